"""Gendered pronouns (Mathwin et al. 2023): the pronoun that stands for a first name."""

import random
from dataclasses import dataclass

from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import numbered_templates, single_token_words

_PRONOUNS = (" she", " he")


@dataclass(frozen=True, kw_only=True)
class GenderedPronoun(Task):
    """A sentence with one first name, up to the pronoun that stands for it: "she" or "he".

    Prompts alternate between names mostly given to women and names mostly given to men. The task asks what the model
    has learnt of such names, not what any person is called. Corruption `other_gender`: a name of the other list.
    """

    name = "gendered_pronoun"
    title = "Gendered pronoun"
    description = "Gendered pronoun: continue a sentence about a person with the pronoun usual for the first name."
    corruptions = ("other_gender",)
    source = "Mathwin et al. 2023, Identifying a Preliminary Circuit for Predicting Gendered Pronouns in GPT-2 Small"

    @property
    def chance(self) -> float:
        """One of two pronouns."""
        return 0.5

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        names = [single_token_words(model, f"names_{kind}.txt", at_least=1) for kind in ("female", "male")]
        templates = numbered_templates("templates_gendered_pronoun.txt", split)

        def make(draw: random.Random, index: int) -> Example:
            family, template = draw.choice(templates)
            mine = index % 2
            name, other = draw.choice(names[mine]), draw.choice(names[1 - mine])
            return Example(
                clean=template.replace("{NAME}", name),
                corrupted={"other_gender": template.replace("{NAME}", other)},
                answer=_PRONOUNS[mine],
                wrong_answer={"other_gender": _PRONOUNS[1 - mine]},
                candidates=_PRONOUNS,
                template=family,
                marks={"NAME": (name, 0)},
            )

        return make
