"""The cache of converted models: entries appear whole or not at all, and are made once however many processes ask.

An entry is a folder `<cache>/models/<name>` with a model in Hugging Face form and a `manifest.json` that lists every
file with its size and SHA-256. `<cache>` is the user's cache folder, or what `WORKBENCH_CACHE` names.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import DataError, ModelError, OutputError

CACHE_VARIABLE = "WORKBENCH_CACHE"
MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_LOCK_PATIENCE_S = 1800.0
_CHUNK = 1 << 22


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """A model in the cache: where it lies, the provenance it was made with, and its files' sizes and hashes."""

    name: str
    folder: Path
    provenance: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]

    @property
    def n_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(int(file["size"]) for file in self.files.values())

    def verify(self) -> None:
        """Hash every file against the manifest.

        Raises:
            DataError: names the first file whose content changed.
        """
        for name, expected in self.files.items():
            found = file_sha256(self.folder / name)
            if found != expected["sha256"]:
                raise DataError(
                    f"{self.folder / name} has sha256 {found}, its manifest says {expected['sha256']}: "
                    f"delete {self.folder} and it is made again on next use"
                )


def cache_root() -> Path:
    """The workbench's cache folder (not necessarily there yet)."""
    from platformdirs import user_cache_dir

    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(user_cache_dir("mi-workbench", appauthor=False))


def models_folder() -> Path:
    """Where cached models lie."""
    return cache_root() / "models"


def say(message: str) -> None:
    """One line to the user on stderr."""
    sys.stderr.write(f"workbench: {message}\n")
    sys.stderr.flush()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_entries() -> dict[str, CacheEntry | str]:
    """Every entry of the cache by name; a damaged one stands as a string that says how."""
    if not models_folder().is_dir():
        return {}
    folders = sorted(path for path in models_folder().iterdir() if path.is_dir() and not path.name.startswith("."))
    return {folder.name: read_entry(folder.name) or "no longer there" for folder in folders}


def read_entry(name: str) -> CacheEntry | str | None:
    """The entry of that name; None if there is none; if it is damaged, a string that says how.

    Cheap: sizes are compared and the safetensors headers opened, contents are not hashed (`CacheEntry.verify` does).
    """
    from safetensors import SafetensorError, safe_open

    folder = models_folder() / name
    if not folder.is_dir():
        return None
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != MANIFEST_FORMAT:
            return f"its manifest has format {manifest['format']}, this version writes {MANIFEST_FORMAT}"
        files = {str(key): dict(value) for key, value in manifest["files"].items()}
        entry = CacheEntry(name=name, folder=folder, provenance=dict(manifest["provenance"]), files=files)
        for file, expected in files.items():
            size = (folder / file).stat().st_size
            if size != expected["size"]:
                return f"{file} has {size:,} bytes, its manifest says {expected['size']:,}"
            if file.endswith(".safetensors"):
                with safe_open(folder / file, framework="pt"):
                    pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return entry


def ensure_entry(name: str, *, bytes_needed: int, build: Callable[[Path], Mapping[str, Any]]) -> CacheEntry:
    """The entry of that name, made by `build` if it is missing or damaged.

    Args:
        name: folder name within the cache.
        bytes_needed: disk space that making it takes at its peak.
        build: writes the model into the folder it is given and returns the provenance. It runs in one process at a
            time; others wait and use its result.

    Raises:
        OutputError: if the cache cannot be written, or the disk is too full.
        ModelError: if another process held the lock for half an hour, or from `build`.
    """
    entry = read_entry(name)
    if isinstance(entry, CacheEntry):
        return entry
    with _locked(name):
        entry = read_entry(name)
        if isinstance(entry, CacheEntry):
            return entry
        if entry is not None:
            say(f"the cached model {models_folder() / name} is damaged ({entry}); making it again")
        for stale in models_folder().glob(f"{_partial_prefix(name)}*"):
            shutil.rmtree(stale, ignore_errors=True)
        with new_folder(models_folder() / name, bytes_needed=bytes_needed, replace=True) as partial:
            write_manifest(partial, build(partial))
        entry = read_entry(name)
    if not isinstance(entry, CacheEntry):
        raise DataError(f"{models_folder() / name} was made and does not read back: {entry}. Check the disk")
    return entry


def write_manifest(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write `manifest.json`: format, provenance, package versions, and size and SHA-256 of every other file."""
    from importlib.metadata import version

    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    versions = {package: version(package) for package in ("transformers", "torch", "safetensors", "gguf")}
    manifest = {
        "format": MANIFEST_FORMAT,
        "provenance": dict(provenance),
        "versions": versions,
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def new_folder(final: Path, *, bytes_needed: int, replace: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `final` when the block ends well and vanishes when it does not.

    Args:
        final: the folder to make; its parents are made too.
        bytes_needed: free space asked for beforehand, and named when the disk fills up all the same.
        replace: put the new folder in the place of an existing `final`; otherwise `final` must be absent or empty.

    Raises:
        OutputError: if the place is not writable, is taken, or the disk is too full; nothing is left behind.
    """
    parent = final.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if not replace and final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise OutputError(f"{final} exists and is not an empty folder: choose another place, or remove it first")
        free = shutil.disk_usage(parent).free
        if free < bytes_needed:
            raise OutputError(_full(final, bytes_needed, free))
        partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(final.name), dir=parent))
    except OSError as error:
        raise OutputError(_unwritable(final, error, bytes_needed)) from error
    try:
        yield partial
        _publish(partial, final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if is_full(error):
            raise OutputError(_full(final, bytes_needed, shutil.disk_usage(parent).free)) from error
        raise


def _publish(partial: Path, final: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)  # safetensors and temporary folders are made for their owner alone
            _sync(path)
    partial.chmod(0o777 & ~umask)
    _sync(partial)
    aside = partial.with_name(f"{partial.name}-old")
    if final.exists():
        os.replace(final, aside)
    os.replace(partial, final)
    shutil.rmtree(aside, ignore_errors=True)
    _sync(final.parent)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(name: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    path = models_folder() / f".{name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"another process is preparing {name}; waiting for it")
            lock.acquire(timeout=_LOCK_PATIENCE_S)
    except Timeout as error:
        raise ModelError(
            f"another process has held {path} for {_LOCK_PATIENCE_S / 60:.0f} minutes: end it, then try again"
        ) from error
    except OSError as error:
        raise OutputError(_unwritable(path.parent, error, 0)) from error
    try:
        yield
    finally:
        with suppress(OSError):
            lock.release()


def _partial_prefix(name: str) -> str:
    return f".{name}.partial-"


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in ("No space left on device", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False


def _full(final: Path, bytes_needed: int, free: int) -> str:
    return (
        f"the disk of {final.parent} is full: making {final.name} takes {bytes_needed:,} bytes and {free:,} are free. "
        f"Free some space, or choose another disk (for the cache: set {CACHE_VARIABLE} to a folder on it)"
    )


def _unwritable(final: Path, error: OSError, bytes_needed: int) -> str:
    if is_full(error):
        return _full(final, bytes_needed, 0)
    return (
        f"cannot write to {final.parent}: {error.strerror or error}. Choose a folder that you may write to "
        f"(for the cache: set {CACHE_VARIABLE} to one)"
    )
