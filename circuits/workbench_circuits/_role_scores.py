"""The measurements behind head roles: where heads look from END, what they copy, and what turns the movers' queries."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.interventions.measured import batches
from workbench.models.forward import visible
from workbench.models.model import Model
from workbench.models.weights import ModelWeights, at_least_float32, rotate
from workbench.prompts import ABSENT, PromptPairs

Head = tuple[int, int]
_LOGITS_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class AtEnd:
    """What a run has at the answer position of every prompt.

    Attributes:
        attention: from the answer position to every key `[layers, n, heads, pos]`, float32 or better.
        z: what every head mixes there `[layers, n, heads, d_head]`.
        resid: the stream that enters every layer there `[layers, n, d_model]`.
        first_out: the stream behind the first block, at every position `[n, pos, d_model]`.
        first_in: the stream in front of it, likewise.
    """

    attention: Float[Tensor, "layers n heads pos"]
    z: Float[Tensor, "layers n heads d_head"]
    resid: Float[Tensor, "layers n d_model"]
    first_out: Float[Tensor, "n pos d_model"]
    first_in: Float[Tensor, "n pos d_model"]


@torch.no_grad()
def at_end(model: Model, tokens: Int[Tensor, "n pos"], pairs: PromptPairs) -> AtEnd:
    """Run one version of the prompts and keep what `AtEnd` says."""
    weights = model.fast_weights
    spec, n, width = weights.spec, len(tokens), tokens.shape[1]
    wide = at_least_float32(weights.dtype)
    attention = weights.embed.new_zeros(spec.n_layers, n, spec.n_heads, width, dtype=wide)
    z = weights.embed.new_zeros(spec.n_layers, n, spec.n_heads, spec.d_head)
    resid = weights.embed.new_zeros(spec.n_layers, n, spec.d_model)
    first_in, first_out = (weights.embed.new_zeros(n, width, spec.d_model) for _ in range(2))
    for rows in batches(pairs.lengths):
        ends = pairs.answer_positions[rows]
        inside = torch.arange(len(rows), device=weights.device)
        stop = int(pairs.lengths[rows].max()) if spec.causal else width

        def keep(site: str, rows: Tensor = rows, ends: Tensor = ends, inside: Tensor = inside, stop: int = stop):  # type: ignore[no-untyped-def]
            def see(layer: int, value: Tensor) -> None:
                if site == "pattern":
                    attention[layer, rows, :, :stop] = value[inside, :, ends].to(wide)
                elif site == "z":
                    z[layer, rows] = value[inside, ends]
                elif site == "resid_pre":
                    resid[layer, rows] = value[inside, ends]
                    if layer == 0:
                        first_in[rows, :stop] = value
                elif layer == 0:
                    first_out[rows, :stop] = value

            return see

        sites = ("pattern", "z", "resid_pre", "resid_post")
        model.forward(tokens[rows, :stop], observe={site: keep(site) for site in sites}, unembed_positions=ends)
    return AtEnd(attention=attention, z=z, resid=resid, first_out=first_out, first_in=first_in)


def holding(pairs: PromptPairs, sets: Int[Tensor, "n k"]) -> Bool[Tensor, "n pos"]:
    """At which positions of the clean prompts, up to the answer position, a token of the prompt's set stands."""
    members = torch.where(sets == ABSENT, -2, sets)
    found = (pairs.clean[:, :, None] == members[:, None, :]).any(-1)
    positions = torch.arange(pairs.clean.shape[1], device=pairs.clean.device)
    return found & (positions <= pairs.answer_positions[:, None])


def at_spans(pairs: PromptPairs, names: Sequence[str]) -> Bool[Tensor, "n pos"]:
    """At which positions any of the named spans stands."""
    found = torch.zeros_like(pairs.clean, dtype=torch.bool)
    for name in names:
        at = pairs.spans[name].to(found.device)
        there = (at != ABSENT).nonzero().flatten()
        found[there, at[there]] = True
    return found


