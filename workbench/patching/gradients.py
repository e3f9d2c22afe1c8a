"""Gradients of the metric at every receiver, from one pass over the windows."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.weights import LayerWeights, Norm, rotate
from workbench.patching.runs import Runs
from workbench.patching.window import attend_window


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Gradients of the metric (summed over prompts, so each prompt has its own) on the windows; one entry a layer.

    Attributes:
        pre: the stream into each block, which `ln1` normalises.
        mid: the stream into each MLP, which `ln2` normalises.
        q: at the query projection's output, before norm and rotation, `[n, width, n_heads, d_head]`.
        k: likewise for keys.
        v: likewise for values.
        z: at the mixed values.
        mlp_in: at the MLP's own copy of its input, before its norm.
        mlp_out: at the MLP's output.
        final: at the input of the final norm, answer position, `[n, d_model]`.
    """

    pre: tuple[Tensor, ...]
    mid: tuple[Tensor, ...]
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
    weights, window, spec = runs.weights, runs.window, runs.weights.spec
    table = None if weights.rotary is None else window.rotary(weights.rotary, weights.dtype)
    kept: dict[str, list[Tensor]] = {name: [] for name in ("q", "k", "v", "z", "mlp_in", "mlp_out")}
    pre, mid = [], []
    with torch.enable_grad():
        x = (runs.resid_pre[0] if start is None else start).detach().requires_grad_()
        for index, layer in enumerate(weights.layers):
            pre.append(x.detach())
            raw = layer.qkv(layer.ln1(x))
            for name, value in zip("qkv", raw, strict=True):
                kept[name].append(value)
            q, k = (
                norm(r) if norm is not None else r
                for norm, r in zip((layer.q_norm, layer.k_norm), raw[:2], strict=True)
            )
            if table is not None:
                q, k = rotate(q, table), rotate(k, table)
            z = attend_window(
                spec,
                window,
                q[None],
                k[None],
                raw[2][None],
                runs.keys[index][:, : window.prefix],
                runs.values[index][:, : window.prefix],
                at_answer=False,
            )[0]
            kept["z"].append(z)
            after = x + layer.out(z.flatten(-2))
            stream = x if spec.parallel else after
            mid.append(stream.detach())
            if layer.mlp is not None:
                own = stream.view_as(stream)
                out = layer.mlp(layer.ln2(own))
                kept["mlp_in"].append(own)
                kept["mlp_out"].append(out)
                after = after + out
            x = after
        final = x[torch.arange(len(x), device=x.device), window.answer_index]
        value = runs.metric.read(final).sum()
        wanted = [tensor for tensors in kept.values() for tensor in tensors]
        found = torch.autograd.grad(value, [*wanted, final], allow_unused=True)
    filled = [torch.zeros_like(t) if g is None else g for g, t in zip(found, [*wanted, final], strict=True)]
    at = 0
    parts: dict[str, tuple[Tensor, ...]] = {}
    for name, tensors in kept.items():
        parts[name] = tuple(filled[at : at + len(tensors)])
        at += len(tensors)
    return Gradients(
        pre=tuple(pre),
        mid=tuple(mid),
        q=parts["q"],
        k=parts["k"],
        v=parts["v"],
        z=parts["z"],
        mlp_in=parts["mlp_in"],
        mlp_out=parts["mlp_out"],
        final=filled[-1],
    )


def norm_vjp(
    norm: Norm, x: Float[Tensor, "*batch d"], gradient: Float[Tensor, "*batch receivers d"]
) -> Float[Tensor, "*batch receivers d"]:
    """Pull gradients at a norm's output back to its input, for several receivers of one stream.

    Source: the derivative of `w (x - mean) / sigma + b`; for RMSNorm without the mean.
    """
    if norm.kind == "none":
        return gradient
    assert norm.weight is not None
    centred = x - x.mean(-1, keepdim=True) if norm.kind == "layernorm" else x
    inverse = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + norm.eps)
    unit = (centred * inverse).unsqueeze(-2)
    gained = gradient * norm.weight
    pulled = gained - unit * (gained * unit).mean(-1, keepdim=True)
    if norm.kind == "layernorm":
        pulled = pulled - gained.mean(-1, keepdim=True)
    return pulled * inverse.unsqueeze(-2)


def receiver_gradients(
    layer: LayerWeights, kind: str, at: Gradients, index: int
) -> Float[Tensor, "n width receivers d_model"]:
    """Gradient of the metric at the stream that each receiver of one kind reads, norm included."""
    if kind == "mlp":
        return at.mlp_in[index].unsqueeze(-2)
    raw = {"q": at.q, "k": at.k, "v": at.v}[kind][index]
    matrices = layer.qkv.weights["qkv".index(kind)]
    normed = torch.einsum("nthe,hde->nthd", raw, matrices)
    return norm_vjp(layer.ln1, at.pre[index], normed)
