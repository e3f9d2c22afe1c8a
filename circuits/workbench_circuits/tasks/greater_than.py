"""Greater-Than (Hanna, Liu and Variengien 2023): a span of years ends later than it begins."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from workbench.errors import PromptError
from workbench.prompts import TextModel
from workbench_circuits.tasks.base import Example, Maker, Split, Task
from workbench_circuits.tasks.words import numbered_templates, single_token_words

_CENTURIES = range(11, 19)
_PAIRS = [f"{number:02}" for number in range(100)]
_DIGITS = [str(number) for number in range(10)]


@dataclass(frozen=True, kw_only=True)
class GreaterThan(Task):
    """The first year is given in full and the last one up to its century; what comes next must make it later.

    What is asked for depends on how the tokenizer cuts numbers:

    - In pairs of digits (GPT-2): as in the paper. The answers are all two-digit endings above that of the first year,
      the wrong answers all others; the first year ends in 02 to 98, and years of which the tokenizer makes anything
      but century and ending are left out.
    - Digit by digit (SmolLM2, Llama 2): the answer is the decade digit. The answers are the digits above that of the
      first year and the wrong answers those below; the digit itself is neither, since the year may go either way. The
      first year's decade digit is 1 to 8.

    Corruption `year_01`: the first year ends in 01, as in the paper, so that nearly every ending is possible.

    The metric `logit_diff` averages the logits of each set; the paper sums probabilities instead.
    """

    name = "greater_than"
    title = "Greater-Than"
    description = "Greater-Than: complete the year in which something ended with one after that in which it began."
    corruptions = ("year_01",)
    source = "Hanna, Liu and Variengien 2023, How does GPT-2 compute greater-than?"

    @property
    def chance(self) -> float:
        """About one half, since first years are drawn evenly; the share of answers differs from prompt to prompt."""
        return 0.5

    def maker(self, model: TextModel, split: Split | None) -> Maker:
        """A function that draws one example; see `Task.maker`."""
        events = single_token_words(model, "events.txt", at_least=1)
        templates = numbered_templates("templates_greater_than.txt", split)
        cut = number_cut(model)
        centuries = {century: _endings(model, century, cut) for century in map(str, _CENTURIES)}
        centuries = {century: endings for century, endings in centuries.items() if endings}

        def make(draw: random.Random, index: int) -> Example:
            family, template = draw.choice(templates)
            century = draw.choice(list(centuries))
            ending = draw.choice(centuries[century])
            event = draw.choice(events)
            filled = template.replace("{EVENT}", event).replace("{CENTURY}", century)
            clean = filled.replace("{YEAR}", century + ending)
            if cut == "pairs":
                right = [number for number in _PAIRS if number > ending]
                wrong = [number for number in _PAIRS if number <= ending]
            else:
                right = [digit for digit in _DIGITS if digit > ending[0]]
                wrong = [digit for digit in _DIGITS if digit < ending[0]]
            first_year = clean.index(century + ending)
            last_year = len(clean) - len(century)
            spans = {"YEAR": first_year + len(century), "CENTURY": last_year if cut == "digits" else last_year - 1}
            if cut == "digits":
                spans["UNIT"] = first_year + len(century) + 1
            return Example(
                clean=clean,
                corrupted={"year_01": filled.replace("{YEAR}", f"{century}01")},
                answer=tuple(right),
                wrong_answer={"year_01": tuple(wrong)},
                candidates=(*right, *wrong),
                template=family,
                marks={"EVENT": (event, 0)},
                at=spans,
            )

        return make


def number_cut(model: TextModel) -> Literal["pairs", "digits"]:
    """How a tokenizer cuts a year of four digits.

    Raises:
        PromptError: if neither in pairs nor digit by digit.
    """
    seen = {year: _pieces(model, year) for year in ("1732", "1645", "1876")}
    if all(pieces == [*year] for year, pieces in seen.items()):
        return "digits"
    if any(pieces == [year[:2], year[2:]] for year, pieces in seen.items()):
        return "pairs"
    raise PromptError(
        f"greater_than needs a tokenizer that cuts years in pairs of digits or digit by digit; this one cuts {seen}. "
        "Use another model, or PromptPairs.from_tokens with prompts of your own"
    )


def _pieces(model: TextModel, year: str) -> list[str]:
    """The tokens of a year inside a sentence, without spaces."""
    (ids, lengths), (_, count) = model.to_tokens([f"in {year}"]), model.to_tokens(["in"])
    tokens = model.to_str_tokens(ids[0, int(count[0]) : int(lengths[0])])
    return [piece for token in tokens if (piece := token.strip())]


def _endings(model: TextModel, century: str, cut: str) -> Sequence[str]:
    """Endings of first years of which, and of the corrupted one, the tokenizer makes what the task needs."""
    if cut == "digits":
        return [ending for ending in _PAIRS if "1" <= ending[0] <= "8"]
    if any(model.single_token(ending) is None for ending in _PAIRS) or _pieces(model, f"{century}01") != [
        century,
        "01",
    ]:
        return []
    return [ending for ending in _PAIRS[2:99] if _pieces(model, century + ending) == [century, ending]]
