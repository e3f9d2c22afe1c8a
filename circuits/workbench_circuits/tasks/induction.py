"""Induction (Elhage et al. 2021; Olsson et al. 2022): what followed a word before follows it again."""

import random
from dataclasses import dataclass

from workbench.errors import PromptError
from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import of_split, single_token_words


@dataclass(frozen=True, kw_only=True)
class Induction(Task):
    """Different words in random order, of which a piece that ends in A comes again: what follows is B, as before.

    Nothing but the repetition tells the answer. It is held against C, another of the words, drawn at random from those
    that are not repeated. The templates are the places of A: the split "held_out" has distances between the two A that
    "train" has not. Corruptions: `first_a` replaces the first A by a word that is not in the prompt, so that what
    followed it is not to be found; `first_b` puts C in the place of B, so that the right answer becomes C.

    One repeated word tells little: SmolLM2-135M-Instruct finds B among 12 words in 22 % of prompts with `repeated=1`,
    38 % with 2, 57 % with 4, and among 16 words in 72 % with 8, the default (200 prompts each; lists with commas were
    tried too, with 10 % for one repeated word).

    Attributes:
        n_words: different words in front of the repetition.
        repeated: how many words come again; 1 is the bare pattern A B ... A.
    """

    n_words: int = 16
    repeated: int = 8
    title = "Induction"
    description = "Induction: in a sequence of random words of which a piece comes again, say what followed it before."
    corruptions = ("first_a", "first_b")
    source = "Olsson et al. 2022, In-context Learning and Induction Heads"

    def __post_init__(self) -> None:
        if self.repeated < 1 or self.n_words < self.repeated + 8:
            raise PromptError(
                f"repeated is {self.repeated} and n_words is {self.n_words}: repeat at least 1 word, and give at least "
                "8 words more than are repeated, so that A can stand in four places of each split"
            )

    @property
    def name(self) -> str:  # type: ignore[override]
        """`induction`, followed by the numbers of words and of repeated words where they are not the default."""
        default = (self.n_words, self.repeated) == (16, 8)
        return "induction" if default else f"induction_{self.n_words}_{self.repeated}"

    @property
    def chance(self) -> float:
        """One of the different words."""
        return 1 / self.n_words

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        words = single_token_words(model, "words_common.txt", at_least=self.n_words + 1)
        places = of_split(range(self.repeated - 1, self.n_words - 1), split)

        def make(draw: random.Random, index: int) -> Example:
            at = draw.choice(places)
            *listed, unrelated = draw.sample(words, self.n_words + 1)
            again = listed[at + 1 - self.repeated : at + 1]
            a, b = listed[at], listed[at + 1]
            c = draw.choice([word for word in listed if word not in (*again, b)])

            def text(first_a: str, first_b: str) -> str:
                return " ".join(["", *listed[:at], first_a, first_b, *listed[at + 2 :], *again])

            return Example(
                clean=text(a, b),
                corrupted={"first_a": text(unrelated, b), "first_b": text(a, c)},
                answer=f" {b}",
                wrong_answer=dict.fromkeys(self.corruptions, f" {c}"),
                candidates=tuple(f" {word}" for word in listed),
                template=f"{at:02}",
                marks={"A1": (a, 0), "B": (b, 0), "C": (c, 0), "A2": (a, 1)},
            )

        return make
