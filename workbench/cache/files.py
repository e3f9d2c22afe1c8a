"""The folder of a stored capture.

    manifest.json             what was captured and how, and size and SHA-256 of every committed shard
    prompts.safetensors       ids, lengths and labels
    shard-00000.safetensors   one batch: a tensor `<layer>/<entry>` for each entry and layer, heads first

A shard is committed by the manifest: it is written under another name, synced, moved into place, and then the manifest
is replaced as a whole. So the manifest is never half written and needs no replay, as a journal would; it is small (some
200 bytes a shard), since everything that grows with the prompts lies in `prompts.safetensors`. It holds its own
SHA-256, and a shard the identity of its capture, so that damage and mix-ups are told apart.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.cache.plan import in_words
from workbench.cache.prompts import CapturedPrompts
from workbench.errors import DataError, OutputError
from workbench.models.store import file_sha256, is_full

KIND = "workbench activation cache"
SCHEMA_VERSION = 1
MANIFEST, PROMPTS, LOCK = "manifest.json", "prompts.safetensors", ".lock"
_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")
PART = ".part"


def shard_file(index: int) -> str:
    """File name of a shard."""
    return f"shard-{index:05d}.safetensors"


def tensor_name(entry: str, layer: int) -> str:
    """Name of a tensor within a shard."""
    return f"{layer}/{entry}"


def hash_json(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """The right to write into a folder, made if need be; it ends with the process that has it, however that ends.

    Raises:
        OutputError: if another process has it, or the folder cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"another process is writing the cache {folder}: wait until it is done and call again (a finished cache is "
            "opened, not made again), or choose another folder"
        ) from error
    except OSError as error:
        raise unwritable(folder, error, "the cache", 0, "") from error
    try:
        yield
    finally:
        lock.release()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replace the manifest as a whole."""
    body = {name: value for name, value in manifest.items() if name != "sha256"}
    text = json.dumps({**body, "sha256": hash_json(body)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    replace_file(folder / MANIFEST, write)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, checked against its own hash.

    Raises:
        DataError: if there is none, or it is damaged, of another kind or of another version.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise DataError(f"there is no {path}: give a folder that capture(store=...) wrote") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}), so it was cut short or changed: {_ANEW}") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise DataError(
            f"{path} is not the manifest of an activation cache: give a folder that capture(store=...) wrote"
        )
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{folder} holds a cache of schema version {manifest.get('schema_version')!r} and this program reads "
            f"{SCHEMA_VERSION}: use the mi-workbench that wrote it, or capture again into another folder"
        )
    recorded = manifest.pop("sha256", None)
    if recorded != hash_json(manifest):
        raise DataError(f"{path} was changed: its content does not have the sha256 that it states. {_ANEW}")
    return manifest


_ANEW = "Capture again into another folder, or remove this one first"


def write_prompts(folder: Path, prompts: CapturedPrompts) -> dict[str, Any]:
    """Write ids, lengths and labels; returns name, size and SHA-256 of the file."""
    from safetensors.torch import save_file

    tensors = {"tokens": prompts.tokens, "lengths": prompts.lengths}
    tensors |= {f"label/{name}": torch.tensor(_codes(column)[1]) for name, column in prompts.labels.items()}
    values = {name: _codes(column)[0] for name, column in prompts.labels.items()}
    metadata = {"prompts": json.dumps({"source": prompts.source, "labels": values})}
    replace_file(folder / PROMPTS, lambda path: save_file(tensors, path, metadata=metadata))
    path = folder / PROMPTS
    return {"file": PROMPTS, "size": path.stat().st_size, "sha256": file_sha256(path)}


def _codes(column: tuple[str, ...]) -> tuple[list[str], list[int]]:
    values = list(dict.fromkeys(column))
    place = {value: at for at, value in enumerate(values)}
    return values, [place[value] for value in column]


def read_prompts(folder: Path, record: Mapping[str, Any]) -> CapturedPrompts:
    """Read back what `write_prompts` wrote.

    Raises:
        DataError: if the file is missing or changed.
    """
    from safetensors import safe_open

    fault = file_fault(folder, record, full=True)
    if fault:
        raise DataError(f"{folder / PROMPTS} {fault}. {_ANEW}")
    with safe_open(folder / PROMPTS, framework="pt") as file:
        described = json.loads(file.metadata()["prompts"])
        codes = {name: file.get_tensor(f"label/{name}").tolist() for name in described["labels"]}
        return CapturedPrompts(
            tokens=file.get_tensor("tokens"),
            lengths=file.get_tensor("lengths"),
            source=described["source"],
            labels={name: tuple(values[code] for code in codes[name]) for name, values in described["labels"].items()},
        )


def write_shard(folder: Path, index: int, tensors: Mapping[str, Tensor], capture_id: str) -> dict[str, Any]:
    """Write a shard into place, not yet committed; returns name, size and SHA-256."""
    from safetensors.torch import save_file

    metadata = {"shard": json.dumps({"capture": capture_id, "index": index})}  # one key: their order is not fixed
    path = folder / shard_file(index)
    hashes: list[str] = []

    def write(part: Path) -> None:
        save_file(dict(tensors), part, metadata=metadata)
        hashes.append(file_sha256(part))

    replace_file(path, write)
    return {"file": path.name, "size": path.stat().st_size, "sha256": hashes[0]}


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` make a file under another name, sync it, and move it into place; nothing is left if that fails."""
    part = path.with_name(f".{path.name}{PART}")
    try:
        write(part)
        umask = os.umask(0)
        os.umask(umask)
        part.chmod(0o666 & ~umask)
        _sync(part)
        os.replace(part, path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_fault(folder: Path, record: Mapping[str, Any], *, full: bool, capture_id: str = "") -> str | None:
    """What is wrong with a file, in words that follow its name; None if nothing is.

    Args:
        folder: where it lies.
        record: its name, size and SHA-256.
        full: compare the SHA-256, not just the size.
        capture_id: of a shard, the capture that it should be of.
    """
    path = folder / record["file"]
    try:
        size = path.stat().st_size
        if size != record["size"]:
            of = _of_another(path, capture_id)
            return (
                of or f"has {size:,} bytes where the manifest says {record['size']:,}, so it was cut short or replaced"
            )
        if full and file_sha256(path) != record["sha256"]:
            return _of_another(path, capture_id) or "does not have the sha256 of the manifest, so it was changed"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None


def _of_another(path: Path, capture_id: str) -> str | None:
    """Says so if a shard states that it belongs to another capture, or elsewhere in this one."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            own = json.loads((file.metadata() or {}).get("shard", "null"))
    except (OSError, SafetensorError, ValueError):
        return None
    if not capture_id or not isinstance(own, dict):
        return None
    if own.get("capture") != capture_id:
        return "is a shard of another capture"
    if path.name != shard_file(int(own["index"])):
        return f"is a copy of shard {own['index']} of this capture"
    return None


def strangers(folder: Path, known: set[str], n_shards: int) -> tuple[list[str], list[str]]:
    """Files that the manifest does not name: shards that this capture will write, and those that it never would."""
    ours: list[str] = []
    foreign: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        if path.name in known or path.name == PROMPTS or path.name.startswith("."):
            continue
        match = _SHARD.fullmatch(path.name)
        (ours if match and int(match[1]) < n_shards else foreign).append(path.name)
    return ours, foreign


def remove_parts(folder: Path) -> None:
    """Remove what a killed writer left half written."""
    for path in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):
            path.unlink()


def is_disk_error(error: BaseException) -> bool:
    """Whether the operating system refused to write, also where safetensors says so in its own words."""
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError))


def unwritable(folder: Path, error: BaseException, what: str, size: int, kept: str) -> OutputError:
    """The error to raise when the operating system refuses to write into a cache."""
    number = getattr(error, "errno", None)
    if is_full(error):
        room = f" ({in_words(size)})" if size else ""
        return OutputError(
            f"no room for {what}{room} in {folder}: the disk is full. {kept}Free some space, or choose a folder on "
            "another disk"
        )
    if number == errno.EFBIG or "File too large" in str(error):
        return OutputError(
            f"{what} ({in_words(size)}) is larger than a file may be in {folder}: {error}. {kept}"
            "Raise the limit (ulimit -f), or capture into another folder with a smaller batch_size"
        )
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return OutputError(f"cannot write the cache {folder}: a file is in the way; choose another folder")
    reason = getattr(error, "strerror", None) or error
    return OutputError(f"cannot write {what} in {folder}: {reason}. {kept}Choose a folder that you may write to")
