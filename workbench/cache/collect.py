"""One batch through the model: what is kept leaves the hooks at once, and the forward pass ends when all is seen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from workbench.cache.plan import Entry, apply, site_shape
from workbench.cache.reductions import without_padding
from workbench.errors import ModelError, PromptError

if TYPE_CHECKING:
    from workbench.models import Model

Key = tuple[str, int]
"""Name of an entry, and layer."""
_PER_HEAD_LAST = frozenset({"q", "k", "v", "z"})


class _AllSeenError(Exception):
    """Ends a forward pass from within an observer: nothing that comes later is wanted."""


def heads_first(site: str, value: Tensor) -> Tensor:
    """A site's tensor with heads before positions, the form in which reductions and caches have it."""
    return value.transpose(1, 2) if site in _PER_HEAD_LAST else value


def watch(
    model: Model,
    tokens: Int[Tensor, "n pos"],
    wanted: Mapping[str, Sequence[int]],
    see: Callable[[str, int, Tensor], None],
) -> None:
    """Show sites of a forward pass, as `Model.forward` does, for as long as something wanted is to come.

    Args:
        model: on either path.
        tokens: ids, padded on the right.
        wanted: layers by site.
        see: called once for each site and layer, with the heads before the positions.

    Raises:
        ModelError: if a site is not shown, or has another shape than the model's spec says.
    """
    pending = {(site, layer) for site, layers in wanted.items() for layer in layers}

    def observer(site: str) -> Callable[[int, Tensor], None]:
        expected = (len(tokens), *site_shape(model, site, tokens.shape[1]))

        def observe(layer: int, value: Tensor) -> None:
            if (site, layer) not in pending:
                return
            shown = heads_first(site, value)
            if tuple(shown.shape) != expected:
                raise ModelError(
                    f"site {site!r} of layer {layer} comes as {tuple(shown.shape)} where {expected} is expected: the "
                    f"{model.path} path of {model.name} shows it in another form, so it cannot be captured"
                )
            see(site, layer, shown)
            pending.discard((site, layer))
            if not pending:
                raise _AllSeenError

        return observe

    try:
        model.forward(tokens, observe={site: observer(site) for site in wanted})
    except _AllSeenError:
        return
    site, layer = min(pending)
    raise ModelError(f"site {site!r} of layer {layer} was not shown by the {model.path} path of {model.name}")


def collect(
    model: Model,
    tokens: Int[Tensor, "n pos"],
    lengths: Int[Tensor, "n"],
    entries: Sequence[Entry],
    into: Mapping[Key, Tensor],
) -> None:
    """Run a batch and fill in what is kept of it.

    Args:
        model: on either path.
        tokens: ids, padded on the right.
        lengths: real tokens of each prompt.
        entries: what to keep.
        into: for each entry and layer the tensor to fill, of the shape `Entry.stored`.

    Raises:
        ModelError: if a site is not shown, or in another shape.
        PromptError: if a reduction fails, or a value does not fit the dtype asked for.
    """
    wanted: dict[str, set[int]] = {}
    for entry in entries:
        wanted.setdefault(entry.site, set()).update(entry.layers)
    real = lengths.to(model.device)

    def see(site: str, layer: int, value: Tensor) -> None:
        for entry in entries:
            if entry.site == site and layer in entry.layers:
                kept = _kept(entry, layer, value, real)
                into[entry.name, layer].copy_(kept.transpose(0, 1) if entry.heads else kept)

    watch(model, tokens, {site: sorted(layers) for site, layers in wanted.items()}, see)


def _kept(entry: Entry, layer: int, value: Tensor, lengths: Tensor) -> Tensor:
    if entry.reduction is None:
        kept = without_padding(value, lengths, -2)
        _check_range(entry, layer, kept)
        return kept
    made = apply(entry.reduction, value, lengths, entry.site, entry.heads)
    found = tuple(made.shape[2 if entry.heads else 1 :])
    if found != entry.shape or made.dtype != entry.dtype:
        raise PromptError(
            f"reduction {entry.reduction.label!r} makes {made.dtype} {found} of layer {layer} and made {entry.dtype} "
            f"{entry.shape} at first: its shape must depend on the shape of its input alone"
        )
    return made


def _check_range(entry: Entry, layer: int, value: Tensor) -> None:
    limit = torch.finfo(entry.dtype).max
    if limit >= torch.finfo(value.dtype).max:
        return
    low, high = value.aminmax()
    largest = float(torch.maximum(-low, high))
    if largest > limit:
        raise PromptError(
            f"dtype {str(entry.dtype).removeprefix('torch.')} cannot hold {entry.name!r} of layer {layer}: it goes "
            f"up to {largest:.4g} and the largest number is {limit:.4g}; take bfloat16 or float32"
        )
