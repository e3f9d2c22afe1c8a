"""What a capture keeps of an activation instead of all of it.

A reduction is a pure function of one site of one layer, called inside the hook. It sees `[n, heads, pos, d]` at sites
with heads (`q`, `k`, `v`, `z`), `[n, heads, query, key]` at `pattern` and `[n, pos, d]` elsewhere, with the number of
real tokens of each prompt, and keeps the leading `[n]` or `[n, heads]`. Prompts are padded on the right; no built-in
reduction lets padding into a result.

    key_mean      [heads, key]    alpha_k = sum over the real queries q >= k of A[q, k], over their number
    entropy       [heads]         mean over the real queries of - sum over k of A[q, k] log A[q, k], in nats
    diagonals(o, ..., start=s)    mean over the real queries q >= s + o of A[q, q - o], for each offset o
                  [heads, o]
    max, argmax   [heads, query]  largest attention of each query, and the key that has it
    last          [heads, d]      the last real position (of `pattern`: the last real query)
    mean          [heads, d]      mean over the real positions (of `pattern`: queries)
    norm          [heads, pos]    L2 norm at each position
    absmax        [heads, pos]    largest absolute value at each position

Sums run in float32 or better. Where a result has positions, padding is 0; a mean over nothing is NaN.

`key_mean` is the importance of a key in Gu et al., "When Attention Sink Emerges in Language Models", ICLR 2025.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import PromptError
from workbench.models.forward import SITES
from workbench.models.weights import at_least_float32

PATTERN = ("pattern",)
VECTORS = tuple(site for site in SITES if site != "pattern")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CALL = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(?:\(([^()]*)\))?")


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """A named, versioned pure function that a hook applies.

    Attributes:
        name: an identifier; with version and parameters it says in the manifest what was computed.
        version: changes when the function does, so that results of two versions are never mixed.
        compute: of the activation and the number of real tokens of each prompt (see the top of this module); it
            must treat each prompt by itself and leave its input as it is.
        on: sites that it makes sense for; empty for all.
        parameters: what else decides the result, as JSON values.
        causal: whether it presumes that a query sees no later key.

    Raises:
        PromptError: if the name is not an identifier, is a built-in one's, or the version is empty.
    """

    name: str
    version: str
    compute: Callable[[Tensor, Int[Tensor, "n"]], Tensor]
    on: tuple[str, ...] = ()
    parameters: Mapping[str, int | Sequence[int] | float | str] = field(default_factory=dict)
    causal: bool = False
    builtin: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == "raw":
            raise PromptError(
                f"reduction name {self.name!r} must be an identifier other than 'raw', such as 'my_score'"
            )
        if self.name in BUILTIN and not self.builtin:
            raise PromptError(f"reduction name {self.name!r} is that of a built-in one: give yours another name")
        if not str(self.version):
            raise PromptError(
                f"reduction {self.name!r} needs a version, such as '1': change it when the function changes"
            )
        unknown = sorted(set(self.on) - set(SITES))
        if unknown:
            raise PromptError(f"reduction {self.name!r} names unknown sites {unknown}; there are {', '.join(SITES)}")

    @property
    def label(self) -> str:
        """Name with its parameters, as `diagonals(1,8,7,start=1)`; what stands behind the site in a cache."""
        if not self.parameters:
            return self.name
        shown = []
        for key, value in self.parameters.items():
            if key == "offsets" and isinstance(value, Sequence):
                shown += [str(each) for each in value]
            elif not (key == "start" and value == 0):
                shown.append(f"{key}={value}")
        return f"{self.name}({','.join(shown)})"

    @property
    def identity(self) -> dict[str, object]:
        """What a manifest records of it."""
        plain = {
            key: list(value) if isinstance(value, (tuple, list)) else value for key, value in self.parameters.items()
        }
        return {"name": self.name, "version": str(self.version), "parameters": plain, "builtin": self.builtin}

    def fits(self, site: str) -> bool:
        """Whether it makes sense for a site."""
        return not self.on or site in self.on


def is_real(lengths: Int[Tensor, "n"], pos: int) -> Bool[Tensor, "n pos"]:
    """Which positions hold tokens rather than padding."""
    return torch.arange(pos, device=lengths.device) < lengths[:, None]


def without_padding(x: Tensor, lengths: Int[Tensor, "n"], axis: int) -> Tensor:
    """The same values with 0 at padding along an axis of positions; itself where nothing is padded."""
    pos = x.shape[axis]
    if bool((lengths >= pos).all()):
        return x
    shape = [1] * x.dim()
    shape[0], shape[axis] = len(x), pos
    return x.masked_fill(~is_real(lengths, pos).view(shape), 0)


def key_means(pattern: Float[Tensor, "n heads pos pos"], lengths: Int[Tensor, "n"]) -> Float[Tensor, "n heads keys"]:
    """Mean attention to each key over the real queries that see it, in float32 or better; 0 at padding."""
    sums = without_padding(pattern, lengths, -2).sum(-2, dtype=at_least_float32(pattern.dtype))
    seen_by = lengths[:, None] - torch.arange(pattern.shape[-1], device=lengths.device)
    return sums / seen_by.clamp(min=1)[:, None, :].to(sums.dtype)


def diagonal_means(
    pattern: Float[Tensor, "n heads pos pos"],
    lengths: Int[Tensor, "n"],
    *,
    offsets: Sequence[int],
    start: int = 0,
) -> Float[Tensor, "n heads offsets"]:
    """Mean of `A[q, q - offset]` over the real queries `q >= start + offset`, in float32 or better; NaN over none."""
    dtype = at_least_float32(pattern.dtype)
    means = []
    for offset in offsets:
        inner = pattern[..., start:, start:].diagonal(-offset, dim1=-2, dim2=-1)
        queries = (lengths - start - offset).clamp(min=0)
        total = without_padding(inner, queries, -1).sum(-1, dtype=dtype)
        means.append(total / queries[:, None].to(dtype))
    return torch.stack(means, dim=-1)


def _entropy(pattern: Tensor, lengths: Tensor) -> Tensor:
    attention = pattern.to(at_least_float32(pattern.dtype))
    return _mean_over(-torch.xlogy(attention, attention).sum(-1), lengths, -1)


def _mean_over(x: Tensor, lengths: Tensor, axis: int) -> Tensor:
    total = without_padding(x, lengths, axis).sum(axis, dtype=at_least_float32(x.dtype))
    return total / lengths.to(total.dtype).view(-1, *[1] * (total.dim() - 1))


def _mean(x: Tensor, lengths: Tensor) -> Tensor:
    return _mean_over(x, lengths, -2)


def _last(x: Tensor, lengths: Tensor) -> Tensor:
    index = (lengths - 1).view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-2], 1, x.shape[-1])
    return x.gather(-2, index).squeeze(-2)


def _max(pattern: Tensor, lengths: Tensor) -> Tensor:
    return without_padding(pattern.amax(-1), lengths, -1)


def _argmax(pattern: Tensor, lengths: Tensor) -> Tensor:
    return without_padding(pattern.argmax(-1).to(torch.int32), lengths, -1)


def _norm(x: Tensor, lengths: Tensor) -> Tensor:
    return without_padding(torch.linalg.vector_norm(x, dim=-1, dtype=at_least_float32(x.dtype)), lengths, -1)


def _absmax(x: Tensor, lengths: Tensor) -> Tensor:
    low, high = x.aminmax(dim=-1)
    return without_padding(torch.maximum(-low, high), lengths, -1)


BUILTIN: dict[str, Reduction] = {}
"""The built-in reductions without parameters, by name; `diagonals` is made by the function of that name."""


def _builtin(name: str, compute: Callable[..., Tensor], on: tuple[str, ...] = (), *, causal: bool = False) -> None:
    BUILTIN[name] = Reduction(name=name, version="1", compute=compute, on=on, causal=causal, builtin=True)


_builtin("key_mean", key_means, PATTERN, causal=True)
_builtin("entropy", _entropy, PATTERN)
_builtin("max", _max, PATTERN)
_builtin("argmax", _argmax, PATTERN)
_builtin("last", _last)
_builtin("mean", _mean)
_builtin("norm", _norm, VECTORS)
_builtin("absmax", _absmax, VECTORS)


def diagonals(*offsets: int, start: int = 0) -> Reduction:
    """Mean attention along diagonals: to the token `offset` before the query.

    Args:
        offsets: distances in tokens, 0 and up.
        start: first position that counts, as query and as key: 1 leaves a beginning-of-sequence token out.

    Raises:
        PromptError: without an offset, or for a negative or repeated one.
    """
    if not offsets or min(offsets) < 0 or start < 0 or len(set(offsets)) < len(offsets):
        raise PromptError(
            f"diagonals takes different offsets from 0 up and start >= 0, not {list(offsets)} and start={start}: "
            "for example diagonals(1)"
        )
    return Reduction(
        name="diagonals",
        version="1",
        compute=partial(diagonal_means, offsets=offsets, start=start),
        on=PATTERN,
        parameters={"offsets": tuple(offsets), "start": start},
        builtin=True,
    )


def reduction(name: str | Reduction) -> Reduction:
    """The reduction of a name such as `key_mean` or `diagonals(1,8,7,start=1)`.

    Raises:
        PromptError: if there is none of that name; the message has near ones.
    """
    if isinstance(name, Reduction):
        return name
    found = _CALL.fullmatch(name.strip()) if isinstance(name, str) else None
    if found and found[1] == "diagonals":
        parts = [part.strip() for part in (found[2] or "").split(",") if part.strip()]
        starts = [part.partition("=")[2] for part in parts if part.replace(" ", "").startswith("start=")]
        try:
            offsets = [int(part) for part in parts if "=" not in part]
            if len(starts) + len(offsets) == len(parts) and len(starts) < 2:
                return diagonals(*offsets, start=int(starts[0]) if starts else 0)
        except ValueError:
            pass
        raise PromptError(f"reduction {name!r} does not parse: expected for example diagonals(1,8,7,start=1)")
    if found and found[2] is None and found[1] in BUILTIN:
        return BUILTIN[found[1]]
    known = [*BUILTIN, "diagonals"]
    near = get_close_matches(found[1] if found else str(name), known, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise PromptError(
        f"unknown reduction {name!r}: {hint}there are {', '.join(known)} (as in diagonals(1,8)), or pass a Reduction"
    )
