"""Capitals (factual recall; Lv et al. 2024, Merullo et al. 2024): the capital of a country."""

import random
from dataclasses import dataclass

from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import numbered_templates, single_token_rows

_OTHERS = 3


@dataclass(frozen=True, kw_only=True)
class Capitals(Task):
    """A sentence about a country that ends before the name of its capital.

    Corruption `other_country`: another country in its place; its capital is the wrong answer. Accuracy is counted among
    these two capitals and three more, drawn at random. Countries and capitals are single tokens of the tokenizer.
    """

    name = "capitals"
    title = "Capitals"
    description = "Capitals: complete a sentence about a country with the name of its capital."
    corruptions = ("other_country",)
    source = "Lv et al. 2024, Interpreting Key Mechanisms of Factual Recall in Transformer-Based Language Models"

    @property
    def chance(self) -> float:
        """One of five capitals."""
        return 1 / (2 + _OTHERS)

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        known = single_token_rows(model, "capitals.txt", at_least=2 + _OTHERS)
        templates = numbered_templates("templates_capitals.txt", split)

        def make(draw: random.Random, index: int) -> Example:
            family, template = draw.choice(templates)
            (country, capital), (other, wrong), *more = draw.sample(known, 2 + _OTHERS)
            return Example(
                clean=template.replace("{COUNTRY}", country),
                corrupted={"other_country": template.replace("{COUNTRY}", other)},
                answer=f" {capital}",
                wrong_answer={"other_country": f" {wrong}"},
                candidates=tuple(f" {name}" for name in (capital, wrong, *(town for _, town in more))),
                template=family,
                marks={"COUNTRY": (country, 0)},
            )

        return make
