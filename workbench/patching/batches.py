"""Prompts in batches that fit a memory budget, and how far the work on them is."""

import time
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import BudgetError
from workbench.patching.window import Window
from workbench.prompts import PromptPairs

GIB = 1 << 30


def prompt_batches(
    pairs: PromptPairs,
    first: Int[Tensor, "n"],
    *,
    causal: bool,
    needed: Callable[[int, int, int], int],
    available: int,
    budget_bytes: int,
) -> list[Int[Tensor, "batch"]]:
    """Indices of prompts, grouped by like windows into batches that fit.

    Args:
        pairs: the prompts.
        first: first position of each prompt that is recomputed.
        causal: whether a query sees only keys up to its own position.
        needed: bytes that a number of prompts with windows of some width and prompts of some length take.
        available: bytes that a batch may take.
        budget_bytes: what the user gave, for the message.

    Raises:
        BudgetError: if one prompt alone does not fit.
    """
    answer = pairs.answer_positions
    widths = (answer - first + 1).clamp(min=1)
    order = sorted(range(len(pairs)), key=lambda i: (int(widths[i]), int(answer[i])))

    def bytes_of(members: list[int]) -> int:
        part = torch.tensor(members, device=answer.device)
        window = Window.of(first[part], answer[part], length=pairs.clean.shape[1], causal=causal)
        return needed(len(members), window.width, int(answer[part].max()) + 1)

    batches: list[list[int]] = []
    for index in order:
        if batches and bytes_of([*batches[-1], index]) <= available:
            batches[-1].append(index)
            continue
        alone = bytes_of([index])
        if alone > available:
            raise BudgetError(
                f"one prompt of {int(pairs.lengths[index])} tokens needs "
                f"{alone / available * budget_bytes / GIB:.2f} GiB beside the weights and the budget is "
                f"{budget_bytes / GIB:.2f} GiB: raise budget_bytes, or shorten the prompts"
            )
        batches.append([index])
    return [torch.tensor(batch) for batch in batches]


class Meter:
    """Says how far the work is, about once a second.

    Args:
        say: called with a line.
        what: what is being computed.
        total: number of effects.
        unit: what is counted.
    """

    def __init__(self, say: Callable[[str], None], what: str, total: int, unit: str) -> None:
        self.say, self.what, self.total, self.unit = say, what, total, unit
        self.done = self.counted = 0
        self.began = self.last = time.monotonic()

    def add(self, n: int, *, counts: bool = True) -> None:
        """Count `n` effects; those that were restored do not enter the rate."""
        self.done += n
        self.counted += n if counts else 0
        now = time.monotonic()
        if now - self.last < 1 and self.done < self.total:
            return
        self.last = now
        rate = self.counted / max(now - self.began, 1e-9)
        left = (self.total - self.done) / rate if rate else float("inf")
        self.say(f"{self.what}: {self.done:,} of {self.total:,} {self.unit}, {rate:,.0f} a second, {left:,.0f} s left")
