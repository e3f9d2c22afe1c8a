"""What a capture will hold, how large that is, and in which batches it is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.cache.names import hook_of
from workbench.cache.reductions import Reduction
from workbench.errors import BudgetError, PromptError, UnsupportedModelError
from workbench.models.weights import at_least_float32

if TYPE_CHECKING:
    from workbench.models import Model

TOKENS_PER_BATCH = 4096
"""Tokens of a batch unless told otherwise: more of them make the forward pass no faster on a CPU, and shards larger."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One kind of tensor in a cache.

    Attributes:
        name: `z`, or `pattern.key_mean` with a reduction.
        site: what is observed.
        reduction: what is made of it; None for the activation itself.
        layers: where.
        heads: length of the head axis; 0 without one.
        shape: of one prompt of one layer (and head).
        dtype: as stored.
    """

    name: str
    site: str
    reduction: Reduction | None
    layers: tuple[int, ...]
    heads: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes_per_layer(self) -> int:
        """Bytes of one prompt in one layer."""
        return prod(self.shape) * max(1, self.heads) * self.dtype.itemsize

    @property
    def bytes_per_prompt(self) -> int:
        """Bytes of one prompt over all layers."""
        return self.bytes_per_layer * len(self.layers)

    def stored(self, n: int) -> tuple[int, ...]:
        """Shape of `n` prompts of one layer as stored: heads lead, so that one head lies in one piece."""
        return (*((self.heads,) if self.heads else ()), n, *self.shape)

    def record(self, model: Model) -> dict[str, Any]:
        """What the manifest says of it."""
        return {
            "name": self.name,
            "site": self.site,
            "hook": f"blocks.{{layer}}.{hook_of(model.spec, self.site)}",
            "reduction": None if self.reduction is None else self.reduction.identity,
            "layers": list(self.layers),
            "heads": self.heads,
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Entry:
        """The entry that a manifest describes; its reduction is known by name alone and cannot be computed again."""
        identity = record["reduction"]
        made = None
        if identity is not None:
            parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in identity["parameters"].items()}
            made = Reduction(
                name=identity["name"],
                version=identity["version"],
                compute=_not_here,
                parameters=parameters,
                builtin=bool(identity["builtin"]),
            )
        return cls(
            name=record["name"],
            site=record["site"],
            reduction=made,
            layers=tuple(record["layers"]),
            heads=int(record["heads"]),
            shape=tuple(record["shape"]),
            dtype=getattr(torch, record["dtype"]),
        )


def _not_here(x: Tensor, lengths: Tensor) -> Tensor:
    raise PromptError("a reduction that was read from a manifest has a name but no function: pass the Reduction itself")


def site_shape(model: Model, site: str, pos: int) -> tuple[int, ...]:
    """Shape of one prompt at a site, heads first where there are heads."""
    spec = model.spec
    if site == "pattern":
        return (spec.n_heads, pos, pos)
    if site in {"q", "z"}:
        return (spec.n_heads, pos, spec.d_head)
    if site in {"k", "v"}:
        return (spec.n_kv_heads, pos, spec.d_head)
    return (pos, spec.d_model)


def make_entries(
    model: Model,
    sites: Mapping[str, tuple[int, ...]],
    reduce: Mapping[str, Sequence[Reduction | None]],
    pos: int,
    dtype: torch.dtype | None,
) -> tuple[Entry, ...]:
    """All entries of a capture, shapes found by running each reduction once on made-up values.

    Raises:
        PromptError: if `dtype` is not a floating one, or a reduction fails or drops the prompt or head axis.
        UnsupportedModelError: if a reduction presumes causal attention and the model's is not.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise PromptError(f"dtype is {dtype}: expected a floating one such as torch.float16, or None")
    entries = []
    for site, layers in sites.items():
        shape = site_shape(model, site, pos)
        heads = shape[0] if len(shape) == 3 else 0
        shown = at_least_float32(model.dtype) if site == "pattern" else model.dtype
        for reduction in reduce[site]:
            if reduction is None:
                kept, name, stored = shape[1:] if heads else shape, site, dtype or shown
            else:
                if reduction.causal and not model.spec.causal:
                    raise UnsupportedModelError(
                        f"reduction {reduction.label!r} presumes that a query sees no later key, and the attention of "
                        f"{model.name} is not causal"
                    )
                made = apply(reduction, _made_up(site, shape, shown), torch.tensor([pos]), site, heads)
                kept, name, stored = tuple(made.shape[2 if heads else 1 :]), f"{site}.{reduction.label}", made.dtype
            entries.append(
                Entry(name=name, site=site, reduction=reduction, layers=layers, heads=heads, shape=kept, dtype=stored)
            )
    return tuple(entries)


