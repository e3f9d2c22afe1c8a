"""Capture activations, reduced inside the hooks, into memory or a folder that survives being killed."""

from workbench.cache.cache import Cache, open_cache
from workbench.cache.capture import capture
from workbench.cache.prompts import windows
from workbench.cache.reductions import Reduction, diagonals, reduction

__all__ = ["Cache", "Reduction", "capture", "diagonals", "open_cache", "reduction", "windows"]
