"""What a task is: prompts drawn with a seed, each with corrupted versions, answers and named positions."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

import torch

from workbench._prompt_inputs import token_at
from workbench.errors import PromptError
from workbench.prompts import ABSENT, PromptPairs, TextModel

_ATTEMPTS = 1000

Split = Literal["train", "held_out"]
Mark = tuple[str, int]
"""Where a span lies: the id of ` word` in the clean prompt, and which of its occurrences, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt of a task as text.

    Attributes:
        clean: the clean prompt.
        corrupted: corrupted prompt by name of the corruption.
        answer: the right next word of the clean prompt, with its leading space; several if all of them are right.
        wrong_answer: by name of the corruption, the word or words it is held against.
        candidates: words among which accuracy is counted.
        template: name of the template, as `PromptPairs.templates` has it.
        marks: named positions, each the n-th occurrence of a word, both without leading space.
        after: named positions that come right after a mark.
        at: named positions of tokens that are no word, each by the place in the text at which the token begins.
    """

    clean: str
    corrupted: Mapping[str, str]
    answer: str | tuple[str, ...]
    wrong_answer: Mapping[str, str | tuple[str, ...]]
    candidates: tuple[str, ...]
    template: str
    marks: Mapping[str, Mark]
    after: Mapping[str, str] = field(default_factory=dict)
    at: Mapping[str, int] = field(default_factory=dict)


Maker = Callable[[random.Random, int], Example]
"""Draws the i-th example from a source of randomness; drawing it again gives another one of the same kind."""


class Task(ABC):
    """A kind of prompt with one right answer, in a clean and a corrupted version.

    Attributes:
        name: what `load_task` calls it.
        title: name in figures and sentences.
        description: one sentence.
        corruptions: names of the ways to corrupt a prompt; the first is the default.
        chance: accuracy of a guess among the candidates, on average over prompts.
        source: the paper that the task comes from.
    """

    name: str
    title: str
    description: str
    corruptions: tuple[str, ...]
    source: str

    @property
    @abstractmethod
    def chance(self) -> float:
        """Accuracy of a guess among the candidates, on average over prompts."""

    @staticmethod
    def from_function(function: Callable[[random.Random], Mapping[str, Any]], **named: Any) -> "Task":
        """A task of your own, from a Python function that draws one prompt; see `tasks.custom.FunctionTask`.

        Args:
            function: takes a `random.Random` and returns a mapping with `clean`, `corrupted`, `correct`, `incorrect`,
                and if you like `candidates`, `template` and `spans`.
            **named: `name`, `title`, `description`, `chance`, `source`; made from the function where left out.

        Raises:
            PromptError: if it is no function.
        """
        from workbench_circuits.tasks.custom import FunctionTask

        return FunctionTask.of(function, **named)

    @abstractmethod
    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example, out of words that are single tokens of the model's tokenizer.

        Args:
            model: whose tokenizer decides on the words.
            split: which templates to use; None: all of them.
        """

    def pairs(
        self, model: TextModel, n: int, *, seed: int = 0, corruption: str | None = None, split: Split | None = None
    ) -> PromptPairs:
        """Draw `n` different prompts.

        The clean prompts depend on the tokenizer and the seed, not on the corruption.

        Args:
            model: whose tokenizer is used; BOS follows it.
            n: how many prompts.
            seed: the same seed gives the same prompts.
            corruption: one of `corruptions`; default: the first.
            split: "train" and "held_out" have no template family in common; None: all templates.

        Raises:
            PromptError: for an unknown corruption or split, for `n` below 1 or beyond the number of different prompts,
                or if the tokenizer has too few of the task's words as single tokens.
        """
        corruption = self.corruptions[0] if corruption is None else corruption
        one_of(f"corruption of {self.name}", corruption, self.corruptions)
        if split is not None:
            one_of("split", split, ("train", "held_out"))
        if n < 1:
            raise PromptError(f"n={n} prompts of {self.name}: ask for at least 1")
        chosen = self._distinct(self.maker(model, split), n, random.Random(seed))
        pairs = PromptPairs.from_texts(
            model,
            [example.clean for example in chosen],
            [example.corrupted[corruption] for example in chosen],
            [_several(example.answer) for example in chosen],
            [_several(example.wrong_answer[corruption]) for example in chosen],
            candidates=[example.candidates for example in chosen],
            templates=[example.template for example in chosen],
            task=self.name,
            corruption=corruption,
            seed=seed,
        )
        rows = [row[:length] for row, length in zip(pairs.clean.tolist(), pairs.lengths.tolist(), strict=True)]
        names = dict.fromkeys(name for each in chosen for name in (*each.marks, *each.after, *each.at))
        spans = {
            name: torch.tensor([find(example, row, model, name) for example, row in zip(chosen, rows, strict=True)])
            for name in names
        }
        spans["END"] = pairs.answer_positions
        return replace(pairs, spans={name: at.to(pairs.clean.device) for name, at in spans.items()})

    def _distinct(self, make: Maker, n: int, draw: random.Random) -> list[Example]:
        """`n` examples with different clean prompts."""
        found: dict[str, Example] = {}
        for index in range(n):
            for _ in range(_ATTEMPTS):
                example = make(draw, index)
                if example.clean not in found:
                    found[example.clean] = example
                    break
            else:
                raise PromptError(
                    f"{self.name} gave only {index} different prompts where n={n} were asked for: ask for fewer"
                )
        return list(found.values())


def _several(words: str | tuple[str, ...]) -> list[str]:
    return [words] if isinstance(words, str) else list(words)


def find(example: Example, row: Sequence[int], model: TextModel, name: str) -> int:
    """Position of a named mark in the tokens of the clean prompt; `ABSENT` if this example has none of that name.

    Raises:
        PromptError: if the word is not there as the token it is by itself, or no token begins at the place.
    """
    if name in example.at:
        return _token_at(example, row, model, name)
    if example.after.get(name, name) not in example.marks:
        return ABSENT
    word, occurrence = example.marks[example.after.get(name, name)]
    token = model.single_token(f" {word}")
    places = [at for at, other in enumerate(row) if other == token]
    if occurrence >= len(places):
        raise PromptError(
            f"{word!r} is the token {token} by itself but not inside {example.clean!r}, where it was looked for as "
            f"{name}: this tokenizer splits words by their surroundings; use PromptPairs.from_tokens"
        )
    return places[occurrence] + (name in example.after)


def _token_at(example: Example, row: Sequence[int], model: TextModel, name: str) -> int:
    place = example.at[name]
    found = token_at(model, example.clean, place, row)
    if found is None:
        raise PromptError(
            f"no token of {example.clean!r} begins at character {place}, where {name} was looked for: this tokenizer "
            "splits the text differently there; use PromptPairs.from_tokens"
        )
    return found


def one_of(what: str, value: str, known: Sequence[str]) -> None:
    """Raise a `PromptError` with the nearest known value unless `value` is known."""
    if value not in known:
        close = get_close_matches(value, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise PromptError(f"{what} is {value!r}, expected one of {', '.join(map(repr, known))}{hint}")
