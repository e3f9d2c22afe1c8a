"""What a GGUF file says it holds, checked against what it does hold before anything is converted.

Format: the GGUF specification, versions 2 and 3 (little-endian): magic, version, counts, metadata, tensor list,
then the tensors' bytes from the next multiple of `general.alignment`.
"""

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from workbench.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = MappingProxyType(
    {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
)
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4


@dataclass(frozen=True, kw_only=True)
class GGUFTensorInfo:
    """One line of the tensor list: element type ("Q4_1"), number of elements, and bytes within the file."""

    type_name: str
    n_elements: int
    start: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class GGUFHeader:
    """Metadata (arrays stand as their length) and tensor list of a GGUF file whose tensors are all there."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensorInfo]

    @property
    def architecture(self) -> str:
        """`general.architecture`, for example "llama"."""
        return str(self.metadata["general.architecture"])

    @property
    def n_elements(self) -> int:
        """Numbers in all tensors together."""
        return sum(tensor.n_elements for tensor in self.tensors.values())

    @property
    def quantisation(self) -> str:
        """The element type that holds most of the weights' tensors, for example "Q4_1"."""
        matrices = [tensor for tensor in self.tensors.values() if tensor.type_name != "F32"]
        counts = Counter(tensor.type_name for tensor in matrices or self.tensors.values())
        return counts.most_common(1)[0][0]


class _Cursor:
    """A place in the mapped file; `struct.error` when a read would pass the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        return value

    def skip(self, n_bytes: int) -> None:
        if n_bytes > len(self.data) - self.at:
            raise struct.error(f"{n_bytes} bytes expected at byte {self.at}")
        self.at += n_bytes

    def string(self) -> str:
        start = self.at + 8
        self.skip_string()
        return self.data[start : self.at].decode("utf-8")

    def skip_string(self) -> None:
        self.skip(self.scalar("<Q"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._skip_array()
        return self.scalar(_SCALARS[kind])

    def _skip_array(self) -> int:
        kind, length = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            self.skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            for _ in range(length):
                if kind == _STRING:
                    self.skip_string()
                else:
                    self.value(kind)
        return int(length)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file and check that the file is long enough for every tensor in it.

    Args:
        path: the file.

    Raises:
        ModelError: if it is missing, not GGUF, of another version, damaged, or shorter than its header says; the
            message names the file, its size and what is wrong.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            magic = file.read(48)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}. Check the path and its permissions") from error
    label = f"{path} ({size:,} bytes)"
    if magic[:4] != MAGIC:
        raise ModelError(f"{label} is not a GGUF file: {_what_instead(magic)}. Download it again, or check the path")
    again = "The download was probably cut short: get the file again"
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _parse(path, _Cursor(data))
    except struct.error as error:
        raise ModelError(f"{label} is truncated: it ends within its own header ({error}). {again}") from error
    except (KeyError, ValueError, OverflowError) as error:
        raise ModelError(f"{label} has a damaged GGUF header: {error}. Get the file again") from error
    for name, tensor in sorted(header.tensors.items(), key=lambda item: item[1].start):
        end = tensor.start + tensor.n_bytes
        if end > size:
            full = max(t.start + t.n_bytes for t in header.tensors.values())
            raise ModelError(
                f"{label} is truncated: its header lists tensors up to byte {full:,}, so {full - size:,} bytes are "
                f"missing, from tensor {name!r} on. {again}"
            )
    return header


def _what_instead(magic: bytes) -> str:
    if not magic:
        return "it is empty"
    if magic.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer that stands for the file (run `git lfs pull`)"
    return f"it starts with {magic[:4]!r} where a GGUF file starts with {MAGIC!r}"


def _parse(path: Path, cursor: _Cursor) -> GGUFHeader:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor.skip(len(MAGIC))
    version = cursor.scalar("<I")
    if version not in _VERSIONS:
        raise ValueError(f"version {version}, where {' and '.join(map(str, _VERSIONS))} (little-endian) are read")
    n_tensors, n_fields = cursor.scalar("<Q"), cursor.scalar("<Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_fields):
        name = cursor.string()
        kind = cursor.scalar("<I")
        if kind not in _SCALARS and kind not in (_STRING, _ARRAY):
            raise ValueError(f"field {name!r} has the unknown type {kind}")
        metadata[name] = cursor.value(kind)
    if "general.architecture" not in metadata:
        raise ValueError("it does not name its architecture (field 'general.architecture')")
    listed: dict[str, tuple[str, int, int, int]] = {}
    for _ in range(n_tensors):
        name = cursor.string()
        n_dims = cursor.scalar("<I")
        if n_dims > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {n_dims} dimensions, at most {_MAX_DIMENSIONS} are allowed")
        n_elements = prod(cursor.scalar("<Q") for _ in range(n_dims))
        kind = GGMLQuantizationType(cursor.scalar("<I"))
        block, block_bytes = GGML_QUANT_SIZES[kind]
        listed[name] = (kind.name, n_elements, cursor.scalar("<Q"), n_elements // block * block_bytes)
    if not listed:
        raise ValueError("it lists no tensors (a vocabulary file?)")
    alignment = int(metadata.get("general.alignment", 32))
    if alignment < 1:
        raise ValueError(f"field 'general.alignment' is {alignment}")
    base = -(-cursor.at // alignment) * alignment
    tensors = {
        name: GGUFTensorInfo(type_name=kind_name, n_elements=n, start=base + offset, n_bytes=n_bytes)
        for name, (kind_name, n, offset, n_bytes) in listed.items()
    }
    return GGUFHeader(path=path, version=version, metadata=metadata, tensors=tensors)
