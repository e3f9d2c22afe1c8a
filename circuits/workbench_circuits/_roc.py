"""ROC of edges and heads against a circuit that is known."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.errors import PromptError
from workbench.patching.effects import EdgeEffects
from workbench.patching.graph import Graph
from workbench_circuits.discovery.select import Ranking
from workbench_circuits.wiring import head_of


@dataclass(frozen=True, kw_only=True)
class ROC:
    """How well scores tell what belongs to a known circuit from what does not.

    Attributes:
        auc: probability that a member scores above a non-member, ties counted half (Mann and Whitney, 1947).
        frame: the curve: `threshold`, `tpr`, `fpr`.
        positives: members.
        negatives: the others.
    """

    auc: float
    frame: pd.DataFrame
    positives: int
    negatives: int


def roc(scores: Float[np.ndarray, " items"], truth: np.ndarray) -> ROC:
    """ROC curve and its area.

    Args:
        scores: higher is more likely a member; not NaN.
        truth: which items are members.

    Raises:
        PromptError: if all or none are members, or a score is NaN.
    """
    scores, truth = np.asarray(scores, dtype=np.float64), np.asarray(truth, dtype=bool)
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if not positives or not negatives:
        raise PromptError(f"truth has {positives} members and {negatives} others: a ROC curve needs both")
    if np.isnan(scores).any():
        raise PromptError("scores has NaN: give every item a score, or leave it out")
    from scipy.stats import rankdata

    ranks = rankdata(scores)
    auc = (ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    levels, inverse = np.unique(-scores, return_inverse=True)
    hits = np.bincount(inverse, weights=truth, minlength=len(levels)).cumsum() / positives
    alarms = np.bincount(inverse, weights=~truth, minlength=len(levels)).cumsum() / negatives
    frame = pd.DataFrame(
        {
            "threshold": np.concatenate(([np.inf], -levels)),
            "tpr": np.concatenate(([0.0], hits)),
            "fpr": np.concatenate(([0.0], alarms)),
        }
    )
    return ROC(auc=float(auc), frame=frame, positives=positives, negatives=negatives)


def edge_roc(effects: EdgeEffects | Ranking, truth: Iterable[str], *, graph: Graph | None = None) -> ROC:
    """ROC of edges against the edges of a known circuit, by absolute (or the ranking's) score.

    Args:
        effects: effects of edges, or a ranking.
        truth: names of the circuit's edges.
        graph: of the model; not needed with a ranking.

    Raises:
        PromptError: if effects come without a graph, or an edge of the circuit has no score.
    """
    ranking = _ranking(effects, graph)
    names = ranking.edges.names
    members = set(truth)
    missing = sorted(members - set(names))
    if missing:
        raise PromptError(f"{len(missing)} edges of the known circuit have no score, the first is {missing[0]!r}")
    return roc(ranking.score, np.array([name in members for name in names]))


def head_roc(effects: EdgeEffects | Ranking, truth: Iterable[tuple[int, int]], *, graph: Graph | None = None) -> ROC:
    """ROC of heads against the heads of a known circuit; a head's score is the largest of its outgoing edges'.

    Raises:
        PromptError: if effects come without a graph, or a head of the circuit does not exist.
    """
    ranking = _ranking(effects, graph)
    found = ranking.edges.graph
    scores = np.full(len(found.senders), -np.inf)
    np.maximum.at(scores, ranking.edges.sender, ranking.score)
    heads = [i for i, s in enumerate(found.senders) if s.kind == "head"]
    places = {head_of(found.sender_names[i]) for i in heads}
    members = {(int(a), int(b)) for a, b in truth}
    if members - places:
        raise PromptError(f"head {sorted(members - places)[0]} of the known circuit is not a head of this model")
    return roc(scores[heads], np.array([head_of(found.sender_names[i]) in members for i in heads]))


def _ranking(effects: EdgeEffects | Ranking, graph: Graph | None) -> Ranking:
    if isinstance(effects, Ranking):
        return effects
    if graph is None:
        raise PromptError("graph=None: pass Graph(model.spec), the graph that the effects are of")
    return replace(Ranking.of(graph, effects), signed=False)
