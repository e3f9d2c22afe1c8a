"""Finding circuits: selection of edges by their scores, pruning by what their removal does, and the whole way."""

from workbench_circuits.discovery.acdc import acdc
from workbench_circuits.discovery.discover import Discovery, discover, find
from workbench_circuits.discovery.refine import Refined, contributions, refine
from workbench_circuits.discovery.select import Ranking, greedy_order, select, threshold_order
from workbench_circuits.discovery.size import smallest
from workbench_circuits.discovery.stability import Stability, stability

__all__ = [
    "Discovery",
    "Ranking",
    "Refined",
    "Stability",
    "acdc",
    "contributions",
    "discover",
    "find",
    "greedy_order",
    "refine",
    "select",
    "smallest",
    "stability",
    "threshold_order",
]
