"""Tiny random models of every served family, and token pairs to run on them.

The weights are far from a default initialisation on purpose: matrices keep the scale of their input, norms are
not all ones and biases are not zero. So attention patterns are uneven, a swapped or forgotten tensor shows, and
the effect of one edge is 0.01 to 1 logits instead of the 0.003 of a freshly initialised model.

``float64`` and ``exact=True`` make a reference that is float64 throughout. Two things in transformers are not:

* ``LlamaRMSNorm`` and its siblings compute the variance in float32, so the ``forward`` of each such *instance*
  is replaced by the same formula in the input's own dtype;
* the "eager" attention of most families takes its softmax in float32, so the modules use "sdpa", which does not.

The rotary tables stay as transformers makes them: angles, cosines and sines in float32, cast afterwards.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

D_VOCAB = 101
D_MODEL = 32
N_HEADS = 4
N_CTX = 128

_LLAMA = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": N_CTX,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GPT2 = {
    "vocab_size": D_VOCAB,
    "n_embd": D_MODEL,
    "n_head": N_HEADS,
    "n_positions": N_CTX,
    "bos_token_id": None,
    "eos_token_id": None,
}
_NEOX = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": N_CTX,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **fields}}


Config = transformers.PreTrainedConfig
_SPECS: dict[str, tuple[Callable[..., Config], dict[str, Any]]] = {
    "gpt2": (transformers.GPT2Config, _GPT2),
    "neox_parallel": (
        transformers.GPTNeoXConfig,
        {**_NEOX, "use_parallel_residual": True, **_rope("default", partial_rotary_factor=0.25)},
    ),
    "neox_sequential": (
        transformers.GPTNeoXConfig,
        {**_NEOX, "use_parallel_residual": False, **_rope("default", partial_rotary_factor=0.5)},
    ),
    "llama": (transformers.LlamaConfig, _LLAMA),
    "llama_mqa": (transformers.LlamaConfig, {**_LLAMA, "num_key_value_heads": 1}),
    "llama_mha": (
        transformers.LlamaConfig,
        {**_LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "llama_bias": (transformers.LlamaConfig, {**_LLAMA, "attention_bias": True, "mlp_bias": True}),
    "llama3_rope": (
        transformers.LlamaConfig,
        {
            **_LLAMA,
            **_rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
        },
    ),
    "llama_linear_rope": (transformers.LlamaConfig, {**_LLAMA, **_rope("linear", factor=4.0)}),
    "llama_yarn": (
        transformers.LlamaConfig,
        {**_LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)},
    ),
    "mistral": (transformers.MistralConfig, {**_LLAMA, "sliding_window": None}),
    "qwen2": (transformers.Qwen2Config, {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3": (transformers.Qwen3Config, {**_LLAMA, "head_dim": 16}),
}

FAMILIES: tuple[str, ...] = tuple(_SPECS)
"""Names that :func:`tiny_module` takes; all of them belong on the fast path."""

_REFUSED_SPECS: dict[str, tuple[Callable[..., Config], dict[str, Any]]] = {
    "sliding_window": (transformers.MistralConfig, {**_LLAMA, "sliding_window": 16}),
    "scale_attn_by_inverse_layer_idx": (
        transformers.GPT2Config,
        {**_GPT2, "scale_attn_by_inverse_layer_idx": True},
    ),
    "reorder_and_upcast_attn": (transformers.GPT2Config, {**_GPT2, "reorder_and_upcast_attn": True}),
    "rope_type": (transformers.LlamaConfig, {**_LLAMA, **_rope("dynamic", factor=2.0)}),
    "model_type": (
        transformers.OPTConfig,
        {
            "vocab_size": D_VOCAB,
            "hidden_size": D_MODEL,
            "word_embed_proj_dim": D_MODEL,
            "ffn_dim": 48,
            "num_attention_heads": N_HEADS,
            "max_position_embeddings": N_CTX,
            "pad_token_id": None,
        },
    ),
}


def _rms_norm_forward(self: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in the dtype of its input (transformers' own goes through float32)."""
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def _randomise(module: nn.Module, seed: int) -> None:
    """Give every parameter a value of a useful size, the same for the same seed whatever the dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float, mean: float = 0.0) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    with torch.no_grad():
        done: set[int] = set()
        for child in module.modules():
            for name, parameter in child.named_parameters(recurse=False):
                if id(parameter) in done:  # tied embeddings
                    continue
                done.add(id(parameter))
                if isinstance(child, nn.Embedding):
                    normal(parameter, 0.6)
                elif name == "bias":
                    normal(parameter, 0.3)
                elif parameter.ndim == 1:  # the scale of a LayerNorm or RMSNorm
                    normal(parameter, 0.25, mean=1.0)
                else:
                    fan_in = parameter.shape[0] if isinstance(child, Conv1D) else parameter.shape[1]
                    normal(parameter, 1.2 / math.sqrt(fan_in))


def _build(
    config_class: Callable[..., Config],
    fields: dict[str, Any],
    *,
    dtype: torch.dtype,
    seed: int,
    n_layers: int,
    exact: bool,
) -> transformers.PreTrainedModel:
    depth = "n_layer" if config_class is transformers.GPT2Config else "num_hidden_layers"
    implementation = "eager" if fields.get("reorder_and_upcast_attn") else "sdpa"
    config = config_class(**{**fields, depth: n_layers})
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    _randomise(module, seed)
    for parameter in module.parameters():  # not module.to(dtype): that would round the rotary frequencies too
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(False)
    if exact and dtype == torch.float64:
        for child in module.modules():
            if type(child).__name__.endswith("RMSNorm"):
                child.forward = types.MethodType(_rms_norm_forward, child)
    return module.eval()


def tiny_module(
    name: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 3, exact: bool = True
) -> transformers.PreTrainedModel:
    """A small random causal language model of one family, in eval mode, without gradients on its parameters.

    Args:
        name: One of :data:`FAMILIES`. 4 heads, width 32, head width 8 (qwen3: 16), 101 tokens, context 128.
        dtype: Type of the parameters. The values are drawn in float32, so every dtype has the same model.
        seed: Seed of the weights.
        n_layers: Number of layers.
        exact: In float64, make the module compute in float64 throughout (see the top of this file).
    """
    config_class, fields = _SPECS[name]
    return _build(config_class, fields, dtype=dtype, seed=seed, n_layers=n_layers, exact=exact)


def _refused(config_class: Callable[..., Config], fields: dict[str, Any]) -> Callable[..., nn.Module]:
    def build(*, dtype: torch.dtype = torch.float32, seed: int = 0, n_layers: int = 3) -> nn.Module:
        return _build(config_class, fields, dtype=dtype, seed=seed, n_layers=n_layers, exact=True)

    return build


REFUSED: dict[str, Callable[..., nn.Module]] = {
    name: _refused(config_class, fields) for name, (config_class, fields) in _REFUSED_SPECS.items()
}
"""Builders (dtype=, seed=, n_layers=) of models outside the fast path, by the field that a refusal must name."""


def tiny_pairs(module: nn.Module, n: int = 3, *, length: int = 12, seed: int = 0) -> dict[str, Tensor]:
    """Clean and corrupted random prompts that differ in every way prompts can.

    Prompt ``i`` first differs at its own position (3, 0, 5, ... ), later tokens differ here and there, every
    second corrupted prompt has another last token than its clean one, and the lengths are mixed: shorter prompts
    are padded on the right with the same token on both sides.

    Args:
        module: The model, for its vocabulary size.
        n: Number of prompts.
        length: Tokens of the longest prompt, at least 8.
        seed: Seed of the tokens.

    Returns:
        Int64 tensors ``clean`` and ``corrupted`` [n, length], ``lengths``, ``answer_positions`` [n],
        ``answers`` [n, 2], ``wrong_answers`` [n, 1] and ``first_difference`` [n].
    """
    if length < 8:
        raise ValueError(f"length is {length}; first differences and lengths need at least 8 tokens")
    generator = torch.Generator().manual_seed(seed)
    d_vocab = int(module.config.vocab_size)

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    clean = randint(d_vocab, n, length)
    lengths = torch.tensor([length - (0, 2, 1)[i % 3] for i in range(n)])
    first = torch.tensor([(3, 0, 5, 1, 4, 2)[i % 6] for i in range(n)])
    other = (clean + 1 + randint(d_vocab - 1, n, length)) % d_vocab  # differs from clean everywhere
    position = torch.arange(length)
    differs = (torch.rand(n, length, generator=generator) < 0.35) & (position > first[:, None])
    differs |= position == first[:, None]
    is_last = position == lengths[:, None] - 1
    changes_last = torch.arange(n) % 2 == 1
    differs = torch.where(is_last, changes_last[:, None], differs)
    padding = position >= lengths[:, None]
    corrupted = torch.where(differs, other, clean)
    clean, corrupted = clean.masked_fill(padding, 7), corrupted.masked_fill(padding, 7)
    answers = torch.stack([torch.randperm(d_vocab, generator=generator)[:3] for _ in range(n)])
    return {
        "clean": clean,
        "corrupted": corrupted,
        "lengths": lengths,
        "answer_positions": lengths - 1,
        "answers": answers[:, :2],
        "wrong_answers": answers[:, 2:],
        "first_difference": first,
    }
