"""Which models the fast path serves, and how their modules become canonical weights.

A config field that is neither handled here nor known to be without effect, and that is not at its default, sends the
model to the hook path with the reason. What passes is then compared with the wrapped module, number by number.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.models.forward import forward
from workbench.models.spec import ModelSpec
from workbench.models.weights import QKV, LayerWeights, Linear, MLPWeights, ModelWeights, Norm, Rotary

WITHOUT_EFFECT = frozenset(
    [
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "_name_or_path",
        "model_type",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "use_cache",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "id2label",
        "label2id",
        "problem_type",
        "task_specific_params",
        "attention_dropout",
        "hidden_dropout",
        "classifier_dropout",
        "resid_pdrop",
        "embd_pdrop",
        "attn_pdrop",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "n_ctx",
        "gradient_checkpointing",
        "unk_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "tokenizer_class",
        "_attn_implementation_autoset",
        "is_llama_config",
        "rope_interleaved",
    ]
)
"""Fields that change nothing in the evaluation-mode forward pass of the families below."""

STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})
"""Rotary scalings whose frequencies do not depend on the length of the prompt."""

ROPE_FIELDS = frozenset(
    [
        "rope_type",
        "type",
        "rope_theta",
        "partial_rotary_factor",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "attention_factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ]
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one architecture is read.

    Attributes:
        handled: config fields whose every value the reader honours.
        build: from the transformers module to canonical weights.
    """

    handled: frozenset[str]
    build: Callable[[nn.Module], ModelWeights]


def _linear(module: Any) -> Linear:
    """View of an `nn.Linear`, or of transformers' `Conv1D`, whose weight lies the other way round."""
    weight: Tensor = module.weight.detach()
    bias = getattr(module, "bias", None)
    matrix = weight if type(module).__name__ == "Conv1D" else weight.mT
    return Linear(matrix=matrix, bias=None if bias is None else bias.detach())


def _layernorm(module: Any) -> Norm:
    bias = None if module.bias is None else module.bias.detach()
    return Norm(kind="layernorm", weight=module.weight.detach(), bias=bias, eps=module.eps)


def _rmsnorm(module: Any) -> Norm:
    return Norm(kind="rmsnorm", weight=module.weight.detach(), eps=module.variance_epsilon)


def _rotary(module: Any) -> Rotary:
    return Rotary(inv_freq=module.inv_freq.detach(), factor=float(module.attention_scaling))


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """The module's activation; the tanh form of GELU that transformers spells out is torch's single fused call."""
    if type(module).__name__ in {"NewGELUActivation", "GELUTanh"}:
        return partial(F.gelu, approximate="tanh")
    return module


def _gpt2(module: Any) -> ModelWeights:
    config, body = module.config, module.transformer
    d_head = config.n_embd // config.n_head
    layers = []
    for block in body.h:
        qkv = QKV(
            layout="concatenated",
            maps=(_linear(block.attn.c_attn),),
            n_heads=config.n_head,
            n_kv_heads=config.n_head,
            d_head=d_head,
        )
        mlp = MLPWeights(w_in=_linear(block.mlp.c_fc), w_out=_linear(block.mlp.c_proj), act=_activation(block.mlp.act))
        layers.append(
            LayerWeights(
                ln1=_layernorm(block.ln_1),
                ln2=_layernorm(block.ln_2),
                qkv=qkv,
                out=_linear(block.attn.c_proj),
                mlp=mlp,
            )
        )
    spec = ModelSpec(
        architecture="gpt2",
        n_layers=config.n_layer,
        n_heads=config.n_head,
        n_kv_heads=config.n_head,
        d_model=config.n_embd,
        d_head=d_head,
        d_mlp=config.n_inner or 4 * config.n_embd,
        d_vocab=config.vocab_size,
        n_ctx=config.n_positions,
        norm="layernorm",
        positions="learned",
        attn_scale=d_head**-0.5 if config.scale_attn_weights else 1.0,
    )
    return ModelWeights(
        spec=spec,
        embed=body.wte.weight.detach(),
        position_embed=body.wpe.weight.detach(),
        rotary=None,
        layers=tuple(layers),
        ln_final=_layernorm(body.ln_f),
        unembed=_linear(module.lm_head),
    )


