"""Attention from the windows of many edges over prefixes that they share."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench_kernels.checks import check_dtypes, check_layout, check_shapes
from workbench_kernels.dispatch import backend_for, check_precision
from workbench_kernels.errors import KernelError
from workbench_kernels.ops.attend import reference


def suffix_attention(
    q: Float[Tensor, "edges n width n_heads d_head"],
    k: Float[Tensor, "edges n width n_kv_heads d_head"],
    v: Float[Tensor, "edges n width n_kv_heads d_head"],
    prefix_k: Float[Tensor, "n prefix n_kv_heads d_head"],
    prefix_v: Float[Tensor, "n prefix n_kv_heads d_head"],
    start: Int[Tensor, "n"],
    *,
    scale: float,
    precision: str = "ieee",
    backend: str | None = None,
) -> Float[Tensor, "edges n width n_heads d_head"]:
    """Causal attention of window queries over the base run's keys before the window and the edge's own in it.

    Args:
        q: queries of every edge's window.
        k: its keys.
        v: its values.
        prefix_k: keys of the base run; those of prompt `i` from `start[i]` on are not read. May be empty.
        prefix_v: values of the base run.
        start: first position of each prompt's window, int64, at most `prefix`.
        scale: what query-key products are multiplied by.
        precision: how float32 operands of products are read: `ieee`, `tf32x3` or `tf32`. Triton only.
        backend: `triton` or `torch`; by default Triton on CUDA.

    Returns:
        What every head mixes, in the dtype of `q`.

    Raises:
        KernelError: if the arguments do not fit.
    """
    check_precision(precision)
    shapes = {
        "q": (q, ("edges", "n", "width", "n_heads", "d_head")),
        "k": (k, ("edges", "n", "width", "n_kv_heads", "d_head")),
        "v": (v, ("edges", "n", "width", "n_kv_heads", "d_head")),
        "start": (start, ("n",)),
    }
    if prefix_k.shape[1:2] != (0,):
        shapes["prefix_k"] = (prefix_k, ("n", "prefix", "n_kv_heads", "d_head"))
        shapes["prefix_v"] = (prefix_v, ("n", "prefix", "n_kv_heads", "d_head"))
    sizes = check_shapes(shapes)
    tensors = {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v}
    check_dtypes(q.dtype, tensors)
    check_layout(q.device, {**tensors, "start": start})
    if start.dtype != torch.int64:
        raise KernelError(f"start is {start.dtype}, expected torch.int64: call start.long()")
    if sizes["n_heads"] % sizes["n_kv_heads"]:
        raise KernelError(
            f"q has {sizes['n_heads']} heads and k {sizes['n_kv_heads']}; expected a multiple: pass all heads"
        )
    if backend_for(q, backend, d_head=sizes["d_head"]) == "torch":
        return reference.suffix_attention(q, k, v, prefix_k, prefix_v, start, scale)
    from workbench_kernels.ops.attend import launch

    return launch.suffix_attention(q, k, v, prefix_k, prefix_v, start, scale, precision)
