r"""Receiver-exact effects: the receiver recomputed exactly, the rest of the model linearised.

For a receiver r that writes `out_r`, the effect of a sender s is approximated by
`sum over positions of <gradient at out_r, out_r(x + delta_s) - out_r(x)>`: norm, query/key norm, rotation, softmax and
MLP are exact, everything downstream is first order.

Attention receivers never meet the sender's whole write. With `ln(x + d) = (x + d - mean) / sigma * w + b`, a score is

    q'_t . k_u = ((x_t + d_t) . c_{t,u}) / sigma'_t + const,   c_{t,u} = centred(w * W_Q R_t^T k_u)

so a delta is projected on one vector per (query, key) pair that it can touch, and sigma' follows from `x.x`, `x.d` and
`d.d`. Key edges are the same with the queries' vectors, value edges need one vector per position,
`W_V sum_t A_{t,u} g_t`, and no attention at all. Where those vectors outnumber the head's dimensions, or queries and
keys are normalised, deltas are projected to queries and keys instead; both forms give the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.weights import Norm, at_least_float32, rotate
from workbench.patching.deltas import sender_deltas
from workbench.patching.gradients import Gradients, gradients
from workbench.patching.graph import Edges
from workbench.patching.runs import Runs
from workbench.patching.sweep import Group, by_receiver_layer

MLP_ROWS = 4096
"""Rows of an MLP recomputed together."""


@torch.no_grad()
def receiver_exact_effects(runs: Runs, edges: Edges, *, budget_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Receiver-exact effects of edges; edges to `logits` come out exact.

    Args:
        runs: caches of the prompts.
        edges: the edges.
        budget_bytes: bound on temporary memory; scores of fewer senders are held at a time under a small one.

    Yields:
        Indices into `edges` and their effects `[edges, n]`, receiver layer by receiver layer.
    """
    at = gradients(runs)
    sweep = by_receiver_layer(edges)
    deltas = sender_deltas(runs, edges.graph, sweep.senders)
    view: _Normed | None = None
    for group in sweep.groups:
        seen = deltas[:, :, : group.readable]
        if group.kind == "logits":
            moved = runs.final + runs.window.at_answer(seen.permute(2, 0, 1, 3)).squeeze(-2)
            effects = (runs.metric.read(moved) - runs.base_value).T.unsqueeze(-1)
        elif group.kind == "mlp":
            effects = _mlp(runs, at, group, seen)
        else:
            if view is None or view.layer != group.layer or view.deltas.shape[2] < group.readable:
                view = _Normed.of(runs, group.layer, seen)
            effects = _attention(runs, at, group, view, budget_bytes)[:, : group.readable]
        yield group.index, effects[:, group.sender_column, group.receiver_column].T


@dataclass(frozen=True, kw_only=True)
class _Normed:
    """`ln1` of every patched stream of a layer, kept as what it takes to apply it after a projection.

    Attributes:
        layer: which layer.
        deltas: `[n, width, senders, d_model]`.
        inverse: 1/sigma of the patched streams `[n, width, senders]`, float32 or better.
        base: base stream, centred where the norm centres, over its own sigma `[n, width, d_model]`.
        sigma: of the base stream `[n, width]`.
    """

    layer: int
    deltas: Tensor
    inverse: Tensor
    base: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, runs: Runs, layer: int, deltas: Tensor) -> "_Normed":
        norm, x = runs.weights.layers[layer].ln1, runs.resid_pre[layer]
        wide = at_least_float32(x.dtype)
        if norm.kind == "none":
            ones = torch.ones(deltas.shape[:-1], dtype=wide, device=x.device)
            return cls(layer=layer, deltas=deltas, inverse=ones, base=x, sigma=ones[..., 0])
        d_model = x.shape[-1]
        centred = (x - x.mean(-1, keepdim=True) if norm.kind == "layernorm" else x).to(wide)
        square = torch.linalg.vector_norm(deltas, dim=-1, dtype=wide).square()
        if norm.kind == "layernorm":
            square = square - deltas.sum(-1, dtype=wide).square() / d_model
        cross = (deltas @ centred.to(deltas.dtype)[..., None]).squeeze(-1).to(wide)
        own = centred.square().sum(-1)
        variance = (own[..., None] + 2 * cross + square).clamp(min=0) / d_model
        sigma = (own / d_model + norm.eps).sqrt()
        return cls(
            layer=layer,
            deltas=deltas,
            inverse=torch.rsqrt(variance + norm.eps),
            base=(centred / sigma[..., None]).to(x.dtype),
            sigma=sigma,
        )


