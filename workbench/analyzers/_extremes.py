"""Extreme tokens: the pure functions. Shapes as in the model: batch, position, width."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models.weights import at_least_float32


def largest(resid: Float[Tensor, "n pos d_model"], k: int = 3) -> Float[Tensor, "n k"]:
    """The `k` largest absolute values of each sample's residual stream."""
    return resid.abs().flatten(1).topk(k, dim=1).values.to(at_least_float32(resid.dtype))


def typical(resid: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n"]:
    """Median absolute value of each sample's residual stream, over tokens and dimensions."""
    return resid.abs().flatten(1).to(at_least_float32(resid.dtype)).median(dim=1).values


def is_massive(
    resid: Float[Tensor, "n pos d_model"], median: Float[Tensor, "n"], *, absolute: float = 100.0, ratio: float = 1000.0
) -> Bool[Tensor, "n pos d_model"]:
    """Where an activation exceeds `absolute` and is at least `ratio` times the median of its sample."""
    size = resid.abs()
    return (size > absolute) & (size >= ratio * median[:, None, None])


def written_norms(
    v: Float[Tensor, "n pos n_kv_heads d_head"], W_O: Float[Tensor, "n_heads d_head d_model"]
) -> Float[Tensor, "n pos n_heads"]:
    """Norm of what each query head would write if it attended to one token alone: |v W_O|."""
    dtype = at_least_float32(v.dtype)
    maps = W_O.to(dtype)
    values = v.to(dtype).repeat_interleave(len(maps) // v.shape[2], dim=2)
    square = torch.einsum("npha,hab,nphb->nph", values, maps @ maps.mT, values)
    return square.clamp(min=0).sqrt()


def first_and_rest(x: Float[Tensor, "n pos *rest"]) -> tuple[Float[Tensor, "n *rest"], Float[Tensor, "n *rest"]]:
    """The value at the first token, and the mean over the others."""
    return x[:, 0], x[:, 1:].mean(1)
