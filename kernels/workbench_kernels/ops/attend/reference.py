"""Attention of edges' windows over shared prefixes in plain torch: all keys side by side, all scores in memory."""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench_kernels.checks import accumulating


def suffix_attention(
    q: Float[Tensor, "edges n width n_heads d_head"],
    k: Float[Tensor, "edges n width n_kv_heads d_head"],
    v: Float[Tensor, "edges n width n_kv_heads d_head"],
    prefix_k: Float[Tensor, "n prefix n_kv_heads d_head"],
    prefix_v: Float[Tensor, "n prefix n_kv_heads d_head"],
    start: Tensor,
    scale: float,
) -> Float[Tensor, "edges n width n_heads d_head"]:
    """Causal attention of window queries over the prefix and the edge's own window; see the dispatch."""
    wide = accumulating(q.dtype)
    edges, _, width, n_heads, _ = q.shape
    group, prefix = n_heads // k.shape[3], prefix_k.shape[1]
    keys, values = (
        torch.cat((early.expand(edges, -1, -1, -1, -1), own), dim=2).to(wide).repeat_interleave(group, dim=3)
        for early, own in ((prefix_k, k), (prefix_v, v))
    )
    scores = torch.einsum("anthe,anuhe->anhtu", q.to(wide), keys) * scale
    index = torch.arange(prefix + width, device=q.device)
    before = (index < start[:, None])[:, None] & (index < prefix)
    own = (index >= prefix) & (index - prefix <= torch.arange(width, device=q.device)[:, None])
    pattern = scores.masked_fill(~(before | own)[:, None], float("-inf")).softmax(-1)
    return torch.einsum("anhtu,anuhe->anthe", pattern, values).to(q.dtype)