def _gained(norm: Norm, columns: Float[Tensor, "*batch d_model columns"]) -> Float[Tensor, "*batch d_model columns"]:
    """Fold a norm's gain, and its centring, into vectors that normalised streams are projected on."""
    if norm.kind == "none":
        return columns
    assert norm.weight is not None
    columns = columns * norm.weight[:, None]
    return columns - columns.mean(-2, keepdim=True) if norm.kind == "layernorm" else columns


def _attention(
    runs: Runs, at: Gradients, group: Group, view: _Normed, budget_bytes: int
) -> Float[Tensor, "n senders heads"]:
    spec = runs.weights.spec
    n, width, n_senders, _ = view.deltas.shape
    if group.kind == "v":
        return _value_edges(runs, at, group, view)
    members = torch.tensor([[h * spec.group_size + i for i in range(spec.group_size)] for h in group.heads])
    if group.kind == "q":
        members = torch.tensor(group.heads)[:, None]
    length = runs.keys[group.layer].shape[1]
    pairs_per_position = length if group.kind == "q" else width
    absorbed = not spec.qk_norm and pairs_per_position * members.shape[1] <= 2 * spec.d_head
    scores = _absorbed_scores if absorbed else _projected_scores
    weight = _key_weights(runs, at, group.layer, members.flatten())
    found = []
    per_sender = n * members.numel() * width * (length if group.kind == "q" else width + 1) * 4 * 4
    per_sender += n * width * members.numel() * spec.d_head * 16
    size = max(1, budget_bytes // per_sender)
    for first in range(0, n_senders, size):
        part = _Normed(
            layer=view.layer,
            deltas=view.deltas[:, :, first : first + size],
            inverse=view.inverse[:, :, first : first + size],
            base=view.base,
            sigma=view.sigma,
        )
        patched = scores(runs, group, part, members)
        finish = _query_effects if group.kind == "q" else _key_effects
        effects = finish(runs, group.layer, members.flatten(), weight, patched)
        found.append(effects.unflatten(-1, members.shape).sum(-1))
    return torch.cat(found, dim=1)


def _key_weights(runs: Runs, at: Gradients, layer: int, heads: Tensor) -> Float[Tensor, "n heads width pos"]:
    """What a unit of attention of window query t on key u is worth: value of u times the gradient at z of t."""
    spec = runs.weights.spec
    values = runs.values[layer][:, :, heads // spec.group_size]
    dtype = at_least_float32(values.dtype)
    return torch.einsum("nuhe,nthe->nhtu", values.to(dtype), at.z[layer][:, :, heads].to(dtype))


def _query_effects(
    runs: Runs, layer: int, heads: Tensor, weight: Tensor, scores: Float[Tensor, "n width senders heads pos"]
) -> Float[Tensor, "n senders heads"]:
    worth = weight.permute(0, 2, 1, 3)[:, :, None]
    base = (runs.patterns[layer][:, heads].permute(0, 2, 1, 3)[:, :, None] * worth).sum(-1)
    seen = scores + runs.visible[:, :, None, None]
    return ((seen.softmax(-1) * worth).sum(-1) - base).sum(1)


def _key_effects(
    runs: Runs, layer: int, heads: Tensor, weight: Tensor, scores: Float[Tensor, "n senders heads width width"]
) -> Float[Tensor, "n senders heads"]:
    """Keys before the window are unchanged: they enter as one key with their joint score and mean worth."""
    window = runs.window
    base = (runs.patterns[layer][:, heads] * weight).sum(-1)[:, None]
    rows = torch.arange(len(window.start), device=scores.device)[:, None]
    own_weight = weight.transpose(1, 3)[rows, window.positions].transpose(1, 3)[:, None]
    unseen = torch.zeros(window.within.shape, dtype=scores.dtype, device=scores.device)
    unseen.masked_fill_(~window.within, float("-inf"))
    scores = scores + unseen[:, None, None]
    if window.prefix:
        early = runs.scores(layer)[:, heads, :, : window.prefix]
        early = early.masked_fill(~window.before[:, None, None], float("-inf"))
        joint = early.logsumexp(-1)
        share = (early - joint.clamp(min=torch.finfo(joint.dtype).min)[..., None]).exp()
        mean_worth = (share * weight[..., : window.prefix]).sum(-1)
        scores = torch.cat((scores, joint[:, None, ..., None].expand(*scores.shape[:-1], 1)), dim=-1)
        own_weight = torch.cat((own_weight, mean_worth[:, None, ..., None]), dim=-1)
    return ((scores.softmax(-1) * own_weight).sum(-1) - base).sum(-1)


def _value_edges(runs: Runs, at: Gradients, group: Group, view: _Normed) -> Float[Tensor, "n senders heads"]:
    """The pattern is fixed, so a value edge is linear in the normalised stream."""
    spec, layer = runs.weights.spec, runs.weights.layers[group.layer]
    rows = torch.arange(len(runs.window.start), device=view.deltas.device)[:, None]
    pattern = runs.patterns[group.layer].transpose(1, 3)[rows, runs.window.positions].transpose(1, 3)
    gradient = at.z[group.layer].to(pattern.dtype)
    pulled = torch.einsum("nhtu,nthe->nuhe", pattern, gradient)
    pulled = pulled.unflatten(2, (spec.n_kv_heads, spec.group_size)).sum(3)[:, :, group.heads]
    columns = torch.einsum("nuge,gde->nudg", pulled.to(view.deltas.dtype), layer.W_V[group.heads])
    columns = _gained(layer.ln1, columns)
    base = (view.base[..., None, :] @ columns).to(pattern.dtype)
    moved = (view.deltas @ columns).to(pattern.dtype)
    patched = (base * view.sigma[..., None, None] + moved) * view.inverse[..., None]
    return (patched - base).sum(1)


def _absorbed_scores(runs: Runs, group: Group, view: _Normed, members: Tensor) -> Tensor:
    """Scores of the patched queries (or keys) by projecting deltas on one vector per query-key pair."""
    weights, window, spec = runs.weights, runs.window, runs.weights.spec
    layer = weights.layers[group.layer]
    heads = members.flatten()
    kv = heads // spec.group_size
    own_is_query = group.kind == "q"
    which = 0 if own_is_query else 1
    if own_is_query:
        others = runs.keys[group.layer][:, :, kv]
        matrices = layer.W_Q[heads]
    else:
        others = runs.queries[group.layer][:, :, heads]
        matrices = layer.W_K[kv]
    width = window.width
    n, n_others = others.shape[:2]
    turned = others[:, None]
    if weights.rotary is not None:
        cos, sin = window.rotary(weights.rotary, others.dtype)
        table = (cos[:, :, None].expand(-1, -1, n_others, -1), -sin[:, :, None].expand(-1, -1, n_others, -1))
        turned = rotate(turned.expand(-1, width, -1, -1, -1), table)
    # [n, own, heads, d_head, others] -> [n, own, d_model, heads * others]
    turned = turned.permute(0, 1, 3, 4, 2) * spec.attn_scale
    columns = _gained(layer.ln1, (matrices @ turned).transpose(2, 3).flatten(3, 4))
    dtype = view.inverse.dtype
    constant = _constant(layer.qkv.biases[which], layer.ln1, matrices, heads if own_is_query else kv)
    moved = (view.deltas @ columns).unflatten(-1, (len(heads), n_others)).to(dtype)
    base = (view.base.to(columns.dtype)[..., None, :] @ columns).unflatten(-1, (len(heads), n_others)).to(dtype)
    scores = (moved + base * view.sigma[..., None, None, None]) * view.inverse[..., None, None]
    if constant is not None:
        scores = scores + (constant[:, None] @ turned).squeeze(-2)[:, :, None].to(dtype)
    return scores if own_is_query else scores.permute(0, 2, 3, 4, 1)


def _constant(bias: Tensor | None, norm: Norm, matrices: Tensor, heads: Tensor) -> Float[Tensor, "heads d_head"] | None:
    """The part of a query or key that comes from biases: its own, and the norm's through the projection."""
    own = None if bias is None else bias[heads]
    if norm.bias is None:
        return own
    through = norm.bias @ matrices
    return through if own is None else own + through


def _projected_scores(runs: Runs, group: Group, view: _Normed, members: Tensor) -> Tensor:
    """Scores of the patched queries (or keys) by projecting deltas to `d_head` dimensions."""
    weights, spec = runs.weights, runs.weights.spec
    layer = weights.layers[group.layer]
    own = torch.tensor(group.heads)
    own_is_query = group.kind == "q"
    which = 0 if own_is_query else 1
    matrices = layer.qkv.weights[which][own]
    columns = _gained(layer.ln1, matrices.transpose(0, 1).flatten(1))
    constant = _constant(layer.qkv.biases[which], layer.ln1, matrices, own)
    dtype = view.inverse.dtype
    moved = (view.deltas @ columns).to(dtype)
    base = (view.base @ columns).to(dtype)[:, :, None] * view.sigma[..., None, None]
    raw = ((moved + base) * view.inverse[..., None]).unflatten(-1, (len(own), spec.d_head))
    if constant is not None:
        raw = raw + constant
    norm = layer.q_norm if own_is_query else layer.k_norm
    if norm is not None:
        raw = norm(raw)
    if weights.rotary is not None:
        cos, sin = runs.window.rotary(weights.rotary, raw.dtype)
        raw = rotate(raw, (cos[:, :, None], sin[:, :, None]))
    raw = raw * spec.attn_scale
    heads = members.flatten()
    if own_is_query:
        keys = runs.keys[group.layer][:, :, heads // spec.group_size].to(dtype)
        return torch.einsum("ntshe,nuhe->ntshu", raw, keys)
    raw = raw.repeat_interleave(members.shape[1], dim=-2)
    return torch.einsum("nushe,nthe->nshtu", raw, runs.queries[group.layer][:, :, heads].to(dtype))


def _mlp(runs: Runs, at: Gradients, group: Group, deltas: Tensor) -> Float[Tensor, "n senders 1"]:
    """The MLP's output map is contracted with the gradient once; only its hidden layer is recomputed."""
    layer = runs.weights.layers[group.layer]
    assert layer.mlp is not None
    n, width, n_senders, d_model = deltas.shape
    x, gradient = runs.resid_mid[group.layer].flatten(0, 1), at.mlp_out[group.layer].flatten(0, 1)
    worth = gradient @ layer.mlp.w_out.matrix.mT
    live = (gradient != 0).any(-1).nonzero().squeeze(-1)
    dtype = at_least_float32(x.dtype)
    found = torch.zeros(n * width, n_senders, dtype=dtype, device=x.device)
    flat = deltas.flatten(0, 1)
    base = (layer.mlp.hidden(layer.ln2(x[live])) * worth[live]).sum(-1, dtype=dtype)
    size = max(1, MLP_ROWS // n_senders)
    for first in range(0, len(live), size):
        at_rows = live[first : first + size]
        hidden = layer.mlp.hidden(layer.ln2(x[at_rows, None] + flat[at_rows]))
        found[at_rows] = (hidden @ worth[at_rows, :, None]).squeeze(-1).to(dtype) - base[first : first + size, None]
    return found.unflatten(0, (n, width)).sum(1).unsqueeze(-1)
