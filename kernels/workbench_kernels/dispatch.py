"""Which implementation of an operation runs: the Triton kernel or batched torch."""

import importlib.util
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from workbench_kernels.errors import KernelError

Backend = Literal["triton", "torch"]
Precision = Literal["ieee", "tf32x3", "tf32"]
"""How float32 operands of a product are read: as they are, as three tf32 products, or rounded to tf32."""

VARIABLE = "WORKBENCH_KERNELS"
"""Environment variable that forces an implementation: `triton` or `torch`."""

MAX_D_HEAD = 256


@cache
def has_triton() -> bool:
    """Whether Triton can be imported here."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether kernels are interpreted on the CPU; the variable must have been set before Triton was imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def backend_for(tensor: Tensor, backend: str | None = None, *, d_head: int | None = None) -> Backend:
    """Choose the implementation for an operation on `tensor`.

    Without a wish (argument, then environment variable), Triton runs on CUDA wherever its kernels serve; float64 and
    heads that are odd or wider than 256 are served by torch.

    Args:
        tensor: the operation's main operand.
        backend: `triton`, `torch`, or None.
        d_head: width of a head, where the operation has heads.

    Raises:
        KernelError: if Triton is asked for and cannot serve; says why and what to do.
    """
    wish = backend or os.environ.get(VARIABLE) or None
    if wish not in {None, "triton", "torch"}:
        source = "backend" if backend else f"the environment variable {VARIABLE}"
        raise KernelError(f"{source} is {wish!r}, expected 'triton' or 'torch': choose one, or leave it unset")
    reason = _refusal(tensor, d_head)
    if wish == "triton" and reason is not None:
        raise KernelError(f"backend='triton' cannot serve this call: {reason}")
    if wish is not None:
        return "triton" if wish == "triton" else "torch"
    return "triton" if tensor.is_cuda and reason is None else "torch"


def _refusal(tensor: Tensor, d_head: int | None) -> str | None:
    if not has_triton():
        return "triton is not installed: install it, or use backend='torch'"
    if tensor.dtype not in {torch.float16, torch.bfloat16, torch.float32}:
        return f"the kernels take float16, bfloat16 and float32, not {tensor.dtype}: use backend='torch'"
    if d_head is not None and (d_head > MAX_D_HEAD or d_head % 2):
        return f"d_head={d_head}; the kernels take even widths up to {MAX_D_HEAD}: use backend='torch'"
    if tensor.is_cuda:
        return None
    if not interpreted():
        return f"tensors are on {tensor.device}: move them to CUDA, or set TRITON_INTERPRET=1 before Python starts"
    if tensor.dtype == torch.bfloat16:
        return "the interpreter has no bfloat16: use float32 there, or a GPU"
    return None


def check_precision(precision: str) -> None:
    """Refuse an unknown reading of float32 operands.

    Raises:
        KernelError: if it is not one of `ieee`, `tf32x3`, `tf32`.
    """
    if precision not in {"ieee", "tf32x3", "tf32"}:
        raise KernelError(f"precision={precision!r} is not one of 'ieee', 'tf32x3', 'tf32': choose one")
