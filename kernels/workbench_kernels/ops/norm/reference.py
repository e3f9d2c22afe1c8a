"""Norms of patched streams in plain torch, any float dtype."""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench_kernels.checks import accumulating


def norm_delta(
    kind: str,
    base: Float[Tensor, "n width d_model"],
    delta: Float[Tensor, "edges n width d_model"],
    weight: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"] | None,
    eps: float,
) -> Float[Tensor, "edges n width d_model"]:
    """`norm(base + delta)`; see the dispatch."""
    wide = accumulating(base.dtype)
    x = base.to(wide) + delta.to(wide)
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    if kind == "rmsnorm":
        return unit.to(base.dtype) * weight
    found = unit * weight.to(wide)
    return (found if bias is None else found + bias.to(wide)).to(base.dtype)


def inverse_sigma(
    kind: str,
    unit: Float[Tensor, "n width d_model"],
    sigma: Float[Tensor, "n width"],
    deltas: Float[Tensor, "n width senders d_model"],
    eps: float,
) -> Float[Tensor, "n width senders"]:
    """1/sigma of every patched stream; see the dispatch."""
    x = unit.to(sigma.dtype) * sigma[..., None]
    x = x[:, :, None] + deltas.to(sigma.dtype)
    if kind == "layernorm":
        x = x - x.mean(-1, keepdim=True)
    return torch.rsqrt(x.square().mean(-1) + eps)
