"""Attention sinks: keys that draw attention from everywhere.

With A[q, k] the attention of query q to key k over T tokens, counted from 0, the importance of key k is its mean
attention over the queries that can see it, and a head has a sink at k where that exceeds eps:

    alpha_k  = sum over q = k ... T-1 of A[q, k] / (T - k)
    sink_k   = mean over samples (and heads) of 1[alpha_k > eps]

The indicator is taken on each sample first and averaged afterwards; it is not the indicator of the mean alpha.

Source: Gu et al., "When Attention Sink Emerges in Language Models", ICLR 2025: eps 0.3, T 64, 100 samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analyzers._patterns import BUDGET, cached_scores, score_patterns
from workbench.analyzers._rows import mean_shares, rows, share_estimates
from workbench.analyzers._tokens import Sequences, built_in_documents, digest_of, leading_tokens, random_ids
from workbench.cache import Cache, reduction
from workbench.cache.reductions import key_means
from workbench.errors import DataError, PromptError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench.tables import HeadTable

INPUTS = ("natural", "random", "repeated")
"""Kinds of input: text, independent random tokens, one random token over and over."""


def key_importance(
    pattern: Float[Tensor, "n n_heads pos pos"], positions: Sequence[int] | None = None
) -> Float[Tensor, "n n_heads keys"]:
    """Importance of the keys at `positions` (all by default): alpha, the mean attention of the queries that see each.

    Args:
        pattern: attention after a causal softmax.
        positions: key positions, counted from 0.

    Returns:
        Between 0 and 1, in float32 or better.

    Raises:
        PromptError: if the pattern is not square or a position is outside it.
    """
    queries, keys = pattern.shape[-2:]
    if queries != keys:
        raise PromptError(f"pattern must have as many queries as keys, not {queries} and {keys}")
    chosen = list(range(keys)) if positions is None else [int(position) for position in positions]
    _check_positions(chosen, keys)
    return key_means(pattern, torch.full((len(pattern),), keys, device=pattern.device))[..., chosen]


def is_sink(alpha: Float[Tensor, "*any"], eps: float = 0.3) -> Float[Tensor, "*any"]:
    """1 where alpha exceeds eps, else 0."""
    return (alpha > eps).to(alpha.dtype)


def sequences(
    model: Model,
    texts: Sequence[str] | None = None,
    *,
    inputs: Sequence[str] = INPUTS,
    length: int = 64,
    n: int = 100,
    seed: int = 0,
) -> Sequences:
    """What `run` looks at, with the kind of input and the domain of each sample as labels.

    A capture of them with these labels (`pattern`, whole or reduced to `key_mean`) is what `run` takes in place of a
    model. Arguments and errors are those of `run`.
    """
    _check(model.spec.n_ctx, texts, inputs, length, n, model.name)
    samples = [_sample(model, name, texts, length, n, seed) for name in dict.fromkeys(inputs)]
    return Sequences(
        tokens=torch.cat([sample.tokens for sample in samples]),
        labels={
            "input": tuple(sample.name for sample in samples for _ in sample.tokens),
            "domain": tuple(domain for sample in samples for domain in sample.domains or [""] * len(sample.tokens)),
        },
    )


def run(
    model: Model | Cache,
    texts: Sequence[str] | None = None,
    *,
    inputs: Sequence[str] = INPUTS,
    length: int = 64,
    eps: float = 0.3,
    positions: Sequence[int] = (0,),
    n: int = 100,
    seed: int = 0,
    budget: int = BUDGET,
    progress: Callable[[str], None] | None = None,
) -> HeadTable:
    """Importance of keys and rate of attention sinks, for every head and the whole model.

    Natural text begins as the tokenizer begins it, with or without a beginning-of-sequence token (`prepends_bos` in
    the provenance), and that token counts as position 0. Random and repeated tokens never have one in front; they
    are drawn uniformly from the vocabulary without special tokens.

    Args:
        model: fast path or hooks; or a capture, such as that of `sequences`. Of a capture the samples and their seed
            are what they are: `n`, `seed` and `budget` have no part, and `inputs` chooses among the kinds that its
            labels name (without labels it names the kind).
        texts: documents for the input "natural", all of them; None takes `n` of the built-in ones, in turn from
            each domain.
        inputs: which of `INPUTS`.
        length: tokens a sample; of a document, the first.
        eps: alpha above which a key is a sink.
        positions: key positions, counted from 0.
        n: samples of each kind of input (documents, sequences).
        seed: seed of the random and repeated tokens.
        budget: working memory of a batch, in bytes.
        progress: called with a line after each batch.

    Returns:
        For each input and position: `alpha` (unit: probability) and `sink_rate` (unit: share of samples) of each
        head, and `sink_rate` of the model, in a row without layer and head (unit: share; per cent / 100): the mean
        over heads, with its CI over samples. Where the built-in documents are used, also `alpha` of each head within
        each domain, with the domain as `input`.

    Raises:
        PromptError: if a document has fewer than `length` tokens, there are too few documents, or an argument makes
            no sense.
        BudgetError: if one sample does not fit the budget.
        DataError: if the capture does not hold the patterns or their key means at this length, or no input asked for.
        UnsupportedModelError: if attention is not causal.
    """
    import pandas as pd

    from workbench.tables import HeadTable, provenance

    if isinstance(texts, str):
        raise PromptError("texts must be a sequence of documents, not one string: pass [text]")
    _check_thresholds(eps, positions)
    extra: dict[str, Any] = {"length": length, "eps": eps, "positions": [int(position) for position in positions]}
    chosen = list(positions)
    alphas: list[Float[Tensor, "n n_layers n_heads keys"]] = []
    if isinstance(model, Cache):
        samples, indices = _cached_samples(model, texts, inputs, length)
        _check_positions(positions, length)
        key_mean = reduction("key_mean")
        alphas = [cached_scores(model, key_mean, prompts=index, length=length)[..., chosen] for index in indices]
        path_taken = model.manifest["capture"]["model"]["path"]
        built_in = any(sample.domains for sample in samples)
    else:
        _check(model.spec.n_ctx, texts, inputs, length, n, model.name)
        _check_positions(positions, length)
        samples = [_sample(model, name, texts, length, n, seed) for name in dict.fromkeys(inputs)]
        for sample in samples:
            label = f"{sample.name} input"
            found = score_patterns(model, sample.tokens, key_importance, budget=budget, progress=progress, label=label)
            alphas.append(found[..., chosen])
        path_taken = model.path
        built_in = texts is None
    kinds = {sample.name: len(sample.tokens) for sample in samples}
    extra |= {"inputs": kinds, "texts": ("built-in" if built_in else "given") if "natural" in kinds else None}
    data_hash = digest_of(*(sample.tokens for sample in samples))
    if isinstance(model, Cache):
        record = {**model.provenance, **extra, "data_hash": data_hash, "capture": model.manifest["capture_id"]}
    else:
        record = provenance(model, data_hash=data_hash, seed=seed, **extra)
    columns = {
        "analysis": "attention_sinks",
        "path_taken": path_taken,
        "method": f"mean over visible queries, {length} tokens, eps {eps:g}",
    }
    frames: list[pd.DataFrame] = []
    for sample, alpha in zip(samples, alphas, strict=True):
        for index, position in enumerate(chosen):
            frames += _rows(alpha[..., index], sample, eps, {**columns, "position": int(position)})
    return HeadTable(frame=pd.concat(frames, ignore_index=True), provenance=record)


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Sequences of one kind of input; `domains` names the domain of each where they have one."""

    name: str
    tokens: Int[Tensor, "n pos"]
    domains: tuple[str, ...] = ()