def _gpt_neox(module: Any) -> ModelWeights:
    config, body = module.config, module.gpt_neox
    d_head = config.hidden_size // config.num_attention_heads
    rotary = _rotary(body.rotary_emb)
    layers = []
    for block in body.layers:
        qkv = QKV(
            layout="interleaved",
            maps=(_linear(block.attention.query_key_value),),
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_attention_heads,
            d_head=d_head,
        )
        mlp = MLPWeights(
            w_in=_linear(block.mlp.dense_h_to_4h),
            w_out=_linear(block.mlp.dense_4h_to_h),
            act=_activation(block.mlp.act),
        )
        layers.append(
            LayerWeights(
                ln1=_layernorm(block.input_layernorm),
                ln2=_layernorm(block.post_attention_layernorm),
                qkv=qkv,
                out=_linear(block.attention.dense),
                mlp=mlp,
            )
        )
    spec = ModelSpec(
        architecture="gpt_neox",
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_attention_heads,
        d_model=config.hidden_size,
        d_head=d_head,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        norm="layernorm",
        positions="rotary",
        rotary_dim=2 * len(rotary.inv_freq),
        parallel=config.use_parallel_residual,
        attn_scale=d_head**-0.5,
    )
    return ModelWeights(
        spec=spec,
        embed=body.embed_in.weight.detach(),
        position_embed=None,
        rotary=rotary,
        layers=tuple(layers),
        ln_final=_layernorm(body.final_layer_norm),
        unembed=_linear(module.get_output_embeddings()),
    )


def _llama_like(module: Any) -> ModelWeights:
    """Llama, Mistral, Qwen2 and Qwen3 differ only in biases and in the norms of queries and keys."""
    config, body = module.config, module.model
    first = body.layers[0].self_attn
    d_head = first.head_dim
    rotary = _rotary(body.rotary_emb)
    layers = []
    for block in body.layers:
        attention, feed = block.self_attn, block.mlp
        qkv = QKV(
            layout="separate",
            maps=(_linear(attention.q_proj), _linear(attention.k_proj), _linear(attention.v_proj)),
            n_heads=config.num_attention_heads,
            n_kv_heads=config.num_key_value_heads,
            d_head=d_head,
        )
        normed = hasattr(attention, "q_norm")
        layers.append(
            LayerWeights(
                ln1=_rmsnorm(block.input_layernorm),
                ln2=_rmsnorm(block.post_attention_layernorm),
                qkv=qkv,
                out=_linear(attention.o_proj),
                mlp=MLPWeights(
                    w_in=_linear(feed.up_proj),
                    gate=_linear(feed.gate_proj),
                    w_out=_linear(feed.down_proj),
                    act=_activation(feed.act_fn),
                ),
                q_norm=_rmsnorm(attention.q_norm) if normed else None,
                k_norm=_rmsnorm(attention.k_norm) if normed else None,
            )
        )
    spec = ModelSpec(
        architecture=config.model_type,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_model=config.hidden_size,
        d_head=d_head,
        d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size,
        n_ctx=config.max_position_embeddings,
        norm="rmsnorm",
        positions="rotary",
        rotary_dim=2 * len(rotary.inv_freq),
        gated=True,
        qk_norm=hasattr(first, "q_norm"),
        attn_scale=first.scaling,
    )
    return ModelWeights(
        spec=spec,
        embed=body.embed_tokens.weight.detach(),
        position_embed=None,
        rotary=rotary,
        layers=tuple(layers),
        ln_final=_rmsnorm(body.norm),
        unembed=_linear(module.lm_head),
    )


_ROTARY_DECODER = frozenset(
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "rope_parameters",
        "head_dim",
        "sliding_window",
        "layer_types",
    ]
)

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        handled=frozenset(
            [
                "vocab_size",
                "n_positions",
                "n_embd",
                "n_layer",
                "n_head",
                "n_inner",
                "activation_function",
                "layer_norm_epsilon",
                "scale_attn_weights",
                "tie_word_embeddings",
            ]
        ),
        build=_gpt2,
    ),
    "gpt_neox": Family(
        handled=frozenset(
            [
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "hidden_act",
                "max_position_embeddings",
                "layer_norm_eps",
                "tie_word_embeddings",
                "use_parallel_residual",
                "rope_parameters",
                "attention_bias",
            ]
        ),
        build=_gpt_neox,
    ),
    "llama": Family(handled=_ROTARY_DECODER | {"attention_bias", "mlp_bias"}, build=_llama_like),
    "mistral": Family(handled=_ROTARY_DECODER, build=_llama_like),
    "qwen2": Family(handled=_ROTARY_DECODER | {"max_window_layers"}, build=_llama_like),
    "qwen3": Family(handled=_ROTARY_DECODER | {"attention_bias", "max_window_layers"}, build=_llama_like),
}


