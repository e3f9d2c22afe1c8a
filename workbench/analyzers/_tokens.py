"""The token sequences that analyses run on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.datafiles import data_path
from workbench.errors import PromptError

if TYPE_CHECKING:
    from workbench.models import Model

DOMAINS = ("prose", "dialogue", "python", "c", "arithmetic", "tables", "logs", "german")
"""The text domains in `data/texts`, in the order in which documents are taken from them."""


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What an analysis runs a model on; `capture(model, s.tokens, ..., labels=s.labels)` gives it a cache to run on.

    Attributes:
        tokens: ids of sequences of one length.
        labels: columns of text, one entry a sequence: `input`, the kind, and what else tells them apart.
        notes: what is not as it was asked for.
    """

    tokens: Int[Tensor, "n pos"]
    labels: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = field(default=())


def ordinary_ids(model: Model) -> Int[Tensor, "ids"]:
    """Ids of the vocabulary that stand for text: neither special tokens nor rows that no token uses.

    Without a tokenizer, all ids of the vocabulary.
    """
    size = model.spec.d_vocab
    if model.tokenizer is None:
        return torch.arange(size)
    special = set(model.tokenizer.all_special_ids)
    special |= {index for index, token in model.tokenizer.added_tokens_decoder.items() if token.special}
    return torch.tensor([index for index in range(min(size, len(model.tokenizer))) if index not in special])


def random_ids(model: Model, n: int, length: int, *, seed: int, stream: str) -> Int[Tensor, "n length"]:
    """Independent draws, uniform over `ordinary_ids`.

    Args:
        model: whose vocabulary it is.
        n: sequences.
        length: tokens a sequence.
        seed: the seed of the analysis.
        stream: what the draws are for; each has a generator of its own, so one does not shift another's draws.
    """
    pool = ordinary_ids(model)
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return pool[torch.randint(len(pool), (n, length), generator=generator)]


def built_in_documents() -> list[tuple[str, str, str]]:
    """All documents of the built-in domains as (name, domain, text): the first of each domain, then the second, ..."""
    domains = {}
    for domain in DOMAINS:
        text = data_path(f"texts/{domain}.txt").read_text(encoding="utf-8")
        domains[domain] = text.removesuffix("\n").split("\n%%\n")
    longest = max(len(documents) for documents in domains.values())
    return [
        (f"{domain} {place}", domain, documents[place])
        for place in range(longest)
        for domain, documents in domains.items()
        if place < len(documents)
    ]


def leading_tokens(model: Model, texts: Sequence[str], length: int) -> list[list[int]]:
    """The first tokens of each text, at most `length`, with what the tokenizer itself puts in front.

    Raises:
        PromptError: if the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise PromptError(
            f"natural text needs a tokenizer and {model.name} has none: give one to wrap_model(module, tokenizer), "
            "or leave 'natural' out of inputs"
        )
    return [list(model.tokenizer(text)["input_ids"])[:length] for text in texts]


def digest_of(*tokens: Int[Tensor, "n pos"]) -> str:
    """SHA-256 over the shapes and ids of token tensors."""
    digest = hashlib.sha256()
    for each in tokens:
        digest.update(f"{tuple(each.shape)};".encode())
        digest.update(each.cpu().to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()
