"""A finished capture, in memory or in a folder, behind one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.cache.collect import heads_first
from workbench.cache.files import (
    file_fault,
    read_manifest,
    read_prompts,
    strangers,
    tensor_name,
)
from workbench.cache.plan import Entry, in_words
from workbench.cache.prompts import CapturedPrompts
from workbench.errors import DataError, PromptError

Prompts = slice | int | Sequence[int] | Tensor | None


class Source(Protocol):
    """Where tensors lie."""

    @property
    def folder(self) -> Path | None:
        """The folder of shards; None in memory."""
        ...

    def read(self, entry: Entry, layer: int, head: int | None, shard: int, within: slice) -> Tensor:
        """A stretch of the prompts of one shard as stored, without the head axis for a single head."""
        ...

    def faults(self) -> list[str]:
        """What is wrong with it, by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Whole tensors by entry and layer."""

    tensors: Mapping[tuple[str, int], Tensor]
    starts: Sequence[int]
    folder: Path | None = None

    def read(self, entry: Entry, layer: int, head: int | None, shard: int, within: slice) -> Tensor:
        """As `Source.read`; a view."""
        tensor = self.tensors[entry.name, layer]
        first = self.starts[shard]
        prompts = slice(first + within.start, first + within.stop)
        if not entry.heads:
            return tensor[prompts]
        return tensor[:, prompts] if head is None else tensor[head, prompts]

    def faults(self) -> list[str]:
        """None: nothing else can write there."""
        return []


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Shards in a folder; only what is asked for is read."""

    folder: Path | None
    records: Sequence[Mapping[str, Any]]
    capture_id: str

    def read(self, entry: Entry, layer: int, head: int | None, shard: int, within: slice) -> Tensor:
        """As `Source.read`."""
        from safetensors import SafetensorError, safe_open

        assert self.folder is not None
        path = self.folder / self.records[shard]["file"]
        try:
            with safe_open(path, framework="pt") as file:
                lazy = file.get_slice(tensor_name(entry.name, layer))
                if not entry.heads:
                    found = lazy[within]
                else:
                    found = lazy[:, within] if head is None else lazy[head : head + 1, within][0]
                return found.clone()  # what safetensors hands out may still lie in the mapped file
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cannot read {path}: {error}. Make the same capture again: it repairs the folder"
            ) from error

    def faults(self) -> list[str]:
        """Every shard that is missing, cut short, changed or of another capture."""
        assert self.folder is not None
        faults = []
        for record in self.records:
            fault = file_fault(self.folder, record, full=True, capture_id=self.capture_id)
            if fault:
                faults.append(f"{record['file']} {fault}")
        return faults


