"""Extreme tokens: massive activations, value-state drains and residual peaks, and what the model loses without them.

With x the residual stream after a block (raw, not centred), an activation is massive if

    |x| > 100  and  |x| >= 1000 median |x|        (median over the tokens and dimensions of that sample)

A value-state drain is a head whose value at the first token is small: |v_0 W_O| against the mean over other tokens. A
residual peak is the norm of the stream at the first token minus its mean over other tokens. At the first layer at which
most samples have massive activations they are set to zero, or to their mean over other documents, and the rest of the
model runs on; a control sets as many other dimensions of the same tokens to zero.

Sources: Sun et al., "Massive Activations in Large Language Models", COLM 2024 (definition, interventions); Guo et al.,
"Active-Dormant Attention Heads", 2024 (drains and peaks); Gu et al., ICLR 2025 (attention to the first token).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.analyzers._extreme_streams import Found, look
from workbench.analyzers._extremes import is_massive, typical
from workbench.analyzers._interventions import Change, losses
from workbench.analyzers._patterns import BUDGET, batch_size
from workbench.analyzers._rows import rows
from workbench.analyzers._tokens import built_in_documents, digest_of, leading_tokens, random_ids
from workbench.errors import PromptError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench.tables import HeadTable


def run(
    model: Model,
    texts: Sequence[str] | None = None,
    *,
    length: int = 128,
    n: int = 32,
    n_loss: int = 32,
    absolute: float = 100.0,
    ratio: float = 1000.0,
    seed: int = 0,
    budget: int = BUDGET,
    progress: Callable[[str], None] | None = None,
) -> HeadTable:
    """Massive activations by layer, value drains by head, residual peaks by layer, and the loss without them.

    Args:
        model: fast path or hooks; norms of what heads would write need the fast path.
        texts: documents, the first half to look at and the second to measure the loss on; None takes `n` and `n_loss`
            of the built-in ones. A model without a tokenizer gets random tokens.
        length: tokens of a document, its first.
        n: built-in documents to look at.
        n_loss: built-in documents to measure the loss on, others than those looked at.
        absolute: size that a massive activation exceeds.
        ratio: how many times the median of its sample it is at least.
        seed: seed of the random tokens and of the control's dimensions.
        budget: working memory of a batch, in bytes.
        progress: called with a line after each batch.

    Returns:
        By layer: `largest_1` to `largest_3` (three largest |x| of a sample), `median_abs`, `massive_share` (share of
        samples with a massive activation), `resid_norm_first`, `resid_norm_rest`, `resid_peak`. By head:
        `value_norm_first`, `value_norm_rest` (norm of v W_O), `value_ratio` (the first over the rest). Of the model,
        where massive activations were found: `loss` (nats per token) as it is, `loss_set_zero`, `loss_set_mean`,
        `loss_control`, each with `delta_...`, the difference paired by document; and `first_token_attention`, the mean
        attention to the first token in the layers behind, under the same names. The provenance lists the
        activations under `massive_activations` (see `activations`), and `first_layer`.

    Raises:
        PromptError: if there are too few documents or tokens, or an argument makes no sense.
        BudgetError: if one document does not fit the budget.
    """
    import pandas as pd

    from workbench.stats import mean_estimates
    from workbench.tables import HeadTable, provenance

    _check(model, length, n, n_loss, absolute, ratio)
    kind, looked_at, measured = _documents(model, texts, length, n, n_loss, seed)
    size = batch_size(model, length, budget)
    found = look(model, looked_at, size, absolute, ratio, progress)
    constant = {
        "analysis": "extreme_tokens",
        "path_taken": model.path,
        "input": kind,
        "method": f"{length} tokens, |x| > {absolute:g} and >= {ratio:g} medians",
    }

    def shown(values: Tensor, metric: str, unit: str, position: int | None = None) -> pd.DataFrame:
        return rows(mean_estimates(values), **constant, metric=metric, unit=unit, position=position)

    frames = [shown(found.largest[..., i], f"largest_{i + 1}", "activation") for i in range(found.largest.shape[-1])]
    frames.append(shown(found.median, "median_abs", "activation"))
    frames.append(rows(found.share(), **constant, metric="massive_share", unit="share of samples", position=None))
    frames.append(shown(found.resid_first, "resid_norm_first", "norm", 0))
    frames.append(shown(found.resid_rest, "resid_norm_rest", "norm"))
    frames.append(shown(found.resid_first - found.resid_rest, "resid_peak", "norm", 0))
    if found.value_first is not None and found.value_rest is not None:
        frames.append(shown(found.value_first, "value_norm_first", "norm", 0))
        frames.append(shown(found.value_rest, "value_norm_rest", "norm"))
        frames.append(shown(found.value_first / found.value_rest, "value_ratio", "ratio", 0))
    first = found.first_layer()
    if first is not None:
        changes = _changes(model, found, first, absolute, ratio, seed)
        measured_by = losses(model, measured, changes, from_layer=first + 1, budget=budget, progress=progress)
        for name, values in measured_by.items():
            for change, of_change in values.items():
                suffix = "" if change == "none" else f"_{change}"
                unit = "nats per token" if name == "loss" else "probability"
                frames.append(shown(of_change, f"{name}{suffix}", unit, 0 if name != "loss" else None))
                if suffix:
                    frames.append(shown(of_change - values["none"], f"delta_{name}{suffix}", unit))
    record = provenance(
        model,
        data_hash=digest_of(looked_at, measured),
        seed=seed,
        texts="built-in" if texts is None else "given",
        length=length,
        n=len(looked_at),
        n_loss=len(measured) if first is not None else 0,
        absolute=absolute,
        ratio=ratio,
        first_layer=first,
        largest_ratio=float((found.largest[..., 0] / found.median.clamp(min=1e-30)).max()),
        massive_activations=found.records(model),
        massive_groups=len(found.groups),
    )
    return HeadTable(frame=pd.concat(frames, ignore_index=True), provenance=record)


def activations(table: HeadTable) -> pd.DataFrame:
    """The massive activations of a table of `run`, one row a layer, dimension and kind of token.

    Returns:
        `layer`, `dim`, `token` ("first" or "later"), `n_samples` that have it, `share` of the samples, `mean`, `std`
        over its occurrences, `ratio` (mean of |x| / median), `positions` and `tokens` (five most frequent).
    """
    import pandas as pd

    columns = ["layer", "dim", "token", "n_samples", "share", "mean", "std", "ratio", "positions", "tokens"]
    return pd.DataFrame(list(table.provenance.get("massive_activations", [])), columns=columns)


def _changes(model: Model, found: Found, first: int, absolute: float, ratio: float, seed: int) -> dict[str, Change]:
    """The interventions at the first layer: none, zero, mean, and the control."""
    d_model = model.spec.d_model
    means, known = torch.zeros(2, d_model, dtype=torch.float64), torch.zeros(2, d_model, dtype=torch.bool)
    for (layer, dim, later), chosen in found.groups.items():
        if layer == first:
            means[int(later), dim], known[int(later), dim] = found.values[chosen].mean(), True
    dims = known.any(0).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    others = torch.tensor([dim for dim in range(d_model) if dim not in set(dims.tolist())])
    swapped = torch.arange(d_model)
    picked = others[torch.randperm(len(others), generator=generator)[: len(dims)]]
    swapped[dims[: len(picked)]] = picked

    def massive_here(resid: Tensor) -> Tensor:
        mask = is_massive(resid, typical(resid), absolute=absolute, ratio=ratio)
        return mask & known.any(0).to(mask.device)

    def zero(resid: Tensor) -> Tensor:
        return resid.masked_fill(massive_here(resid), 0)

    def mean(resid: Tensor) -> Tensor:
        table = means.to(resid)
        # a dimension that was massive at one kind of token alone has one mean
        full = torch.where(known.to(resid.device), table, table.flip(0))
        later = (torch.arange(resid.shape[1], device=resid.device) > 0).long()
        return torch.where(massive_here(resid), full[later], resid)

    def control(resid: Tensor) -> Tensor:
        n, pos, dim = massive_here(resid).nonzero(as_tuple=True)
        new = resid.clone()
        new[n, pos, swapped.to(resid.device)[dim]] = 0
        return new

    made = {"set_zero": zero, "set_mean": mean, "control": control}
    return {"none": Change(layer=first)} | {name: Change(layer=first, to=to) for name, to in made.items()}


def _documents(
    model: Model, texts: Sequence[str] | None, length: int, n: int, n_loss: int, seed: int
) -> tuple[str, Int[Tensor, "n pos"], Int[Tensor, "n_loss pos"]]:
    if isinstance(texts, str):
        raise PromptError("texts must be a sequence of documents, not one string: pass [text, other_text]")
    if texts is None and model.tokenizer is None:
        ids = random_ids(model, n + n_loss, length, seed=seed, stream="extreme_tokens")
        return "random", ids[:n], ids[n:]
    if texts is None:
        every = leading_tokens(model, [text for _, _, text in built_in_documents()], length)
        kept = [row for row in every if len(row) == length]
        if len(kept) < n + n_loss:
            raise PromptError(
                f"{len(kept)} of the {len(every)} built-in documents have {length} tokens and {n} + {n_loss} are asked "
                "for: lower n, n_loss or length, or give texts"
            )
        return "natural", torch.tensor(kept[:n]), torch.tensor(kept[n : n + n_loss])
    if len(texts) < 2:
        raise PromptError(f"texts has {len(texts)} document: give at least two, half are for the loss")
    rows_ = leading_tokens(model, texts, length)
    for index, row in enumerate(rows_):
        if len(row) < length:
            raise PromptError(
                f"texts[{index}] ({texts[index][:40]!r} ...) has {len(row)} tokens of the {length} that are needed: "
                "leave it out, or lower length"
            )
    half = (len(rows_) + 1) // 2
    return "natural", torch.tensor(rows_[:half]), torch.tensor(rows_[half:])


def _check(model: Model, length: int, n: int, n_loss: int, absolute: float, ratio: float) -> None:
    if not 2 <= length <= model.spec.n_ctx:
        raise PromptError(f"length is {length}: expected 2 to {model.spec.n_ctx}, the context of {model.name}")
    if n < 1 or n_loss < 1:
        raise PromptError(f"n is {n} and n_loss {n_loss}: expected at least 1 document each")
    if absolute < 0 or ratio <= 0:
        raise PromptError(
            f"absolute is {absolute} and ratio {ratio}: expected positive thresholds, such as 100 and 1000"
        )
