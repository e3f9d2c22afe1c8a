"""The functional forward pass over the canonical weights.

The patching engine and the analyzers call these pieces with streams of their own; `forward` strings them together.
Prompts are padded on the right, so the causal mask alone keeps padding from reaching any real position.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import PromptError
from workbench.models.spec import ModelSpec
from workbench.models.weights import LayerWeights, ModelWeights, at_least_float32, rotate

Observer = Callable[[int, Tensor], None]
Editor = Callable[[int, Tensor], Tensor]
SITES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")
"""Where `forward` can be observed, in the order in which a block computes them."""


def embed(weights: ModelWeights, tokens: Int[Tensor, "n pos"], first: int = 0) -> Float[Tensor, "n pos d_model"]:
    """Token embedding plus learned positions, the node `input`."""
    resid = F.embedding(tokens, weights.embed)
    if weights.position_embed is not None:
        resid = resid + weights.position_embed[first : first + tokens.shape[1]]
    return resid


def queries_keys_values(
    weights: ModelWeights, layer: LayerWeights, normed: Float[Tensor, "*batch pos d_model"], first: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries `[..., pos, n_heads, d_head]`; keys, values `[..., pos, n_kv_heads, d_head]`; normalised, rotated."""
    q, k, v = layer.qkv(normed)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if weights.rotary is not None:
        table = weights.rotary.table(normed.shape[-2], normed.dtype, first)
        q, k = rotate(q, table), rotate(k, table)
    return q, k, v


def visible(queries: int, keys: int, device: torch.device | str = "cpu") -> Tensor:
    """Causal mask `[queries, keys]`; the last query sees the last key."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attention_pattern(
    spec: ModelSpec, q: Float[Tensor, "n q n_heads d_head"], k: Float[Tensor, "n k n_kv_heads d_head"]
) -> Float[Tensor, "n n_heads q k"]:
    """Attention after the softmax, in float32 or better."""
    dtype = at_least_float32(q.dtype)
    grouped = q.transpose(1, 2).unflatten(1, (spec.n_kv_heads, spec.group_size))
    scores = (grouped @ k.permute(0, 2, 3, 1).unsqueeze(2)).flatten(1, 2).to(dtype) * spec.attn_scale
    if spec.causal:
        scores = scores.masked_fill(~visible(q.shape[1], k.shape[1], q.device), float("-inf"))
    return scores.softmax(dim=-1)


def mix_values(
    spec: ModelSpec, pattern: Float[Tensor, "n n_heads q k"], v: Float[Tensor, "n k n_kv_heads d_head"]
) -> Float[Tensor, "n q n_heads d_head"]:
    """`z`: the values that every head mixes, before W_O."""
    grouped = pattern.to(v.dtype).unflatten(1, (spec.n_kv_heads, spec.group_size))
    return (grouped @ v.transpose(1, 2).unsqueeze(2)).flatten(1, 2).transpose(1, 2)


def attend(spec: ModelSpec, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "n q n_heads d_head"]:
    """`z` without the pattern in memory, by torch's fused attention."""
    causal = spec.causal and q.shape[1] > 1
    mask = visible(q.shape[1], k.shape[1], q.device) if causal and q.shape[1] != k.shape[1] else None
    return F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=spec.attn_scale,
        enable_gqa=spec.group_size > 1,
    ).transpose(1, 2)


def unembed(weights: ModelWeights, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
    """Final norm and unembedding."""
    return weights.unembed(weights.ln_final(resid))


def run_blocks(
    weights: ModelWeights,
    resid: Float[Tensor, "n pos d_model"],
    *,
    observe: Mapping[str, Observer] | None = None,
    edit: Mapping[str, Editor] | None = None,
    first_position: int = 0,
) -> Float[Tensor, "n pos d_model"]:
    """Take a stream through all blocks, up to the final norm; `observe` and `edit` as in `forward`."""
    spec = weights.spec
    watchers, editors = dict(observe or {}), dict(edit or {})
    with_pattern = "pattern" in watchers or "pattern" in editors

    def at(site: str, layer: int, value: Tensor) -> Tensor:
        if site in editors:
            value = edited(editors[site], site, layer, value)
        if site in watchers:
            watchers[site](layer, value)
        return value

    for index, layer in enumerate(weights.layers):
        resid = at("resid_pre", index, resid)
        q, k, v = queries_keys_values(weights, layer, layer.ln1(resid), first_position)
        q, k, v = at("q", index, q), at("k", index, k), at("v", index, v)
        if with_pattern:
            pattern = at("pattern", index, attention_pattern(spec, q, k))
            z = mix_values(spec, pattern, v)
        else:
            z = attend(spec, q, k, v)
        z = at("z", index, z)
        attn_out = at("attn_out", index, layer.out(z.flatten(-2)))
        mid = resid + attn_out
        if not spec.parallel:
            mid = at("resid_mid", index, mid)
        if layer.mlp is not None:
            mlp_out = at("mlp_out", index, layer.mlp(layer.ln2(resid if spec.parallel else mid)))
            mid = mid + mlp_out
        resid = at("resid_post", index, mid)
    return resid


def edited(editor: Editor, site: str, layer: int, value: Tensor) -> Tensor:
    """What an editor puts in place of a value.

    Raises:
        PromptError: if it is no tensor of the shape and dtype of the value.
    """
    new = editor(layer, value)
    if not isinstance(new, Tensor) or new.shape != value.shape or new.dtype != value.dtype:
        got = f"{tuple(new.shape)} {new.dtype}" if isinstance(new, Tensor) else type(new).__name__
        raise PromptError(
            f"the editor of {site!r} returned {got} at layer {layer}; expected {tuple(value.shape)} {value.dtype}: "
            "return the tensor that takes the value's place, or the value itself to leave it"
        )
    return new


def forward(
    weights: ModelWeights,
    tokens: Int[Tensor, "n pos"],
    *,
    observe: Mapping[str, Observer] | None = None,
    edit: Mapping[str, Editor] | None = None,
    unembed_positions: Int[Tensor, "n"] | None = None,
    first_position: int = 0,
) -> Tensor:
    """Run the model.

    Args:
        weights: canonical view of the model.
        tokens: token ids, padded on the right.
        observe: callbacks by site (see `SITES`), each called with the layer and the tensor. `pattern` comes in float32
            `[n, n_heads, query, key]`; asking for it turns the fused attention off.
        edit: by site, what takes a value's place, called with the layer and the tensor; what follows, and what
            `observe` sees, is the edited value. Leave the given tensor as it is: return a new one.
        unembed_positions: unembed just this position of each prompt.
        first_position: position of the first token.

    Returns:
        Logits `[n, pos, d_vocab]`, or `[n, d_vocab]` with `unembed_positions`.
    """
    resid = run_blocks(
        weights, embed(weights, tokens, first_position), observe=observe, edit=edit, first_position=first_position
    )
    if unembed_positions is not None:
        resid = resid[torch.arange(len(tokens), device=tokens.device), unembed_positions]
    return unembed(weights, resid)
