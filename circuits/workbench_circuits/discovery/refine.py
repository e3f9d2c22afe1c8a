"""Shrinking a circuit step by step, every time by what its edges contribute within it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from workbench.errors import DataError, OutputError, PromptError
from workbench_circuits._gradients import edge_gradients
from workbench_circuits.run import CircuitRunner, Progress
from workbench_circuits.wiring import Mask

RATIO = 0.5
"""What share of the edges is kept from round to round."""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Circuits of falling size.

    Attributes:
        masks: the circuits, from the whole graph on.
        path: the circuits that were scored: of each size, the edges that add most.
        scores: what the next circuit was taken by, from the contributions within each of the path
            `[receivers, senders]`.
        frame: one row a circuit: `n_edges`, `faithfulness` on the prompts of the search, and `rule`, how it was taken:
            the edges that add most (`helpful`), or those that matter most whichever way (`strong`).
    """

    masks: tuple[Mask, ...]
    path: tuple[Mask, ...]
    scores: tuple[Float[np.ndarray, "receivers senders"], ...]
    frame: pd.DataFrame

    def at(self, runner: CircuitRunner, n_edges: int) -> Mask:
        """The circuit of any size: the first `n_edges` by what the next smaller round was taken by, then pruned."""
        if n_edges >= int(self.masks[0].sum()) or not self.scores:
            return self.masks[0]
        return _take(runner, self.scores[self.round_of(n_edges)], n_edges)

    def round_of(self, n_edges: int) -> int:
        """The round by whose scores a circuit of some size is taken."""
        smaller = [int(mask.sum()) for mask in self.masks[1:]]
        return next((i for i, size in enumerate(smaller) if n_edges >= size), len(smaller) - 1)


def contributions(runner: CircuitRunner, circuit: Mask, *, steps: int = 2) -> Float[np.ndarray, "receivers senders"]:
    """What every edge of a circuit adds to the mean metric, and what every other edge would add, at first order.

    The derivatives of the metric by the weights of all edges are averaged over weights 1/steps, 2/steps ... 1 of the
    circuit's edges: integrated gradients from the empty circuit to this one (Sundararajan et al. 2017). Over the edges
    of the circuit they add up to m(C) - m(none), but for the error of so few steps.

    Args:
        runner: model, prompts, ablation and metric.
        circuit: the circuit.
        steps: gradients that are averaged.

    Returns:
        In units of the metric; 0 where there is no edge.
    """
    total = np.zeros(runner.wiring.shape)
    for _, found in _by_prompt(runner, circuit, steps):
        total += found.sum(0, dtype=np.float64)
    return np.where(runner.wiring.everything, total / len(runner.pairs), 0.0)


def contributions_by_prompt(
    runner: CircuitRunner, circuit: Mask, *, steps: int = 2
) -> Float[np.ndarray, "n receivers senders"]:
    """`contributions` to the metric of each prompt."""
    values = np.zeros((len(runner.pairs), *runner.wiring.shape), dtype=np.float32)
    for rows, found in _by_prompt(runner, circuit, steps):
        values[rows] = np.where(runner.wiring.everything, found, 0.0)
    return values


