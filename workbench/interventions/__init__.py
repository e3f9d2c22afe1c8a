"""What can be done to a head: the ablations, and editors that apply them in any forward pass."""

from workbench.interventions.ablation import Ablation
from workbench.interventions.editors import ablate

__all__ = ["Ablation", "ablate"]
