"""First-order scores for all edges, exact effects for those that matter, and the error of the first by the second.

Which edges matter is not known beforehand. Verified are: the strongest edges by each of two first-order methods, every
edge from `input` and from or to the first MLP (where first-order scores are known to fail), and a random sample of the
rest, stratified by class of edge, that bounds what was missed.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.patching.effects import agreement_by_class
from workbench.patching.graph import Edges

STRONG = 50
"""A missed edge is one that would belong to this many strongest edges."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which edges are verified, and why, as booleans over the edges.

    Attributes:
        top: among the strongest by a first-order method.
        always: from `input`, or from or to the first MLP.
        sampled: drawn at random from the rest.
    """

    top: np.ndarray
    always: np.ndarray
    sampled: np.ndarray

    @property
    def chosen(self) -> np.ndarray:
        """All that are verified."""
        return self.top | self.always | self.sampled


def select(edges: Edges, scores: Mapping[str, np.ndarray], *, top_k: int, sample: int, seed: int) -> Selection:
    """Choose the edges to verify.

    Args:
        edges: the edges.
        scores: mean effects by first-order method.
        top_k: how many of the strongest of each method.
        sample: how many of the rest, shared among the classes in proportion, at least a tenth of it for each.
        seed: seed of the sample.
    """
    top = np.zeros(len(edges), dtype=bool)
    for values in scores.values():
        top[np.argsort(-np.abs(values), kind="stable")[:top_k]] = True
    graph = edges.graph
    first_mlp_sender = np.array([s.kind == "mlp" and s.layer == 0 for s in graph.senders])
    first_mlp_receiver = np.array([r.kind == "mlp" and r.layer == 0 for r in graph.receivers])
    from_input = np.array([s.kind == "input" for s in graph.senders])
    always = from_input[edges.sender] | first_mlp_sender[edges.sender] | first_mlp_receiver[edges.receiver]
    sampled = np.zeros(len(edges), dtype=bool)
    rest, classes = ~(top | always), edges.classes
    generator = np.random.default_rng(seed)
    for name in sorted(set(classes[rest].tolist())):
        members = np.flatnonzero(rest & (classes == name))
        quota = max(round(sample * len(members) / rest.sum()), sample // 10)
        sampled[generator.choice(members, min(len(members), quota), replace=False)] = True
    return Selection(top=top, always=always, sampled=sampled)


def calibrate(edges: Edges, selection: Selection, scores: Mapping[str, np.ndarray], exact: np.ndarray) -> pd.DataFrame:
    """What verification says about each first-order method.

    Args:
        edges: the edges.
        selection: which were verified.
        scores: mean effects of all edges by first-order method.
        exact: mean exact effects, NaN where not verified.

    Returns:
        One row per method, class of edge and with or without the largest edge: see `agreement`. Beside them, over the
        random sample: `sampled` edges, how many of those would belong to the `STRONG` strongest (`sampled_strong`),
        how many edges of the class were left unverified, and `missed_share`, a 95 % upper bound on the share of strong
        edges among those: exact binomial (Clopper-Pearson), which is about 3/n for no hit in n.
    """
    chosen = selection.chosen
    found = exact[chosen]
    threshold = np.sort(np.abs(found))[-min(STRONG, len(found))] if len(found) else np.inf
    classes = edges.classes
    parts = []
    for method, values in scores.items():
        table = agreement_by_class(values[chosen], found, classes[chosen], STRONG)
        parts.append(table.assign(method=method))
    table = pd.concat(parts, ignore_index=True)
    bounds = {}
    for name in table["edge_class"].unique():
        of_class = np.ones(len(edges), dtype=bool) if name == "all" else classes == name
        drawn = selection.sampled & of_class
        hits = int((np.abs(exact[drawn]) >= threshold).sum())
        left = int((~chosen & of_class).sum())
        bounds[name] = (int(drawn.sum()), hits, left, upper_bound(hits, int(drawn.sum())) if left else 0.0)
    for column, at in (("sampled", 0), ("sampled_strong", 1), ("unverified", 2), ("missed_share", 3)):
        table[column] = [bounds[name][at] for name in table["edge_class"]]
    return table[["method", *[c for c in table.columns if c != "method"]]]


def upper_bound(hits: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson upper bound on a share, given `hits` in `n` draws; 1 for no draws."""
    from scipy.stats import beta

    return 1.0 if hits >= n else float(beta.ppf(confidence, hits + 1, n - hits))
