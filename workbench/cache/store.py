"""A capture into a folder, shard by shard: begin, check what is there, go on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench._provenance import versions
from workbench.cache import files
from workbench.cache.cache import Cache, Folder
from workbench.cache.collect import collect
from workbench.cache.plan import Entry, Estimate, in_words
from workbench.cache.prompts import CapturedPrompts
from workbench.errors import DataError, OutputError

if TYPE_CHECKING:
    from workbench.models import Model

Say = Callable[[str], None]


def new_manifest(
    model: Model, prompts: CapturedPrompts, entries: Sequence[Entry], plan: Estimate, record: Mapping[str, Any]
) -> dict[str, Any]:
    """The manifest of a capture of which no shard is written.

    `capture` is what makes it this capture and no other; `capture_id` is its hash. `sessions` are the runs that worked
    on it, and each shard names the one that made it, so that a change of versions within a cache shows.
    """
    description = {
        "model": {
            "hash": model.model_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "path": model.path,
            "causal": model.spec.causal,
            "ungrouped": bool(model.provenance.get("ungrouped")),
        },
        "prompts": {"hash": prompts.digest(), "n": plan.n_prompts, "pos": plan.pos, "source": prompts.source},
        "entries": [entry.record(model) for entry in entries],
        "batch_size": plan.batch_size,
    }
    return {
        "kind": files.KIND,
        "schema_version": files.SCHEMA_VERSION,
        "capture": description,
        "capture_id": files.hash_json(description),
        "provenance": dict(record),
        "sessions": [
            {
                "versions": versions(),
                "device": str(model.device),
                "threads": torch.get_num_threads(),
                "command": record["command"],
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        ],
        "repaired": [],
        "prompts_file": None,
        "shards": [None] * len(plan.batches),
    }


def to_folder(
    model: Model,
    prompts: CapturedPrompts,
    entries: Sequence[Entry],
    plan_of: Callable[[int | None], Estimate],
    batch_size: int | None,
    record: Mapping[str, Any],
    folder: Path,
    say: Say,
) -> Cache:
    """Make or finish a capture in a folder that this process alone may write.

    Args:
        model: what runs.
        prompts: what it reads.
        entries: what is kept.
        plan_of: batches for a given number of prompts a batch, or None for the largest that fit.
        batch_size: as asked for; None takes what an existing capture began with.
        record: provenance.
        folder: where; it exists.
        say: told what happens.

    Raises:
        DataError: if the folder holds another capture or foreign files.
        OutputError: if the disk is full or the folder cannot be written.
        BudgetError: from `plan_of`.
    """
    old = files.read_manifest(folder) if (folder / files.MANIFEST).exists() else None
    if old is not None and batch_size is None:
        batch_size = int(old["capture"]["batch_size"])
    plan = plan_of(batch_size)
    manifest = new_manifest(model, prompts, entries, plan, record)
    say(str(plan))
    if old is not None:
        _refuse_another(folder, old["capture"], manifest["capture"])
        manifest = {**old, "sessions": [*old["sessions"], *manifest["sessions"]]}
    _refuse_strangers(folder, manifest, say)
    _drop_damaged(folder, manifest, say)
    missing = [index for index, shard in enumerate(manifest["shards"]) if shard is None]
    if old is not None:
        say(f"{len(plan.batches) - len(missing)} of {len(plan.batches)} shards are there")
    _check_room(folder, plan, missing)
    _write(folder, manifest, prompts)
    for index in missing:
        _make_shard(model, prompts, entries, plan, manifest, folder, index)
        say(f"captured {plan.batches[index].stop:,} of {plan.n_prompts:,} prompts")
    source = Folder(folder=folder, records=manifest["shards"], capture_id=manifest["capture_id"])
    return Cache(manifest=manifest, prompts=prompts, source=source)


def _make_shard(
    model: Model,
    prompts: CapturedPrompts,
    entries: Sequence[Entry],
    plan: Estimate,
    manifest: dict[str, Any],
    folder: Path,
    index: int,
) -> None:
    """Compute one batch and commit it."""
    span = plan.batches[index]
    n = span.stop - span.start
    batch = {
        (entry.name, layer): torch.empty(entry.stored(n), dtype=entry.dtype)
        for entry in entries
        for layer in entry.layers
    }
    collect(model, prompts.tokens[span], prompts.lengths[span], entries, batch)
    tensors = {files.tensor_name(name, layer): tensor for (name, layer), tensor in batch.items()}
    try:
        written = files.write_shard(folder, index, tensors, manifest["capture_id"])
        session = len(manifest["sessions"]) - 1
        manifest["shards"][index] = {**written, "prompts": [span.start, span.stop], "session": session}
        files.write_manifest(folder, manifest)
    except Exception as error:
        if not files.is_disk_error(error):
            raise
        manifest["shards"][index] = None
        what = f"{files.shard_file(index)} ({index + 1} of {len(plan.batches)})"
        raise files.unwritable(folder, error, what, n * plan.total_bytes // plan.n_prompts, _kept(manifest)) from error


def _write(folder: Path, manifest: dict[str, Any], prompts: CapturedPrompts) -> None:
    """Write prompts and manifest: from here on the folder is a capture, if one without shards."""
    try:
        known = manifest["prompts_file"]
        if known is None or files.file_fault(folder, known, full=True):
            manifest["prompts_file"] = files.write_prompts(folder, prompts)
        files.write_manifest(folder, manifest)
    except Exception as error:
        if not files.is_disk_error(error):
            raise
        raise files.unwritable(folder, error, "the prompts", prompts.tokens.nbytes, _kept(manifest)) from error


def _kept(manifest: Mapping[str, Any]) -> str:
    n = sum(shard is not None for shard in manifest["shards"])
    return f"The {n} committed shards stay, and the same call goes on from there. " if n else ""


def _refuse_another(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Refuse a folder that holds another capture.

    Raises:
        DataError: says in what it differs.
    """
    differences = []
    for part in ("model", "prompts"):
        for name, value in ours[part].items():
            if theirs[part].get(name) != value:
                differences.append(f"{part} {name} {_short(theirs[part].get(name))} there and {_short(value)} here")
    there = {entry["name"]: entry for entry in theirs["entries"]}
    here = {entry["name"]: entry for entry in ours["entries"]}
    if set(there) != set(here):
        differences.append(f"names {', '.join(there)} there and {', '.join(here)} here")
    for name in [name for name in here if name in there]:
        for key, value in here[name].items():
            if there[name].get(key) != value:
                differences.append(f"{key} of {name} {_short(there[name].get(key))} there and {_short(value)} here")
    if theirs["batch_size"] != ours["batch_size"]:
        differences.append(f"batch_size {theirs['batch_size']} there and {ours['batch_size']} here")
    if differences:
        raise DataError(
            f"{folder} holds another capture: {'; '.join(differences)}. Nothing was changed; "
            "choose another folder, or remove this one first"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if isinstance(value, str) and len(text) == 64 else text


def _refuse_strangers(folder: Path, manifest: Mapping[str, Any], say: Say) -> None:
    """Refuse a folder with files that are not a capture's; name uncommitted shards that will be replaced."""
    known = {shard["file"] for shard in manifest["shards"] if shard is not None}
    ours, foreign = files.strangers(folder, known, len(manifest["shards"]))
    if manifest["prompts_file"] is None:
        own = {files.LOCK, files.PROMPTS, files.MANIFEST}
        foreign = sorted(
            path.name for path in folder.iterdir() if path.name not in own and not path.name.endswith(files.PART)
        )
        if foreign:
            raise DataError(
                f"{folder} is not empty and holds no capture ({', '.join(foreign[:3])}): choose another folder"
            )
    if foreign:
        raise DataError(
            f"{folder} holds files that are not this capture's: {', '.join(foreign)}. Remove them, then go on"
        )
    files.remove_parts(folder)
    for name in ours:
        say(f"{name} lies in the folder but was not committed: computing it again")


def _drop_damaged(folder: Path, manifest: dict[str, Any], say: Say) -> None:
    """Forget every committed shard that is not what was committed."""
    shards, repaired = list(manifest["shards"]), list(manifest["repaired"])
    for index, shard in enumerate(shards):
        fault = None if shard is None else files.file_fault(folder, shard, full=True, capture_id=manifest["capture_id"])
        if fault:
            say(f"{shard['file']} {fault}: computing it again")
            repaired.append({"file": shard["file"], "fault": fault, "session": len(manifest["sessions"]) - 1})
            shards[index] = None
    manifest["shards"], manifest["repaired"] = shards, repaired


def _check_room(folder: Path, plan: Estimate, missing: Sequence[int]) -> None:
    """Refuse to begin what the disk has no room for.

    Raises:
        OutputError: says how much is needed and how much is free.
    """
    prompts = sum(plan.batches[index].stop - plan.batches[index].start for index in missing)
    needed = prompts * (plan.total_bytes // plan.n_prompts)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"no room for the cache in {folder}: it takes {in_words(needed)} and {in_words(free)} are free. "
            "Free some space, choose a folder on another disk, reduce, or capture fewer layers"
        )
