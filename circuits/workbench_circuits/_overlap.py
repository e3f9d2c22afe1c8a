"""What two circuits of one model share, and how much of that is chance."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from workbench.errors import DataError
from workbench_circuits.circuit import Circuit

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What two circuits share.

    Attributes:
        summary: one row for `edges`, `heads`, `nodes`: sizes `n_a`, `n_b`, `shared`, `union`, `jaccard`,
            `of_smaller` (shared over the smaller size), `expected` number shared and `expected_jaccard` if circuits of
            these sizes were drawn at random, `p_value` of sharing at least as many (hypergeometric), `population`,
            and `spearman` of the scores of what is shared (`spearman_n` of them): an edge's is the size of its effect,
            a head's or node's the sum over the circuit's edges out of it.
        heads: one row a head in either: `layer`, `head`, `in_a`, `in_b`, `score_a`, `score_b`, and edges out of it.
        names: what the two are called.
        warnings: what must be said beside the figures.
    """

    summary: pd.DataFrame
    heads: pd.DataFrame
    names: tuple[str, str]
    warnings: tuple[str, ...] = ()


def overlap(a: Circuit, b: Circuit, *, names: tuple[str, str] = ("A", "B")) -> Overlap:
    """Compare two circuits of one model.

    Chance is a draw of as many edges (heads, nodes) from all of the model, without regard to how they are connected or
    to some being in every circuit, so it is a lower bound on what unrelated circuits share.

    Args:
        a: a circuit.
        b: another one.
        names: what to call them.

    Raises:
        DataError: if they are of different models.
    """
    import pandas as pd

    warnings = [w for w in (a.warning, b.warning) if w]
    if a.shape != b.shape:
        raise DataError(
            f"the circuits are of models with different nodes, {a.model} ({a.shape}) and {b.model} ({b.shape}): "
            "only circuits of one model can be compared"
        )
    if a.model_hash and b.model_hash and a.model_hash != b.model_hash:
        raise DataError(
            f"the circuits are of different models, {a.model} (weights {a.model_hash[:12]}) and {b.model} (weights "
            f"{b.model_hash[:12]}): head 3 of one has nothing to do with head 3 of the other"
        )
    if not (a.model_hash and b.model_hash):
        warnings.append("one of the circuits does not know its weights, so nothing says that both are of one model")
    graph = a.graph
    head_names = [name for name, s in zip(graph.sender_names, graph.senders, strict=True) if s.kind == "head"]
    sets = {
        "edges": (_edge_scores(a), _edge_scores(b), graph.n_edges),
        "heads": (_node_scores(a, set(head_names)), _node_scores(b, set(head_names)), len(head_names)),
        "nodes": (_node_scores(a), _node_scores(b), len(graph.senders)),
    }
    summary = pd.DataFrame([{"what": what, **_compare(*parts)} for what, parts in sets.items()])
    return Overlap(summary=summary, heads=_head_table(a, b), names=names, warnings=tuple(dict.fromkeys(warnings)))


def _edge_scores(circuit: Circuit) -> dict[str, float]:
    return {name: abs(x) for name, x in zip(circuit.edges, circuit.effects, strict=True)}


def _node_scores(circuit: Circuit, among: set[str] | None = None) -> dict[str, float]:
    """Sum of the sizes of the effects of the edges out of every node, without `logits`, which writes none."""
    found = {node: 0.0 for node in circuit.nodes if node != "logits" and (among is None or node in among)}
    for name, x in _edge_scores(circuit).items():
        sender = name.split("->", maxsplit=1)[0]
        if sender in found:
            found[sender] += x
    return found


def _compare(a: Mapping[str, float], b: Mapping[str, float], population: int) -> dict[str, float]:
    from scipy.stats import hypergeom

    shared = sorted(set(a) & set(b))
    n_a, n_b, k = len(a), len(b), len(shared)
    union = n_a + n_b - k
    expected = n_a * n_b / population
    sizes = np.arange(max(0, n_a + n_b - population), min(n_a, n_b) + 1)
    weights = hypergeom.pmf(sizes, population, n_a, n_b)
    unions = np.maximum(n_a + n_b - sizes, 1)
    rho, many = spearman([a[name] for name in shared], [b[name] for name in shared])
    return {
        "n_a": n_a,
        "n_b": n_b,
        "shared": k,
        "union": union,
        "jaccard": k / union if union else math.nan,
        "of_smaller": k / min(n_a, n_b) if min(n_a, n_b) else math.nan,
        "expected": expected,
        "expected_jaccard": float((weights * sizes / unions).sum()),
        "p_value": float(hypergeom.sf(k - 1, population, n_a, n_b)),
        "population": population,
        "spearman": rho,
        "spearman_n": many,
    }


def spearman(x: list[float], y: list[float]) -> tuple[float, int]:
    """Rank correlation (Spearman, 1904; ties at their mean rank) over pairs without NaN, and how many these are.

    NaN for fewer than three pairs or without any spread.
    """
    from scipy.stats import rankdata

    pairs = np.array([(p, q) for p, q in zip(x, y, strict=True) if not (math.isnan(p) or math.isnan(q))])
    if len(pairs) < 3:
        return math.nan, len(pairs)
    ranks = np.stack([rankdata(pairs[:, 0]), rankdata(pairs[:, 1])])
    if (np.ptp(ranks, axis=1) == 0).any():
        return math.nan, len(pairs)
    return float(np.corrcoef(ranks)[0, 1]), len(pairs)


def _head_table(a: Circuit, b: Circuit) -> pd.DataFrame:
    import pandas as pd

    scores = tuple({_place(c, node): x for node, x in _node_scores(c).items()} for c in (a, b))
    counts = tuple(_out_edges(c) for c in (a, b))
    rows = [
        {
            "layer": layer,
            "head": head,
            "in_a": (layer, head) in a.heads,
            "in_b": (layer, head) in b.heads,
            "score_a": scores[0].get((layer, head), 0.0),
            "score_b": scores[1].get((layer, head), 0.0),
            "edges_a": counts[0].get(f"a{layer}.h{head}", 0),
            "edges_b": counts[1].get(f"a{layer}.h{head}", 0),
        }
        for layer, head in sorted({*a.heads, *b.heads})
    ]
    columns = ["layer", "head", "in_a", "in_b", "score_a", "score_b", "edges_a", "edges_b"]
    return pd.DataFrame(rows, columns=columns)


def _place(circuit: Circuit, node: str) -> Hashable:
    from workbench_circuits.wiring import head_of

    return head_of(node) or node


def _out_edges(circuit: Circuit) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in circuit.edges:
        sender = name.split("->", maxsplit=1)[0]
        found[sender] = found.get(sender, 0) + 1
    return found
