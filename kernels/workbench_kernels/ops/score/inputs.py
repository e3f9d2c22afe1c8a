"""What a receiver's attention is recomputed from, checked once for all implementations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench_kernels.checks import accumulating, check_dtypes, check_layout, check_shapes
from workbench_kernels.errors import KernelError

Channel = Literal["q", "k"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Clean attention of one layer over a window of each prompt, and the gradient at what its heads mix.

    Window position `t` of prompt `i` stands at position `start[i] + t`; keys before `start[i]` are its prefix.

    Attributes:
        queries: as they meet the keys (normalised, rotated) `[n, width, n_heads, d_head]`.
        keys: likewise, of all positions `[n, pos, n_kv_heads, d_head]`.
        values: of all positions `[n, pos, n_kv_heads, d_head]`.
        gradient: of the metric at the mixed values `[n, width, n_heads, d_head]`.
        start: first position of each window `[n]`, int64.
        scale: what query-key products are multiplied by.
        causal: a query sees no later key. Without it windows must be whole prompts.

    Raises:
        KernelError: if shapes, dtypes, devices or strides do not fit.
    """

    queries: Float[Tensor, "n width n_heads d_head"]
    keys: Float[Tensor, "n pos n_kv_heads d_head"]
    values: Float[Tensor, "n pos n_kv_heads d_head"]
    gradient: Float[Tensor, "n width n_heads d_head"]
    start: Int[Tensor, "n"]
    scale: float
    causal: bool = True

    def __post_init__(self) -> None:
        sizes = check_shapes(
            {
                "queries": (self.queries, ("n", "width", "n_heads", "d_head")),
                "keys": (self.keys, ("n", "pos", "n_kv_heads", "d_head")),
                "values": (self.values, ("n", "pos", "n_kv_heads", "d_head")),
                "gradient": (self.gradient, ("n", "width", "n_heads", "d_head")),
                "start": (self.start, ("n",)),
            }
        )
        tensors = {"queries": self.queries, "keys": self.keys, "values": self.values, "gradient": self.gradient}
        check_dtypes(self.queries.dtype, tensors)
        check_layout(self.queries.device, {**tensors, "start": self.start})
        if self.start.dtype != torch.int64:
            raise KernelError(f"start is {self.start.dtype}, expected torch.int64: call start.long()")
        if sizes["n_heads"] % sizes["n_kv_heads"]:
            raise KernelError(
                f"queries have {sizes['n_heads']} heads and keys {sizes['n_kv_heads']}; expected a multiple: pass all "
                "heads of the layer"
            )
        if sizes["width"] > sizes["pos"]:
            raise KernelError(
                f"windows of {sizes['width']} positions do not fit keys of {sizes['pos']}: pass keys of all positions"
            )
        last = int(self.start.max()) + sizes["width"]
        if int(self.start.min()) < 0 or last > sizes["pos"]:
            raise KernelError(
                f"start is between {int(self.start.min())} and {int(self.start.max())}; windows of {sizes['width']} "
                f"positions must lie within the {sizes['pos']} positions of keys: pass the keys of all positions"
            )
        if not self.causal and sizes["width"] != sizes["pos"]:
            raise KernelError(
                f"causal=False with windows of {sizes['width']} and keys of {sizes['pos']} positions: without a causal "
                "mask windows must be whole prompts"
            )

    @property
    def group(self) -> int:
        """Query heads that share a key and a value."""
        return self.queries.shape[2] // self.keys.shape[2]


