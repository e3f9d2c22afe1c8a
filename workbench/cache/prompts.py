"""The prompts of a capture: ids, how many of them are real, and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.errors import PromptError

if TYPE_CHECKING:
    from workbench.models import Model


@dataclass(frozen=True, kw_only=True)
class CapturedPrompts:
    """What a model read.

    Attributes:
        tokens: ids, padded on the right.
        lengths: real tokens of each prompt.
        source: whether they were given as ids or as texts.
        labels: columns of text, one entry a prompt (such as the kind of input).
    """

    tokens: Int[Tensor, "n pos"]
    lengths: Int[Tensor, "n"]
    source: Literal["tokens", "texts"] = "tokens"
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 over shape, ids, lengths and labels."""
        digest = hashlib.sha256(f"{tuple(self.tokens.shape)};".encode())
        digest.update(self.tokens.contiguous().numpy().tobytes())
        digest.update(self.lengths.contiguous().numpy().tobytes())
        for name in sorted(self.labels):
            digest.update("\0".join([name, *self.labels[name]]).encode())
        return digest.hexdigest()


def as_prompts(
    model: Model,
    tokens: Int[Tensor, "n pos"] | str | Sequence[str],
    lengths: Int[Tensor, "n"] | Sequence[int] | None,
    labels: Mapping[str, Sequence[str]] | None,
) -> CapturedPrompts:
    """Check what a capture was given, and put it on the CPU.

    Raises:
        PromptError: if it is not ids `[n, pos]` of the vocabulary within the context or texts, lengths or labels do
            not fit it, or padding would be seen because attention is not causal.
    """
    source: Literal["tokens", "texts"] = "tokens"
    if not isinstance(tokens, Tensor):
        if isinstance(tokens, str) or (len(tokens) > 0 and all(isinstance(text, str) for text in tokens)):
            if lengths is not None:
                raise PromptError("lengths are given with texts: leave them out, the tokenizer counts")
            tokens, lengths = model.to_tokens(tokens)
            source = "texts"
        else:
            raise PromptError(f"tokens must be ids [n, pos] or texts, not {type(tokens).__name__}")
    if tokens.dim() != 2 or tokens.numel() == 0 or tokens.is_floating_point():
        raise PromptError(
            f"tokens must be a non-empty [n, pos] tensor of ids, not {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    ids = tokens.detach().to("cpu", torch.int64).contiguous()
    n, pos = ids.shape
    if pos > model.spec.n_ctx:
        raise PromptError(
            f"prompts of {pos} tokens do not fit the context of {model.name}, {model.spec.n_ctx}: cut them"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= model.spec.d_vocab:
        raise PromptError(f"token id {low if low < 0 else high} is outside the vocabulary of {model.spec.d_vocab}")
    real = torch.full((n,), pos) if lengths is None else torch.as_tensor(lengths).detach().to("cpu", torch.int64)
    if real.shape != (n,) or int(real.min()) < 1 or int(real.max()) > pos:
        raise PromptError(
            f"lengths must be {n} numbers from 1 to {pos}, one a prompt; they have shape {tuple(real.shape)}"
            + (f" and go from {int(real.min())} to {int(real.max())}" if real.numel() else "")
        )
    if not model.spec.causal and int(real.min()) < pos:
        raise PromptError(
            f"the attention of {model.name} is not causal, so real tokens would see padding: capture prompts of one "
            "length"
        )
    columns = {str(name): tuple(map(str, column)) for name, column in (labels or {}).items()}
    for name, column in columns.items():
        if len(column) != n:
            raise PromptError(
                f"labels[{name!r}] has {len(column)} entries and there are {n} prompts: give one a prompt"
            )
    return CapturedPrompts(tokens=ids, lengths=real.contiguous(), source=source, labels=columns)


def windows(model: Model, text: str, length: int) -> tuple[Int[Tensor, "n length"], Int[Tensor, "n"]]:
    """Cut one long text into prompts of `length` tokens; the last is padded.

    Each window begins with a beginning-of-sequence token if the tokenizer puts one in front of a text.

    Returns:
        Ids and the number of real tokens of each window.

    Raises:
        PromptError: without a tokenizer, for a text without tokens, or a length outside the context.
    """
    if model.tokenizer is None:
        raise PromptError(f"text needs a tokenizer and {model.name} has none: give token ids")
    front = [int(model.tokenizer.bos_token_id)] if model.prepends_bos else []
    if not len(front) < length <= model.spec.n_ctx:
        raise PromptError(
            f"length is {length}: expected {len(front) + 1} to {model.spec.n_ctx}, the context of {model.name}"
        )
    ids = list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise PromptError("the text has no tokens: give a text")
    step = length - len(front)
    rows = [front + ids[first : first + step] for first in range(0, len(ids), step)]
    pad = model.tokenizer.pad_token_id
    pad = pad if pad is not None else (model.tokenizer.eos_token_id or 0)
    tokens = torch.full((len(rows), length), int(pad))
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    return tokens, torch.tensor([len(row) for row in rows])
