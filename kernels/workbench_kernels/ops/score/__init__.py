"""Effects of many senders on what attention heads read, the heads recomputed exactly, the rest first order.

With gradient `g_t` at what query `t` mixes and values `v_u`, a unit of attention of `t` on `u` is worth `v_u . g_t`. A
patched query or key changes attention `A` to `A'`, and its effect is `sum over t, u of (A' - A)[t, u] (v_u . g_t)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from workbench_kernels.checks import accumulating, check_dtypes, check_layout, check_shapes
from workbench_kernels.dispatch import backend_for, check_precision
from workbench_kernels.ops.score import reference
from workbench_kernels.ops.score.inputs import Attention, Channel, Patch, check_fit

__all__ = ["Attention", "BaseAttention", "Channel", "Patch", "base_attention", "receiver_effects", "value_gradient"]

FUSED_ROWS, FUSED_D_HEAD = 64, 128
"""With more rows, every block of queries would multiply factored keys out again; wider heads would spill registers."""


@dataclass(frozen=True, kw_only=True)
class BaseAttention:
    """What clean attention comes to, query by query.

    Attributes:
        worth: `sum over u of A[t, u] (v_u . g_t)`, `[n, n_heads, width]`, float32 or better.
        log_normaliser: logarithm of the softmax's denominator, likewise.
    """

    worth: Float[Tensor, "n n_heads width"]
    log_normaliser: Float[Tensor, "n n_heads width"]


def base_attention(attention: Attention, *, precision: str = "ieee", backend: str | None = None) -> BaseAttention:
    """What clean attention is worth; computed once for all senders of a layer.

    Args:
        attention: the clean attention.
        precision: how float32 operands of products are read: `ieee`, `tf32x3` or `tf32`. Triton only.
        backend: `triton` or `torch`; by default Triton on CUDA.

    Raises:
        KernelError: if the arguments do not fit.
    """
    check_precision(precision)
    if backend_for(attention.queries, backend, d_head=attention.queries.shape[-1]) == "torch":
        worth, log = reference.base_attention(attention)
    else:
        from workbench_kernels.ops.score import launch

        worth, log = launch.base_attention(attention, precision)
    return BaseAttention(worth=worth, log_normaliser=log)


def value_gradient(
    attention: Attention,
    base: BaseAttention | None = None,
    *,
    precision: str = "ieee",
    backend: str | None = None,
) -> Float[Tensor, "n width n_kv_heads d_head"]:
    """Gradient at the values of window keys, `sum over t of A[t, u] g_t`, summed over the query heads of a group.

    Attention does not change when values do, so a value edge is this gradient times the change of its values: one
    product with the deltas, for which torch serves.

    Args:
        attention: the clean attention.
        base: what `base_attention` returned for it; computed here where it is not given.
        precision: see `base_attention`.
        backend: likewise.

    Returns:
        Float32 or better.

    Raises:
        KernelError: if the arguments do not fit.
    """
    check_precision(precision)
    if backend_for(attention.queries, backend, d_head=attention.queries.shape[-1]) == "torch":
        return reference.value_gradient(attention)
    from workbench_kernels.ops.score import launch

    base = base or base_attention(attention, precision=precision, backend=backend)
    _check_base(attention, base)
    return launch.value_gradient(attention, base.log_normaliser, precision)


def receiver_effects(
    attention: Attention,
    patch: Patch,
    channel: Channel,
    heads: Sequence[int],
    base: BaseAttention | None = None,
    *,
    precision: str = "ieee",
    backend: str | None = None,
) -> Float[Tensor, "n senders receivers"]:
    """Effect of every sender on every receiver head.

    Args:
        attention: the clean attention of the receivers' layer.
        patch: the senders' deltas in front of the receivers.
        channel: `q`: queries are patched; `k`: keys, for all query heads of their group.
        heads: which heads the receivers are: query heads, or key/value heads.
        base: what `base_attention` returned for this attention; computed here where it is not given.
        precision: see `base_attention`.
        backend: likewise.

    Returns:
        Float32 or better.

    Raises:
        KernelError: if the arguments do not fit.
    """
    check_precision(precision)
    check_fit(attention, patch, channel, heads)
    numbers = torch.tensor(list(heads), device=attention.queries.device)
    if backend_for(attention.queries, backend, d_head=attention.queries.shape[-1]) == "torch":
        return reference.receiver_effects(attention, patch, channel, numbers)
    from workbench_kernels.ops.score import launch

    base = base or base_attention(attention, precision=precision, backend=backend)
    _check_base(attention, base)
    rows, d_head = attention.queries.shape[1] * attention.group, attention.queries.shape[-1]
    if channel == "k" and patch.mixed is not None and (rows > FUSED_ROWS or d_head > FUSED_D_HEAD):
        patch = _multiplied_out(patch)
    return launch.receiver_effects(attention, patch, channel, numbers, base.worth, precision)


def _check_base(attention: Attention, base: BaseAttention) -> None:
    given = {"base.worth": base.worth, "base.log_normaliser": base.log_normaliser}
    axes = ("n", "n_heads", "width")
    check_shapes(
        {
            "queries": (attention.queries, ("n", "width", "n_heads", "d_head")),
            **{name: (tensor, axes) for name, tensor in given.items()},
        }
    )
    check_dtypes(accumulating(attention.queries.dtype), given)
    check_layout(attention.queries.device, given)


def _multiplied_out(patch: Patch) -> Patch:
    """The same patch with projected deltas: one product a sender."""
    assert patch.mixed is not None
    assert patch.matrices is not None
    senders, n, width, _ = patch.mixed.shape
    receivers, d_inner, d_head = patch.matrices.shape[1:]
    joined = patch.matrices.transpose(1, 2).reshape(senders, d_inner, receivers * d_head)
    moved = torch.bmm(patch.mixed.flatten(1, 2), joined).view(senders, n, width, receivers, d_head)
    return replace(patch, moved=moved.permute(1, 2, 0, 3, 4), mixed=None, matrices=None)
