"""Word lists, filtered to the words that are one token of the tokenizer at hand."""

from collections.abc import Callable, Sequence

from workbench.datafiles import data_path
from workbench.errors import PromptError
from workbench.prompts import TextModel


def read_lines(filename: str) -> list[str]:
    """Words or templates of a file in `data/`, one a line; lines that start with `#` are comments.

    Raises:
        DataError: if the file is not there.
    """
    lines = (line.strip() for line in data_path(filename).read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


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
    if model.tokenizer is None:
        raise PromptError("tasks are made of words and this model has no tokenizer: give one to wrap_model")
    words = read_lines(filename)
    kept: list[str] = []
    dropped: list[str] = []
    for word in words:
        single = all(model.single_token(f" {form(word)}") is not None for form in forms)
        (kept if single else dropped).append(word)
    if len(kept) < at_least:
        raise PromptError(
            f"{filename}: {len(kept)} of {len(words)} words are single tokens of this tokenizer and {at_least} are "
            f"needed; several tokens each: {', '.join(dropped[:12])}{' ...' if len(dropped) > 12 else ''}. Use "
            "another model, or PromptPairs.from_tokens with prompts of your own"
        )
    return kept


def with_article(words: str) -> str:
    """`words` with "a" or "an" in front, by the first letter: "an orange cup", "a red cup"."""
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"
