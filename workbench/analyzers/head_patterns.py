"""Previous-token, duplicate-token and induction scores, by attention on random tokens that are repeated once.

A sequence is P random tokens, twice over: x_0 ... x_{P-1} x_0 ... x_{P-1}. With A[q, k] the attention of query q to
key k, each score is the mean of one diagonal of A, over every query whose key exists:

    previous_token    mean of A[q, q - 1]        q = 1   ... 2P-1    2P - 1 queries
    duplicate_token   mean of A[q, q - P]        q = P   ... 2P-1    P queries
    induction         mean of A[q, q - (P - 1)]  q = P-1 ... 2P-1    P + 1 queries

Induction is attention to the token that followed the present one the first time. Its first query, q = P - 1, has no
earlier occurrence to find; it is on the published diagonal, with a weight of 1 / (P + 1), and so it is on this one.

Source: Wang et al., "Interpretability in the Wild", 2022, the random-token test of the released code (P = 100).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.analyzers._patterns import BUDGET, cached_scores, score_patterns
from workbench.analyzers._rows import mean_shares, rows
from workbench.analyzers._tokens import Sequences, digest_of, random_ids
from workbench.cache import Cache
from workbench.cache.reductions import diagonal_means, diagonals
from workbench.errors import DataError, PromptError

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.tables import HeadTable

METRICS = ("previous_token", "duplicate_token", "induction")
"""The scores, in the order in which `diagonal_scores` returns them."""


def diagonal_scores(
    pattern: Float[Tensor, "n n_heads pos pos"], *, period: int, start: int = 0
) -> Float[Tensor, "n n_heads 3"]:
    """Previous-token, duplicate-token and induction score of every head on every sequence.

    Args:
        pattern: attention after the softmax on sequences in which token i + period repeats token i.
        period: distance of the repetition, in tokens.
        start: position of the first of those tokens: 1 behind a beginning-of-sequence token. What stands before it is
            neither query nor key of any score; attention to it lowers them all.

    Returns:
        Scores in the order of `METRICS`, between 0 and 1, in float32 or better.

    Raises:
        PromptError: if the pattern is not square, the period is below 2, or nothing is repeated behind `start`.
    """
    queries, keys = pattern.shape[-2:]
    if queries != keys:
        raise PromptError(f"pattern must have as many queries as keys, not {queries} and {keys}")
    if period < 2 or start < 0 or keys - start <= period:
        raise PromptError(
            f"period {period} from position {start} on leaves nothing repeated among {keys} positions: "
            "expected start >= 0, period >= 2 and more than start + period positions"
        )
    lengths = torch.full((len(pattern),), keys, device=pattern.device)
    return diagonal_means(pattern, lengths, offsets=_offsets(period), start=start)


def _offsets(period: int) -> tuple[int, int, int]:
    """How far before the query the key of each of `METRICS` is."""
    return (1, period, period - 1)


def sequences(model: Model, *, n: int = 24, period: int = 100, seed: int = 0) -> Sequences:
    """The repeated random tokens that `run` looks at.

    A capture of them (`pattern`, whole or reduced to `diagonals(1, period, period - 1)`, with `start=1` where the
    tokenizer puts a token in front) is what `run` takes in place of a model.

    Args:
        model: whose vocabulary and context it is.
        n: sequences.
        period: tokens before they repeat; the longest that fits where the context has no room for two.
        seed: seed of the tokens.

    Raises:
        PromptError: if `n` is below 1 or `period` below 2, or the context is too short to repeat anything.
    """
    if n < 1 or period < 2:
        raise PromptError(f"n is {n} and period is {period}: expected at least 1 sequence and a period of 2 tokens")
    start = int(model.prepends_bos)
    fits = (model.spec.n_ctx - start) // 2
    if fits < 2:
        raise PromptError(f"the context of {model.name} is {model.spec.n_ctx} tokens: too short to repeat anything")
    notes: tuple[str, ...] = ()
    if period > fits:
        notes = (f"period {fits} in place of {period}: the context of {model.name} is {model.spec.n_ctx} tokens",)
        period = fits
    tokens = random_ids(model, n, period, seed=seed, stream="head_patterns").repeat(1, 2)
    if start:
        tokens = torch.cat([torch.full((n, 1), int(model.tokenizer.bos_token_id)), tokens], dim=1)
    return Sequences(tokens=tokens, labels={"input": ("repeated_random",) * n}, notes=notes)


def run(
    model: Model | Cache,
    *,
    n: int = 24,
    period: int = 100,
    seed: int = 0,
    budget: int = BUDGET,
    progress: Callable[[str], None] | None = None,
) -> HeadTable:
    """Previous-token, duplicate-token and induction scores of every head.

    The tokens are drawn uniformly from the vocabulary without its special tokens. If the tokenizer puts a
    beginning-of-sequence token in front of texts, so does this (`bos_in_front` in the provenance); that token is
    neither query nor key of a score.

    Args:
        model: on either path; or a capture of tokens that are repeated once, such as those of `sequences`. Of a
            capture the sequences, their period and their seed are what they are: `n`, `period`, `seed` and `budget`
            have no part.
        n: sequences.
        period: tokens before they repeat. Where the context has no room for two periods, the longest that fits is
            taken, and the provenance says so in `notes`.
        seed: seed of the tokens.
        budget: working memory of a batch, in bytes; results do not depend on it.
        progress: called with a line after each batch.

    Returns:
        One row a head and metric (`METRICS`): mean over sequences, standard error and 95 % interval; unit: probability.

    Raises:
        PromptError: if `n` is below 1 or `period` below 2, or the context is too short to repeat anything.
        BudgetError: if one sequence does not fit the budget.
        DataError: if the capture is of other tokens, or does not hold the patterns or their diagonals.
        UnsupportedModelError: if attention is not causal.
    """
    import pandas as pd

    from workbench.tables import HeadTable, provenance

    extra: dict[str, Any]
    if isinstance(model, Cache):
        tokens, path_taken = model.tokens, model.manifest["capture"]["model"]["path"]
        period, start = _period_of(model)
        scores = cached_scores(
            model,
            diagonals(*_offsets(period), start=start),
            prompts=range(len(tokens)),
            length=tokens.shape[1],
        )
        extra = {"n": len(tokens), "period": period, "bos_in_front": bool(start), "notes": []}
        here = {"data_hash": digest_of(tokens), "capture": model.manifest["capture_id"]}
        record = {**model.provenance, **extra, **here}
    else:
        drawn = sequences(model, n=n, period=period, seed=seed)
        tokens, path_taken = drawn.tokens, model.path
        start = int(model.prepends_bos)
        period = (tokens.shape[1] - start) // 2
        scores = score_patterns(
            model,
            tokens,
            lambda pattern: diagonal_scores(pattern, period=period, start=start),
            budget=budget,
            progress=progress,
            label="repeated random tokens",
        )
        extra = {"n": n, "period": period, "bos_in_front": bool(start), "notes": list(drawn.notes)}
        record = provenance(model, data_hash=digest_of(tokens), seed=seed, **extra)
    frames = [
        rows(
            mean_shares(scores[..., index]),
            analysis="head_patterns",
            metric=metric,
            unit="probability",
            input="repeated_random",
            position=None,
            method=f"mean of a diagonal, 2 x {period} tokens",
            path_taken=path_taken,
        )
        for index, metric in enumerate(METRICS)
    ]
    return HeadTable(frame=pd.concat(frames, ignore_index=True), provenance=record)


def _period_of(cache: Cache) -> tuple[int, int]:
    """Period of the tokens of a capture, and the number of tokens before the first.

    Raises:
        DataError: if they are not repeated once from beginning to end.
    """
    tokens, pos = cache.tokens, cache.tokens.shape[1]
    start = pos % 2
    period = (pos - start) // 2
    halves = tokens[:, start : start + period], tokens[:, start + period :]
    if period < 2 or int(cache.lengths.min()) < pos or not torch.equal(*halves):
        raise DataError(
            f"the cache is of {len(tokens)} prompts of {pos} tokens that are not one stretch of tokens, twice over: "
            "capture head_patterns.sequences(model).tokens"
        )
    return period, start