def _made_up(site: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if site != "pattern":
        return torch.ones(1, *shape, dtype=dtype)
    rows = torch.ones(shape[1:], dtype=dtype).tril()
    return (rows / rows.sum(-1, keepdim=True)).expand(1, *shape).clone()


def apply(reduction: Reduction, x: Tensor, lengths: Tensor, site: str, heads: int) -> Tensor:
    """A reduction's result, checked.

    Raises:
        PromptError: if it fails, changes its input, or does not keep the axes of prompts and heads.
    """
    before = x._version
    try:
        made = reduction.compute(x, lengths)
    except Exception as error:
        raise PromptError(
            f"reduction {reduction.label!r} fails on {site!r} of shape {tuple(x.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if x._version != before:
        raise PromptError(f"reduction {reduction.label!r} changes its input in place: return a new tensor instead")
    leading = (len(x), heads) if heads else (len(x),)
    if not isinstance(made, Tensor) or tuple(made.shape[: len(leading)]) != leading:
        shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise PromptError(
            f"reduction {reduction.label!r} makes {shape} of {site!r} {tuple(x.shape)}: expected a tensor that begins "
            f"with {leading}, prompts{' and heads' if heads else ''}"
        )
    return made


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a capture takes.

    Attributes:
        n_prompts, pos: of the tokens.
        batch_size: prompts that run together.
        total_bytes: of the tensors captured, in memory or on disk.
        batch_bytes: of those of one batch.
        memory_bytes: at the peak, beside the model.
        budget_bytes: what was allowed.
        stored: whether batches go to disk.
    """

    n_prompts: int
    pos: int
    batch_size: int
    total_bytes: int
    batch_bytes: int
    memory_bytes: int
    budget_bytes: int
    stored: bool

    @property
    def batches(self) -> tuple[slice, ...]:
        """Prompts of each batch."""
        n, size = self.n_prompts, self.batch_size
        return tuple(slice(first, min(first + size, n)) for first in range(0, n, size))

    def __str__(self) -> str:
        where = "on disk" if self.stored else "in memory"
        return (
            f"{self.n_prompts:,} prompts x {self.pos} tokens in {len(self.batches)} batches of {self.batch_size}: "
            f"{in_words(self.total_bytes)} {where}, about {in_words(self.memory_bytes)} of memory at the peak "
            f"(budget {in_words(self.budget_bytes)})"
        )


def in_words(n_bytes: int) -> str:
    """A number of bytes as people write it."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= size:
            return f"{n_bytes / size:.3g} {unit}" if n_bytes < 1000 * size else f"{n_bytes / size:,.0f} {unit}"
    return f"{n_bytes} bytes"


def working_bytes(model: Model, pos: int, *, pattern: bool = True) -> int:
    """About what one sequence takes in a forward pass beside the weights, in bytes.

    Scores, mask and pattern of one layer where the pattern is shown (`n_heads * pos ** 2` each; attention on the hook
    path always makes them), and the widest activations of a block.
    """
    spec = model.spec
    size = max(4, model.dtype.itemsize)
    scores = 4 * spec.n_heads * pos if pattern or model.path == "hooks" else spec.n_heads * pos
    return size * pos * (scores + 8 * spec.d_model + 3 * spec.d_mlp)


def check_one_fits(model: Model, sites: Sequence[str], pos: int, budget_bytes: int) -> None:
    """Refuse prompts of which not one can run within the budget, before anything of their size is made.

    Raises:
        BudgetError: says how much one takes.
    """
    one = working_bytes(model, pos, pattern="pattern" in sites)
    if one > budget_bytes:
        raise BudgetError(
            f"budget_bytes is {budget_bytes:,} ({in_words(budget_bytes)}) and the forward pass of one prompt of {pos} "
            f"tokens alone takes about {one:,} ({in_words(one)}): shorten the prompts, or raise budget_bytes"
        )


def estimate(
    model: Model,
    entries: Sequence[Entry],
    n: int,
    pos: int,
    *,
    budget_bytes: int,
    batch_size: int | None,
    stored: bool,
) -> Estimate:
    """Choose batches that fit the budget.

    Args:
        model: what runs.
        entries: what is kept.
        n: prompts.
        pos: tokens of each, padding included.
        budget_bytes: memory beside the model.
        batch_size: prompts that run together; None takes as many as fit, up to `TOKENS_PER_BATCH` tokens.
        stored: whether each batch goes to disk before the next.

    Raises:
        PromptError: if `batch_size` is below 1.
        BudgetError: if it does not fit; the message says what would.
    """
    if batch_size is not None and batch_size < 1:
        raise PromptError(f"batch_size is {batch_size}: expected at least 1, or None to let the budget decide")
    kept = sum(entry.bytes_per_prompt for entry in entries)
    largest = max(prod(site_shape(model, entry.site, pos)) for entry in entries) * max(4, model.dtype.itemsize)
    one = working_bytes(model, pos, pattern=any(entry.site == "pattern" for entry in entries)) + largest
    fixed, each = (0, one + kept) if stored else (n * kept, one)
    each += each // 8  # what the allocator does not give back at once
    size = min(n, max(1, TOKENS_PER_BATCH // pos), max(1, (budget_bytes - fixed) // each))
    size = size if batch_size is None else min(batch_size, n)
    found = Estimate(
        n_prompts=n,
        pos=pos,
        batch_size=size,
        total_bytes=n * kept,
        batch_bytes=size * kept,
        memory_bytes=fixed + size * each,
        budget_bytes=budget_bytes,
        stored=stored,
    )
    if found.memory_bytes > budget_bytes:
        raise BudgetError(_over(found, fixed, each, entries, batch_size))
    return found


def _over(found: Estimate, fixed: int, each: int, entries: Sequence[Entry], batch_size: int | None) -> str:
    """The message for a capture over its budget, with what would bring it under."""
    budget, one = found.budget_bytes, fixed + each
    largest = max(entries, key=lambda entry: entry.bytes_per_prompt)
    remedies = []
    if not found.stored and one > budget:
        alone = in_words(each + fixed // found.n_prompts)
        remedies.append(f"give store=folder (then one batch has to fit, of at least {alone})")
    if batch_size is not None and one <= budget:
        remedies.append(f"lower batch_size to {(budget - fixed) // each} or leave it out")
    if largest.reduction is None:
        remedies.append(f"reduce {largest.name!r}, the largest ({in_words(largest.bytes_per_prompt)} a prompt)")
    if len(largest.layers) > 1:
        remedies.append(f"capture fewer than {len(largest.layers)} layers")
    remedies.append("shorten the prompts")
    what = f"a batch of {found.batch_size} prompts" if found.stored else "this capture"
    kept = found.batch_bytes if found.stored else found.total_bytes
    return (
        f"budget_bytes is {budget:,} ({in_words(budget)}) and {what} takes about {found.memory_bytes:,} "
        f"({in_words(found.memory_bytes)}) of memory, {in_words(kept)} of it for what is kept: "
        f"{', '.join(remedies)}, or raise budget_bytes to {found.memory_bytes:,}"
    )
