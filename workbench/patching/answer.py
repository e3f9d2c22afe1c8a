"""Attention of the answer position alone, where nothing else of a layer is read.

One query per prompt and head meets all keys, so keys and values need not be formed: a score is the normalised stream
at the key's position times `W_K q`, and what a head mixes is `W_V` applied to the mixed stream. With `w` positions that
takes about `w` times fewer operations than projecting every position. Keys are formed where they are normalised or
rotated after the projection, values where so few positions or key/value heads make that cheaper.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.weights import at_least_float32, rotate
from workbench.patching.runs import Runs


def attend_at_answer(
    runs: Runs, index: int, normed: Float[Tensor, "edges n width d_model"]
) -> Float[Tensor, "edges n n_heads d_head"]:
    """`z` of each prompt's answer position, given one layer's normalised streams on the windows.

    Args:
        runs: caches of the prompts; keys and values before the windows are read from them.
        index: the layer.
        normed: output of its first norm.
    """
    weights, window, spec = runs.weights, runs.window, runs.weights.spec
    layer = weights.layers[index]
    edges, n, width, _ = normed.shape
    wide, prefix = at_least_float32(normed.dtype), window.prefix
    flat = normed.flatten(0, 1)
    q = _at_heads(window.at_answer(normed).flatten(0, 2), layer.W_Q, layer.qkv.biases[0])
    if layer.q_norm is not None:
        q = layer.q_norm(q)
    table = None if weights.rotary is None else window.rotary(weights.rotary, normed.dtype)
    if table is not None:
        rows = torch.arange(n, device=q.device)
        here = tuple(part[rows, window.answer_index] for part in table)
        q = rotate(q.unflatten(0, (edges, n)), (here[0], here[1])).flatten(0, 1)
    # [edges * n, kv, group, d_head]
    grouped = q.unflatten(1, (spec.n_kv_heads, spec.group_size)) * spec.attn_scale
    bias_k, bias_v = layer.qkv.biases[1:]
    formed = spec.n_heads * (width + spec.d_head) >= spec.n_kv_heads * width * spec.d_head

    if formed or table is not None or layer.k_norm is not None:
        k = _projected(flat, layer.W_K, bias_k)
        if layer.k_norm is not None:
            k = layer.k_norm(k)
        if table is not None:
            k = rotate(k.unflatten(0, (edges, n)), table).flatten(0, 1)
        scores = grouped @ k.permute(0, 2, 3, 1)
    else:
        pulled = torch.bmm(grouped.permute(1, 0, 2, 3).flatten(1, 2), layer.W_K.mT)
        pulled = pulled.unflatten(1, (edges * n, -1)).transpose(0, 1).flatten(1, 2)
        scores = torch.bmm(pulled, flat.mT).unflatten(1, (spec.n_kv_heads, -1))
        if bias_k is not None:
            scores += (grouped * bias_k[:, None]).sum(-1, keepdim=True)
    if prefix:
        early = grouped.unflatten(0, (edges, n)) @ runs.keys[index][:, :prefix].permute(0, 2, 3, 1)
        scores = torch.cat((early.flatten(0, 1), scores), dim=-1)
    scores = scores.unflatten(0, (edges, n)).to(wide) + window.mask(True, wide)[:, None]
    pattern = scores.softmax(dim=-1).to(normed.dtype).flatten(0, 1)

    own = pattern[..., prefix:]
    if formed:
        z = own @ _projected(flat, layer.W_V, bias_v).transpose(1, 2)
    else:
        mixed = torch.bmm(own.flatten(1, 2), flat).unflatten(1, (spec.n_kv_heads, spec.group_size))
        z = torch.bmm(mixed.transpose(0, 1).flatten(1, 2), layer.W_V)
        z = z.unflatten(1, (edges * n, -1)).transpose(0, 1)
        if bias_v is not None:
            z = z + own.sum(-1, keepdim=True) * bias_v[:, None]
    if prefix:
        early = pattern[..., :prefix].unflatten(0, (edges, n))
        z = z + (early @ runs.values[index][:, :prefix].transpose(1, 2)).flatten(0, 1)
    return z.flatten(1, 2).unflatten(0, (edges, n))


def _at_heads(x: Float[Tensor, "rows d_model"], matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Projection of a few rows `[rows, heads, d_head]`."""
    found = (x @ matrices).transpose(0, 1)
    return found if bias is None else found + bias


def _projected(x: Float[Tensor, "rows width d_model"], matrices: Tensor, bias: Tensor | None) -> Tensor:
    """Projection of all positions `[rows, width, heads, d_head]`."""
    joined = matrices.movedim(0, 1).flatten(1)
    found = (x @ joined).unflatten(-1, (len(matrices), -1))
    return found if bias is None else found + bias