def _rows(
    alpha: Float[Tensor, "n n_layers n_heads"], sample: _Sample, eps: float, columns: dict[str, Any]
) -> list[pd.DataFrame]:
    """All rows of one input at one key position."""
    sinks = is_sink(alpha, eps)
    here = {**columns, "input": sample.name}
    frames = [
        rows(mean_shares(alpha), **here, metric="alpha", unit="probability"),
        rows(share_estimates(sinks), **here, metric="sink_rate", unit="share"),
        rows(mean_shares(sinks.mean((1, 2))), **here, metric="sink_rate", unit="share"),
    ]
    for domain in dict.fromkeys(sample.domains):
        inside = torch.tensor([each == domain for each in sample.domains])
        frames.append(rows(mean_shares(alpha[inside]), **{**here, "input": domain}, metric="alpha", unit="probability"))
    return frames


def _cached_samples(
    cache: Cache, texts: Sequence[str] | None, inputs: Sequence[str], length: int
) -> tuple[list[_Sample], list[list[int]]]:
    """Samples of a capture by kind of input, and which of its prompts each are.

    Raises:
        PromptError: if texts are given too.
        DataError: if it has none of the inputs, does not say what it is of, or is of fewer tokens.
    """
    if texts is not None:
        raise PromptError("texts are given beside a cache, which has its own: leave them out, or pass the model")
    n, pos = cache.tokens.shape
    if not 2 <= length <= pos:
        raise DataError(f"length is {length} and the prompts of the cache have {pos} tokens: pass length={pos} or less")
    kinds = cache.labels.get("input")
    if kinds is None:
        named = tuple(inputs) if tuple(inputs) != INPUTS else ("natural",) * (cache.source_kind == "texts")
        if len(named) != 1:
            raise DataError(
                "the cache does not say what input its tokens are: pass for example inputs=('natural',), or capture "
                "with the labels of attention_sinks.sequences(model)"
            )
        kinds = named * n
    wanted = [kind for kind in dict.fromkeys(kinds) if kind in inputs]
    if not wanted:
        raise DataError(
            f"inputs is {tuple(inputs)} and the cache is of {', '.join(dict.fromkeys(kinds))}: name one of these"
        )
    domains = cache.labels.get("domain", ("",) * n)
    samples, indices = [], []
    for kind in wanted:
        index = [at for at in range(n) if kinds[at] == kind]
        named = tuple(domains[at] for at in index)
        samples.append(_Sample(name=kind, tokens=cache.tokens[index, :length], domains=named if all(named) else ()))
        indices.append(index)
    return samples, indices


