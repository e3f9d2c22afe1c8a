"""Docstring (Heimersheim and Janiak 2023): a docstring names parameters in the order of the function's definition."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import single_token_words

_HEADS = ("def {NAME}(self", "async def {NAME}(self", "@classmethod\ndef {NAME}(cls")
_FIELDS = (":param", ":arg", "@param")
_PARAMETERS, _DESCRIBED, _UNRELATED = 5, 2, 7


@dataclass(frozen=True, kw_only=True)
class Docstring(Task):
    """A Python function with five parameters and a docstring that describes the first two; the third comes next.

    It is held against the other four parameters. All names and descriptions are unrelated words. Corruptions:
    `random_random` puts other names into definition and docstring, different ones in each, so that neither tells the
    answer or where to look for it; `random_definition` changes those of the definition only, `random_docstring` those
    of the docstring only (the paper's three; its best-known results are with the first).
    """

    name = "docstring"
    title = "Docstring"
    description = "Docstring: continue a Python docstring with the parameter that comes next in the definition."
    corruptions = ("random_random", "random_definition", "random_docstring")
    source = "Heimersheim and Janiak 2023, A Circuit for Python Docstrings in a 4-layer Attention-only Transformer"

    @property
    def chance(self) -> float:
        """One of the parameters."""
        return 1 / _PARAMETERS

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        described = 2 * _DESCRIBED + 3
        words = single_token_words(model, "words_common.txt", at_least=_PARAMETERS + _UNRELATED + described + 1)
        templates = [
            (head, field)
            for (i, head), (j, field) in product(enumerate(_HEADS), enumerate(_FIELDS))
            if split is None or ((i + j) % 2 == 0) == (split == "train")
        ]

        def make(draw: random.Random, index: int) -> Example:
            head, field = draw.choice(templates)
            drawn = draw.sample(words, _PARAMETERS + _UNRELATED + described + 1)
            names, others = drawn[:_PARAMETERS], drawn[_PARAMETERS : _PARAMETERS + _UNRELATED]
            about, function = drawn[_PARAMETERS + _UNRELATED : -1], drawn[-1]
            opening = head.replace("{NAME}", function)

            def text(defined: Sequence[str], documented: Sequence[str]) -> str:
                fields = [
                    f"    {field} {name}: {first} {second}\n"
                    for name, first, second in zip(documented, about[3::2], about[4::2], strict=True)
                ]
                return (
                    f'{opening}, {", ".join(defined)}):\n    """{" ".join(about[:3])}\n\n{"".join(fields)}    {field}'
                )

            shown = names[:_DESCRIBED]
            answer = names[_DESCRIBED]
            wrong = [f" {name}" for name in names if name != answer]
            return Example(
                clean=text(names, shown),
                corrupted={
                    "random_random": text(others[:_PARAMETERS], others[_PARAMETERS:]),
                    "random_definition": text(others[:_PARAMETERS], shown),
                    "random_docstring": text(names, others[_PARAMETERS:]),
                },
                answer=f" {answer}",
                wrong_answer=dict.fromkeys(self.corruptions, tuple(wrong)),
                candidates=tuple(f" {name}" for name in names),
                template=f"{head.split(' ')[0].strip('@').split(chr(10))[0]}, {field}",
                marks={
                    **{f"{letter}_def": (name, 0) for letter, name in zip("ABCDE", names, strict=True)},
                    **{f"{letter}_doc": (name, 1) for letter, name in zip("AB", shown, strict=True)},
                },
            )

        return make
