"""Tiny models with a tokenizer of single characters, with and without a beginning-of-sequence token."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import workbench
from families import tiny_module
from workbench.models import Model

SPECIAL = ("<s>", "<unk>", "<pad>")


def character_tokenizer(*, bos: bool) -> Any:
    """Three special tokens, letters, digits and some signs: fewer ids than the embedding of the tiny models has."""
    pieces = [*SPECIAL, *string.ascii_letters, *string.digits, *" \n.,:=+-"]
    core = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(pieces)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), behavior="isolated")
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>", pad_token="<pad>")


@pytest.fixture(scope="session")
def text_model() -> Callable[..., Model]:
    def make(*, bos: bool = False, family: str = "llama") -> Model:
        return workbench.wrap_model(tiny_module(family), character_tokenizer(bos=bos), name="tiny")

    return make
