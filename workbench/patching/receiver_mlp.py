"""Receiver-exact effects of MLPs: their hidden layers recomputed, the rest of the model linearised."""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.weights import Linear, MLPWeights, Norm, at_least_float32
from workbench.patching.gradients import Gradients, folded, patched_inverse, unit_stream
from workbench.patching.graph import Sender
from workbench.patching.runs import Runs
from workbench.patching.sweep import Group

CPU_ROWS, GPU_ROWS = 1 << 12, 1 << 14
"""Rows of an MLP recomputed together: on a CPU as many as its caches take."""


def mlp_effects(
    runs: Runs, at: Gradients, group: Group, deltas: Tensor, senders: Sequence[Sender], rounded: bool
) -> Float[Tensor, "n senders 1"]:
    """Effects of senders on one layer's MLP.

    The MLP's output map is contracted with the gradient once; only its hidden layer is recomputed.

    A head's write has rank `d_head`. With more rows than the stream has dimensions to spare, it is cheaper to take its
    mixed values through `W_O W_in` than its write through `W_in`.
    """
    layer, x = runs.weights.layers[group.layer], runs.resid_mid[group.layer].flatten(0, 1)
    mlp, dtype = layer.mlp, at_least_float32(x.dtype)
    assert mlp is not None
    gradient = at.mlp_out[group.layer].flatten(0, 1)
    live = (gradient != 0).any(-1).nonzero().squeeze(-1)
    found = torch.zeros(deltas.shape[2], len(gradient), dtype=dtype, device=x.device)
    worth = gradient[live] @ mlp.w_out.matrix.mT
    unit, sigma = unit_stream(layer.ln2, x[live].to(dtype))
    flat = deltas.flatten(0, 1)[live]
    inverse = patched_inverse(layer.ln2, unit.to(x.dtype), sigma, flat)
    maps = [mlp.w_in] if mlp.gate is None else [mlp.gate, mlp.w_in]
    rows = [folded(layer.ln2, m.matrix).mT for m in maps]
    fixed = [(unit.to(x.dtype) @ row) * sigma[:, None].to(x.dtype) for row in rows]
    added = [_bias_through(layer.ln2, m) for m in maps]
    base = _hidden(mlp, [f / sigma[:, None].to(x.dtype) for f in fixed], added)
    base_worth = None if rounded else (base * worth).sum(-1, dtype=dtype)
    spec = runs.weights.spec
    low_rank = len(live) * (spec.d_model - spec.d_head) > spec.d_head * spec.d_model
    size = max(1, (GPU_ROWS if x.is_cuda else CPU_ROWS) // max(1, len(live)))
    columns = range(deltas.shape[2])
    heads = [c for c in columns if low_rank and senders[c].kind == "head"]
    for part in _chunks([c for c in columns if c not in set(heads)], size):
        moved = [flat[:, part].transpose(0, 1) @ row for row in rows]
        _score_hidden(mlp, part, moved, fixed, added, inverse, worth, base, base_worth, found, live)
    for part in _chunks(heads, size):
        mixed = torch.stack([runs.delta_z[senders[c].layer, senders[c].head].flatten(0, 1)[live] for c in part])
        outs = torch.stack([runs.weights.layers[senders[c].layer].W_O[senders[c].head] for c in part])
        moved = [mixed @ (outs @ row) for row in rows]
        _score_hidden(mlp, part, moved, fixed, added, inverse, worth, base, base_worth, found, live)
    return found.T.unflatten(0, deltas.shape[:2]).sum(1).unsqueeze(-1)


def _score_hidden(
    mlp: MLPWeights,
    part: list[int],
    moved: list[Float[Tensor, "senders rows d_mlp"]],
    fixed: list[Float[Tensor, "rows d_mlp"]],
    added: list[Tensor | None],
    inverse: Float[Tensor, "rows senders"],
    worth: Float[Tensor, "rows d_mlp"],
    base: Float[Tensor, "rows d_mlp"],
    base_worth: Float[Tensor, "rows"] | None,
    found: Float[Tensor, "senders all_rows"],
    live: Tensor,
) -> None:
    """Score some senders on an MLP from their projected deltas, into `found`.

    Without `base_worth` it is the change of hidden activations that meets `worth`: what products round is then small.
    """
    scale = inverse[:, part].T[..., None].to(worth.dtype)
    hidden = _hidden(mlp, [(m.add_(f)).mul_(scale) for m, f in zip(moved, fixed, strict=True)], added)
    if base_worth is None:
        hidden = hidden - base
    scores = (hidden.transpose(0, 1) @ worth[..., None]).squeeze(-1).T.to(found.dtype)
    columns = torch.tensor(part, device=found.device)
    found[columns[:, None], live] = scores if base_worth is None else scores - base_worth


def _hidden(mlp: MLPWeights, projected: list[Tensor], added: list[Tensor | None]) -> Tensor:
    """Hidden activations from projected normalised streams, before biases: of `w_in`, or of gate and `w_in`."""
    first, *rest = (p if a is None else p + a for p, a in zip(projected, added, strict=True))
    return mlp.act(first) if not rest else mlp.act(first) * rest[0]


def _bias_through(norm: Norm, linear: Linear) -> Float[Tensor, "d_out"] | None:
    """What biases add behind a norm and a map: the map's own, and the norm's through it."""
    if norm.bias is None:
        return linear.bias
    through = norm.bias @ linear.matrix
    return through if linear.bias is None else through + linear.bias


def _chunks(items: list[int], size: int) -> Iterator[list[int]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
