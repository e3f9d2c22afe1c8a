"""Loading a model and looking at it head by head."""

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.models.model import Model, wrap_model
from workbench.models.spec import ModelSpec
from workbench.models.weights import ModelWeights

if TYPE_CHECKING:
    import torch

__all__ = ["Model", "ModelSpec", "ModelWeights", "load_model", "wrap_model"]

DEFAULT = "smollm2-135m-instruct"
"""The model that is loaded when none is named."""


def load_model(
    source: str | Path = DEFAULT,
    *,
    device: "torch.device | str | None" = None,
    dtype: "torch.dtype | None" = None,
    ungroup: bool = False,
    trust_remote_code: bool = False,
) -> Model:
    """Load a model.

    Args:
        source: the default model's name, a Hugging Face id, a folder with `config.json` and safetensors, or a `.gguf`.
        device: CUDA where there is one, by default.
        dtype: float32 for the default model, what the checkpoint says for others.
        ungroup: give every query head a key and a value head of its own, with the same outputs.
        trust_remote_code: run code that comes with a Hugging Face model. Off unless asked for.

    Raises:
        ModelError: if the source is unknown, missing, damaged or unsafe to read; the message says what to do.
    """
    import torch

    from workbench.models.sources import resolve

    found = resolve(source, dtype=dtype, trust_remote_code=trust_remote_code)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    module = found.module.to(place)
    return wrap_model(module, found.tokenizer, name=found.name, ungroup=ungroup, provenance=found.provenance)
