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
from workbench_circuits.discovery.select import Ranking
from workbench_circuits.run import CircuitRunner, Progress
from workbench_circuits.wiring import Mask

RATIO = 0.5
"""What share of the edges is kept from round to round."""

START = 0.02
"""Share of the edges that the search begins with."""


@dataclass(frozen=True, kw_only=True)
class Refined:
    """Circuits of falling size.

    Attributes:
        masks: the circuits, from the largest on.
        scores: what the edges of each circuit were taken by `[receivers, senders]`.
        frame: one row a circuit: `n_edges`; `within` and `ranking`, the faithfulness of the two candidates on the
            prompts of the judge; `rule`, which of them was taken.
    """

    masks: tuple[Mask, ...]
    scores: tuple[Float[np.ndarray, "receivers senders"], ...]
    frame: pd.DataFrame

    def at(self, runner: CircuitRunner, n_edges: int) -> Mask:
        """The circuit of any size: the first `n_edges` by what the next smaller round was taken by, then pruned."""
        return take(runner, self.scores[self.round_of(n_edges)], n_edges)

    def round_of(self, n_edges: int) -> int:
        """The round by whose scores a circuit of some size is taken."""
        sizes = [int(mask.sum()) for mask in self.masks]
        return next((i for i, size in enumerate(sizes) if n_edges >= size), len(sizes) - 1)


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
    ranking: Ranking,
    n_edges: int = 1,
    *,
    judge: CircuitRunner | None = None,
    ratio: float = RATIO,
    steps: int = 2,
    stop: Callable[[Mask], bool] | None = None,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Shrink the circuit of a ranking round by round, by what edges contribute within what is left.

    Scores that are measured once, in the whole model, miss what only shows when other edges are gone: paths that stand
    in for each other, and edges that need each other. So the first fiftieth of all edges is scored again in the circuit
    that it makes, half of it is kept, and so on (edge attributions with integrated gradients as in Hanna et al. 2024,
    of the circuit instead of the model; pruned step by step as in de Jorge et al. 2021, so an edge that was dropped can
    come back). In every round two circuits of the wanted size are run: the edges that add most within the last circuit,
    and the first of the ranking. The one whose faithfulness is closer to 1 on other prompts goes on.

    It goes by gradients: where attention is hard, as in compiled programs, they vanish, and it does no better than
    its ranking; use `acdc` there.

    Args:
        runner: model, prompts to score edges on, ablation and metric.
        ranking: a first ranking of all edges.
        n_edges: edges to stop at.
        judge: runs circuits on the prompts that decide between the two; default: `runner`.
        ratio: edges of one round to those of the last.
        steps: gradients a round, see `contributions`.
        stop: called with every circuit; true ends the search after it.
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
    judge = runner if judge is None else judge
    first = ranking.matrix()
    key = [runner.model.model_hash, str(runner.model.dtype), runner.pairs.data_hash, judge.pairs.data_hash]
    key += [runner.ablation, runner.metric, hashlib.sha256(first.tobytes()).hexdigest()]
    digest = hashlib.sha256(repr([*key, n_edges, ratio, steps]).encode()).hexdigest()
    kept = _Kept(None if resume is None else Path(resume), digest)
    sign = 1.0 if float(runner.clean.mean() - runner.none.mean()) > 0 else -1.0
    size = max(n_edges, int(START * total))
    current = take(runner, first, size)
    masks, scores = [current], [first]
    f = float(judge.f(judge.run([current]))[0])
    rows: list[dict[str, Any]] = [{"n_edges": int(current.sum()), "within": np.nan, "ranking": f, "rule": "ranking"}]
    while size > n_edges and current.any():
        size = max(n_edges, int(size * ratio))
        known = kept.round(len(masks), first.shape)
        within = sign * contributions(runner, current, steps=steps) if known is None else known
        kept.add(within, len(masks))
        choices = {"within": within, "ranking": first}
        taken = [take(runner, score, size) for score in choices.values()]
        found = dict(zip(choices, judge.f(judge.run(taken)).tolist(), strict=True))
        rule = min(found, key=lambda name: abs(1 - found[name]))
        current = taken[list(choices).index(rule)]
        masks.append(current)
        scores.append(choices[rule])
        rows.append({"n_edges": int(current.sum()), **found, "rule": rule})
        if progress is not None:
            progress(
                f"refine: {int(current.sum()):,} edges, faithfulness {found['within']:.2f} by contributions within, "
                f"{found['ranking']:.2f} by the ranking"
            )
        if stop is not None and stop(current):
            break
    kept.discard()
    return Refined(masks=tuple(masks), scores=tuple(scores), frame=pd.DataFrame(rows))


def take(runner: CircuitRunner, score: Float[np.ndarray, "receivers senders"], n: int) -> Mask:
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
