"""Colored Objects (Merullo, Eickhoff and Pavlick 2024): which colour has the object that is asked for."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from workbench.errors import PromptError
from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import single_token_words, with_article

_SURFACES = ("table", "desk", "floor")
_VIEWS = ("there is", "you see", "I see")


@dataclass(frozen=True, kw_only=True)
class ColoredObjects(Task):
    """A worked example and a question in the format of the paper; the answer is the capitalised colour.

    Example and question share neither colours nor objects. Corruption `mindiff`: only the object that is asked for in
    the question differs, so that the right answer becomes another one of the listed colours, which is the wrong answer.

    Attributes:
        n_objects: objects in each list; 3 in the paper, at least 2.
    """

    n_objects: int = 3
    description = "Colored Objects: name the colour of one of the objects in a list, after one worked example."
    corruptions = ("mindiff",)
    source = "Merullo, Eickhoff and Pavlick 2024, Circuit Component Reuse Across Tasks"

    def __post_init__(self) -> None:
        if self.n_objects < 2:
            raise PromptError(
                f"n_objects is {self.n_objects}: the corruption asks for another object, so give at least 2"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        """`colored_objects`, followed by the number of objects where it is not that of the paper."""
        return "colored_objects" if self.n_objects == 3 else f"colored_objects_{self.n_objects}"

    @property
    def title(self) -> str:  # type: ignore[override]
        """Name in figures and sentences."""
        return "Colored Objects" if self.n_objects == 3 else f"Colored Objects ({self.n_objects} objects)"

    @property
    def chance(self) -> float:
        """One of the listed colours."""
        return 1 / self.n_objects

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        count = self.n_objects
        colours = single_token_words(model, "colours.txt", at_least=2 * count, forms=(str, str.capitalize))
        objects = single_token_words(model, "objects_colored.txt", at_least=2 * count)
        templates = [
            (surface, view)
            for (i, surface), (j, view) in product(enumerate(_SURFACES), enumerate(_VIEWS))
            if split is None or ((i + j) % 2 == 0) == (split == "train")
        ]

        def make(draw: random.Random, index: int) -> Example:
            drawn_colours, drawn_objects = draw.sample(colours, 2 * count), draw.sample(objects, 2 * count)
            shown = _question(draw.choice(templates), drawn_colours[:count], drawn_objects[:count])
            shown_at = draw.randrange(count)
            surface, view = draw.choice(templates)
            listed, things = drawn_colours[count:], drawn_objects[count:]
            asked, other = draw.sample(range(count), 2)
            question = _question((surface, view), listed, things)
            start = f"{shown(shown_at)} {drawn_colours[shown_at].capitalize()}\n"
            answers = [f" {colour.capitalize()}" for colour in listed]
            places = {f"colour{i + 1}": (colour, 0) for i, colour in enumerate(listed)}
            places |= {f"object{i + 1}": (thing, 0) for i, thing in enumerate(things)}
            return Example(
                clean=start + question(asked),
                corrupted={"mindiff": start + question(other)},
                answer=answers[asked],
                wrong_answer={"mindiff": answers[other]},
                candidates=tuple(answers),
                template=f"{surface}, {view}",
                marks={**places, "asked": (things[asked], 1)},
                after={},
            )

        return make


def _question(template: tuple[str, str], colours: Sequence[str], objects: Sequence[str]) -> Callable[[int], str]:
    """The text of a question about a list, as a function of which object is asked for."""
    surface, view = template
    *first, last = (with_article(f"{colour} {thing}") for colour, thing in zip(colours, objects, strict=True))
    listed = f"{', '.join(first)}{',' if len(first) > 1 else ''} and {last}"
    return lambda asked: f"Q: On the {surface}, {view} {listed}. What color is the {objects[asked]}?\nA:"
