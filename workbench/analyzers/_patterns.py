"""Attention patterns reduced to scores as they come, a batch of sequences at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import BudgetError, UnsupportedModelError

if TYPE_CHECKING:
    from workbench.models import Model

BUDGET = 256 * 2**20
"""Working memory of a batch unless told otherwise, in bytes."""


def bytes_per_sequence(model: Model, length: int) -> int:
    """About what one sequence of `length` tokens takes in a forward pass that shows its patterns, in bytes.

    Scores, mask and pattern of one layer (`n_heads * length ** 2` each), the widest activations of a block, and on the
    hook path the logits of every position.
    """
    spec = model.spec
    size = max(4, torch.empty(0, dtype=model.dtype).element_size())
    logits = spec.d_vocab if model.path == "hooks" else 0
    return size * length * (3 * spec.n_heads * length + 8 * spec.d_model + 3 * spec.d_mlp + logits)


def batch_size(model: Model, length: int, budget: int) -> int:
    """How many sequences of `length` tokens fit into `budget` bytes of working memory.

    Raises:
        BudgetError: if not even one does.
    """
    one = bytes_per_sequence(model, length)
    if one > budget:
        raise BudgetError(
            f"budget is {budget} bytes and one sequence of {length} tokens takes about {one} in {model.name}: "
            "raise the budget or shorten the sequences"
        )
    return budget // one


def score_patterns(
    model: Model,
    tokens: Int[Tensor, "n pos"],
    score: Callable[[Float[Tensor, "n n_heads q k"]], Float[Tensor, "n n_heads scores"]],
    *,
    budget: int = BUDGET,
    progress: Callable[[str], None] | None = None,
    label: str = "patterns",
) -> Float[Tensor, "n n_layers n_heads scores"]:
    """Scores of every head on every sequence; no pattern outlives its layer.

    Args:
        model: fast path or hooks.
        tokens: sequences of one length, without padding.
        score: reduces the patterns of one layer, each sequence by itself.
        budget: working memory of a batch, in bytes.
        progress: told after each batch.
        label: what to call these sequences in progress messages.

    Returns:
        Scores on the CPU, in float64 whatever they were computed in (float32 or better).

    Raises:
        UnsupportedModelError: if queries of the model see later keys: the scores presume a causal mask.
        BudgetError: if one sequence does not fit the budget.
    """
    if not model.spec.causal:
        raise UnsupportedModelError(
            f"the attention of {model.name} is not causal; scores of visible keys presume that a query sees "
            "itself and what comes before it"
        )
    size = batch_size(model, tokens.shape[1], budget)
    batches = []
    for first in range(0, len(tokens), size):
        batch = tokens[first : first + size]
        layers: dict[int, Tensor] = {}

        def observe(layer: int, pattern: Tensor, layers: dict[int, Tensor] = layers) -> None:
            layers[layer] = score(pattern).to("cpu", torch.float64)

        last = torch.full((len(batch),), tokens.shape[1] - 1, device=model.device)
        model.forward(batch, observe={"pattern": observe}, unembed_positions=last)
        batches.append(torch.stack([layers[layer] for layer in range(model.spec.n_layers)], dim=1))
        if progress is not None:
            progress(f"{label}: {first + len(batch)} of {len(tokens)} sequences")
    return torch.cat(batches)
