"""Finding circuits: selection of edges by their scores, pruning by what their removal does, and the whole way."""

from workbench_circuits.discovery.acdc import acdc
from workbench_circuits.discovery.discover import discover
from workbench_circuits.discovery.select import Ranking, greedy_order, select, threshold_order
from workbench_circuits.discovery.size import smallest
from workbench_circuits.discovery.stability import Stability, stability

__all__ = [
    "Ranking",
    "Stability",
    "acdc",
    "discover",
    "greedy_order",
    "select",
    "smallest",
    "stability",
    "threshold_order",
]
