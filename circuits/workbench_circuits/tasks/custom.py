"""Tasks of the user's own: prompts in a CSV file, or drawn by a Python function."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.errors import PromptError, WorkbenchError
from workbench.prompts import PromptPairs, TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task, one_of

CORRUPTION = "given"
"""Name of the corruption where the user wrote the corrupted prompts."""

_NEEDED = ("clean", "corrupted", "correct", "incorrect")
_OPTIONAL = ("candidates", "template", "spans")


@dataclass(frozen=True, kw_only=True)
class CsvTask(Task):
    """The prompts of a CSV file, as `PromptPairs.from_csv` reads them.

    Every row is a prompt; `pairs` draws `n` of them without replacement, or takes all in the order of the file. Where
    the file has a column `template`, a split takes every second family of templates in alphabetical order; where it
    has none, every second row.

    Attributes:
        path: the file.
    """

    path: Path
    corruptions = (CORRUPTION,)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The file's name without its ending."""
        return self.path.stem

    @property
    def title(self) -> str:  # type: ignore[override]
        """Name in figures and sentences."""
        return self.name

    @property
    def description(self) -> str:  # type: ignore[override]
        """Where the prompts come from."""
        return f"prompts from {self.path.name}."

    @property
    def source(self) -> str:  # type: ignore[override]
        """The file."""
        return str(self.path)

    @property
    def chance(self) -> float:
        """Unknown without a tokenizer: see the competence of the pairs, which counts their candidates."""
        return float("nan")

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """Not used: the prompts of a file are read together.

        Raises:
            PromptError: always.
        """
        raise PromptError(f"{self.path} holds finished prompts and draws none one by one: use pairs()")

    def pairs(
        self,
        model: TextModel,
        n: int | None = None,
        *,
        seed: int = 0,
        corruption: str | None = None,
        split: Split | None = None,
    ) -> PromptPairs:
        """`n` prompts of the file, drawn with the seed; by default all, in their order.

        Args:
            model: whose tokenizer is used; BOS follows it.
            n: how many prompts; None: all of them.
            seed: seed of the draw.
            corruption: "given", the only one.
            split: "train" and "held_out" have no template family (without templates: no row) in common.

        Raises:
            DataError: if the file cannot be read.
            PromptError: if a row is wrong (the message names it), or there are not `n` prompts.
        """
        if corruption is not None:
            one_of(f"corruption of {self.path.name}", corruption, self.corruptions)
        if split is not None:
            one_of("split", split, ("train", "held_out"))
        everything = PromptPairs.from_csv(model, self.path)
        rows = self._rows(everything, split)
        if n is not None and not 1 <= n <= len(rows):
            part = f" in its {split} half" if split else ""
            raise PromptError(
                f"n={n} prompts of {self.path}: it has {len(rows)}{part}; ask for 1 to {len(rows)}, or None for all"
            )
        if n is not None:
            rows = random.Random(seed).sample(rows, n)
        chosen = everything.subset(rows)
        spans = {**chosen.spans, "END": chosen.answer_positions}
        return replace(chosen, corruption=CORRUPTION, seed=None if n is None else seed, spans=spans)

    def _rows(self, everything: PromptPairs, split: Split | None) -> list[int]:
        rows = list(range(len(everything)))
        if split is None:
            return rows
        keys: Sequence[Any] = rows
        if everything.templates is not None:
            keys = [name.split("/")[0] for name in everything.templates]
        families = sorted(set(keys))
        if len(families) < 2:
            what = "row" if everything.templates is None else f"template family ({families[0]!r})"
            raise PromptError(f"split={split!r} of {self.path}: there is only one {what}, and a split needs two")
        chosen = set(families[0 if split == "train" else 1 :: 2])
        return [row for row in rows if keys[row] in chosen]


