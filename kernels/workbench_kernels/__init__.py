"""Tensors in, tensors out: Triton kernels, their plain-torch reference and the dispatch between them.

Every operation checks its arguments, then runs Triton on CUDA and torch elsewhere; `backend="triton"` or the variable
`WORKBENCH_KERNELS` of the environment ask for one of them. Nothing here knows a model. Triton is imported when a kernel
runs.
"""

from workbench_kernels.dispatch import VARIABLE, Backend, Precision, backend_for, has_triton
from workbench_kernels.errors import KernelError
from workbench_kernels.ops.attend import suffix_attention
from workbench_kernels.ops.norm import inverse_sigma, norm_delta
from workbench_kernels.ops.score import (
    Attention,
    BaseAttention,
    Patch,
    base_attention,
    receiver_effects,
    value_gradient,
)

__all__ = [
    "VARIABLE",
    "Attention",
    "Backend",
    "BaseAttention",
    "KernelError",
    "Patch",
    "Precision",
    "backend_for",
    "base_attention",
    "has_triton",
    "inverse_sigma",
    "norm_delta",
    "receiver_effects",
    "suffix_attention",
    "value_gradient",
]
