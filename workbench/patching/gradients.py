"""Gradients of the metric at every receiver, from one pass over the windows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

import workbench_kernels as kernels
from workbench.models.weights import LayerWeights, Norm
from workbench.patching.passes import run_window
from workbench.patching.runs import Runs


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of the metric (summed over prompts, so each prompt has its own) on the windows; one entry a layer.

    Attributes:
        pre: the stream into each block, which `ln1` normalises.
        q: at the query projection's output, before norm and rotation, `[n, width, n_heads, d_head]`.
        k: likewise for keys.
        v: likewise for values.
        z: at the mixed values.
        mlp_in: at the MLP's own copy of its input, before its norm.
        mlp_out: at the MLP's output.
        final: at the input of the final norm, answer position, `[n, d_model]`.
    """

    pre: tuple[Tensor, ...]
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    mlp_in: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    final: Float[Tensor, "n d_model"]


def gradients(runs: Runs, start: Float[Tensor, "n width d_model"] | None = None) -> Gradients:
    """Gradients of the metric along a run.

    Args:
        runs: caches of the prompts.
        start: stream into the first block; the base run's by default. Positions before the windows are the base's.
    """
    made = runs.traced if start is None else None
    if made is None:
        with torch.enable_grad():
            x = (runs.resid_pre[0] if start is None else start).detach().requires_grad_()
            made = run_window(runs.weights, runs.window, x, runs.keys, runs.values)
    with torch.enable_grad():
        value = runs.metric.read(made.final).sum()
    n_layers = len(made.pre)
    wanted = [*(part for raw in made.raw for part in raw), *made.z, *made.mid, *made.mlp_out, made.final]
    found = torch.autograd.grad(value, wanted, allow_unused=True, retain_graph=made is runs.traced)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(found, wanted, strict=True)]
    raw, rest = filled[: 3 * n_layers], filled[3 * n_layers : -1]
    return Gradients(
        pre=tuple(x.detach() for x in made.pre),
        q=tuple(raw[0::3]),
        k=tuple(raw[1::3]),
        v=tuple(raw[2::3]),
        z=tuple(rest[:n_layers]),
        mlp_in=tuple(rest[n_layers : 2 * n_layers]),
        mlp_out=tuple(rest[2 * n_layers :]),
        final=filled[-1],
    )


def folded(norm: Norm, matrices: Float[Tensor, "heads d_model d_head"]) -> Float[Tensor, "heads d_head d_model"]:
    """Projections with the norm's gain and centring folded in, transposed: what a stream over its sigma meets."""
    rows = matrices.mT
    if norm.kind == "none":
        return rows
    assert norm.weight is not None
    rows = rows * norm.weight
    return rows - rows.mean(-1, keepdim=True) if norm.kind == "layernorm" else rows


def unit_stream(norm: Norm, x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch"]]:
    """A stream, centred where the norm centres, over its sigma; and sigma. Without a norm: itself, and 1."""
    if norm.kind == "none":
        return x, torch.ones_like(x[..., 0])
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layernorm" else x
    sigma = (centred.square().mean(-1) + norm.eps).sqrt()
    return centred / sigma[..., None], sigma


def patched_inverse(
    norm: Norm,
    unit: Float[Tensor, "rows d_model"],
    sigma: Float[Tensor, "rows"],
    deltas: Float[Tensor, "rows senders d_model"],
) -> Float[Tensor, "rows senders"]:
    """1/sigma of every patched stream, from `x.x`, `x.d` and `d.d`."""
    if norm.kind == "none":
        return sigma.new_ones(deltas.shape[:2])
    if deltas.numel() and kernels.backend_for(deltas) == "triton":
        return kernels.inverse_sigma(norm.kind, unit[None], sigma[None], deltas[None], eps=norm.eps)[0]
    d_model = deltas.shape[-1]
    square = torch.linalg.vector_norm(deltas, dim=-1, dtype=sigma.dtype).square()
    if norm.kind == "layernorm":
        square = square - deltas.sum(-1, dtype=sigma.dtype).square() / d_model
    cross = torch.bmm(deltas, unit[..., None]).squeeze(-1).to(sigma.dtype) * sigma[:, None]
    own = (sigma.square() - norm.eps)[:, None] * d_model
    return torch.rsqrt((own + 2 * cross + square).clamp(min=0) / d_model + norm.eps)


def receiver_gradients(
    layer: LayerWeights, kind: str, at: Gradients, index: int
) -> Float[Tensor, "n width receivers d_model"]:
    """Gradient of the metric at the stream that each receiver of one kind reads, norm included.

    The derivative of `x_hat w + b`, `x_hat = (x - mean) / sigma`, pulled back: `(c - x_hat (c . x_hat) / d) / sigma`
    with the gain and the centring folded into `c`.
    """
    if kind == "mlp":
        return at.mlp_in[index].unsqueeze(-2)
    raw = {"q": at.q, "k": at.k, "v": at.v}[kind][index]
    n, width = raw.shape[:2]
    rows = folded(layer.ln1, layer.qkv.weights["qkv".index(kind)])
    raw = raw.flatten(0, 1).transpose(0, 1)
    if layer.ln1.kind == "none":
        return torch.bmm(raw, rows).unflatten(1, (n, width)).permute(1, 2, 0, 3)
    unit, sigma = unit_stream(layer.ln1, at.pre[index].flatten(0, 1))
    pulled = torch.bmm(raw / sigma[:, None], rows)
    along = torch.linalg.vecdot(pulled, unit)
    pulled.addcmul_(along[..., None], unit, value=-1 / unit.shape[-1])
    return pulled.unflatten(1, (n, width)).permute(1, 2, 0, 3)
