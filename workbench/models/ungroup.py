"""Turn grouped-query attention into multi-head attention with the same outputs."""

from typing import Any

import torch
from torch import nn

from workbench.errors import ModelError
from workbench.models.bridge import sharing_copy


def _repeat_heads(linear: nn.Linear, n_kv_heads: int, repeats: int) -> nn.Linear:
    """A projection in which the rows of every head stand `repeats` times in a row."""
    weight = linear.weight.detach().unflatten(0, (n_kv_heads, -1)).repeat_interleave(repeats, dim=0).flatten(0, 1)
    wider = nn.Linear(weight.shape[1], weight.shape[0], bias=linear.bias is not None, device="meta")
    wider.weight = nn.Parameter(weight, requires_grad=False)
    if linear.bias is not None:
        bias = linear.bias.detach().unflatten(0, (n_kv_heads, -1)).repeat_interleave(repeats, dim=0).flatten(0, 1)
        wider.bias = nn.Parameter(bias, requires_grad=False)
    return wider


@torch.no_grad()
def ungrouped(module: Any) -> Any:
    """A copy in which every query head has a key and a value head of its own; all other weights are shared.

    Raises:
        ModelError: if the architecture does not keep `k_proj` and `v_proj` in `model.layers[i].self_attn`.
    """
    n_heads = module.config.num_attention_heads
    n_kv_heads = getattr(module.config, "num_key_value_heads", n_heads) or n_heads
    if n_kv_heads == n_heads:
        return module
    copy: Any = sharing_copy(module)
    repeats = n_heads // n_kv_heads
    try:
        for layer in copy.model.layers:
            attention = layer.self_attn
            attention.k_proj = _repeat_heads(attention.k_proj, n_kv_heads, repeats)
            attention.v_proj = _repeat_heads(attention.v_proj, n_kv_heads, repeats)
            attention.num_key_value_groups = 1
    except AttributeError as error:
        raise ModelError(f"cannot ungroup {type(module).__name__}: {error}") from error
    copy.config.num_key_value_heads = n_heads
    return copy
