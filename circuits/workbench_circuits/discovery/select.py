"""Circuits from scores: the strongest edges, or the strongest that are connected to the logits."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from workbench.errors import PromptError
from workbench.patching.effects import EdgeEffects
from workbench.patching.graph import Edges, Graph
from workbench_circuits.wiring import Mask, Wiring

Algorithm = Literal["threshold", "greedy"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Edges of one graph with their scores.

    Attributes:
        edges: the edges.
        effect: what each does to the metric, in its unit, as measured.
        signed: rank by how much an edge helps; otherwise by the size of its effect, whichever way it goes.
        helps: +1 where an edge that helps has a positive effect (denoising a metric that should be high), else -1.
        method: how the effects were computed.
    """

    edges: Edges
    effect: Float[np.ndarray, " edges"]
    signed: bool = False
    helps: int = -1
    method: str = ""

    @classmethod
    def of(cls, graph: Graph, effects: EdgeEffects, *, signed: bool = False) -> Ranking:
        """The ranking by some effects.

        Raises:
            PromptError: if they name edges that the graph has not.
        """
        frame = effects.frame
        if frame.empty:
            raise PromptError("effects has no edges: compute them with edges='all'")
        edges = graph.edges(frame["sender"] + "->" + frame["receiver"])
        direction, metric = str(frame["direction"].iloc[0]), str(frame["metric"].iloc[0])
        methods = set(frame["method"])
        return cls(
            edges=edges,
            effect=frame["effect"].to_numpy(dtype=np.float64),
            signed=signed,
            helps=helping_sign(direction, metric),
            method=str(effects.provenance.get("settings", {}).get("method", "")) or "+".join(sorted(methods)),
        )

    @property
    def score(self) -> Float[np.ndarray, " edges"]:
        """What edges are ranked by, largest first."""
        return self.helps * self.effect if self.signed else np.abs(self.effect)

    def matrix(self) -> Float[np.ndarray, "receivers senders"]:
        """Scores as a matrix; minus infinity where there is no score."""
        found = np.full(Wiring(self.edges.graph).shape, -np.inf)
        found[self.edges.receiver, self.edges.sender] = self.score
        return found


def helping_sign(direction: str, metric: str) -> int:
    """+1 where an edge that helps has a positive effect (`denoising` or `both`), else -1; for KL the reverse."""
    lower_is_better = metric == "kl_to_clean"
    return 1 if (direction != "noising") != lower_is_better else -1


def threshold_order(ranking: Ranking) -> Int[np.ndarray, " edges"]:
    """Edges from the highest score down; ties as they stand in the graph."""
    return np.argsort(-ranking.score, kind="stable")


def greedy_order(ranking: Ranking, limit: int | None = None) -> Int[np.ndarray, " edges"]:
    """Edges in the order in which a greedy search from the logits takes them.

    At each step the edge of highest score is taken whose receiver's node already has an edge to a taken receiver, the
    logits being there from the start (Hanna et al. 2024). Every prefix of the order is thus connected to the logits.

    Args:
        ranking: edges and scores.
        limit: stop after this many.

    Returns:
        Indices into the ranking's edges; edges that are never reached are missing.
    """
    wiring = Wiring(ranking.edges.graph)
    score, sender, receiver = ranking.score, ranking.edges.sender, ranking.edges.receiver
    order = np.argsort(receiver, kind="stable")
    starts = np.searchsorted(receiver[order], np.arange(wiring.shape[0] + 1))
    by_receiver = [order[starts[r] : starts[r + 1]] for r in range(wiring.shape[0])]
    inputs: list[list[int]] = [[] for _ in range(wiring.shape[1])]
    for r, fed in enumerate(wiring.feeds):
        for s in range(fed.start, fed.stop):
            inputs[s].append(r)
    heap: list[tuple[float, int]] = []
    opened = np.zeros(wiring.shape[0], dtype=bool)
    reached = np.zeros(wiring.shape[1], dtype=bool)

    def reach(r: int) -> None:
        if not opened[r]:
            opened[r] = True
            for edge in by_receiver[r]:
                heapq.heappush(heap, (-float(score[edge]), int(edge)))

    reach(wiring.shape[0] - 1)
    taken: list[int] = []
    many = len(score) if limit is None else limit
    while heap and len(taken) < many:
        _, edge = heapq.heappop(heap)
        taken.append(edge)
        node = int(sender[edge])
        if not reached[node]:
            reached[node] = True
            for r in inputs[node]:
                reach(r)
    return np.array(taken, dtype=np.int64)


def order_of(ranking: Ranking, algorithm: str, limit: int | None = None) -> Int[np.ndarray, " edges"]:
    """Edges in the order in which an algorithm takes them.

    Raises:
        PromptError: for an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise PromptError(f"algorithm {algorithm!r} is not one of {', '.join(ALGORITHMS)}")
    return threshold_order(ranking)[:limit] if algorithm == "threshold" else greedy_order(ranking, limit)


def select(
    ranking: Ranking, n: int, *, algorithm: str = "threshold", from_input: bool = True, order: np.ndarray | None = None
) -> Mask:
    """The circuit of the first `n` edges, without those on no path from `input` to `logits`.

    Args:
        ranking: edges and scores.
        n: how many edges are taken before unconnected ones are dropped.
        algorithm: `threshold` or `greedy`.
        from_input: drop what `input` does not reach; right for resample ablation, see `Wiring.prune`.
        order: the algorithm's order, if it is known.

    Raises:
        PromptError: for an unknown algorithm, or `n` below 0 or beyond the ranked edges.
    """
    if not 0 <= n <= len(ranking.edges):
        raise PromptError(f"n={n} edges: expected 0 to {len(ranking.edges)}, the edges that have a score")
    wiring = Wiring(ranking.edges.graph)
    taken = order_of(ranking, algorithm, n) if order is None else order[:n]
    return wiring.prune(wiring.mask(ranking.edges[taken]), from_input=from_input)