def _sample(model: Model, name: str, texts: Sequence[str] | None, length: int, n: int, seed: int) -> _Sample:
    if name == "random":
        return _Sample(name=name, tokens=random_ids(model, n, length, seed=seed, stream=name))
    if name == "repeated":
        return _Sample(name=name, tokens=random_ids(model, n, 1, seed=seed, stream=name).repeat(1, length))
    if texts is not None:
        rows = leading_tokens(model, texts, length)
        for index, row in enumerate(rows):
            if len(row) < length:
                raise PromptError(
                    f"texts[{index}] ({texts[index][:40]!r} ...) has {len(row)} tokens of the {length} that are "
                    "needed: leave it out, or lower length"
                )
        return _Sample(name=name, tokens=torch.tensor(rows))
    documents = built_in_documents()
    rows = leading_tokens(model, [text for _, _, text in documents], length)
    long_enough = [(row, domain) for row, (_, domain, _) in zip(rows, documents, strict=True) if len(row) == length]
    if len(long_enough) < n:
        raise PromptError(
            f"{len(long_enough)} of the {len(documents)} built-in documents have {length} tokens and n is {n}: "
            "lower n or length, or give texts"
        )
    taken = long_enough[:n]
    return _Sample(
        name=name, tokens=torch.tensor([row for row, _ in taken]), domains=tuple(domain for _, domain in taken)
    )


def _check(n_ctx: int, texts: Sequence[str] | None, inputs: Sequence[str], length: int, n: int, name: str) -> None:
    unknown = [each for each in inputs if each not in INPUTS]
    if unknown or not inputs or isinstance(inputs, str):
        raise PromptError(f"inputs is {inputs!r}: expected a sequence of some of {', '.join(INPUTS)}")
    if texts is not None and "natural" not in inputs:
        raise PromptError(f"texts are given but inputs is {tuple(inputs)!r}: add 'natural' or leave texts out")
    if texts is not None and not texts:
        raise PromptError("texts is empty: give at least one document, or None for the built-in ones")
    if not 2 <= length <= n_ctx:
        raise PromptError(f"length is {length}: expected 2 to {n_ctx}, the context of {name}")
    if n < 1:
        raise PromptError(f"n is {n}: expected at least 1 sample")


def _check_thresholds(eps: float, positions: Sequence[int]) -> None:
    if not 0 < eps < 1:
        raise PromptError(f"eps is {eps}: expected a number between 0 and 1, such as 0.3")
    if not positions:
        raise PromptError("positions is empty: give at least one key position, such as (0,)")


def _check_positions(positions: Sequence[int], length: int) -> None:
    wrong = [position for position in positions if not 0 <= position < length]
    if wrong or len(set(positions)) < len(positions):
        raise PromptError(
            f"positions is {list(positions)}: expected different key positions from 0 to {length - 1}, counted from 0"
        )
