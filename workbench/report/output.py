"""Writing the files of a report: whether that is possible is found out first, and none is half written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from pathlib import Path

from workbench.errors import OutputError

PROBE_BYTES = 16 * 2**20


def prepare(folder: str | Path) -> Path:
    """Make a folder and find out by writing that a report will fit into it.

    Args:
        folder: the folder; its parents are made too.

    Returns:
        Its absolute path.

    Raises:
        OutputError: if it is a file, cannot be made or written, or has no room for `PROBE_BYTES`.
    """
    path = Path(folder).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".probe-") as probe:
            for _ in range(PROBE_BYTES // 2**20):
                probe.write(bytes(2**20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise refused(path, error) from error
    return path


def refused(path: Path, error: OSError) -> OutputError:
    """The error to raise when the operating system refuses to write `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no room to write {path}: {error.strerror}; a report takes about {PROBE_BYTES // 2**20} MB: "
            "free some space, or choose another folder with --out"
        )
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return OutputError(f"cannot write into {path}: a file is in the way; choose another folder with --out")
    return OutputError(f"cannot write {path}: {error.strerror or error}; choose a folder you may write to with --out")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file under another name, then move it into place.

    Raises:
        OutputError: if it cannot be written; what was there before is left as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise refused(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def describe_file(path: Path, root: Path) -> dict[str, str | int]:
    """Path below `root`, size in bytes and SHA-256 of a file."""
    data = path.read_bytes()
    return {
        "path": path.relative_to(root).as_posix(),
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