def _by_prompt(runner: CircuitRunner, circuit: Mask, steps: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for rows, reference in runner.for_gradients.references():
        parts = [edge_gradients(reference, runner.wiring, circuit * (step / steps)) for step in range(1, steps + 1)]
        yield rows, np.asarray(sum(parts) / steps)


def refine(
    runner: CircuitRunner,
    n_edges: int = 1,
    *,
    stop: Callable[[Mask], bool] | None = None,
    ratio: float = RATIO,
    steps: int = 2,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Shrink the whole graph round by round, keeping the edges that contribute most within the circuit so far.

    Scores that are measured once, in the whole model, miss what only shows when other edges are gone: paths that stand
    in for each other, and edges that need each other. Here they are measured again in every circuit on the way. An edge
    that was dropped comes back if it would contribute more than another (as in progressive pruning, de Jorge et al.
    2021); scores are edge attributions with integrated gradients (Hanna et al. 2024), of the circuit instead of the
    model. The search goes on with the edges that add most. Beside them, in every round, a circuit of those that matter
    most whichever way is run, and of the two the one whose faithfulness is closer to 1 is the circuit of this size:
    among large circuits, where what works against the metric belongs to it, that is mostly the second. It goes by
    gradients: in a model whose attention is hard, as in compiled programs, they vanish and it fails; use `acdc` there.

    Args:
        runner: model, prompts, ablation and metric.
        n_edges: edges to stop at.
        stop: called with every circuit; true ends the search after it.
        ratio: edges of one round to those of the last.
        steps: gradients a round, see `contributions`.
        resume: a file in which finished rounds are kept; a later call with the same arguments goes on from there.
        progress: called with a line after every round.

    Raises:
        PromptError: for fewer than one edge or more than there are, or a ratio that is not between 0 and 1.
        DataError: if the file is of another search.
    """
    total = runner.n_edges
    if not 1 <= n_edges <= total or not 0 < ratio < 1 or steps < 1:
        raise PromptError(
            f"n_edges={n_edges} (expected 1 to {total:,}), ratio={ratio} (between 0 and 1), steps={steps} (at least 1)"
        )
    key = [runner.model.model_hash, str(runner.model.dtype), runner.pairs.data_hash, runner.ablation, runner.metric]
    kept = _Kept(
        None if resume is None else Path(resume), hashlib.sha256(repr([*key, ratio, steps]).encode()).hexdigest()
    )
    whole = runner.wiring.everything
    masks: list[Mask] = [whole]
    path = [whole]
    scores: list[np.ndarray] = []
    rows: list[dict[str, Any]] = [{"n_edges": total, "faithfulness": 1.0, "rule": "all"}]
    sign = 1.0 if float(runner.clean.mean() - runner.none.mean()) > 0 else -1.0
    while rows[-1]["n_edges"] > n_edges:
        wanted = max(n_edges, int(total * ratio ** len(masks)))
        found = kept.round(len(masks) - 1, whole.shape)
        added = sign * contributions(runner, path[-1], steps=steps) if found is None else found
        kept.add(added, len(masks) - 1)
        choices = {"helpful": added, "strong": np.abs(added)}
        taken = [_take(runner, score, wanted) for score in choices.values()]
        f = runner.f(runner.run(taken))
        best = int(np.argmin(np.abs(1 - f)))
        if not taken[0].any():
            break
        path.append(taken[0])
        masks.append(taken[best])
        scores.append(list(choices.values())[best])
        rows.append({"n_edges": int(taken[best].sum()), "faithfulness": float(f[best]), "rule": list(choices)[best]})
        if progress is not None:
            progress(f"refine: {rows[-1]['n_edges']:,} edges, faithfulness {f[0]:.2f} ({f[1]:.2f} by size)")
        if wanted == n_edges or (stop is not None and stop(taken[best])):
            break
    kept.discard()
    return Refined(masks=tuple(masks), path=tuple(path), scores=tuple(scores), frame=pd.DataFrame(rows))


def _take(runner: CircuitRunner, score: np.ndarray, n: int) -> Mask:
    """The `n` edges of highest score, without those on no path from `input` to `logits`."""
    ranked = np.where(runner.wiring.everything, score, -np.inf).ravel()
    chosen = np.zeros(ranked.size, dtype=bool)
    chosen[np.argsort(-ranked, kind="stable")[:n]] = True
    mask = chosen.reshape(score.shape) & runner.wiring.everything
    return runner.wiring.prune(mask, from_input=runner.ablation == "resample")


class _Kept:
    """Scores of finished rounds on disk, if a file is given."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.known: dict[str, np.ndarray] = {}
        if path is None or not path.exists():
            return
        try:
            self.known = load_file(path)
            found = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["key"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}. Delete it and begin again") from error
        if found != key:
            raise DataError(
                f"{path} holds rounds of another model, other prompts or settings: delete it, or choose another"
            )

    def round(self, number: int, shape: tuple[int, ...]) -> np.ndarray | None:
        found = self.known.get(str(number))
        return found if found is not None and found.shape == shape else None

    def add(self, scores: np.ndarray, number: int) -> None:
        if self.path is None:
            return
        self.known[str(number)] = np.ascontiguousarray(scores)
        fresh = self.path.with_suffix(".new")
        try:
            self.path.with_suffix(".json").write_text(json.dumps({"key": self.key}), encoding="utf-8")
            save_file(self.known, fresh)
            fresh.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"cannot keep rounds in {self.path}: {error}") from error

    def discard(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)
            self.path.with_suffix(".json").unlink(missing_ok=True)
