"""A tokenizer of whole words, and a tiny random model over its vocabulary: tasks without a download."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import workbench as wb
from workbench.datafiles import data_path
from workbench.models import Model

_PIECE = r" ?[A-Za-z]+|\n *|[^A-Za-z\s]| +"
_PIECE_OF_PAIRS = rf" ?[0-9][0-9]|{_PIECE}"
UNKNOWN = "<unk>"


def word_tokenizer(texts: list[str], *, piece_pattern: str = _PIECE, **special: Any) -> Any:
    """A tokenizer that has every word of `texts`, with and without a leading space, as one token."""
    pieces = {UNKNOWN, *special.values()}
    for text in texts:
        for piece in re.findall(piece_pattern, text):
            pieces |= {piece, f" {piece.strip()}", piece.strip()} if piece.strip() else {piece}
    core = Tokenizer(models.WordLevel({piece: at for at, piece in enumerate(sorted(pieces))}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(piece_pattern), behavior="isolated")
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=UNKNOWN, clean_up_tokenization_spaces=False, **special
    )


@lru_cache(maxsize=1)
def task_texts() -> tuple[str, ...]:
    """Everything that the prompts of the tasks are made of."""
    lists = ["names", "places", "objects_ioi", "objects_colored", "colours", "templates_ioi"]
    lists += ["names_female", "names_male", "capitals", "nouns_number", "events", "words_common"]
    lists += [f"templates_{task}" for task in ("greater_than", "capitals", "gendered_pronoun", "subject_verb")]
    words = "\n".join(data_path(f"{name}.txt").read_text(encoding="utf-8") for name in lists)
    colours = data_path("colours.txt").read_text(encoding="utf-8").title()
    frame = "Q: On the table desk floor, there is you see I see a an. and What color is the ?\nA:"
    verbs = "she he is was has are were have"
    docstring = 'async def\n    ":@classmethod\ndef (self, cls, ): param arg'
    return (words, colours, frame, verbs, docstring, " ".join(f"{number:02}" for number in range(100)))


def tiny_text_model(
    *, without: tuple[str, ...] = (), seed: int = 0, pairs_of_digits: bool = False, **special: Any
) -> Model:
    """A random 2-layer model whose tokenizer knows every word of the tasks but those in `without`.

    It cuts numbers digit by digit, or, as GPT-2's does, in pairs of digits.
    """
    texts = [re.sub(rf"\b({'|'.join(without)})\b", "", text) if without else text for text in task_texts()]
    tokenizer = word_tokenizer(texts, piece_pattern=_PIECE_OF_PAIRS if pairs_of_digits else _PIECE, **special)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.4,
    )
    return wb.wrap_model(transformers.LlamaForCausalLM(config).eval(), tokenizer, name="tiny-words")
