"""Norms of patched streams: the sum of a base stream and many deltas, normalised without being kept."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from workbench_kernels.checks import accumulating, check_dtypes, check_layout, check_shapes
from workbench_kernels.dispatch import backend_for
from workbench_kernels.errors import KernelError
from workbench_kernels.ops.norm import reference

Kind = Literal["layernorm", "rmsnorm"]

MAX_D_MODEL = 16384


def norm_delta(
    kind: Kind,
    base: Float[Tensor, "n width d_model"],
    delta: Float[Tensor, "edges n width d_model"],
    weight: Float[Tensor, "d_model"],
    bias: Float[Tensor, "d_model"] | None = None,
    *,
    eps: float,
    backend: str | None = None,
) -> Float[Tensor, "edges n width d_model"]:
    """`norm(base + delta)` of every edge; statistics in float32 or better, the sum is never written.

    Args:
        kind: `layernorm` or `rmsnorm`.
        base: stream that the edges share.
        delta: what each edge adds to it.
        weight: gain.
        bias: shift, LayerNorm only.
        eps: added to the variance.
        backend: `triton` or `torch`; by default Triton on CUDA.

    Raises:
        KernelError: if the arguments do not fit.
    """
    _check_kind(kind, bias)
    shapes = {
        "base": (base, ("n", "width", "d_model")),
        "delta": (delta, ("edges", "n", "width", "d_model")),
        "weight": (weight, ("d_model",)),
    }
    sizes = check_shapes(shapes if bias is None else {**shapes, "bias": (bias, ("d_model",))})
    tensors = {"base": base, "delta": delta, "weight": weight, "bias": bias}
    check_dtypes(base.dtype, tensors)
    check_layout(base.device, tensors)
    if backend_for(base, backend) == "torch" or sizes["d_model"] > MAX_D_MODEL:
        return reference.norm_delta(kind, base, delta, weight, bias, eps)
    from workbench_kernels.ops.norm import launch

    return launch.norm_delta(kind, base, delta, weight, bias, eps)


def inverse_sigma(
    kind: Kind,
    unit: Float[Tensor, "n width d_model"],
    sigma: Float[Tensor, "n width"],
    deltas: Float[Tensor, "n width senders d_model"],
    *,
    eps: float,
    backend: str | None = None,
) -> Float[Tensor, "n width senders"]:
    """`1 / sqrt(variance + eps)` of every patched stream, by which its projections are multiplied afterwards.

    Args:
        kind: `layernorm`: deviations from the mean; `rmsnorm`: from zero.
        unit: base stream, centred where the norm centres, over `sigma`.
        sigma: of the base stream, float32 or better.
        deltas: what each sender adds.
        eps: added to the variance.
        backend: `triton` or `torch`; by default Triton on CUDA.

    Raises:
        KernelError: if the arguments do not fit.
    """
    _check_kind(kind, None)
    check_shapes(
        {
            "unit": (unit, ("n", "width", "d_model")),
            "sigma": (sigma, ("n", "width")),
            "deltas": (deltas, ("n", "width", "senders", "d_model")),
        }
    )
    check_dtypes(unit.dtype, {"unit": unit, "deltas": deltas})
    check_dtypes(accumulating(unit.dtype), {"sigma": sigma})
    check_layout(unit.device, {"unit": unit, "deltas": deltas, "sigma": sigma})
    if backend_for(unit, backend) == "torch":
        return reference.inverse_sigma(kind, unit, sigma, deltas, eps)
    from workbench_kernels.ops.norm import launch

    return launch.inverse_sigma(kind, unit, sigma, deltas, eps)


def _check_kind(kind: str, bias: Tensor | None) -> None:
    if kind not in {"layernorm", "rmsnorm"}:
        raise KernelError(f"kind={kind!r} is not 'layernorm' or 'rmsnorm': choose one")
    if kind == "rmsnorm" and bias is not None:
        raise KernelError("bias is given for an RMSNorm, which has none: pass None")