def refusal(config: Any) -> str | None:
    """Why a config is not served by the fast path, or None.

    Args:
        config: a transformers config.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        return f"model_type {config.model_type!r} is not one of {', '.join(sorted(FAMILIES))}"
    values = config.to_dict()
    defaults = type(config)().to_dict()
    for name, value in values.items():
        if name in family.handled or name in WITHOUT_EFFECT or name.startswith("_"):
            continue
        if name not in defaults or value != defaults[name]:
            return f"config field {name}={value!r} is not one that the fast path honours"
    window = values.get("sliding_window")
    if window is not None and window < config.max_position_embeddings:
        return f"sliding_window={window} is shorter than the context of {config.max_position_embeddings}"
    kinds = set(values.get("layer_types") or ()) - {"full_attention"}
    if kinds and window is not None and window < config.max_position_embeddings:
        return f"layer_types has {', '.join(sorted(kinds))}"
    rope = values.get("rope_parameters")
    if rope is not None:
        kind = rope.get("rope_type", "default")
        if kind not in STATIC_ROPE:
            return f"rope_type={kind!r} changes with the length of the prompt, or is unknown"
        unknown = set(rope) - ROPE_FIELDS
        if unknown:
            return f"rope_parameters has {', '.join(sorted(unknown))}"
    return None


def scaling_threshold(config: Any) -> int:
    """The longest position at which a rotary scaling or a window could begin to matter; 0 if there is none."""
    rope = getattr(config, "rope_parameters", None) or {}
    candidates = [rope.get("original_max_position_embeddings"), getattr(config, "sliding_window", None)]
    if rope.get("rope_type", "default") != "default":
        candidates.append(config.max_position_embeddings)
    return max((int(c) for c in candidates if c is not None), default=0)


TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Largest accepted difference of a logit from the module's, in standard deviations of the module's logits.

transformers computes its RMSNorms in float32 whatever the model's dtype, hence the float64 entry.
"""


@torch.no_grad()
def disagreement(weights: ModelWeights, module: Any) -> float:
    """Largest difference between the functional forward's logits and the module's, in standard deviations.

    Two runs: a prompt from position 0 on, and one that lies beyond every length at which positions are scaled (with
    its true length where that is short, else by position ids).
    """
    spec = weights.spec
    generator = torch.Generator().manual_seed(0)
    threshold = scaling_threshold(module.config)
    short = min(spec.n_ctx, 24)
    runs = [(short, 0)]
    if 0 < threshold <= 256:
        runs.append((threshold + 8, 0))
    elif threshold > 256:
        runs.append((short, threshold + 8 - short // 2))
    if spec.positions == "learned":
        runs.append((short, spec.n_ctx - short))
    worst = 0.0
    for length, first in runs:
        tokens = torch.randint(spec.d_vocab, (2, length), generator=generator).to(weights.device)
        position_ids = torch.arange(first, first + length, device=weights.device).expand(2, -1)
        theirs = module(input_ids=tokens, position_ids=position_ids, use_cache=False).logits.double()
        ours = forward(weights, tokens, first_position=first).double()
        worst = max(worst, float((ours - theirs).abs().max() / theirs.std()))
    return worst


def serve(module: Any) -> tuple[ModelWeights | None, str | None]:
    """Canonical weights of a module, or the reason why it stays on the hook path.

    Args:
        module: a transformers causal language model in evaluation mode.

    Returns:
        `(weights, None)` or `(None, reason)`.
    """
    reason = refusal(module.config)
    if reason is not None:
        return None, reason
    try:
        weights = FAMILIES[module.config.model_type].build(module)
    except AttributeError as error:
        return None, f"{type(module).__name__} is not laid out as transformers' {module.config.model_type}: {error}"
    difference = disagreement(weights, module)
    limit = TOLERANCE.get(weights.dtype)
    if limit is None:
        return None, f"dtype {weights.dtype} is not one of {', '.join(str(d) for d in TOLERANCE)}"
    if not difference <= limit:
        return None, (
            f"the functional forward differs from the module by {difference:.2g} standard deviations of the logits "
            f"(limit {limit:g} in {weights.dtype})"
        )
    return weights, None
