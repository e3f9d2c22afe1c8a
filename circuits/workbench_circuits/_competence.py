"""Whether a model can do a task at all: without that, its circuit for the task means nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from workbench.errors import PromptError
from workbench.metrics import METRICS, beats, logit_diff
from workbench.models import Model
from workbench.prompts import ABSENT, PromptPairs
from workbench.stats import Estimate, mean_estimate, proportion

if TYPE_CHECKING:
    import pandas as pd

Verdict = Literal["solved", "above chance", "not solved"]

RULE = (
    "A task is solved if the 95 % interval of the accuracy lies above the midpoint between chance and 1, and done "
    "above chance if it lies above chance; either way the interval of the clean logit difference must lie above 0. "
    "Otherwise it is not solved."
)
"""The rule behind `Competence.verdict`."""


@dataclass(frozen=True, kw_only=True)
class Competence:
    """How well a model does a task, over a sample of its prompts; intervals are of level 95 %.

    Attributes:
        model: name of the model.
        task: name of the task, or None for prompts that have none.
        corruption: how the corrupted prompts were made.
        n: number of prompts.
        chance: expected accuracy of a guess among the candidates.
        accuracy: share of prompts in which an answer has a strictly higher logit than every other candidate (Wilson).
        top1: share of prompts in which an answer has the highest logit of the whole vocabulary (Wilson).
        metric_clean: mean logit difference on the clean prompts.
        metric_corrupted: mean logit difference, with the clean prompts' answers, on the corrupted prompts.
        data_hash: hash of the prompts.
        seed: seed that the prompts were drawn with.
        prepends_bos: whether the prompts begin with BOS.
        path_taken: which forward pass was used.
    """

    model: str
    task: str | None
    corruption: str | None
    n: int
    chance: float
    accuracy: Estimate
    top1: Estimate
    metric_clean: Estimate
    metric_corrupted: Estimate
    data_hash: str
    seed: int | None
    prepends_bos: bool | None
    path_taken: str

    @property
    def above_chance(self) -> bool:
        """Whether accuracy and clean logit difference lie above what a guess gives, with their intervals."""
        return self.accuracy.ci_low > self.chance and self.metric_clean.ci_low > 0

    @property
    def can_do(self) -> bool:
        """Whether the model does better than a guess, by `RULE`: if not, a circuit found here explains no skill."""
        return self.above_chance

    @property
    def mark(self) -> str:
        """What to write beside every number and figure made from this task; empty if the model solves it."""
        if self.solved:
            return ""
        shares = f"{_percent(self.accuracy)} right, chance {100 * self.chance:.0f} %"
        return f"above chance only: {shares}" if self.above_chance else f"NOT SOLVED: {shares}"

    @property
    def solved(self) -> bool:
        """Whether the model can do the task, by `RULE`."""
        return self.above_chance and self.accuracy.ci_low > (1 + self.chance) / 2

    @property
    def verdict(self) -> Verdict:
        """What `RULE` says."""
        if self.solved:
            return "solved"
        return "above chance" if self.above_chance else "not solved"

    @property
    def frame(self) -> "pd.DataFrame":
        """One row a number: `task, corruption, quantity, value, stderr, ci_low, ci_high, n, chance, unit` and more."""
        import pandas as pd

        rows = [
            {
                "task": self.task,
                "corruption": self.corruption,
                "quantity": quantity,
                "value": estimate.value,
                "stderr": estimate.stderr,
                "ci_low": estimate.ci_low,
                "ci_high": estimate.ci_high,
                "n": estimate.n,
                "unit": unit,
                "chance": self.chance if quantity == "accuracy" else None,
                "verdict": self.verdict,
                "mark": self.mark,
                "model": self.model,
                "data_hash": self.data_hash,
                "seed": self.seed,
                "prepends_bos": self.prepends_bos,
                "path_taken": self.path_taken,
            }
            for quantity, estimate, unit in (
                ("accuracy", self.accuracy, "share"),
                ("top1", self.top1, "share"),
                ("logit_diff_clean", self.metric_clean, METRICS["logit_diff"].unit),
                ("logit_diff_corrupted", self.metric_corrupted, METRICS["logit_diff"].unit),
            )
        ]
        return pd.DataFrame(rows).astype({"chance": float})

    @property
    def sentence(self) -> str:
        """The verdict in one sentence, with its numbers."""
        doing = {"solved": "solves", "above chance": "does better than chance on", "not solved": "does not solve"}
        task = self.task or "these prompts"
        return (
            f"{self.model} {doing[self.verdict]} {task}: right among the candidates in {_percent(self.accuracy)} of "
            f"{self.n} prompts (chance {100 * self.chance:.0f} %), in the whole vocabulary in {_percent(self.top1)}; "
            f"logit difference {_logits(self.metric_clean)} clean and {_logits(self.metric_corrupted)} corrupted"
            f"{f' ({self.corruption})' if self.corruption else ''}."
        )


@dataclass(frozen=True, kw_only=True)
class Survey:
    """How well a model does several tasks.

    Attributes:
        results: one for each task and corruption.
        refused: for each task of which this model's tokenizer can make no prompts, why.
    """

    results: tuple[Competence, ...]
    refused: Mapping[str, str]

    @property
    def frame(self) -> "pd.DataFrame":
        """The rows of every `Competence.frame`."""
        import pandas as pd

        return pd.concat([result.frame for result in self.results], ignore_index=True)

    @property
    def text(self) -> str:
        """A table for the terminal, with the rule below it."""
        head = (
            "task",
            "corruption",
            "n",
            "right",
            "chance",
            "first of all",
            "logit diff clean",
            "corrupted",
            "verdict",
        )
        lines = [head] + [
            (
                result.task or "",
                result.corruption or "",
                str(result.n),
                _percent(result.accuracy),
                f"{100 * result.chance:.0f} %",
                _percent(result.top1),
                _logits(result.metric_clean),
                _logits(result.metric_corrupted),
                result.verdict,
            )
            for result in self.results
        ]
        widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        ]
        return "\n".join([*rows, *(f"{name}: {reason}" for name, reason in self.refused.items()), RULE])


def survey(
    model: Model,
    *,
    tasks: Sequence[str] | None = None,
    n: int = 60,
    seed: int = 0,
    every_corruption: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Survey:
    """Measure how well a model does several tasks.

    Args:
        model: the model.
        tasks: their names; default: all.
        n: prompts a task.
        seed: seed of the prompts.
        every_corruption: measure each task with all its corruptions instead of the first.
        progress: called with a sentence about each task.

    Raises:
        PromptError: for an unknown task, if `n` is below 1, or if not one task can be measured.
    """
    from workbench_circuits.tasks import TASKS, load_task

    if n < 1:
        raise PromptError(f"n={n} prompts a task: ask for at least 1")
    results: list[Competence] = []
    refused: dict[str, str] = {}
    for name in TASKS if tasks is None else tasks:
        task = load_task(name)
        for corruption in task.corruptions if every_corruption else task.corruptions[:1]:
            try:
                pairs = task.pairs(model, n, seed=seed, corruption=corruption)
            except PromptError as error:
                refused[task.name] = str(error)
                break
            results.append(competence(model, pairs))
            if progress is not None:
                progress(results[-1].sentence)
    if not results:
        raise PromptError(f"no task could be measured: {'; '.join(refused.values())}")
    return Survey(results=tuple(results), refused=refused)


def competence(model: Model, pairs: PromptPairs, *, batch_size: int = 32) -> Competence:
    """Measure how well a model does a task.

    Both versions of every prompt are run once; only the answer position is unembedded.

    Args:
        model: the model.
        pairs: prompts with answers, wrong answers and candidates.
        batch_size: prompts a forward pass.

    Raises:
        PromptError: if a token is outside the model's vocabulary, or `batch_size` is below 1.
    """
    if batch_size < 1:
        raise PromptError(f"batch_size is {batch_size}: run at least 1 prompt a pass")
    pairs.check_vocabulary(model.spec.d_vocab)
    columns: list[list[Tensor]] = [[], [], [], []]
    for rows in pairs.lengths.argsort(stable=True).split(batch_size):
        batch = pairs.subset(rows)
        clean = model.forward(batch.clean, unembed_positions=batch.answer_positions)
        corrupted = model.forward(batch.corrupted, unembed_positions=batch.answer_positions)
        found = (
            beats(clean, batch.answers, batch.candidates),
            beats(clean, batch.answers),
            logit_diff(clean, batch),
            logit_diff(corrupted, batch),
        )
        for column, values in zip(columns, found, strict=True):
            column.append(values.cpu())
    right, first, clean_diff, corrupted_diff = (torch.cat(column) for column in columns)
    members = [(ids != ABSENT).sum(1).double() for ids in (pairs.answers, pairs.candidates)]
    return Competence(
        model=model.name,
        task=pairs.task,
        corruption=pairs.corruption,
        n=len(pairs),
        chance=float((members[0] / members[1]).mean()),
        accuracy=proportion(int(right.sum()), len(pairs)),
        top1=proportion(int(first.sum()), len(pairs)),
        metric_clean=mean_estimate(clean_diff),
        metric_corrupted=mean_estimate(corrupted_diff),
        data_hash=pairs.data_hash,
        seed=pairs.seed,
        prepends_bos=pairs.prepends_bos,
        path_taken=model.path,
    )


def _percent(share: Estimate) -> str:
    return f"{100 * share.value:.0f} % [{100 * share.ci_low:.0f}, {100 * share.ci_high:.0f}]"


def _logits(mean: Estimate) -> str:
    from workbench.plots.labels import interval, number

    return f"{number(mean.value)} {interval(mean.ci_low, mean.ci_high)}".strip()
