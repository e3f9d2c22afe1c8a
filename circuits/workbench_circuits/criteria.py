"""Completeness and minimality of a circuit (Wang et al. 2022), by nodes or by edges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from workbench.errors import PromptError
from workbench_circuits.run import CircuitRunner, EdgeSet
from workbench_circuits.wiring import Mask

Unit = Literal["heads", "nodes", "edges"]
NEEDED = 0.01
"""A part is needed if it moves the metric by more than this share of that of the whole model (Wang et al.)."""


@dataclass(frozen=True, kw_only=True)
class Completeness:
    """Whether the rest of the model makes up for what is taken out of the circuit.

    Attributes:
        frame: one row a set K: `kind` (`random`, `greedy` or its given name), `size`, `circuit`, the metric of the
            circuit without K, `model`, that of the whole model without K, and `score`, the size of their difference,
            in the metric's unit; `share`, the score over the gap between model and empty circuit.
        members: the parts of each K.
        score: mean score over the random K.
        worst: largest score over all K.
    """

    frame: pd.DataFrame
    members: tuple[tuple[str, ...], ...]
    score: float
    worst: float


@dataclass(frozen=True, kw_only=True)
class Minimality:
    """Whether every part of the circuit matters.

    Attributes:
        frame: one row a part v: `part`, `score`, the largest |F(C without K and v) - F(C without K)| over the sets K
            that were tried, in the metric's unit, `share` of |F(M)|, `k`, the size of the K it was found with, and
            `needed`, whether the share is above `NEEDED`.
        needed: how many parts are.
    """

    frame: pd.DataFrame
    needed: int


def completeness(
    runner: CircuitRunner,
    circuit: EdgeSet,
    *,
    unit: Unit = "heads",
    random: int = 10,
    greedy: int = 5,
    candidates: int = 5,
    sets: Mapping[str, Iterable[str]] | None = None,
    seed: int = 0,
) -> Completeness:
    """Compare the circuit without K to the whole model without K: if nothing was missed, they score alike.

    Args:
        runner: model, prompts, ablation and metric.
        circuit: the circuit.
        unit: what K is made of: `heads`, `nodes` (heads, MLPs and input) or `edges` of the circuit. A head or node is
            taken out with all the edges that it writes.
        random: how many random K, each part in it with probability one half.
        greedy: how many parts a greedy search puts into K, one at a time the one that makes the score largest; every
            K on the way is reported.
        candidates: how many random parts the search chooses from at each step (Wang et al. take 5 to 10).
        sets: further K by name, such as the heads of a class.
        seed: seed of the random choices.

    Raises:
        PromptError: for an unknown unit, a circuit without such parts, or a K that is not of the circuit.
    """
    mask = runner.mask(circuit)
    parts = _parts(runner, mask, unit)
    draw = np.random.default_rng(seed)
    chosen: list[tuple[str, list[int]]] = [
        ("random", np.flatnonzero(draw.random(len(parts)) < 0.5).tolist()) for _ in range(random)
    ]
    index = {name: i for i, name in enumerate(parts.names)}
    for name, members in (sets or {}).items():
        wanted = list(members)
        foreign = [m for m in wanted if m not in index]
        if foreign:
            raise PromptError(f"set {name!r}: {foreign[0]!r} is none of the circuit's {unit}")
        chosen.append((name, [index[m] for m in wanted]))
    rows = _completeness_rows(runner, parts, mask, chosen)
    current: list[int] = []
    for _ in range(min(greedy, len(parts))):
        left = [i for i in range(len(parts)) if i not in current]
        tried = draw.permutation(left)[:candidates].tolist()
        found = _completeness_rows(runner, parts, mask, [("greedy", [*current, int(v)]) for v in tried])
        best = max(found, key=lambda row: row["score"])
        current = list(best["members"])
        rows.append(best)
    named: tuple[tuple[str, ...], ...] = tuple(tuple(parts.names[i] for i in row["members"]) for row in rows)
    columns = ["kind", "size", "circuit", "model", "score", "share"]
    frame = pd.DataFrame([{name: row[name] for name in columns} for row in rows], columns=columns)
    drawn = frame.loc[frame["kind"] == "random", "score"]
    return Completeness(
        frame=frame,
        members=named,
        score=float(drawn.mean()) if len(drawn) else float("nan"),
        worst=float(frame["score"].max()) if len(frame) else float("nan"),
    )


def minimality(
    runner: CircuitRunner,
    circuit: EdgeSet,
    *,
    unit: Unit = "heads",
    random: int = 3,
    parts: Sequence[str] | None = None,
    seed: int = 0,
) -> Minimality:
    """For every part v of the circuit, how much it matters beside some part K of the rest.

    Wang et al. ask for a K for which removing v moves the metric; here the empty K is tried, and random ones in which
    every other part is with probability one half, so that backups of v are sometimes gone. The score is a lower bound.

    Args:
        runner: model, prompts, ablation and metric.
        circuit: the circuit.
        unit: `heads`, `nodes` or `edges`.
        random: how many random K a part.
        parts: only these; default: all.
        seed: seed of the random choices.

    Raises:
        PromptError: for an unknown unit, or parts that are not of the circuit.
    """
    mask = runner.mask(circuit)
    everything = _parts(runner, mask, unit)
    wanted = list(everything.names if parts is None else parts)
    index = {name: i for i, name in enumerate(everything.names)}
    foreign = [name for name in wanted if name not in index]
    if foreign:
        raise PromptError(f"{foreign[0]!r} is none of the circuit's {unit}")
    draw = np.random.default_rng(seed)
    shared = [np.flatnonzero(draw.random(len(everything)) < 0.5).tolist() for _ in range(random)]
    without = [everything.removed(mask, k) for k in ([], *shared)]
    also = [everything.removed(without[j], [index[v]]) for v in wanted for j in range(len(without))]
    means = runner.run([*without, *also]).mean(1, dtype=np.float64)
    base, moved = means[: len(without)], means[len(without) :].reshape(len(wanted), len(without))
    # a part that is in K has no say there
    inside = np.array([[index[v] in k for k in ([], *shared)] for v in wanted]).reshape(moved.shape)
    score = np.where(inside, 0.0, np.abs(moved - base))
    best = score.argmax(1)
    sizes = np.array([0, *map(len, shared)])
    whole = abs(float(runner.clean.mean(dtype=np.float64)))
    frame = pd.DataFrame({"part": wanted, "score": score.max(1), "k": sizes[best]})
    frame["share"] = frame["score"] / whole if whole else float("nan")
    frame["needed"] = frame["share"] > NEEDED
    frame = frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)
    return Minimality(frame=frame[["part", "score", "share", "k", "needed"]], needed=int(frame["needed"].sum()))


@dataclass(frozen=True)
class _Parts:
    """The parts of a circuit, each with what goes if it is taken out."""

    names: tuple[str, ...]
    senders: np.ndarray | None
    pairs: np.ndarray | None

    def __len__(self) -> int:
        return len(self.names)

    def removed(self, mask: Mask, members: Iterable[int]) -> Mask:
        left = mask.copy()
        chosen = np.array(list(members), dtype=np.int64)
        if self.senders is not None:
            left[:, self.senders[chosen]] = False
        else:
            assert self.pairs is not None
            left[self.pairs[chosen, 0], self.pairs[chosen, 1]] = False
        return left


def _parts(runner: CircuitRunner, mask: Mask, unit: str) -> _Parts:
    if unit not in ("heads", "nodes", "edges"):
        raise PromptError(f"unit {unit!r} is not one of heads, nodes, edges")
    graph = runner.wiring.graph
    if unit == "edges":
        edges = runner.wiring.edges(mask)
        found = _Parts(tuple(edges.names), None, np.stack((edges.receiver, edges.sender), axis=1))
    else:
        inside = mask.any(0) & np.array([unit == "nodes" or s.kind == "head" for s in graph.senders])
        numbers = np.flatnonzero(inside)
        found = _Parts(tuple(graph.sender_names[i] for i in numbers), numbers, None)
    if not len(found):
        raise PromptError(f"the circuit has no {unit}")
    return found


def _completeness_rows(
    runner: CircuitRunner, parts: _Parts, mask: Mask, chosen: Sequence[tuple[str, list[int]]]
) -> list[dict[str, Any]]:
    whole = runner.wiring.everything
    masks = [parts.removed(base, k) for _, k in chosen for base in (mask, whole)]
    means = runner.run(masks).mean(1, dtype=np.float64).reshape(-1, 2)
    gap = abs(float(runner.clean.mean(dtype=np.float64) - runner.none.mean(dtype=np.float64)))
    return [
        {
            "kind": kind,
            "size": len(k),
            "circuit": float(pair[0]),
            "model": float(pair[1]),
            "score": abs(float(pair[0] - pair[1])),
            "share": abs(float(pair[0] - pair[1])) / gap if gap else float("nan"),
            "members": k,
        }
        for (kind, k), pair in zip(chosen, means, strict=True)
    ]
