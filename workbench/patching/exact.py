"""Exact edge effects, many edges at a time.

For an edge the receiver is recomputed on its own copy of the stream, in which one sender's write is replaced; that
changes what the receiver writes, and everything downstream of it is recomputed. A batch of edges walks through the
layers together: it starts at the first receiver's layer from the cached base stream, and an edge joins the walk where
its receiver writes. Only window positions are walked, the last layer runs at the answer position alone, and the metric
reads the final stream there.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

import workbench_kernels as kernels
from workbench.models.weights import ModelWeights, Norm, rotate
from workbench.patching.answer import attend_at_answer
from workbench.patching.graph import Edges, Kind, Receiver, Sender
from workbench.patching.runs import Runs
from workbench.patching.window import attend_window

CPU_TOKENS = 2048
"""Edges x prompts x positions walked together on a CPU: enough for efficient products, small enough for its caches."""

GPU_TOKENS = 1 << 18

Stage = tuple[int, int]
"""Layer, and 0 where attention has written, 1 where the MLP has, 2 for the unembedding."""


def stage(weights: ModelWeights, receiver: Receiver) -> Stage:
    """Where in the walk the edges of a receiver join."""
    if receiver.kind == "logits":
        return weights.spec.n_layers, 2
    return receiver.layer, 1 if receiver.kind == "mlp" or weights.spec.parallel else 0


def edges_per_batch(runs: Runs, budget_bytes: int) -> int:
    """How many edges walk together within a memory budget."""
    spec, window = runs.weights.spec, runs.window
    n, width = window.positions.shape
    keys = width + window.prefix
    per_token = 6 * spec.d_model + 3 * spec.d_mlp + 6 * spec.n_heads * spec.d_head + 4 * spec.n_heads * keys
    per_edge = n * width * per_token * max(4, runs.final.element_size())
    tokens = GPU_TOKENS if runs.final.is_cuda else CPU_TOKENS
    return int(max(1, min(budget_bytes // per_edge, tokens // (n * width))))


@torch.no_grad()
def exact_effects(runs: Runs, edges: Edges, *, budget_bytes: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Effects of edges, batch by batch.

    Args:
        runs: caches of the prompts.
        edges: the edges.
        budget_bytes: bound on the memory of one batch.

    Yields:
        Indices into `edges` and their effects `[edges, n]`, in units of the metric.
    """
    receivers, senders = edges.graph.receivers, edges.graph.senders
    stages = [stage(runs.weights, receivers[r]) for r in edges.receiver]
    order = sorted(range(len(edges)), key=lambda i: (stages[i], int(edges.receiver[i])))
    size = edges_per_batch(runs, budget_bytes)
    for first in range(0, len(order), size):
        batch = order[first : first + size]
        joins: dict[Stage, list[int]] = defaultdict(list)
        for index in batch:
            joins[stages[index]].append(index)
        found: list[int] = []
        streams: dict[Stage, Callable[[], list[Tensor]]] = {}
        for at, joined in joins.items():
            found.extend(joined)
            part = [(senders[edges.sender[i]], receivers[edges.receiver[i]]) for i in joined]
            streams[at] = partial(_patched_streams, runs, at, part)
        yield torch.tensor(found), walk(runs, streams) - runs.base_value


def base_stream(runs: Runs, at: Stage) -> Float[Tensor, "n q d_model"]:
    """The base run's stream at a stage; from the last layer's attention on only the answer position."""
    layer, part = at
    last = runs.weights.spec.n_layers - 1
    if layer > last or (layer == last and part == 1):
        return runs.final[:, None]
    if part == 1:
        return runs.resid_pre[layer + 1]
    return runs.window.at_answer(runs.resid_mid[layer]) if layer == last else runs.resid_mid[layer]


