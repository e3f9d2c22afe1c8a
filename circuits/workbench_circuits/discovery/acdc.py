"""Pruning a circuit edge by edge, by what the removal does to the whole circuit (ACDC; Conmy et al. 2023)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workbench.errors import DataError, OutputError, PromptError
from workbench_circuits.run import CircuitRunner, Progress
from workbench_circuits.wiring import Mask

LARGEST_BLOCK = 16


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What ACDC leaves.

    Attributes:
        mask: the circuit.
        value: mean metric of the circuit.
        start: mean metric of the circuit that was pruned.
        tau: threshold.
        absolute: whether a removal counts by the size of its effect, whichever way it goes.
        tried: edges whose removal was run.
        dead: edges that were removed without a run, as nothing they change is read any more.
        runs: circuits that were run, speculative ones that came to nothing included.
    """

    mask: Mask
    value: float
    start: float
    tau: float
    absolute: bool
    tried: int
    dead: int
    runs: int


def acdc(
    runner: CircuitRunner,
    start: Mask,
    *,
    tau: float,
    absolute: bool | None = None,
    block: int = LARGEST_BLOCK,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Remove every edge whose removal changes the metric by less than `tau`.

    Edges are gone through once, receivers from the logits down and within a receiver senders from the last to the
    first; an edge is removed if the metric of the circuit without it differs from that of the circuit with it by less
    than `tau`, and what follows is judged on the smaller circuit. Removals are run in blocks ahead of their judgement:
    a chain that takes it that all will be removed, or single ones that take it that none will. What the guess got
    wrong is thrown away, so the result is that of one removal at a time.

    Args:
        runner: model, prompts, ablation and metric.
        start: the circuit to prune, such as the 3,000 strongest edges.
        tau: threshold, in units of the metric.
        absolute: judge by the size of the change; otherwise only a change for the worse keeps an edge, as in the paper.
            Default: true, but for `kl_to_clean`.
        block: most circuits run together; 1 is one at a time.
        resume: a file in which the state is kept; a later call with the same arguments goes on from there.
        progress: called with a line after every block.

    Raises:
        PromptError: if tau is not positive or block below 1.
        DataError: if the file holds another pruning.
    """
    if not tau > 0 or block < 1:
        raise PromptError(f"tau={tau!r} must be above 0 (in units of the metric) and block={block!r} at least 1")
    lower_is_better = runner.metric == "kl_to_clean"
    if absolute is None:
        absolute = not lower_is_better
    wiring = runner.wiring
    receivers, senders = np.nonzero(start)
    order = np.lexsort((-senders, -receivers))
    todo = [(int(receivers[i]), int(senders[i])) for i in order]
    kept = _Kept.open(resume, _key(runner, start, tau, absolute))

    mask, place = start.copy(), kept.place
    for r, s in (todo[i] for i in kept.removed):
        mask[r, s] = False
    removed, counts = list(kept.removed), dict(kept.counts)
    first, value = (float(x) for x in runner.run([start, mask]).mean(1, dtype=np.float64))
    size, chain = 1, True

    def harm(new: float, old: float) -> float:
        change = new - old if lower_is_better else old - new
        return abs(change) if absolute else change

    while place < len(todo):
        ahead: list[int] = []
        scan = place
        useful, _ = wiring.useful(mask)
        while scan < len(todo) and len(ahead) < size:
            if mask[todo[scan]] and useful[todo[scan][0]]:
                ahead.append(scan)
            elif mask[todo[scan]]:
                mask[todo[scan]] = False
                removed.append(scan)
                counts["dead"] += 1
            scan += 1
        if not ahead:
            break
        trials, current = [], mask.copy()
        for index in ahead:
            trial = current.copy()
            trial[todo[index]] = False
            trials.append(trial)
            if chain:
                current = trial
        means = runner.run(trials).mean(1, dtype=np.float64)
        counts["runs"] += len(trials)
        right = True
        for index, trial_value in zip(ahead, means, strict=True):
            counts["tried"] += 1
            place = index + 1
            goes = harm(float(trial_value), value) < tau
            if goes:
                mask[todo[index]] = False
                removed.append(index)
                value = float(trial_value)
            if goes != chain:
                right = index == ahead[-1]
                chain = goes
                break
        size = min(2 * size, block) if right else max(1, size // 2)
        kept.store(place, removed, counts)
        if progress is not None:
            progress(f"acdc: {place:,} of {len(todo):,} edges judged, {int(mask.sum()):,} kept, metric {value:.3f}")
    kept.discard()
    return Pruned(
        mask=mask,
        value=value,
        start=first,
        tau=tau,
        absolute=absolute,
        tried=counts["tried"],
        dead=counts["dead"],
        runs=counts["runs"],
    )


def _key(runner: CircuitRunner, start: Mask, tau: float, absolute: bool) -> str:
    digest = hashlib.sha256()
    fixed = [runner.model.model_hash, str(runner.model.dtype), runner.pairs.data_hash, runner.ablation, runner.metric]
    digest.update(json.dumps([*fixed, tau, absolute]).encode())
    digest.update(np.packbits(start).tobytes())
    return digest.hexdigest()


class _Kept:
    """The state of a pruning, on disk if a file is given."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.place = 0
        self.removed: Sequence[int] = ()
        self.counts = {"tried": 0, "dead": 0, "runs": 0}

    @classmethod
    def open(cls, path: str | Path | None, key: str) -> _Kept:
        kept = cls(None if path is None else Path(path), key)
        if kept.path is None or not kept.path.exists():
            return kept
        try:
            found = json.loads(kept.path.read_text(encoding="utf-8"))
            if found["key"] != key:
                raise DataError(
                    f"{kept.path} holds a pruning of another model, other prompts, edges or settings: choose another "
                    "file, or delete it"
                )
            kept.place, kept.removed = int(found["place"]), [int(i) for i in found["removed"]]
            kept.counts = {name: int(found["counts"][name]) for name in kept.counts}
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise DataError(f"{kept.path} is damaged: {error}. Delete it and begin again") from error
        return kept

    def store(self, place: int, removed: Sequence[int], counts: dict[str, int]) -> None:
        if self.path is None:
            return
        record = {"key": self.key, "place": place, "removed": [int(i) for i in removed], "counts": counts}
        fresh = self.path.with_suffix(".new")
        try:
            fresh.write_text(json.dumps(record), encoding="utf-8")
            os.replace(fresh, self.path)
        except OSError as error:
            raise OutputError(f"cannot keep the state of acdc in {self.path}: {error.strerror or error}") from error

    def discard(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
