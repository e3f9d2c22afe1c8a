"""Reading of what users hand to `PromptPairs`; every failure names argument, prompt, value and remedy."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench._prompt_checks import ABSENT
from workbench.errors import PromptError

_T = TypeVar("_T")


@runtime_checkable
class TextModel(Protocol):
    """The part of a model that turns text into tokens."""

    @property
    def spec(self) -> Any:
        """Its sizes, among them `d_vocab`."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or None."""

    @property
    def prepends_bos(self) -> bool:
        """Whether the tokenizer puts a BOS in front by itself."""

    def to_tokens(self, texts: Any, *, bos: bool | None = None) -> tuple[Tensor, Tensor]:
        """Right-padded ids `[n, t]` and lengths `[n]`."""

    def single_token(self, word: str) -> int | None:
        """Id of a word that is exactly one token."""

    def to_str_tokens(self, ids: Any) -> list[str]:
        """The text of each token."""


def integers(name: str, values: Any) -> Tensor:
    """`values` as a new int64 tensor.

    Raises:
        PromptError: if they are not integers, or rows differ in length.
    """
    try:
        tensor = values.detach().clone() if isinstance(values, Tensor) else torch.tensor(np.asarray(values))
    except (ValueError, TypeError) as error:
        raise PromptError(f"{name} must be integers in equal rows, got {_short(values)}: {error}") from None
    if tensor.numel() and (tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex()):
        raise PromptError(f"{name} must be integers, got {tensor.dtype} {_short(values)}: convert with .long()")
    return tensor.long()


def token_rows(clean: Any, corrupted: Any, lengths: Any, model: TextModel | None) -> tuple[Tensor, Tensor, Tensor]:
    """Both versions as right-padded ids `[n, t]`, and the lengths `[n]`.

    Raises:
        PromptError: if rows differ in length without `lengths`, or `lengths` contradicts them.
    """
    row_lengths = None if lengths is None else integers("lengths", lengths)
    first, second = (_padded(name, rows, row_lengths) for name, rows in (("clean", clean), ("corrupted", corrupted)))
    if first.ndim == 2 and row_lengths is None:
        _notice_padding(first, model)
        row_lengths = torch.full((len(first),), first.shape[1], device=first.device)
    if row_lengths is None:
        row_lengths = torch.zeros(0, dtype=torch.long)
    return first, second.to(first.device), row_lengths.to(first.device)


def _padded(name: str, rows: Any, lengths: Tensor | None) -> Tensor:
    if isinstance(rows, Tensor | np.ndarray) or not _is_rows(rows):
        return integers(name, rows)
    sizes = [len(row) for row in rows]
    odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is None:
        return integers(name, [list(map(_plain, row)) for row in rows])
    if lengths is None:
        raise PromptError(
            f"{name} has prompts of unequal length ({name}[0] has {sizes[0]} tokens, {name}[{odd}] has {sizes[odd]}) "
            f"and lengths was not given: pass lengths= with the number of tokens of each prompt"
        )
    if lengths.ndim == 1 and len(lengths) == len(sizes):
        for i, size in enumerate(sizes):
            if size < int(lengths[i]):
                raise PromptError(f"lengths[{i}] is {int(lengths[i])}, but {name}[{i}] has only {size} tokens")
    return stack([integers(name, [list(map(_plain, row))]) for row in rows], fill=0)


def _is_rows(rows: Any) -> bool:
    return isinstance(rows, Sequence) and len(rows) > 0 and all(hasattr(row, "__len__") for row in rows)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _notice_padding(rows: Tensor, model: TextModel | None) -> None:
    pad = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if pad is None or not rows.numel():
        return
    ends = rows[:, -1] == pad
    if ends.any() and not ends.all():
        row = int(ends.nonzero()[0])
        raise PromptError(
            f"clean[{row}] ends in the padding token {pad} while other prompts do not, and lengths was not given: "
            "pass lengths= with the number of tokens of each prompt"
        )


def id_sets(name: str, values: Any) -> Tensor:
    """`[n]` ids or `[n, k]` sets as int64 `[n, k]`; rows of a list may differ in size and are filled with `ABSENT`."""
    if not isinstance(values, Tensor | np.ndarray) and _is_rows(values):
        return stack([integers(f"{name}[{i}]", [list(map(_plain, row))]) for i, row in enumerate(values)], fill=ABSENT)
    tensor = integers(name, values)
    return tensor[:, None] if tensor.ndim == 1 else tensor


def stack(rows: Sequence[Tensor], fill: int) -> Tensor:
    """`[n_i, w_i]` tensors below each other, filled up on the right to the widest."""
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (0, width - row.shape[1]), value=fill) for row in rows])


