"""Clean and corrupted prompts with their answers: what every patching run, metric and circuit is measured on."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench import _prompt_checks as checks
from workbench import _prompt_inputs as inputs
from workbench._prompt_checks import ABSENT
from workbench._prompt_csv import check_ids, read_csv, span_positions
from workbench._prompt_inputs import TextModel
from workbench.errors import PromptError

__all__ = ["ABSENT", "PromptPairs", "TextModel"]

_PER_PROMPT = ("lengths", "answer_positions")
_SETS = ("answers", "wrong_answers", "candidates")


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptPairs:
    """A batch of prompts, each in a clean and a corrupted version that line up token by token.

    Build one with `from_tokens`, `from_texts` or `from_csv`; the constructor itself checks everything and repairs
    nothing. Rows of `answers`, `wrong_answers` and `candidates` are sets: a shorter set is filled up with `ABSENT`
    (-1). A pair whose two versions are identical is allowed: its `first_difference` is its length.

    Attributes:
        clean: token ids, padded on the right.
        corrupted: token ids, padded on the right; prompt for prompt as long as `clean`.
        lengths: number of tokens of each prompt, padding not counted.
        answer_positions: position whose logits predict the answer.
        answers: right tokens of the clean prompt.
        wrong_answers: tokens that the answers are held against; they share none with the answers.
        candidates: tokens among which accuracy is counted; they include `answers` and `wrong_answers`.
        templates: name of the template of each prompt. Templates that differ in what follows a `/` are one family.
        task: name of the task that made the prompts.
        corruption: name of the way in which `corrupted` was made.
        seed: seed that the prompts were drawn with.
        prepends_bos: whether the prompts begin with the tokenizer's BOS; None if not known.
        spans: named token positions, for example `{"S2": [n], "IO": [n]}`; `ABSENT` where a prompt has none.

    Raises:
        PromptError: if anything does not fit together; the message names argument, prompt, value and remedy.
    """

    clean: Int[Tensor, "n t"]
    corrupted: Int[Tensor, "n t"]
    lengths: Int[Tensor, " n"]
    answer_positions: Int[Tensor, " n"]
    answers: Int[Tensor, "n k"]
    wrong_answers: Int[Tensor, "n w"]
    candidates: Int[Tensor, "n c"]
    templates: tuple[str, ...] | None = None
    task: str | None = None
    corruption: str | None = None
    seed: int | None = None
    prepends_bos: bool | None = None
    spans: Mapping[str, Int[Tensor, " n"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.check_tokens(self.clean, self.corrupted, self.lengths, self.answer_positions)
        checks.check_answers(len(self.clean), self.answers, self.wrong_answers, self.candidates)
        checks.check_spans(self.spans, self.lengths)
        if self.templates is not None and len(self.templates) != len(self.clean):
            raise PromptError(
                f"templates has {len(self.templates)} names for {len(self.clean)} prompts: give one for each prompt"
            )

    @classmethod
    def from_tokens(
        cls,
        clean: Any,
        corrupted: Any,
        answers: Any,
        wrong_answers: Any,
        lengths: Any = None,
        answer_positions: Any = None,
        *,
        candidates: Any = None,
        model: TextModel | None = None,
        templates: Sequence[str] | None = None,
        task: str | None = None,
        corruption: str | None = None,
        seed: int | None = None,
        prepends_bos: bool | None = None,
        spans: Mapping[str, Any] | None = None,
    ) -> "PromptPairs":
        """Prompt pairs from token ids.

        Args:
            clean: `[n, t]` ids, a tensor or rows of integers. Rows of unequal length need `lengths`.
            corrupted: `[n, t]` ids, as many in each prompt as in `clean`.
            answers: `[n]` ids or `[n, k]` sets of ids; rows of a list may differ in size.
            wrong_answers: `[n]` ids or `[n, w]` sets of ids.
            lengths: `[n]` tokens of each prompt without padding; default: all `t`.
            answer_positions: `[n]` positions read for the answer; default: the last token of each prompt.
            candidates: `[n, c]` ids among which accuracy is counted; default: answers and wrong answers.
            model: if given, ids are checked against its vocabulary, and padding without `lengths` is noticed.
            templates: name of each prompt's template.
            task: name of the task.
            corruption: name of the corruption.
            seed: seed that the prompts were drawn with.
            prepends_bos: whether the rows begin with the tokenizer's BOS.
            spans: named `[n]` token positions.

        Raises:
            PromptError: if anything does not fit together.
        """
        clean_ids, corrupted_ids, row_lengths = inputs.token_rows(clean, corrupted, lengths, model)
        device = clean_ids.device
        right = inputs.id_sets("answers", answers).to(device)
        wrong = inputs.id_sets("wrong_answers", wrong_answers).to(device)
        if candidates is not None:
            among = inputs.id_sets("candidates", candidates).to(device)
        else:
            among = torch.cat([right, wrong], dim=1) if len(right) == len(wrong) else right
        last = row_lengths - 1
        at = last if answer_positions is None else inputs.integers("answer_positions", answer_positions).to(device)
        named = {name: inputs.integers(f"spans[{name!r}]", span).to(device) for name, span in (spans or {}).items()}
        pairs = cls(
            clean=clean_ids,
            corrupted=corrupted_ids,
            lengths=row_lengths,
            answer_positions=at,
            answers=right,
            wrong_answers=wrong,
            candidates=among,
            templates=None if templates is None else tuple(templates),
            task=task,
            corruption=corruption,
            seed=seed,
            prepends_bos=prepends_bos,
            spans=named,
        )
        if model is not None:
            pairs.check_vocabulary(model.spec.d_vocab)
        return pairs

    @classmethod
    def from_texts(
        cls,
        model: TextModel,
        clean: Sequence[str],
        corrupted: Sequence[str],
        answers: Sequence[str] | Sequence[Sequence[str]],
        wrong_answers: Sequence[str] | Sequence[Sequence[str]],
        *,
        candidates: Sequence[Sequence[str]] | None = None,
        bos: bool | None = None,
        **named: Any,
    ) -> "PromptPairs":
        """Prompt pairs from texts, tokenised with the model's tokenizer.

        Args:
            model: whose tokenizer is used.
            clean: one text a prompt.
            corrupted: one text a prompt, of as many tokens as its clean version.
            answers: one word a prompt or a list of words; written with the leading space they have in the text.
            wrong_answers: likewise.
            candidates: list of words a prompt among which accuracy is counted; default: answers and wrong answers.
            bos: put a BOS in front; default: what the tokenizer does by itself.
            **named: `answer_positions`, `templates`, `task`, `corruption`, `seed`, `spans` as in `from_tokens`.

        Raises:
            PromptError: if two versions differ in length or a word is not a single token.
        """
        tokens, others, lengths = inputs.tokenise_pairs(model, clean, corrupted, bos)
        return cls.from_tokens(
            tokens,
            others,
            inputs.word_ids(model, "answers", answers),
            inputs.word_ids(model, "wrong_answers", wrong_answers),
            lengths,
            candidates=None if candidates is None else inputs.word_ids(model, "candidates", candidates),
            model=model,
            prepends_bos=model.prepends_bos if bos is None else bos,
            **named,
        )

    @classmethod
    def from_csv(cls, model: TextModel, path: str | Path, *, bos: bool | None = None) -> "PromptPairs":
        """Prompt pairs from a CSV file with a header.

        Columns `clean`, `corrupted`, and either `correct_idx`, `incorrect_idx` (token ids, as EAP-IG writes them) or
        `correct`, `incorrect` (words with their leading space). A cell may hold a JSON list, which is a set. A column
        `template` is taken if there, and columns `span:NAME`, which name a position by a word of the clean prompt
        ("Mary", or "Mary#2" for its second occurrence; empty where there is none). Other columns are ignored.

        Raises:
            DataError: if the file cannot be read.
            PromptError: if columns are missing, or in a row the two texts are the same or differ in their number of
                tokens, an answer is not a single token or both right and wrong; the message names file and line.
        """
        table = read_csv(Path(path))
        tokens, others, lengths = inputs.tokenise_pairs(
            model, table.clean, table.corrupted, bos, table.where.__getitem__
        )
        if table.as_ids:
            check_ids(table, model.spec.d_vocab)
            answers, wrong = (
                inputs.id_sets("correct_idx", table.correct),
                inputs.id_sets("incorrect_idx", table.incorrect),
            )
        else:
            answers = inputs.word_ids(model, "correct", table.correct, lambda row: f"{table.where[row]}: correct")
            wrong = inputs.word_ids(model, "incorrect", table.incorrect, lambda row: f"{table.where[row]}: incorrect")
        return cls.from_tokens(
            tokens,
            others,
            answers,
            wrong,
            lengths,
            model=model,
            templates=table.templates,
            task=Path(path).stem,
            spans=span_positions(table, model, tokens, lengths, bos),
            prepends_bos=model.prepends_bos if bos is None else bos,
        )

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        made = "".join(f", {k}={v!r}" for k in ("task", "corruption", "seed") if (v := getattr(self, k)) is not None)
        return f"PromptPairs({len(self)} prompts of {int(self.lengths.min())}-{int(self.lengths.max())} tokens{made})"

    @cached_property
    def first_difference(self) -> Int[Tensor, " n"]:
        """First position at which clean and corrupted differ; the prompt's length if they are identical."""
        positions = torch.arange(self.clean.shape[1], device=self.clean.device)
        differs = (self.clean != self.corrupted) & (positions < self.lengths[:, None])
        return torch.where(differs, positions, self.lengths[:, None]).amin(dim=1)

    @cached_property
    def data_hash(self) -> str:
        """SHA-256 over tokens, positions and answers; padding does not count, nor the order within a set."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            length = int(self.lengths[row])
            parts = [self.clean[row, :length], self.corrupted[row, :length], self.answer_positions[row : row + 1]]
            parts += [ids[ids != ABSENT].sort().values for ids in (getattr(self, name)[row] for name in _SETS)]
            for part in parts:
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def check_vocabulary(self, d_vocab: int) -> None:
        """Make sure that every token id exists in a vocabulary of `d_vocab` tokens.

        Raises:
            PromptError: naming the first id that does not.
        """
        for name in ("clean", "corrupted", *_SETS):
            checks.check_vocabulary(name, getattr(self, name), d_vocab)

    def to(self, device: torch.device | str) -> "PromptPairs":
        """The same pairs with every tensor on `device`."""
        moved: dict[str, Any] = {
            f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **moved, spans={name: at.to(device) for name, at in self.spans.items()})

    def subset(self, index: Any) -> "PromptPairs":
        """The prompts at `index` (integers, a slice or a mask of `[n]` booleans), cut to their longest.

        Raises:
            PromptError: if `index` is out of range or leaves no prompt.
        """
        rows = inputs.row_index(index, len(self)).to(self.clean.device)
        width = int(self.lengths[rows].max())
        chosen = {name: getattr(self, name)[rows] for name in (*_PER_PROMPT, *_SETS)}
        templates = None if self.templates is None else tuple(self.templates[int(row)] for row in rows)
        return replace(
            self,
            clean=self.clean[rows, :width],
            corrupted=self.corrupted[rows, :width],
            **chosen,
            templates=templates,
            spans={name: at[rows] for name, at in self.spans.items()},
        )

    def split(
        self, fraction: float = 0.5, seed: int = 0, *, by_template: bool = False
    ) -> tuple["PromptPairs", "PromptPairs"]:
        """Split into (train, held out), each at least one prompt, drawn with `seed`.

        Args:
            fraction: share of the prompts that goes to train.
            seed: seed of the draw.
            by_template: keep template families apart, so that held-out prompts have templates unseen in train; the
                share is then met as nearly as whole families allow.

        Raises:
            PromptError: if the fraction is not between 0 and 1, or there are not two prompts (families) to part.
        """
        if not 0 < fraction < 1:
            raise PromptError(f"fraction={fraction!r} must lie between 0 and 1: it is the share of prompts in train")
        draw = np.random.default_rng(seed)
        if by_template:
            in_train = inputs.part_by_family(self.templates, fraction, draw)
        else:
            if len(self) < 2:
                raise PromptError("split needs at least 2 prompts, there is 1: draw more with n=")
            count = min(max(round(fraction * len(self)), 1), len(self) - 1)
            in_train = np.zeros(len(self), dtype=bool)
            in_train[draw.permutation(len(self))[:count]] = True
        return self.subset(np.flatnonzero(in_train)), self.subset(np.flatnonzero(~in_train))

    @classmethod
    def concat(cls, parts: Sequence["PromptPairs"]) -> "PromptPairs":
        """All prompts of `parts` in order; what the parts do not agree on (task, seed ...) becomes None.

        Raises:
            PromptError: if there is no part, or some begin with BOS and others do not.
        """
        if not parts:
            raise PromptError("concat needs at least one PromptPairs, got an empty list")
        policies = {part.prepends_bos for part in parts}
        if policies == {True, False}:
            raise PromptError(
                "parts have prepends_bos=True and prepends_bos=False: tokenise all of them with one BOS policy"
            )
        shared = set.intersection(*(set(part.spans) for part in parts))
        templates = [part.templates for part in parts]
        return cls(
            clean=inputs.stack([part.clean for part in parts], fill=0),
            corrupted=inputs.stack([part.corrupted for part in parts], fill=0),
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in _PER_PROMPT},
            **{name: inputs.stack([getattr(part, name) for part in parts], fill=ABSENT) for name in _SETS},
            templates=None if None in templates else tuple(t for names in templates for t in names or ()),
            task=inputs.agreed([part.task for part in parts]),
            corruption=inputs.agreed([part.corruption for part in parts]),
            seed=inputs.agreed([part.seed for part in parts]),
            prepends_bos=inputs.agreed([part.prepends_bos for part in parts]),
            spans={name: torch.cat([part.spans[name] for part in parts]) for name in sorted(shared)},
        )
