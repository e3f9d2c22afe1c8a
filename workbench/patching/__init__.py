"""The patching engine: what every edge of a model contributes to a metric."""

from workbench.patching.effects import EdgeEffects, agreement, compare
from workbench.patching.engine import edge_effects, estimate_cost
from workbench.patching.graph import Edges, Graph

__all__ = ["EdgeEffects", "Edges", "Graph", "agreement", "compare", "edge_effects", "estimate_cost"]
