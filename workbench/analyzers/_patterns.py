"""Attention patterns reduced to scores: as they come, a batch of sequences at a time, or out of a capture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.cache.collect import watch
from workbench.cache.reductions import Reduction
from workbench.errors import BudgetError, DataError, UnsupportedModelError

if TYPE_CHECKING:
    from workbench.cache import Cache
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
    _check_causal(model.spec.causal, model.name)
    size = batch_size(model, tokens.shape[1], budget)
    batches = []
    for first in range(0, len(tokens), size):
        batch = tokens[first : first + size]
        layers: dict[int, Tensor] = {}

        def see(site: str, layer: int, pattern: Tensor, layers: dict[int, Tensor] = layers) -> None:
            layers[layer] = score(pattern).to("cpu", torch.float64)

        watch(model, batch, {"pattern": range(model.spec.n_layers)}, see)
        batches.append(torch.stack([layers[layer] for layer in range(model.spec.n_layers)], dim=1))
        if progress is not None:
            progress(f"{label}: {first + len(batch)} of {len(tokens)} sequences")
    return torch.cat(batches)


def cached_scores(
    cache: Cache, reduction: Reduction, *, prompts: Sequence[int], length: int
) -> Float[Tensor, "n n_layers n_heads scores"]:
    """Scores of every head on sequences of a capture, as `score_patterns` computes them from a model.

    Args:
        cache: holds `pattern` of all layers, or what `reduction` made of it.
        reduction: the score.
        prompts: which of its prompts.
        length: how many of their first tokens.

    Returns:
        Scores in float64.

    Raises:
        DataError: if the cache does not hold what is needed; the message says what to capture.
        UnsupportedModelError: if queries of the model see later keys.
    """
    source = cache.provenance
    _check_causal(bool(cache.manifest["capture"]["model"]["causal"]), source["model"]["name"])
    reduced, pos = f"pattern.{reduction.label}", cache.tokens.shape[1]
    every = tuple(range(source["n_layers"]))
    whole = [name for name in ("pattern", reduced) if name in cache and cache.entries[name].layers == every]
    remedy = f"capture(model, tokens, 'pattern', reduce={reduction.label!r}) with tokens of this length and all layers"
    if int(cache.lengths[list(prompts)].min()) < length:
        raise DataError(f"prompts of the cache have fewer than {length} tokens: lower length, or {remedy}")
    if reduced in whole and pos == length:
        layers = [cache.get(reduced, layer, prompts=prompts).double() for layer in every]
        return torch.stack(layers, dim=1)
    if "pattern" not in whole:
        short = f" (of {pos} tokens; {length} are asked for)" if reduced in whole else ""
        raise DataError(
            f"the cache holds {', '.join(cache.names)}{short}, and this needs {reduced!r} or 'pattern' of all "
            f"{len(every)} layers: {remedy}"
        )
    scores = []
    for span in cache.shards:
        inside = [index for index in prompts if span.start <= index < span.stop]
        if inside:
            full = torch.full((len(inside),), length)
            found = [cache.get("pattern", layer, prompts=inside)[..., :length, :length] for layer in every]
            scores.append(torch.stack([reduction.compute(each, full).double() for each in found], dim=1))
    return torch.cat(scores)


def _check_causal(causal: bool, name: str) -> None:
    if not causal:
        raise UnsupportedModelError(
            f"the attention of {name} is not causal; scores of visible keys presume that a query sees "
            "itself and what comes before it"
        )
