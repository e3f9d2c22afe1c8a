"""Indirect-object identification (Wang et al. 2022): who receives what the other one gives."""

import random
from dataclasses import dataclass

from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import numbered_templates, single_token_words, with_article

_ORDERS = ("ABBA", "BABA")


@dataclass(frozen=True, kw_only=True)
class IndirectObject(Task):
    """Two people are named, one of them (S) is named again and gives something to the other (IO).

    Prompts alternate between ABBA (the indirect object first) and BABA (the subject first). Corruptions: `abc` puts
    three unrelated names in the places of IO, S1 and S2 (Wang et al.); `s2_flip` replaces the second S by the IO, so
    that the right answer becomes S (Merullo et al. 2024). The answer is held against S in both.
    """

    name = "ioi"
    title = "IOI"
    description = "Indirect-object identification: complete a sentence with the name of the one who receives."
    corruptions = ("abc", "s2_flip")
    source = "Wang et al. 2022, Interpretability in the Wild"

    @property
    def chance(self) -> float:
        """One of two names."""
        return 0.5

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        names = single_token_words(model, "names.txt", at_least=5)
        places = single_token_words(model, "places.txt", at_least=1)
        objects = single_token_words(model, "objects_ioi.txt", at_least=1)
        templates = numbered_templates("templates_ioi.txt", split)

        def make(draw: random.Random, index: int) -> Example:
            family, template = draw.choice(templates)
            order = _ORDERS[index % 2]
            io, s, *unrelated = draw.sample(names, 5)
            thing = draw.choice(objects)
            filled = template.replace("{PLACE}", draw.choice(places)).replace("{AN_OBJECT}", with_article(thing))

            def text(first_io: str, first_s: str, second_s: str) -> str:
                a, b = (first_io, first_s) if order == "ABBA" else (first_s, first_io)
                return filled.replace("{A}", a).replace("{B}", b).replace("{S}", second_s)

            return Example(
                clean=text(io, s, s),
                corrupted={"abc": text(*unrelated), "s2_flip": text(io, s, io)},
                answer=f" {io}",
                wrong_answer=dict.fromkeys(self.corruptions, f" {s}"),
                candidates=(f" {io}", f" {s}"),
                template=f"{family}/{order}",
                marks={"IO": (io, 0), "S1": (s, 0), "S2": (s, 1)},
                after={"S1+1": "S1"},
            )

        return make
