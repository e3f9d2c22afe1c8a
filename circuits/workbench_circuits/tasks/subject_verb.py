"""Subject-verb agreement past an attractor (Linzen, Dupoux and Goldberg 2016; Finlayson et al. 2021)."""

import random
from dataclasses import dataclass

from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import numbered_templates, single_token_rows

_VERBS = ((" is", " was", " has"), (" are", " were", " have"))


@dataclass(frozen=True, kw_only=True)
class SubjectVerb(Task):
    """A subject, then a noun of the opposite number (the attractor), up to the verb, which agrees with the subject.

    Prompts alternate between singular and plural subjects. The answers are the three commonest verbs in the number of
    the subject (is, was, has or are, were, have), the wrong answers the same three in the other number. Corruption
    `number`: the subject in the other number, that of the attractor.
    """

    name = "subject_verb"
    title = "Subject-verb agreement"
    description = "Subject-verb agreement: continue with a verb in the number of the subject, not of the noun between."
    corruptions = ("number",)
    source = "Linzen, Dupoux and Goldberg 2016, Assessing the Ability of LSTMs to Learn Syntax-Sensitive Dependencies"

    @property
    def chance(self) -> float:
        """Three of six verbs."""
        return 0.5

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        nouns = single_token_rows(model, "nouns_number.txt", at_least=2)
        templates = numbered_templates("templates_subject_verb.txt", split)

        def make(draw: random.Random, index: int) -> Example:
            family, template = draw.choice(templates)
            number = index % 2
            subject, attractor = draw.sample(nouns, 2)
            filled = template.replace("{OTHER}", attractor[1 - number])
            return Example(
                clean=filled.replace("{SUBJECT}", subject[number]),
                corrupted={"number": filled.replace("{SUBJECT}", subject[1 - number])},
                answer=_VERBS[number],
                wrong_answer={"number": _VERBS[1 - number]},
                candidates=(*_VERBS[number], *_VERBS[1 - number]),
                template=f"{family}/{('singular', 'plural')[number]}",
                marks={"SUBJECT": (subject[number], 0), "ATTRACTOR": (attractor[1 - number], 0)},
            )

        return make