@torch.no_grad()
def copying(
    weights: ModelWeights,
    heads: Sequence[Head],
    streams: Float[Tensor, "cases d_model"],
    tokens: Int[Tensor, " cases"],
    *,
    top: int = 5,
) -> tuple[Bool[Tensor, "heads cases"], Bool[Tensor, "heads cases"]]:
    """Whether what a head's OV circuit makes of a stream brings back its token, and whether its negative does.

    The stream is read through the head's own norm, value and output weights, the result through the final norm and the
    unembedding; a case counts if the token is among the `top` highest logits, ties against it.

    Args:
        weights: of the model.
        heads: layer and head.
        streams: a stream at each case's token.
        tokens: that token.
        top: how many highest logits count.
    """
    spec, m = weights.spec, len(tokens)
    straight = weights.ln_final.bias is None and weights.unembed.bias is None
    copies = torch.zeros(len(heads), m, dtype=torch.bool, device=streams.device)
    negative = torch.zeros_like(copies)

    def ranked(writes: Tensor) -> tuple[Tensor, Tensor]:
        """How many logits are not below and how many not above each case's own, `[heads, cases]`."""
        logits = weights.unembed(weights.ln_final(writes))
        own = logits.gather(-1, tokens.expand(len(logits), m)[..., None])
        return (logits >= own).sum(-1) - 1, (logits <= own).sum(-1) - 1

    step = max(1, _LOGITS_BYTES // (m * spec.d_vocab * streams.element_size()))
    for at in range(0, len(heads), step):
        writes = torch.stack([_written(weights, each, streams) for each in heads[at : at + step]])
        above, below = ranked(writes)
        copies[at : at + step] = above < top
        negative[at : at + step] = (below if straight else ranked(-writes)[0]) < top
    return copies, negative


def _written(weights: ModelWeights, head: Head, streams: Float[Tensor, "cases d_model"]) -> Tensor:
    layer, index = head
    block = weights.layers[layer]
    values = block.qkv(block.ln1(streams))[2][:, index // weights.spec.group_size]
    return values @ block.W_O[index]


@torch.no_grad()
def mover_attention_changes(
    model: Model,
    pairs: PromptPairs,
    clean: AtEnd,
    corrupted: AtEnd,
    movers: Sequence[Head],
    senders: Sequence[Head],
    right: Bool[Tensor, "n pos"],
    wrong: Bool[Tensor, "n pos"],
) -> Float[Tensor, "senders n"]:
    """How the movers' attention changes when each sender's write is the corrupted one in what their queries read.

    Nothing else reads that write. The attention is that from the answer position to right positions minus that to wrong
    ones, the mean over the movers behind the sender.

    Args:
        model: on the fast path.
        pairs: the prompts.
        clean: of the clean prompts.
        corrupted: of the corrupted prompts.
        movers: heads whose attention is measured.
        senders: heads whose write is replaced; NaN for one that no mover stands behind.
        right: positions that hold a right answer.
        wrong: positions that hold a wrong one.
    """
    weights = model.fast_weights
    keys = _keys(model, pairs, sorted({layer for layer, _ in movers}))
    sign = right.to(at_least_float32(weights.dtype)) - wrong.to(at_least_float32(weights.dtype))
    total = sign.new_zeros(len(senders), len(pairs))
    count = sign.new_zeros(len(senders), 1)
    for layer, head in movers:
        before = [at for at, (sender, _) in enumerate(senders) if sender < layer]
        if not before:
            continue
        spec = weights.spec
        own = keys[layer][:, :, head // spec.group_size]
        base = _focus(weights, pairs, clean.resid[layer][None], own, layer, head, sign)
        step = max(1, _LOGITS_BYTES // (8 * len(pairs) * max(spec.d_model, own.shape[1])))
        for at in range(0, len(before), step):
            chunk = before[at : at + step]
            deltas = torch.stack([_delta(weights, clean, corrupted, senders[index]) for index in chunk])
            total[chunk] += _focus(weights, pairs, clean.resid[layer] + deltas, own, layer, head, sign) - base
            count[chunk] += 1
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)


def _delta(weights: ModelWeights, clean: AtEnd, corrupted: AtEnd, sender: Head) -> Float[Tensor, "n d_model"]:
    layer, head = sender
    return (corrupted.z[layer, :, head] - clean.z[layer, :, head]) @ weights.layers[layer].W_O[head]


def _focus(
    weights: ModelWeights,
    pairs: PromptPairs,
    streams: Float[Tensor, "senders n d_model"],
    keys: Float[Tensor, "n pos d_head"],
    layer: int,
    head: int,
    sign: Float[Tensor, "n pos"],
) -> Float[Tensor, "senders n"]:
    """Attention of one head from the answer position, weighted by `sign`, for streams that its query reads there."""
    block, spec = weights.layers[layer], weights.spec
    q = block.ln1(streams) @ block.W_Q[head]
    bias = block.qkv.biases[0]
    if bias is not None:
        q = q + bias[head]
    if block.q_norm is not None:
        q = block.q_norm(q)
    if weights.rotary is not None:
        table = weights.rotary.table(keys.shape[1], q.dtype)
        here = tuple(part[pairs.answer_positions] for part in table)
        q = rotate(q.unsqueeze(-2), here).squeeze(-2)  # type: ignore[arg-type]
    scores = torch.einsum("snd,npd->snp", q, keys).to(sign.dtype) * spec.attn_scale
    if spec.causal:
        seen = visible(keys.shape[1], keys.shape[1], keys.device)[pairs.answer_positions]
        scores = scores.masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) * sign).sum(-1)


def _keys(
    model: Model, pairs: PromptPairs, layers: Sequence[int]
) -> dict[int, Float[Tensor, "n pos n_kv_heads d_head"]]:
    """Keys of some layers on the clean prompts, rotated."""
    spec, weights = model.spec, model.fast_weights
    shape = (*pairs.clean.shape, spec.n_kv_heads, spec.d_head)
    found = {layer: torch.zeros(shape, dtype=weights.dtype, device=weights.device) for layer in layers}
    for rows in batches(pairs.lengths):
        stop = int(pairs.lengths[rows].max()) if spec.causal else pairs.clean.shape[1]

        def see(layer: int, value: Tensor, rows: Tensor = rows, stop: int = stop) -> None:
            if layer in found:
                found[layer][rows, :stop] = value

        model.forward(pairs.clean[rows, :stop], observe={"k": see}, unembed_positions=pairs.answer_positions[rows])
    return found