@dataclass(frozen=True, kw_only=True)
class Patch:
    """Sender deltas on their way to the queries (or keys) of some receiver heads.

    The patched projection of sender s at window position t into receiver r is

        (delta(s, t) W_r + base(t, r)) * inverse(t, s) + constant(r),

    then normalised per head where `norm_weight` is given, then rotated where `cos` and `sin` are.

    Attributes:
        base: clean stream, centred where the norm centres, not divided by its sigma, through the receiver's folded
            matrix `[n, width, receivers, d_head]`.
        inverse: 1/sigma of every patched stream `[n, width, senders]`.
        moved: deltas through the receiver's folded matrix `[n, width, senders, receivers, d_head]`; or instead
        mixed: what a sender's output matrix maps `[senders, n, width, d_inner]`, with
        matrices: the two maps multiplied, `[senders, receivers, d_inner, d_head]`.
        constant: what biases add `[receivers, d_head]`.
        norm_weight: gain of a per-head RMSNorm `[d_head]`.
        norm_eps: its epsilon.
        cos: of the window positions `[n, width, rotary_dim]`, half-split layout.
        sin: likewise.

    `base`, `inverse`, `constant`, `norm_weight`, `cos` and `sin` are in the accumulating dtype, the rest in that of the
    attention.

    Raises:
        KernelError: if they do not fit each other.
    """

    base: Float[Tensor, "n width receivers d_head"]
    inverse: Float[Tensor, "n width senders"]
    moved: Float[Tensor, "n width senders receivers d_head"] | None = None
    mixed: Float[Tensor, "senders n width d_inner"] | None = None
    matrices: Float[Tensor, "senders receivers d_inner d_head"] | None = None
    constant: Float[Tensor, "receivers d_head"] | None = None
    norm_weight: Float[Tensor, "d_head"] | None = None
    norm_eps: float = 0.0
    cos: Float[Tensor, "n width rotary"] | None = None
    sin: Float[Tensor, "n width rotary"] | None = None

    def __post_init__(self) -> None:
        factored = self.mixed is not None and self.matrices is not None
        if (self.moved is None) != factored or (self.mixed is None) != (self.matrices is None):
            given = [name for name in ("moved", "mixed", "matrices") if getattr(self, name) is not None]
            raise KernelError(f"given {', '.join(given) or 'no delta'}; expected moved alone, or mixed with matrices")
        if (self.cos is None) != (self.sin is None):
            raise KernelError("cos and sin belong together: give both or none")
        axes = {
            "base": ("n", "width", "receivers", "d_head"),
            "inverse": ("n", "width", "senders"),
            "moved": ("n", "width", "senders", "receivers", "d_head"),
            "mixed": ("senders", "n", "width", "d_inner"),
            "matrices": ("senders", "receivers", "d_inner", "d_head"),
            "constant": ("receivers", "d_head"),
            "norm_weight": ("d_head",),
            "cos": ("n", "width", "rotary"),
            "sin": ("n", "width", "rotary"),
        }
        given_axes = {name: (getattr(self, name), named) for name, named in axes.items()}
        sizes = check_shapes({name: pair for name, pair in given_axes.items() if pair[0] is not None})
        delta = self.moved if self.moved is not None else self.mixed
        assert delta is not None
        check_dtypes(delta.dtype, {"moved": self.moved, "mixed": self.mixed, "matrices": self.matrices})
        fixed = {name: getattr(self, name) for name in ("base", "inverse", "constant", "norm_weight", "cos", "sin")}
        check_dtypes(accumulating(delta.dtype), fixed)
        check_layout(self.base.device, {"moved": self.moved, "mixed": self.mixed, "matrices": self.matrices, **fixed})
        if self.cos is not None and (sizes["rotary"] % 2 or sizes["rotary"] > sizes["d_head"]):
            raise KernelError(
                f"cos has {sizes['rotary']} columns for d_head={sizes['d_head']}; expected an even number, at most "
                "d_head: pass the half-split tables of the rotating dimensions"
            )

    @property
    def senders(self) -> int:
        """How many senders are scored."""
        return self.inverse.shape[-1]

    @property
    def rotary_dim(self) -> int:
        """Leading dimensions of a head that rotate."""
        return 0 if self.cos is None else self.cos.shape[-1]


def check_fit(attention: Attention, patch: Patch, channel: str, heads: Sequence[int]) -> None:
    """Hold a patch and its receiver heads against the attention.

    Raises:
        KernelError: if they do not fit.
    """
    if channel not in {"q", "k"}:
        raise KernelError(f"channel={channel!r} is not 'q' or 'k': value edges are linear, see value_gradient")
    sizes = check_shapes(
        {
            "queries": (attention.queries, ("n", "width", "n_heads", "d_head")),
            "base": (patch.base, ("n", "width", "receivers", "d_head")),
        }
    )
    delta = patch.moved if patch.moved is not None else patch.mixed
    check_dtypes(attention.queries.dtype, {"moved" if patch.moved is not None else "mixed": delta})
    check_layout(attention.queries.device, {"base": patch.base})
    if len(heads) != sizes["receivers"]:
        raise KernelError(
            f"heads has {len(heads)} entries and base {sizes['receivers']} receivers: name every receiver"
        )
    there = sizes["n_heads"] if channel == "q" else attention.keys.shape[2]
    if not all(0 <= head < there for head in heads):
        raise KernelError(f"heads={list(heads)} for channel {channel!r}; expected numbers from 0 to {there - 1}")
