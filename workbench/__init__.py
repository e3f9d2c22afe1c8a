"""Take a language model apart head by head.

    import workbench as wb

    model = wb.load_model()                       # SmolLM2-135M, no network beyond the package index
    wb.attention_sinks(model).plot()

Names are imported when they are first used, so that `import workbench` costs nothing but Python itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.analyzers.attention_sinks import run as attention_sinks
    from workbench.analyzers.extreme_tokens import run as extreme_tokens
    from workbench.analyzers.head_patterns import run as head_patterns
    from workbench.cache import Cache, capture, open_cache
    from workbench.interventions import Ablation, ablate
    from workbench.models import Model, load_model, wrap_model
    from workbench.patching import EdgeEffects, compare, edge_effects
    from workbench.patching.direct_effects import direct_effects
    from workbench.patching.head_effects import head_effects
    from workbench.prompts import PromptPairs
    from workbench.tables import HeadTable

__version__ = "0.1.0"

_HOME = {
    "Ablation": "workbench.interventions:Ablation",
    "Cache": "workbench.cache:Cache",
    "capture": "workbench.cache:capture",
    "open_cache": "workbench.cache:open_cache",
    "EdgeEffects": "workbench.patching:EdgeEffects",
    "compare": "workbench.patching:compare",
    "edge_effects": "workbench.patching:edge_effects",
    "HeadTable": "workbench.tables:HeadTable",
    "Model": "workbench.models:Model",
    "PromptPairs": "workbench.prompts:PromptPairs",
    "ablate": "workbench.interventions:ablate",
    "attention_sinks": "workbench.analyzers.attention_sinks:run",
    "extreme_tokens": "workbench.analyzers.extreme_tokens:run",
    "direct_effects": "workbench.patching.direct_effects:direct_effects",
    "head_effects": "workbench.patching.head_effects:head_effects",
    "head_patterns": "workbench.analyzers.head_patterns:run",
    "load_model": "workbench.models:load_model",
    "wrap_model": "workbench.models:wrap_model",
}

__all__ = [  # noqa: RUF022
    "load_model",
    "wrap_model",
    "Model",
    "PromptPairs",
    "HeadTable",
    "attention_sinks",
    "head_patterns",
    "capture",
    "open_cache",
    "Cache",
    "extreme_tokens",
    "head_effects",
    "direct_effects",
    "Ablation",
    "ablate",
    "edge_effects",
    "EdgeEffects",
    "compare",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
