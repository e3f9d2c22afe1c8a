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
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.weights import Norm, at_least_float32, rotate
from workbench.patching.deltas import sender_deltas
from workbench.patching.gradients import Gradients, folded, gradients, patched_inverse, unit_stream
from workbench.patching.graph import Edges
from workbench.patching.kernel_scores import KernelScores, served_by_kernels
from workbench.patching.precision import Precision
from workbench.patching.receiver_mlp import mlp_effects
from workbench.patching.runs import Runs
from workbench.patching.sweep import Group, by_receiver_layer


@torch.no_grad()
def receiver_exact_effects(
    runs: Runs, edges: Edges, *, budget_bytes: int, precision: Precision = "fp32"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Receiver-exact effects of edges; edges to `logits` come out exact.

    Args:
        runs: caches of the prompts.
        edges: the edges.
        budget_bytes: bound on temporary memory; scores of fewer senders are held at a time under a small one.
        precision: how float32 operands of products are read. The caller sets torch to it; here it chooses what kernels
            do, and that an empty patch is taken off where it would have an effect by rounding alone.

    Yields:
        Indices into `edges` and their effects `[edges, n]`, receiver layer by receiver layer.
    """
    at = gradients(runs)
    sweep = by_receiver_layer(edges)
    deltas = sender_deltas(runs, edges.graph, sweep.senders)
    senders = [edges.graph.senders[number] for number in sweep.senders]
    rounded = precision != "fp32"
    base_value = runs.metric.read(runs.final) if rounded else runs.base_value
    fused = None
    if served_by_kernels(runs):
        fused = KernelScores(runs, at, senders, precision=precision, budget_bytes=budget_bytes)
    view: _Normed | None = None
    for group in sweep.groups:
        seen = deltas[:, :, : group.readable]
        if group.kind == "logits":
            moved = runs.final + runs.window.at_answer(seen.permute(2, 0, 1, 3)).squeeze(-2)
            effects = (runs.metric.read(moved) - base_value).T.unsqueeze(-1)
        elif group.kind == "mlp":
            effects = mlp_effects(runs, at, group, seen, senders[: group.readable], rounded)
        else:
            if view is None or view.layer != group.layer or view.deltas.shape[2] < group.readable:
                view = _Normed.of(runs, group.layer, seen)
            effects = _attention(runs, at, group, view, budget_bytes, fused)[:, : group.readable]
        yield group.index, effects[:, group.sender_column, group.receiver_column].T


@dataclass(frozen=True, kw_only=True)
class _Normed:
    """`ln1` of every patched stream of a layer, kept as what it takes to apply it after a projection.

    Attributes:
        layer: which layer.
        deltas: `[n, width, senders, d_model]`.
        inverse: 1/sigma of the patched streams `[n, width, senders]`, float32 or better.
        unit: base stream, centred where the norm centres, over its own sigma `[n, width, d_model]`.
        sigma: of the base stream `[n, width]`.
    """

    layer: int
    deltas: Tensor
    inverse: Tensor
    unit: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, runs: Runs, layer: int, deltas: Tensor) -> "_Normed":
        norm, x = runs.weights.layers[layer].ln1, runs.resid_pre[layer]
        unit, sigma = unit_stream(norm, x.to(at_least_float32(x.dtype)))
        inverse = patched_inverse(norm, unit.to(x.dtype).flatten(0, 1), sigma.flatten(), deltas.flatten(0, 1))
        inverse = inverse.unflatten(0, x.shape[:2])
        return cls(layer=layer, deltas=deltas, inverse=inverse, unit=unit.to(x.dtype), sigma=sigma)

    def senders(self, part: slice) -> "_Normed":
        """The same for some of the senders."""
        return replace(self, deltas=self.deltas[:, :, part], inverse=self.inverse[:, :, part])

    def onto(self, rows: Float[Tensor, "n rows d_model"], position: int) -> Float[Tensor, "n senders rows"]:
        """Patched normalised streams of one window position on folded rows, without the norm's bias."""
        dtype = self.inverse.dtype
        moved = torch.bmm(self.deltas[:, position], rows.mT).to(dtype)
        base = torch.bmm(self.unit[:, position, None], rows.mT).to(dtype) * self.sigma[:, position, None, None]
        return (moved + base) * self.inverse[:, position, :, None]


def _project(
    deltas: Float[Tensor, "n width senders d_model"], rows: Float[Tensor, "n width rows d_model"]
) -> Float[Tensor, "n width senders rows"]:
    """One product per prompt and position, without a copy of the deltas."""
    return torch.bmm(deltas.flatten(0, 1), rows.flatten(0, 1).mT).unflatten(0, deltas.shape[:2])


def _attention(
    runs: Runs, at: Gradients, group: Group, view: _Normed, budget_bytes: int, fused: KernelScores | None
) -> Float[Tensor, "n senders heads"]:
    spec = runs.weights.spec
    if group.kind == "v":
        return _value_edges(
            runs, group, view, _value_gradient(runs, at, group) if fused is None else fused.value_gradient(group)
        )
    if fused is not None:
        layer, is_query = runs.weights.layers[group.layer], group.kind == "q"
        matrices = (layer.W_Q if is_query else layer.W_K)[group.heads]
        constant = _constant(layer.qkv.biases[0 if is_query else 1], layer.ln1, matrices, torch.tensor(group.heads))
        return fused.effects(group, view.deltas, view.inverse, view.unit, view.sigma, constant)
    n, width, n_senders, _ = view.deltas.shape
    is_query = group.kind == "q"
    repeats = 1 if is_query else spec.group_size
    own = torch.tensor(group.heads)
    heads = own if is_query else (own[:, None] * repeats + torch.arange(repeats)).flatten()
    reach = runs.length if is_query else width
    absorbed = not spec.qk_norm and reach * repeats <= 2 * spec.d_head
    make = _Absorbed if absorbed else _Projected
    worth = _worth(runs, at, group.layer, heads)
    per_sender = n * len(heads) * (4 * reach if is_query else 4 * width * (width + 1)) * 4
    per_sender += 0 if absorbed else n * width * len(own) * spec.d_head * 16
    size = max(1, budget_bytes // per_sender)
    finish = _query_effects if is_query else _key_effects
    found = []
    for first in range(0, n_senders, size):
        scores = make(runs, group, view.senders(slice(first, first + size)), heads)
        found.append(finish(runs, group.layer, heads, worth, scores))
    return torch.cat(found, dim=1).unflatten(-1, (len(own), repeats)).sum(-1)


def _worth(runs: Runs, at: Gradients, layer: int, heads: Tensor) -> Float[Tensor, "n width pos heads"]:
    """What a unit of attention of window query t on key u is worth: value of u times the gradient at z of t."""
    spec = runs.weights.spec
    values = runs.values[layer][:, :, heads // spec.group_size]
    dtype = at_least_float32(values.dtype)
    return torch.einsum("nuhe,nthe->nhtu", values.to(dtype), at.z[layer][:, :, heads].to(dtype)).permute(0, 2, 3, 1)


def _base_effects(runs: Runs, layer: int, heads: Tensor, worth: Tensor) -> Float[Tensor, "n 1 heads"]:
    """What the base run's attention is worth, over all window queries."""
    return (runs.patterns[layer][:, heads] * worth.permute(0, 3, 1, 2)).sum((-1, -2))[:, None]


def _query_effects(
    runs: Runs, layer: int, heads: Tensor, worth: Tensor, scores: "_Scores"
) -> Float[Tensor, "n senders heads"]:
    """Every window query attends afresh to all keys that it sees."""
    total = -_base_effects(runs, layer, heads, worth)
    for t in range(runs.window.width):
        upto = runs.window.prefix + t + 1 if runs.window.causal else runs.length
        patched = scores.at(t, upto) + runs.visible[:, t, None, :upto, None]
        total = total + (patched.softmax(-2) * worth[:, t, None, :upto]).sum(-2)
    return total


def _key_effects(
    runs: Runs, layer: int, heads: Tensor, worth: Tensor, scores: "_Scores"
) -> Float[Tensor, "n senders heads"]:
    """Window queries attend to patched keys; keys before the window enter as one, with joint score and mean worth."""
    window = runs.window
    rows = torch.arange(len(window.start), device=worth.device)[:, None]
    own_worth = worth.transpose(1, 2)[rows, window.positions]
    patched = torch.stack([scores.at(u, 0) for u in range(window.width)], dim=1)
    if window.causal:
        later = torch.ones(window.width, window.width, dtype=torch.bool, device=worth.device).tril(-1)
        patched.masked_fill_(later[None, :, None, :, None], float("-inf"))
    if window.prefix:
        early = runs.scores(layer)[:, heads, :, : window.prefix]
        early = early.masked_fill(~window.before[:, None, None], float("-inf"))
        joint = early.logsumexp(-1)
        share = (early - joint.clamp(min=torch.finfo(joint.dtype).min)[..., None]).exp()
        mean_worth = (share * worth[:, :, : window.prefix].permute(0, 3, 1, 2)).sum(-1).transpose(1, 2)
        joint = joint.transpose(1, 2)[:, None, None].expand(-1, 1, patched.shape[2], -1, -1)
        patched = torch.cat((patched, joint), dim=1)
        own_worth = torch.cat((own_worth, mean_worth[:, None]), dim=1)
    # softmax over keys, dimension 1 of [n, keys, senders, queries, heads]
    return (patched.softmax(1) * own_worth[:, :, None]).sum((1, 3)) - _base_effects(runs, layer, heads, worth)


def _value_gradient(runs: Runs, at: Gradients, group: Group) -> Float[Tensor, "n width heads d_head"]:
    """Gradient at the values of a group's receivers: attention paid to each, times the gradient at z."""
    spec = runs.weights.spec
    rows = torch.arange(len(runs.window.start), device=runs.final.device)[:, None]
    pattern = runs.patterns[group.layer].transpose(1, 3)[rows, runs.window.positions].transpose(1, 3)
    gradient = at.z[group.layer].to(pattern.dtype)
    pulled = torch.einsum("nhtu,nthe->nuhe", pattern, gradient)
    return pulled.unflatten(2, (spec.n_kv_heads, spec.group_size)).sum(3)[:, :, group.heads]


def _value_edges(
    runs: Runs, group: Group, view: _Normed, pulled: Float[Tensor, "n width heads d_head"]
) -> Float[Tensor, "n senders heads"]:
    """The pattern is fixed, so a value edge is linear in the normalised stream."""
    layer, dtype = runs.weights.layers[group.layer], pulled.dtype
    lines = torch.einsum("nuge,ged->nugd", pulled.to(view.deltas.dtype), folded(layer.ln1, layer.W_V[group.heads]))
    base = _project(view.unit[:, :, None], lines).to(dtype)
    moved = _project(view.deltas, lines).to(dtype)
    patched = (base * view.sigma[..., None, None] + moved) * view.inverse[..., None]
    return (patched - base).sum(1)


def _constant(bias: Tensor | None, norm: Norm, matrices: Tensor, heads: Tensor) -> Float[Tensor, "heads d_head"] | None:
    """The part of a query or key that comes from biases: its own, and the norm's through the projection."""
    own = None if bias is None else bias[heads]
    if norm.bias is None:
        return own
    through = norm.bias @ matrices
    return through if own is None else own + through


class _Scores(Protocol):
    """Scores of patched queries (or keys) of one window position."""

    def at(self, position: int, upto: int) -> Float[Tensor, "n senders others heads"]:
        """Scores with keys before `upto`, or with all window queries."""
        ...


class _Absorbed:
    """Deltas projected on one row per query-key pair: no patched query or key is ever formed."""

    def __init__(self, runs: Runs, group: Group, view: _Normed, heads: Tensor) -> None:
        spec, layer = runs.weights.spec, runs.weights.layers[group.layer]
        self.view, self.runs, self.is_query = view, runs, group.kind == "q"
        kv = heads // spec.group_size
        own = heads if self.is_query else kv
        matrices = (layer.W_Q if self.is_query else layer.W_K)[own]
        others = runs.keys[group.layer][:, :, kv] if self.is_query else runs.queries[group.layer][:, :, heads]
        self.others = others.permute(2, 0, 1, 3) * spec.attn_scale
        self.folded = folded(layer.ln1, matrices)
        self.constant = _constant(layer.qkv.biases[0 if self.is_query else 1], layer.ln1, matrices, own)
        self.fixed = None if runs.weights.rotary else self._rows(self.others)

    def _rows(self, others: Float[Tensor, "heads n others d_head"]) -> tuple[Tensor, Tensor | None]:
        """Rows `[n, others, heads, d_model]` and what biases add `[n, 1, others, heads]`."""
        heads, n, _, _ = others.shape
        rows = torch.bmm(others.reshape(heads, -1, others.shape[-1]), self.folded)
        rows = rows.unflatten(1, (n, -1)).permute(1, 2, 0, 3).contiguous()
        if self.constant is None:
            return rows, None
        return rows, (others @ self.constant[:, None, :, None]).squeeze(-1).permute(1, 2, 0)[:, None]

    def at(self, position: int, upto: int) -> Float[Tensor, "n senders others heads"]:
        """See `_Scores`; queries before a key do not see it and are left at 0."""
        first, stop = (0, upto) if self.is_query else (position if self.runs.window.causal else 0, self.others.shape[2])
        if self.fixed is not None:
            rows, added = self.fixed[0][:, first:stop], self.fixed[1]
            added = None if added is None else added[:, :, first:stop]
        else:
            assert self.runs.weights.rotary is not None
            cos, sin = self.runs.window.rotary(self.runs.weights.rotary, self.others.dtype)
            table = (cos[:, position, None], -sin[:, position, None])
            turned = rotate(self.others[:, :, first:stop, None], (table[0][None], table[1][None])).squeeze(-2)
            rows, added = self._rows(turned)
        found = self.view.onto(rows.flatten(1, 2), position).unflatten(-1, (stop - first, -1))
        if added is not None:
            found = found + added.to(found.dtype)
        if first:
            found = torch.cat((found.new_zeros(*found.shape[:2], first, found.shape[-1]), found), dim=2)
        return found


class _Projected:
    """Deltas projected to queries (or keys): for long prompts, and where queries and keys are normalised."""

    def __init__(self, runs: Runs, group: Group, view: _Normed, heads: Tensor) -> None:
        weights, spec = runs.weights, runs.weights.spec
        layer = weights.layers[group.layer]
        is_query = group.kind == "q"
        own = torch.tensor(group.heads)
        matrices = (layer.W_Q if is_query else layer.W_K)[own]
        dtype = view.inverse.dtype
        constant = _constant(layer.qkv.biases[0 if is_query else 1], layer.ln1, matrices, own)
        rows = folded(layer.ln1, matrices).flatten(0, 1).mT
        base = (view.unit @ rows).to(dtype)[:, :, None] * view.sigma[..., None, None]
        raw = ((view.deltas @ rows).to(dtype) + base) * view.inverse[..., None]
        raw = raw.unflatten(-1, (len(own), spec.d_head))
        if constant is not None:
            raw = raw + constant
        norm = layer.q_norm if is_query else layer.k_norm
        if norm is not None:
            raw = norm(raw)
        if weights.rotary is not None:
            cos, sin = runs.window.rotary(weights.rotary, raw.dtype)
            raw = rotate(raw, (cos[:, :, None], sin[:, :, None]))
        self.own = raw.repeat_interleave(len(heads) // len(own), dim=-2) * spec.attn_scale
        others = runs.keys[group.layer] if is_query else runs.queries[group.layer]
        self.others = others[:, :, heads // spec.group_size if is_query else heads].to(dtype)

    def at(self, position: int, upto: int) -> Float[Tensor, "n senders others heads"]:
        """See `_Scores`."""
        others = self.others[:, :upto] if upto else self.others
        return torch.einsum("nshe,nuhe->nsuh", self.own[:, position], others)