class Cache:
    """Activations of one model on one set of prompts.

    Attributes:
        manifest: what was captured, of which model, from which tokens, by which versions.
        entries: what it holds, by name: `z`, or `pattern.key_mean` for what a reduction made.
        tokens: ids `[n, pos]`, padded on the right.
        lengths: real tokens of each prompt.
        labels: columns of text, one entry a prompt.
        folder: where it is stored; None in memory.
        shards: the prompts of each batch, as slices: `for prompts in cache.shards: cache.get("z", 3, prompts=prompts)`.
    """

    def __init__(self, *, manifest: Mapping[str, Any], prompts: CapturedPrompts, source: Source) -> None:
        self.manifest = dict(manifest)
        capture = self.manifest["capture"]
        self.entries = {record["name"]: Entry.from_record(record) for record in capture["entries"]}
        self.tokens: Int[Tensor, "n pos"] = prompts.tokens
        self.lengths: Int[Tensor, "n"] = prompts.lengths
        self.labels = dict(prompts.labels)
        self.source_kind = prompts.source
        size = int(capture["batch_size"])
        n = len(prompts.tokens)
        self.shards = tuple(slice(first, min(first + size, n)) for first in range(0, n, size))
        self._source = source

    @property
    def names(self) -> tuple[str, ...]:
        """What can be asked for."""
        return tuple(self.entries)

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers of which there is anything."""
        return tuple(sorted({layer for entry in self.entries.values() for layer in entry.layers}))

    @property
    def folder(self) -> Path | None:
        """Where it is stored; None in memory."""
        return self._source.folder

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return len(self) * sum(entry.bytes_per_prompt for entry in self.entries.values())

    @property
    def provenance(self) -> dict[str, Any]:
        """Model, versions, seed and command of the capture, in the form that every result carries."""
        return dict(self.manifest["provenance"])

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __repr__(self) -> str:
        model = self.provenance["model"]["name"]
        held = "; ".join(f"{entry.name} {_span(entry.layers)}" for entry in self.entries.values())
        where = f"in {self.folder}" if self.folder else "in memory"
        return (
            f"Cache({model}, {len(self):,} prompts x {self.tokens.shape[1]} tokens, {held}; "
            f"{in_words(self.nbytes)} {where}, {len(self.shards)} shard{'s' * (len(self.shards) != 1)})"
        )

    def __getitem__(self, key: tuple[str, int] | tuple[str, int, int]) -> Tensor:
        if not isinstance(key, tuple) or len(key) not in (2, 3):
            raise DataError(
                f"cache[{key!r}]: write cache[name, layer] or cache[name, layer, head]; names: {self._held()}"
            )
        return self.get(key[0], key[1], *key[2:])

    def get(self, name: str, layer: int, head: int | None = None, prompts: Prompts = None) -> Tensor:
        """What was captured at one site of one layer.

        Of a stored cache only the bytes asked for are read: one head of one shard lies in one piece.

        Args:
            name: one of `names`.
            layer: one of its layers.
            head: only this head (of `k` and `v`: key/value head).
            prompts: which, as an index, a slice or several indices; None is all.

        Returns:
            Without a reduction the shape of the site in `Model.forward`: `[n, pos, heads, d_head]`, `[n, heads, query,
            key]` or `[n, pos, d_model]`. With one, `[n, heads, ...]` or `[n, ...]`. For one head the head axis is left
            out, for one prompt (an index) the leading axis. Padding is 0. Of a cache in memory it may be a view: do
            not write into it.

        Raises:
            DataError: if the cache does not hold it, or its file cannot be read.
        """
        entry = self._entry(name, layer, head)
        chosen, single = self._chosen(prompts)
        wanted = sorted(set(chosen))
        parts = []
        for shard, span in enumerate(self.shards):
            inside = [index - span.start for index in wanted if span.start <= index < span.stop]
            if inside:
                first, stop = inside[0], inside[-1] + 1
                part = self._source.read(entry, layer, head, shard, slice(first, stop))
                part = part.transpose(0, 1) if entry.heads and head is None else part
                parts.append(part if len(inside) == stop - first else part[torch.tensor(inside) - first])
        found = torch.cat(parts) if len(parts) > 1 else parts[0] if parts else self._empty(entry, head)
        if chosen != wanted:
            place = {index: at for at, index in enumerate(wanted)}
            found = found[torch.tensor([place[index] for index in chosen])]
        if entry.reduction is None and head is None:
            found = heads_first(entry.site, found)
        return found[0] if single else found

    def verify(self) -> None:
        """Hash every shard against the manifest.

        Raises:
            DataError: names every shard that is missing, cut short, changed or of another capture.
        """
        faults = self._source.faults()
        if faults:
            raise DataError(damaged(self.folder, faults))

    def _empty(self, entry: Entry, head: int | None) -> Tensor:
        heads = (entry.heads,) if entry.heads and head is None else ()
        return torch.empty((0, *heads, *entry.shape), dtype=entry.dtype)

    def _held(self) -> str:
        return ", ".join(f"{entry.name} ({_span(entry.layers)})" for entry in self.entries.values())

    def _entry(self, name: str, layer: int, head: int | None) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise DataError(f"the cache has no {name!r}: it holds {self._held()}; capture it, or ask for one of these")
        if layer not in entry.layers:
            raise DataError(
                f"the cache has {name!r} of {_span(entry.layers)}, not of layer {layer}: capture that layer too"
            )
        if head is not None and not 0 <= head < entry.heads:
            there = f"heads 0 to {entry.heads - 1}" if entry.heads else "no head axis"
            raise DataError(f"head is {head}, and {name!r} has {there}")
        return entry

    def _chosen(self, prompts: Prompts) -> tuple[list[int], bool]:
        n = len(self)
        if prompts is None or isinstance(prompts, slice):
            return list(range(n))[prompts or slice(None)], False
        single = isinstance(prompts, int)
        listed = [prompts] if isinstance(prompts, int) else [int(index) for index in prompts]
        if any(not -n <= index < n for index in listed):
            raise PromptError(f"prompts is {prompts}: the cache has the prompts 0 to {n - 1}")
        return [index % n for index in listed], single


def _span(layers: Sequence[int]) -> str:
    """Layers in words: `layer 3`, `layers 0-29`, `layers 1, 4`."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    whole = list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"layers {layers[0]}-{layers[-1]}" if whole else f"layers {', '.join(map(str, layers))}"


def damaged(folder: Path | None, faults: Sequence[str]) -> str:
    """The message for a folder with faulty shards."""
    return (
        f"the cache {folder} is damaged: {'; '.join(faults)}. Make the same capture into it again: "
        "it computes these shards anew and keeps the others"
    )


def open_cache(folder: str | Path, *, verify: Literal["full", "size"] = "full") -> Cache:
    """Open a stored capture.

    Args:
        folder: what `capture(store=...)` wrote.
        verify: "full" hashes every shard, which reads all of it once; "size" compares sizes, and `Cache.verify` can
            hash later.

    Raises:
        DataError: if it is not there, not complete, damaged, or has shards that are not its own; the message names
            them.
    """
    if verify not in ("full", "size"):
        raise DataError(f"verify is {verify!r}: expected 'full' or 'size'")
    path = Path(folder).expanduser().absolute()
    manifest = read_manifest(path)
    prompts = read_prompts(path, manifest["prompts_file"])
    records = manifest["shards"]
    missing = [index for index, record in enumerate(records) if record is None]
    if missing:
        raise DataError(
            f"the cache {path} is not finished: {len(records) - len(missing)} of its {len(records)} shards are "
            "committed. Make the same capture into it again: it goes on from there"
        )
    cache_id = manifest["capture_id"]
    full = verify == "full"
    faults = [
        f"{record['file']} {fault}"
        for record in records
        if (fault := file_fault(path, record, full=full, capture_id=cache_id))
    ]
    if faults:
        raise DataError(damaged(path, faults))
    ours, foreign = strangers(path, {record["file"] for record in records}, len(records))
    if ours or foreign:
        raise DataError(
            f"the cache {path} holds files that are not its own: {', '.join([*ours, *foreign])}. Remove them; "
            "they would not be read"
        )
    return Cache(manifest=manifest, prompts=prompts, source=Folder(folder=path, records=records, capture_id=cache_id))
