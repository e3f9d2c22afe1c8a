"""Random models and prompts of a given shape; what is timed does not depend on what the numbers mean."""

import math
from dataclasses import dataclass

import torch

from workbench.errors import PromptError
from workbench.models import Model, wrap_model
from workbench.prompts import PromptPairs


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a GPT-2.

    Attributes:
        n_layers: blocks.
        n_heads: heads of each block.
        d_model: width of the residual stream.
        d_vocab: number of tokens.
        product: side of the square matrices with which the machine's speed is measured.
    """

    n_layers: int
    n_heads: int
    d_model: int
    d_vocab: int
    product: int


SHAPES = {
    "gpt2": Shape(n_layers=12, n_heads=12, d_model=768, d_vocab=50257, product=2048),
    "tiny": Shape(n_layers=4, n_heads=4, d_model=128, d_vocab=1000, product=512),
}
"""Shapes by name; `gpt2` is GPT-2 small."""


def random_model(shape: Shape, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """A GPT-2 with random weights, drawn in float32 whatever the dtype.

    Matrices keep the scale of what they are applied to, so attention is uneven and one edge moves a logit difference
    visibly; with transformers' own initialisation effects would be about as small as float32 rounding.
    """
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        n_embd=shape.d_model,
        vocab_size=shape.d_vocab,
        n_positions=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    module = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                std, mean = 0.1, 0.0
            elif parameter.ndim == 1:
                std, mean = 0.1, 1.0
            else:
                std, mean = (0.6 if "wte" in name or "wpe" in name else 1 / math.sqrt(parameter.shape[0])), 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
            parameter.requires_grad_(False)
    return wrap_model(module.to(dtype).eval(), name=f"random {shape.n_layers} x {shape.n_heads} GPT-2")


def random_pairs(shape: Shape, *, n: int, tokens: int, first_difference: int, seed: int = 0) -> PromptPairs:
    """Random prompts that differ from `first_difference` on, at every position.

    Raises:
        PromptError: if that leaves no position.
    """
    if not 0 <= first_difference < tokens:
        raise PromptError(f"first_difference={first_difference} must be one of the {tokens} positions, from 0 on")
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(shape.d_vocab, (n, tokens), generator=generator)
    step = torch.randint(1, shape.d_vocab, (n, tokens), generator=generator)
    differs = torch.arange(tokens) >= first_difference
    answers = torch.stack([torch.randperm(shape.d_vocab, generator=generator)[:2] for _ in range(n)])
    return PromptPairs.from_tokens(
        clean, torch.where(differs, (clean + step) % shape.d_vocab, clean), answers[:, :1], answers[:, 1:]
    )
