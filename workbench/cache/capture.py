"""Run a model over prompts and keep what is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from workbench._provenance import provenance
from workbench.cache.cache import Cache, Memory
from workbench.cache.collect import collect
from workbench.cache.files import writing
from workbench.cache.names import reductions_of, select
from workbench.cache.plan import Entry, Estimate, check_one_fits, estimate, make_entries
from workbench.cache.prompts import CapturedPrompts, as_prompts
from workbench.cache.reductions import Reduction
from workbench.cache.store import new_manifest, to_folder

if TYPE_CHECKING:
    from workbench.models import Model

BUDGET_BYTES = 10**9
"""Memory that a capture takes beside the model unless told otherwise."""

Reduce = str | Reduction | Sequence[str | Reduction] | Mapping[str, Any] | None
Say = Callable[[str], None]


def capture(
    model: Model,
    tokens: Int[Tensor, "n pos"] | str | Sequence[str],
    names: str | Iterable[str],
    *,
    lengths: Int[Tensor, "n"] | Sequence[int] | None = None,
    layers: int | Iterable[int] | None = None,
    reduce: Reduce = None,
    store: str | Path | None = None,
    budget_bytes: int = BUDGET_BYTES,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    labels: Mapping[str, Sequence[str]] | None = None,
    seed: int | None = None,
    command: Sequence[str] | str | None = None,
    progress: Say | None = None,
) -> Cache:
    """Capture activations, whole or reduced, into memory or a folder.

    Reductions run inside the hooks, so a tensor that is only reduced never outlives its layer; the forward pass ends
    with the last layer asked for, and never reaches the unembedding. Results do not depend on what stands in the
    padding. By float noise they depend on the batch size, and on whether `pattern` is captured too: that turns the
    fused attention off.

    With `store`, each batch becomes a shard that is synced and committed before the next. The same call on a folder
    that a killed one left goes on from there: batches are the same, so the result is bit for bit that of a run that
    nobody stopped. Shards that were damaged in the meantime are named and computed anew.

    Args:
        model: on either path.
        tokens: ids padded on the right, or texts.
        names: sites (`z`), TransformerLens hooks (`blocks.3.attn.hook_z`), or either with wildcards; see
            `workbench.models.forward.SITES`.
        lengths: real tokens of each prompt; None says that all are.
        layers: only these.
        reduce: what to keep of a site instead of all of it: reductions by site, or for every site that they fit, or
            `site.reduction`; see `workbench.cache.reductions`. Sites without one are kept whole.
        store: folder to write into; only one batch then has to fit the budget.
        budget_bytes: memory beside the model's.
        batch_size: prompts that run together; None takes what fits (and, in an existing folder, what it began with).
        dtype: of activations that are kept whole; None keeps what the model computes in (`pattern`: float32 or better).
            Results of reductions keep the dtype that they are computed in.
        labels: columns of text to keep with the prompts, such as the kind of input.
        seed: of the tokens, for the record.
        command: for the record; None takes the command line of this process.
        progress: told the estimate, and a line after each batch.

    Returns:
        The captured tensors. What `store` holds can be opened again with `open_cache`.

    Raises:
        PromptError: if tokens, lengths, labels, names, layers or reductions make no sense or match nothing.
        BudgetError: if it does not fit the budget; the message says what would.
        DataError: if `store` holds another capture (the message says in what it differs) or foreign files.
        OutputError: if the folder cannot be written, is being written by another process, or the disk is full;
            committed shards stay.
        UnsupportedModelError: if a reduction presumes causal attention and the model's is not.
        ModelError: if the model does not show a site.
    """
    prompts = as_prompts(model, tokens, lengths, labels)
    sites = select(model, names, layers)
    kept = reductions_of(list(sites), reduce)
    n, pos = prompts.tokens.shape
    check_one_fits(model, list(sites), pos, budget_bytes)
    entries = make_entries(model, sites, kept, pos, dtype)
    record = provenance(model, data_hash=prompts.digest(), seed=seed, command=command)
    say = progress or _silent

    def plan(size: int | None) -> Estimate:
        return estimate(model, entries, n, pos, budget_bytes=budget_bytes, batch_size=size, stored=store is not None)

    if store is None:
        return _to_memory(model, prompts, entries, plan(batch_size), record, say)
    folder = Path(store).expanduser().absolute()
    with writing(folder):
        return to_folder(model, prompts, entries, plan, batch_size, record, folder, say)


def _silent(message: str) -> None:
    pass


def _to_memory(
    model: Model,
    prompts: CapturedPrompts,
    entries: Sequence[Entry],
    plan: Estimate,
    record: dict[str, Any],
    say: Say,
) -> Cache:
    say(str(plan))
    whole = {
        (entry.name, layer): torch.empty(entry.stored(plan.n_prompts), dtype=entry.dtype)
        for entry in entries
        for layer in entry.layers
    }
    heads = {entry.name: entry.heads for entry in entries}
    for span in plan.batches:
        into = {key: tensor[:, span] if heads[key[0]] else tensor[span] for key, tensor in whole.items()}
        collect(model, prompts.tokens[span], prompts.lengths[span], entries, into)
        say(f"captured {span.stop:,} of {plan.n_prompts:,} prompts")
    return Cache(
        manifest=new_manifest(model, prompts, entries, plan, record),
        prompts=prompts,
        source=Memory(tensors=whole, starts=[span.start for span in plan.batches]),
    )