@dataclass(frozen=True, kw_only=True)
class FunctionTask(Task):
    """Prompts that a Python function draws, one a call.

    The function takes a `random.Random` and returns a mapping: `clean` and `corrupted` (texts of equally many tokens;
    `corrupted` may be a mapping of several corruptions by name), `correct` and `incorrect` (a word with its leading
    space, or a list of them), and if you like `candidates` (list of words among which accuracy is counted), `template`
    (name of the template) and `spans` (by name a word of the clean prompt, or a pair of word and occurrence).

        def opposites(draw):
            word, other = draw.choice([("hot", "cold"), ("big", "small")])
            return {"clean": f"The opposite of {word} is", "corrupted": f"The opposite of {other} is",
                    "correct": f" {other}", "incorrect": f" {word}", "spans": {"WORD": word}}

        pairs = wc.Task.from_function(opposites).pairs(model, n=2)

    Attributes:
        function: draws one prompt; prompts that come again are drawn anew.
        name: name of the task.
        title: name in figures and sentences.
        description: one sentence.
        corruptions: names of the corruptions.
        chance: accuracy of a guess among the candidates, as the first prompt has it.
        source: the module and name of the function.
    """

    function: Callable[[random.Random], Mapping[str, Any]]
    name: str
    title: str
    description: str
    corruptions: tuple[str, ...]
    source: str
    chance: float = float("nan")

    @classmethod
    def of(cls, function: Any, **named: Any) -> "FunctionTask":
        """The task of a function; what is not named is read off its first prompt.

        Raises:
            PromptError: if it is no function, or its first prompt is not what it must be.
        """
        if not callable(function):
            raise PromptError(f"from_function got {function!r}: give a function that takes a random.Random")
        label = str(named.get("name") or getattr(function, "__name__", "function"))
        first = _drawn(label, function, random.Random(0))
        many = first["corrupted"] if isinstance(first["corrupted"], Mapping) else {CORRUPTION: ""}
        right, among = len(_words(first["correct"])), len(_candidates(first))
        text = (getattr(function, "__doc__", None) or f"prompts drawn by {label}.").strip().split("\n")[0]
        made = {
            "name": label,
            "title": label,
            "description": text,
            "corruptions": tuple(many),
            "chance": right / among,
            "source": f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', label)}",
        }
        if unknown := set(named) - set(made):
            raise PromptError(f"from_function does not take {sorted(unknown)}; it takes {', '.join(made)}")
        return cls(function=function, **{**made, **named})

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`.

        Raises:
            PromptError: for a split: draw all prompts and use `PromptPairs.split(by_template=True)`.
        """
        if split is not None:
            raise PromptError(
                f"split={split!r} of {self.name}: a function draws from all its templates; draw the prompts and use "
                "PromptPairs.split(by_template=True)"
            )
        return lambda draw, index: self._example(_drawn(self.name, self.function, draw))

    def _example(self, found: Mapping[str, Any]) -> Example:
        corrupted = found["corrupted"]
        versions = dict(corrupted) if isinstance(corrupted, Mapping) else {CORRUPTION: corrupted}
        if missing := set(self.corruptions) - set(versions):
            raise PromptError(
                f"{self.name} returned the corruptions {sorted(versions)} for {found['clean']!r} and lacks "
                f"{sorted(missing)}: return the same ones each time"
            )
        for name, text in versions.items():
            if text == found["clean"]:
                raise PromptError(
                    f"{self.name}: clean and corrupted ({name}) are both {text!r}: nothing could be patched; change one"
                )
        spans = found.get("spans") or {}
        return Example(
            clean=found["clean"],
            corrupted=versions,
            answer=_words(found["correct"]),
            wrong_answer=dict.fromkeys(versions, _words(found["incorrect"])),
            candidates=_candidates(found),
            template=str(found.get("template", self.name)),
            marks={name: (mark, 0) if isinstance(mark, str) else (mark[0], mark[1]) for name, mark in spans.items()},
        )


def _drawn(
    label: str, function: Callable[[random.Random], Mapping[str, Any]], draw: random.Random
) -> Mapping[str, Any]:
    try:
        found = function(draw)
    except WorkbenchError:
        raise
    except Exception as error:
        raise PromptError(
            f"{label}(random.Random) raised {type(error).__name__}: {error}; correct the function"
        ) from error
    if not isinstance(found, Mapping):
        raise PromptError(f"{label} returned {found!r}, expected a mapping with {', '.join(_NEEDED)}")
    if missing := [key for key in _NEEDED if key not in found]:
        raise PromptError(f"{label} returned {sorted(found)} and lacks {missing}: return {', '.join(_NEEDED)}")
    if foreign := set(found) - {*_NEEDED, *_OPTIONAL}:
        raise PromptError(
            f"{label} returned the unknown keys {sorted(foreign)}: there are {', '.join(_NEEDED + _OPTIONAL)}"
        )
    if not isinstance(found["clean"], str) or not found["clean"]:
        raise PromptError(f"{label} returned clean={found['clean']!r}, expected a text")
    return found


def _words(value: Any) -> tuple[str, ...]:
    words = (value,) if isinstance(value, str) else tuple(value)
    if not words or not all(isinstance(word, str) and word for word in words):
        raise PromptError(
            f"correct or incorrect is {value!r}, expected a word with its leading space, or a list of words"
        )
    return words


def _candidates(found: Mapping[str, Any]) -> tuple[str, ...]:
    both = (*_words(found["correct"]), *_words(found["incorrect"]))
    return _words(found["candidates"]) if found.get("candidates") else tuple(dict.fromkeys(both))


def from_reference(reference: str, **named: Any) -> FunctionTask:
    """The task of a function named `package.module:function`; `named` as in `Task.from_function`.

    Raises:
        PromptError: if there is no such module or function.
    """
    module, _, attribute = reference.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise PromptError(
            f"task {reference!r} is no function that can be imported ({error}): write package.module:function, with "
            "the package installed or in the working directory on PYTHONPATH"
        ) from error
    return found if isinstance(found, FunctionTask) else FunctionTask.of(found, **named)
