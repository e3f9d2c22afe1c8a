"""What the tests of the patching engine share: tiny models in float64, prompts, and effects without the entrance."""

from collections.abc import Iterable

import torch
from torch import Tensor

import workbench as wb
from families import tiny_module, tiny_pairs
from workbench import Model, PromptPairs
from workbench.patching.graph import Edges

PAIR_KEYS = ("clean", "corrupted", "answers", "wrong_answers", "lengths", "answer_positions")


def model_of(family: str, dtype: torch.dtype = torch.float64) -> Model:
    """A tiny model of a family."""
    return wb.wrap_model(tiny_module(family, dtype=dtype))


def prompts(raw: dict[str, Tensor], rows: Iterable[int] | None = None) -> PromptPairs:
    """Prompt pairs from what `tiny_pairs` returns, or some of them."""
    pairs = PromptPairs.from_tokens(**{key: raw[key] for key in PAIR_KEYS})
    return pairs if rows is None else pairs.subset(list(rows))


def tiny_prompts(model: Model, n: int = 5, rows: Iterable[int] | None = None, seed: int = 0) -> PromptPairs:
    """`tiny_pairs` of a model as `PromptPairs`."""
    return prompts(tiny_pairs(model.module, n=n, seed=seed), rows)


LATE = (0, 2, 4)
"""Rows of `tiny_pairs(n=5)` that differ late: their windows start at different positions, none at 0."""


def gather(batches: Iterable[tuple[Tensor, Tensor]], edges: Edges, n: int) -> Tensor:
    """All effects `[edges, n]` of what an engine function yields; every edge exactly once."""
    found = torch.full((len(edges), n), float("nan"), dtype=torch.float64)
    for index, values in batches:
        assert found[index].isnan().all(), "an edge came twice"
        found[index] = values.double()
    assert not found.isnan().any(), "an edge is missing"
    return found
