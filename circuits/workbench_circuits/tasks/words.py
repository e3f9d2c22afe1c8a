"""Word lists, filtered to the words that are one token of the tokenizer at hand."""

from collections.abc import Callable, Sequence
from typing import TypeVar

from workbench.datafiles import data_path
from workbench.errors import PromptError
from workbench.prompts import TextModel

_T = TypeVar("_T")


def read_lines(filename: str) -> list[str]:
    """Words or templates of a file in `data/`, one a line; lines that start with `#` are comments.

    Raises:
        DataError: if the file is not there.
    """
    lines = (line.strip() for line in data_path(filename).read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def numbered_templates(filename: str, split: str | None) -> list[tuple[str, str]]:
    """Family number and text of the templates of a file: even lines are "train", odd ones "held_out", None is all."""
    return of_split([(f"{family:02}", text) for family, text in enumerate(read_lines(filename))], split)


def of_split(items: Sequence[_T], split: str | None) -> list[_T]:
    """Every second item: the even ones for "train", the odd ones for "held_out"; None: all of them."""
    return [item for at, item in enumerate(items) if split is None or (at % 2 == 0) == (split == "train")]


def single_token_words(
    model: TextModel, filename: str, *, at_least: int, forms: Sequence[Callable[[str], str]] = (str,)
) -> list[str]:
    """The words of a file of which every form, with a leading space, is one token.

    Args:
        model: whose tokenizer decides.
        filename: below `data/`.
        at_least: how many words the task needs.
        forms: how the word appears in prompts and answers, for example `(str, str.capitalize)`.

    Raises:
        PromptError: if the model has no tokenizer or too few words are left; the message names those that fell out.
    """
    return _single(model, filename, at_least, lambda word: [form(word) for form in forms])


def single_token_rows(model: TextModel, filename: str, *, at_least: int) -> list[tuple[str, ...]]:
    """The lines of a file, each of several words, of which every word is one token with a leading space.

    Args:
        model: whose tokenizer decides.
        filename: below `data/`.
        at_least: how many lines the task needs.

    Raises:
        PromptError: as `single_token_words`.
    """
    return [tuple(line.split()) for line in _single(model, filename, at_least, str.split)]


def _single(model: TextModel, filename: str, at_least: int, parts: Callable[[str], Sequence[str]]) -> list[str]:
    if model.tokenizer is None:
        raise PromptError("tasks are made of words and this model has no tokenizer: give one to wrap_model")
    lines = read_lines(filename)
    kept: list[str] = []
    dropped: list[str] = []
    for line in lines:
        single = all(model.single_token(f" {part}") is not None for part in parts(line))
        (kept if single else dropped).append(line)
    if len(kept) < at_least:
        raise PromptError(
            f"{filename}: {len(kept)} of {len(lines)} words are single tokens of this tokenizer and {at_least} are "
            f"needed; several tokens each: {', '.join(dropped[:12])}{' ...' if len(dropped) > 12 else ''}. Use "
            "another model, or PromptPairs.from_tokens with prompts of your own"
        )
    return kept


def with_article(words: str) -> str:
    """`words` with "a" or "an" in front, by the first letter: "an orange cup", "a red cup"."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"
