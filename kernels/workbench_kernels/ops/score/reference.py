"""Receiver scoring in plain torch: everything in memory, nothing fused, any float dtype."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench_kernels.checks import accumulating
from workbench_kernels.ops.score.inputs import Attention, Channel, Patch


def visible(attention: Attention) -> Bool[Tensor, "n width pos"]:
    """Which keys each window query sees."""
    width, length = attention.queries.shape[1], attention.keys.shape[1]
    device = attention.queries.device
    key = torch.arange(length, device=device)
    query = attention.start[:, None] + torch.arange(width, device=device)
    if not attention.causal:
        return torch.ones(len(query), width, length, dtype=torch.bool, device=device)
    return key <= query[:, :, None]


def softmax_worth(
    scores: Float[Tensor, "... width pos"], worth: Float[Tensor, "... width pos"], seen: Bool[Tensor, "... width pos"]
) -> Float[Tensor, "... width"]:
    """What the attention of scores is worth, query by query."""
    return (scores.masked_fill(~seen, float("-inf")).softmax(-1) * worth).sum(-1)


def base_attention(attention: Attention) -> tuple[Float[Tensor, "n n_heads width"], Float[Tensor, "n n_heads width"]]:
    """What clean attention is worth, and the logarithm of its normaliser; see the dispatch of the same name."""
    wide = accumulating(attention.queries.dtype)
    scores = _scores(attention.queries.to(wide), attention) * attention.scale
    seen = visible(attention)[:, None]
    worth = softmax_worth(scores, _worth(attention), seen)
    return worth, scores.masked_fill(~seen, float("-inf")).logsumexp(-1)


def value_gradient(attention: Attention) -> Float[Tensor, "n width n_kv_heads d_head"]:
    """Gradient at the window's values; see the dispatch of the same name."""
    wide = accumulating(attention.queries.dtype)
    scores = _scores(attention.queries.to(wide), attention) * attention.scale
    pattern = scores.masked_fill(~visible(attention)[:, None], float("-inf")).softmax(-1)
    pulled = torch.einsum("nhtu,nthe->nuhe", pattern, attention.gradient.to(wide))
    pulled = pulled.unflatten(2, (-1, attention.group)).sum(3)
    width = attention.queries.shape[1]
    rows = torch.arange(len(pulled), device=pulled.device)[:, None]
    return pulled[rows, attention.start[:, None] + torch.arange(width, device=pulled.device)]


def patched_projection(patch: Patch) -> Float[Tensor, "n width senders receivers d_head"]:
    """Patched queries (or keys) as they meet their counterparts."""
    wide = patch.base.dtype
    if patch.moved is not None:
        moved = patch.moved.to(wide)
    else:
        assert patch.mixed is not None
        assert patch.matrices is not None
        moved = torch.einsum("sntd,srde->ntsre", patch.mixed.to(wide), patch.matrices.to(wide))
    found = (moved + patch.base[:, :, None]) * patch.inverse[..., None, None]
    if patch.constant is not None:
        found = found + patch.constant
    if patch.norm_weight is not None:
        found = found * torch.rsqrt(found.square().mean(-1, keepdim=True) + patch.norm_eps) * patch.norm_weight
    if patch.cos is None or patch.sin is None:
        return found
    cos, sin = (table[:, :, None, None] for table in (patch.cos, patch.sin))
    turning, still = found[..., : patch.rotary_dim], found[..., patch.rotary_dim :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat((turning * cos + torch.cat((-second, first), dim=-1) * sin, still), dim=-1)


def receiver_effects(
    attention: Attention, patch: Patch, channel: Channel, heads: Tensor
) -> Float[Tensor, "n senders receivers"]:
    """Effects of every sender on every receiver; see the dispatch of the same name."""
    wide = accumulating(attention.queries.dtype)
    patched = patched_projection(patch)
    n, width, _, receivers, _ = patched.shape
    base = base_attention(attention)[0]
    worth, seen = _worth(attention), visible(attention)[:, None]
    if channel == "q":
        keys = attention.keys.to(wide)[:, :, heads // attention.group]
        scores = torch.einsum("ntsre,nure->nsrtu", patched, keys) * attention.scale
        found = softmax_worth(scores, worth[:, None, heads], seen[:, None])
        return (found - base[:, None, heads]).sum(-1)
    members = heads[:, None] * attention.group + torch.arange(attention.group, device=heads.device)
    queries = attention.queries.to(wide)[:, :, members.flatten()].unflatten(2, (receivers, -1))
    keys = attention.keys.to(wide)[:, None, :, heads].repeat(1, patch.senders, 1, 1, 1)
    rows = torch.arange(n, device=heads.device)[:, None]
    positions = attention.start[:, None] + torch.arange(width, device=heads.device)
    keys[rows, :, positions] = patched
    scores = torch.einsum("ntrge,nsure->nsrgtu", queries, keys) * attention.scale
    found = softmax_worth(scores, worth[:, None, members], seen[:, None, None])
    return (found - base[:, None, members]).sum((-1, -2))


def _scores(queries: Tensor, attention: Attention) -> Float[Tensor, "n n_heads width pos"]:
    keys = attention.keys.to(queries.dtype).repeat_interleave(attention.group, dim=2)
    return torch.einsum("nthe,nuhe->nhtu", queries, keys)


def _worth(attention: Attention) -> Float[Tensor, "n n_heads width pos"]:
    """Value of each key times the gradient at what each query mixes."""
    wide = accumulating(attention.queries.dtype)
    values = attention.values.to(wide).repeat_interleave(attention.group, dim=2)
    return torch.einsum("nthe,nuhe->nhtu", attention.gradient.to(wide), values)
