"""Would other prompts have given the same circuit? The edges are selected again from resampled prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from workbench.errors import PromptError
from workbench.stats import Estimate
from workbench_circuits.discovery.select import Ranking, order_of, select
from workbench_circuits.wiring import Mask


@dataclass(frozen=True, kw_only=True)
class Stability:
    """How much of a circuit comes back when its prompts are resampled.

    Attributes:
        inclusion: share of the resamples that have each edge of the circuit, in the order of `Wiring.edges`.
        jaccard: Jaccard similarity of the circuit and a resampled one: mean and 2.5 to 97.5 % of the resamples;
            `stderr` is their standard deviation.
        head_jaccard: likewise of the sets of heads.
        pairwise: mean Jaccard similarity of two resampled circuits.
        n_resamples: how many.
        n_prompts: prompts that are resampled.
    """

    inclusion: Float[np.ndarray, " edges"]
    jaccard: Estimate
    head_jaccard: Estimate
    pairwise: float
    n_resamples: int
    n_prompts: int

    @property
    def core(self) -> int:
        """How many edges of the circuit are in at least 95 % of the resamples."""
        return int((self.inclusion >= 0.95).sum())


def stability(
    ranking: Ranking,
    per_prompt: Float[np.ndarray, "edges n"],
    mask: Mask,
    *,
    taken: int,
    algorithm: str = "greedy",
    from_input: bool = True,
    n_resamples: int = 50,
    seed: int = 0,
    keep: Callable[[Mask], Mask] | None = None,
) -> Stability:
    """Select a circuit again and again from effects averaged over resampled prompts (bootstrap; Efron, 1979).

    The number of edges taken stays what it was, so this is about which edges, not about how many. The effects of each
    prompt are given, so nothing is run.

    Args:
        ranking: edges and how they are ranked.
        per_prompt: effects of those edges on each prompt.
        mask: the circuit.
        taken: edges that were taken before unconnected ones were dropped.
        algorithm: as the circuit was selected.
        from_input: likewise.
        n_resamples: how often.
        seed: seed of the resampling.
        keep: a last step of selection, applied to every resampled circuit.

    Raises:
        PromptError: with fewer than two prompts or resamples, or effects of other edges.
    """
    if per_prompt.shape[0] != len(ranking.edges):
        raise PromptError(f"per_prompt has {per_prompt.shape[0]} edges and the ranking {len(ranking.edges)}")
    n = per_prompt.shape[1]
    if n < 2 or n_resamples < 2:
        raise PromptError(f"stability needs at least 2 prompts and 2 resamples, got {n} and {n_resamples}")
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        counts = np.bincount(draw.integers(n, size=n), minlength=n) / n
        again = replace(ranking, effect=per_prompt @ counts.astype(per_prompt.dtype))
        order = order_of(again, algorithm, taken)
        chosen = select(again, min(taken, len(order)), algorithm=algorithm, from_input=from_input, order=order)
        found.append(chosen if keep is None else keep(chosen))
    stack = np.stack(found)
    inside = stack[:, mask]
    own = _jaccard(inside.sum(1), int(mask.sum()), stack.sum((1, 2)))
    is_head = np.array([s.kind == "head" for s in ranking.edges.graph.senders])
    heads = np.any(stack, axis=1)[:, is_head]
    reference = np.any(mask, axis=0)[is_head]
    head_own = _jaccard((heads & reference).sum(1), int(reference.sum()), heads.sum(1))
    return Stability(
        inclusion=inside.mean(0),
        jaccard=_spread(own, n),
        head_jaccard=_spread(head_own, n),
        pairwise=_pairwise(stack.reshape(len(stack), -1)),
        n_resamples=n_resamples,
        n_prompts=n,
    )


def _jaccard(shared: np.ndarray, size: int, sizes: np.ndarray) -> np.ndarray:
    union = size + sizes - shared
    return np.asarray(np.where(union == 0, 1.0, shared / np.maximum(union, 1)))


def _spread(values: np.ndarray, n: int) -> Estimate:
    low, high = np.quantile(values, (0.025, 0.975))
    return Estimate(
        value=float(values.mean()), stderr=float(values.std(ddof=1)), ci_low=float(low), ci_high=float(high), n=n
    )


def _pairwise(sets: np.ndarray) -> float:
    used = sets[:, sets.any(0)].astype(np.float32)
    shared = used @ used.T
    sizes = np.diag(shared)
    union = sizes[:, None] + sizes[None] - shared
    ratio = np.where(union == 0, 1.0, shared / np.maximum(union, 1))
    return float(ratio[np.triu_indices(len(sets), 1)].mean())