def tokenise_pairs(
    model: TextModel,
    clean: Sequence[str],
    corrupted: Sequence[str],
    bos: bool | None,
    where: Callable[[int], str] = "prompt {}".format,
) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"], Int[Tensor, " n"]]:
    """Both versions as right-padded ids, and their common lengths; `where` names a prompt in errors.

    Raises:
        PromptError: if there is no text, the counts differ, or the versions of a prompt differ in tokens.
    """
    for name, texts in (("clean", clean), ("corrupted", corrupted)):
        if isinstance(texts, str):
            raise PromptError(f"{name} is one string, expected a list of texts: write [{texts[:20]!r}...]")
        if not texts:
            raise PromptError(f"{name} is empty: give at least one text")
    if len(clean) != len(corrupted):
        raise PromptError(f"clean has {len(clean)} texts and corrupted has {len(corrupted)}: give one for one")
    tokens, lengths = model.to_tokens(list(clean), bos=bos)
    others, other_lengths = model.to_tokens(list(corrupted), bos=bos)
    for row in (lengths != other_lengths).nonzero().flatten().tolist():
        ours, theirs = int(lengths[row]), int(other_lengths[row])
        raise PromptError(
            f"{where(row)}: clean is {ours} tokens and corrupted is {theirs}; patching lines them up token by token. "
            f"Clean: {model.to_str_tokens(tokens[row, :ours])}, "
            f"corrupted: {model.to_str_tokens(others[row, :theirs])}. Reword one of them until both have as many tokens"
        )
    return tokens, others, lengths


def word_ids(
    model: TextModel,
    name: str,
    words: Sequence[str] | Sequence[Sequence[str]],
    where: Callable[[int], str] | None = None,
) -> Tensor:
    """Ids `[n, k]` of words that must each be a single token; `where` names a prompt's entry in errors.

    Raises:
        PromptError: naming the word, the tokens it falls into, and what could be done.
    """
    if isinstance(words, str):
        raise PromptError(f"{name} is one string, expected a list with the word (or list of words) of each prompt")
    rows = []
    for row, entry in enumerate(words):
        ids = []
        for word in [entry] if isinstance(entry, str) else entry:
            token = model.single_token(word)
            if token is None:
                raise PromptError(_not_single(model, where(row) if where else f"{name}[{row}]", word))
            ids.append(token)
        rows.append(ids)
    return id_sets(name, rows)


def _not_single(model: TextModel, where: str, word: str) -> str:
    ids, lengths = model.to_tokens([word], bos=False)
    split = model.to_str_tokens(ids[0, : int(lengths[0])])
    respaced = f" {word.strip()}" if word.strip() != word[1:] else word.strip()
    hint = f"; {respaced!r} would be one" if respaced and model.single_token(respaced) is not None else ""
    what = f"{len(split)} tokens {split}" if len(split) > 1 else f"unknown to this tokenizer (it reads {split[0]!r})"
    return (
        f"{where} is {word!r}, which is {what}, and an answer must be a single token{hint}: "
        "choose another word, or give ids to from_tokens"
    )


def token_at(model: TextModel, text: str, place: int, row: Sequence[int], bos: bool | None = None) -> int | None:
    """Which of a text's tokens begins at a place in it; None if the tokenizer lets none begin there.

    Args:
        model: whose tokenizer is used.
        text: the text.
        place: index of a character.
        row: the tokens of the whole text, with BOS as `bos` says.
        bos: as in `PromptPairs.from_texts`.
    """
    if place == 0:
        return int(model.prepends_bos if bos is None else bos)
    ids, lengths = model.to_tokens([text[:place]], bos=bos)
    before = ids[0, : int(lengths[0])].tolist()
    return len(before) if len(before) < len(row) and before == list(row[: len(before)]) else None


def row_index(index: Any, n: int) -> Int[Tensor, " m"]:
    """`index` (integers, slice or boolean mask) as row numbers below `n`."""
    if isinstance(index, slice):
        rows = torch.arange(n)[index]
    else:
        rows = torch.as_tensor(index).flatten()
        if rows.dtype == torch.bool and len(rows) != n:
            raise PromptError(f"index is a mask of {len(rows)} entries for {n} prompts")
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else integers("index", rows)
    if not len(rows):
        raise PromptError(f"index={_short(index)} leaves no prompt of {n}")
    if (rows < -n).any() or (rows >= n).any():
        raise PromptError(f"index={_short(index)} leaves the range of {n} prompts (0 to {n - 1})")
    return rows % n


def part_by_family(
    templates: tuple[str, ...] | None, fraction: float, draw: np.random.Generator
) -> Bool[np.ndarray, " n"]:
    """Which prompts go to train when whole template families are kept together."""
    if templates is None:
        raise PromptError("by_template=True needs the template of each prompt, and templates is None: pass templates=")
    family = np.array([name.split("/")[0] for name in templates])
    names, counts = np.unique(family, return_counts=True)
    if len(names) < 2:
        raise PromptError(
            f"by_template=True needs two template families, there is only {names[0]!r}: draw more prompts"
        )
    order = draw.permutation(len(names))
    filled = np.cumsum(counts[order])[:-1]
    cut = int(np.abs(filled - fraction * len(family)).argmin()) + 1
    return np.isin(family, names[order[:cut]])


def agreed(values: Sequence[_T]) -> _T | None:
    """The value, if all are the same."""
    return values[0] if all(value == values[0] for value in values) else None


def _short(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 60 else f"{text[:57]}..."
