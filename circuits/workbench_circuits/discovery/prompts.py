"""The prompts of a search: to score edges on, to choose the size on, and to judge the circuit on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from workbench.errors import PromptError

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptPairs
    from workbench_circuits.tasks import Task

COMPETENCE_PROMPTS = 100
FEWEST_TO_PART = 6
"""From this many prompts on, a third of those that a circuit is found on only decide on its size."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one discovery; those of different parts are different prompts.

    Attributes:
        train: prompts that edges are scored on.
        sizing: prompts that decide how many edges are taken.
        held_out: prompts that the result is judged on.
        competence: prompts that say whether the model can do the task.
        split: how `held_out` was kept apart.
    """

    train: PromptPairs
    sizing: PromptPairs
    held_out: PromptPairs
    competence: PromptPairs
    split: str


def draw_prompts(
    model: Model,
    task: str | Path | Task | PromptPairs,
    *,
    n: int = 32,
    n_held_out: int = 32,
    corruption: str | None = None,
    seed: int = 0,
    held_out: PromptPairs | None = None,
) -> Prompts:
    """Prompts to find a circuit on and prompts to judge it on, with templates of their own where there are several.

    Args:
        model: whose tokenizer is used.
        task: a task, its name, a CSV file, or prompts.
        n: prompts of a task to find the circuit on.
        n_held_out: prompts to judge it on.
        corruption: of a task; default: its first.
        seed: seed of all draws.
        held_out: prompts to judge it on, if `task` is prompts.

    Raises:
        PromptError: if there are not enough prompts.
    """
    from workbench.prompts import PromptPairs
    from workbench_circuits.tasks import load_task
    from workbench_circuits.tasks.base import Task
    from workbench_circuits.tasks.custom import CsvTask

    if isinstance(task, PromptPairs):
        if held_out is not None:
            train, sizing = _sizing(task, seed)
            return Prompts(train=train, sizing=sizing, held_out=held_out, competence=task, split="given")
        return _halves(task, seed)
    drawer = task if isinstance(task, Task) else load_task(task)
    if isinstance(drawer, CsvTask):
        found = _halves(drawer.pairs(model, corruption=corruption), seed)
        return replace(
            found,
            train=_at_most(found.train, n, seed),
            sizing=_at_most(found.sizing, n, seed),
            held_out=_at_most(found.held_out, n_held_out, seed),
        )
    extra = n // 2
    try:
        both = drawer.pairs(model, n + extra, seed=seed, corruption=corruption, split="train")
        judged = drawer.pairs(model, n_held_out, seed=seed + 1, corruption=corruption, split="held_out")
        split = "templates of their own"
    except PromptError:
        everything = drawer.pairs(model, n + extra + n_held_out, seed=seed, corruption=corruption)
        both, judged = everything.split((n + extra) / len(everything), seed)
        split = "prompts of the same templates"
    train, sizing = (both, both) if extra < 2 else (both.subset(slice(0, n)), both.subset(slice(n, None)))
    try:
        able = drawer.pairs(model, COMPETENCE_PROMPTS, seed=seed, corruption=corruption)
    except PromptError:
        able = PromptPairs.concat([both, judged])
    return Prompts(train=train, sizing=sizing, held_out=judged, competence=able, split=split)


def _halves(pairs: PromptPairs, seed: int = 0) -> Prompts:
    families = set() if pairs.templates is None else {name.split("/")[0] for name in pairs.templates}
    several = len(families) > 1
    found, judged = pairs.split(0.5, seed, by_template=several)
    train, sizing = _sizing(found, seed)
    split = "templates of their own" if several else "prompts of the same templates"
    return Prompts(train=train, sizing=sizing, held_out=judged, competence=pairs, split=split)


def _sizing(pairs: PromptPairs, seed: int) -> tuple[PromptPairs, PromptPairs]:
    return (pairs, pairs) if len(pairs) < FEWEST_TO_PART else pairs.split(2 / 3, seed)


def _at_most(pairs: PromptPairs, n: int, seed: int) -> PromptPairs:
    if len(pairs) <= n:
        return pairs
    return pairs.subset(np.sort(np.random.default_rng(seed).permutation(len(pairs))[:n]))