def walk(
    runs: Runs, joins: Mapping[Stage, Callable[[], list[Float[Tensor, "edges n q d_model"]]]]
) -> Float[Tensor, "edges n"]:
    """Take patched streams through the rest of the model to the metric.

    Args:
        runs: caches of the prompts.
        joins: for each stage, in ascending order, what makes the streams that join there; called when the walk arrives.

    Returns:
        The metric of every stream, in the order in which they joined.
    """
    weights, window, spec = runs.weights, runs.window, runs.weights.spec
    last = spec.n_layers - 1
    stream: Tensor | None = None

    def join(stream: Tensor | None, at: Stage) -> Tensor | None:
        if at not in joins:
            return stream
        return torch.cat(([] if stream is None else [stream]) + joins[at]())

    for index in range(min(layer for layer, _ in joins), spec.n_layers):
        layer = weights.layers[index]
        at_answer = index == last
        mid = None if stream is None else _attention(runs, index, stream, at_answer)
        if spec.parallel:
            if mid is not None and layer.mlp is not None:
                assert stream is not None
                mid += layer.mlp(layer.ln2(window.at_answer(stream) if at_answer else stream))
            stream = mid
        else:
            stream = join(mid, (index, 0))
            if stream is not None and layer.mlp is not None:
                stream = layer.mlp(layer.ln2(stream)).add_(stream)
        stream = join(stream, (index, 1))
    stream = join(stream, (spec.n_layers, 2))
    assert stream is not None
    return runs.metric.read(stream.squeeze(-2))


def _attention(runs: Runs, index: int, stream: Tensor, at_answer: bool) -> Float[Tensor, "edges n q d_model"]:
    """One attention block on walked streams; at the last layer only the answer position comes out."""
    weights, window = runs.weights, runs.window
    layer = weights.layers[index]
    normed = layer.ln1(stream)
    if at_answer:
        z = attend_at_answer(runs, index, normed)
        return window.at_answer(stream) + layer.out(z.flatten(-2)).unsqueeze(-2)
    q, k, v = layer.qkv(normed)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if weights.rotary is not None:
        table = window.rotary(weights.rotary, stream.dtype)
        q, k = rotate(q, table), rotate(k, table)
    prefix = window.prefix
    z = attend_window(
        weights.spec,
        window,
        q,
        k,
        v,
        runs.keys[index][:, :prefix],
        runs.values[index][:, :prefix],
    )
    return layer.out(z.flatten(-2)).add_(stream)


def _patched_streams(runs: Runs, at: Stage, joined: Sequence[tuple[Sender, Receiver]]) -> list[Tensor]:
    """The stream after each edge's receiver has written, receivers of one kind at a time, in the order of `joined`."""
    base, parts = base_stream(runs, at), []
    for kind, members in groupby(joined, key=lambda edge: edge[1].kind):
        edges = list(members)
        parts.append(base + written(runs, kind, edges[0][1].layer, edges))
    return parts


def written(
    runs: Runs, kind: Kind, layer: int, edges: Sequence[tuple[Sender, Receiver]]
) -> Float[Tensor, "edges n q d_model"]:
    """What receivers of one kind and layer write more than in the base run; for `logits`, what they read more."""
    deltas = runs.writes([sender for sender, _ in edges])
    heads = [receiver.head for _, receiver in edges]
    if kind == "logits":
        return runs.window.at_answer(deltas)
    if kind == "mlp":
        return _mlp_written(runs, layer, deltas)
    if kind == "q":
        return _query_written(runs, layer, heads, deltas)
    return _key_value_written(runs, layer, kind, heads, deltas)


def _mlp_written(runs: Runs, index: int, deltas: Tensor) -> Float[Tensor, "edges n q d_model"]:
    layer = runs.weights.layers[index]
    assert layer.mlp is not None
    base, out = runs.resid_mid[index], runs.mlp_out[index]
    if index == runs.weights.spec.n_layers - 1:
        base, out, deltas = (runs.window.at_answer(x) for x in (base, out, deltas))
    return layer.mlp(_normed(layer.ln2, base, deltas)) - out


def _normed(norm: Norm, base: Tensor, deltas: Float[Tensor, "edges n q d_model"]) -> Float[Tensor, "edges n q d_model"]:
    """A base stream with each edge's delta, normalised; on CUDA without the sum in memory."""
    if norm.kind != "none" and kernels.backend_for(deltas) == "triton":
        assert norm.weight is not None
        return kernels.norm_delta(norm.kind, base, deltas, norm.weight, norm.bias, eps=norm.eps)
    return norm(base + deltas)


def _project(runs: Runs, index: int, kind: str, heads: list[int], normed: Tensor) -> Tensor:
    """Queries, keys or values `[edges, n, q, d_head]` of one head per edge, before norm and rotation."""
    which = "qkv".index(kind)
    qkv = runs.weights.layers[index].qkv
    projected = (normed.flatten(1, 2) @ qkv.weights[which][heads]).unflatten(1, normed.shape[1:3])
    bias = qkv.biases[which]
    return projected if bias is None else projected + bias[heads][:, None, None]


def _finish(runs: Runs, index: int, kind: str, raw: Tensor) -> Tensor:
    """Query/key norm and rotation of `[edges, n, width, d_head]`."""
    layer = runs.weights.layers[index]
    norm = {"q": layer.q_norm, "k": layer.k_norm}.get(kind)
    if norm is not None:
        raw = norm(raw)
    if runs.weights.rotary is not None and kind != "v":
        table = runs.window.rotary(runs.weights.rotary, raw.dtype)
        raw = rotate(raw[..., None, :], table).squeeze(-2)
    return raw


def _query_written(runs: Runs, index: int, heads: list[int], deltas: Tensor) -> Float[Tensor, "edges n q d_model"]:
    weights, window, spec = runs.weights, runs.window, runs.weights.spec
    layer = weights.layers[index]
    normed = _normed(layer.ln1, runs.resid_pre[index], deltas)
    q = _finish(runs, index, "q", _project(runs, index, "q", heads, normed))
    kv = [head // spec.group_size for head in heads]
    keys = runs.keys[index].permute(2, 0, 3, 1)[kv]
    values = runs.values[index].permute(2, 0, 1, 3)[kv]
    mask, base = runs.visible, runs.z[index].permute(2, 0, 1, 3)[heads]
    if index == spec.n_layers - 1:
        q, base = window.at_answer(q), window.at_answer(base)
        mask = mask[torch.arange(len(mask), device=mask.device), window.answer_index][:, None]
    pattern = ((q @ keys).to(mask.dtype) * spec.attn_scale + mask).softmax(-1)
    change = pattern.to(values.dtype) @ values - base
    return (change.flatten(1, 2) @ layer.W_O[heads]).unflatten(1, change.shape[1:3])


def _key_value_written(
    runs: Runs, index: int, kind: str, heads: list[int], deltas: Tensor
) -> Float[Tensor, "edges n q d_model"]:
    """A patched key or value serves every query head of its group."""
    weights, window, spec = runs.weights, runs.window, runs.weights.spec
    layer, group = weights.layers[index], spec.group_size
    at_answer = index == spec.n_layers - 1
    rows = torch.arange(len(window.start), device=deltas.device)
    normed = _normed(layer.ln1, runs.resid_pre[index], deltas)
    fresh = _finish(runs, index, kind, _project(runs, index, kind, heads, normed))
    patched = (runs.keys if kind == "k" else runs.values)[index].permute(2, 0, 1, 3)[heads]
    patched[:, rows[:, None], window.positions] = fresh
    # [edges, n, group, q, d_head] for the query heads of each edge's group
    members = torch.tensor([[head * group + i for i in range(group)] for head in heads], device=deltas.device)
    base = runs.z[index].permute(2, 0, 1, 3)[members].transpose(1, 2)
    mask = runs.visible
    queries = runs.queries[index].permute(2, 0, 1, 3)[members].transpose(1, 2)
    if at_answer:
        base = base[:, rows, :, window.answer_index].transpose(0, 1).unsqueeze(-2)
        queries = queries[:, rows, :, window.answer_index].transpose(0, 1).unsqueeze(-2)
        mask = mask[rows, window.answer_index][:, None]
    keys = patched if kind == "k" else runs.keys[index].permute(2, 0, 1, 3)[heads]
    values = patched if kind == "v" else runs.values[index].permute(2, 0, 1, 3)[heads]
    scores = (queries @ keys.mT[:, :, None]).to(mask.dtype) * spec.attn_scale + mask[:, None]
    change = scores.softmax(-1).to(values.dtype) @ values[:, :, None] - base
    merged = change.transpose(2, 3).flatten(3, 4)
    n, n_q = merged.shape[1:3]
    out = layer.W_O.unflatten(0, (spec.n_kv_heads, group))[heads].flatten(1, 2)
    return (merged.flatten(1, 2) @ out).unflatten(1, (n, n_q))
