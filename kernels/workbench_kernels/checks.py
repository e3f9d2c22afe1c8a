"""The same checks before every operation, whichever implementation then runs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from workbench_kernels.errors import KernelError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over tensors of `dtype` are kept: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def check_shapes(arguments: Mapping[str, tuple[Tensor, tuple[str, ...]]]) -> dict[str, int]:
    """Bind the named axes of all tensors to one size each.

    Args:
        arguments: tensor and names of its axes, by argument; an axis `1` must have size 1.

    Returns:
        Sizes by axis.

    Raises:
        KernelError: at the first tensor with another number of axes or another size of an axis.
    """
    sizes: dict[str, int] = {}
    source: dict[str, str] = {}
    for name, (tensor, axes) in arguments.items():
        wanted = f"[{', '.join(axes)}]"
        if tensor.dim() != len(axes):
            raise KernelError(
                f"{name} has shape {tuple(tensor.shape)}; expected {len(axes)} axes {wanted}: reshape {name}"
            )
        for axis, size in zip(axes, tensor.shape, strict=True):
            if axis not in sizes:
                sizes[axis], source[axis] = size, name
            elif sizes[axis] != size:
                raise KernelError(
                    f"{name} has shape {tuple(tensor.shape)}, so {axis}={size}, but {source[axis]} has "
                    f"{axis}={sizes[axis]}; expected {wanted}: pass tensors of the same prompts, heads and positions"
                )
    for axis, size in sizes.items():
        if size < 1:
            raise KernelError(f"{source[axis]} has {axis}=0; expected at least 1: leave out what is empty")
    return sizes


def check_dtypes(dtype: torch.dtype, arguments: Mapping[str, Tensor | None]) -> None:
    """Hold every given tensor against a dtype.

    Raises:
        KernelError: at the first of another dtype, or if `dtype` is no floating dtype that is served.
    """
    if dtype not in FLOATS:
        raise KernelError(f"dtype {dtype} is not one of {', '.join(map(str, FLOATS))}: convert the tensors")
    for name, tensor in arguments.items():
        if tensor is not None and tensor.dtype != dtype:
            raise KernelError(f"{name} is {tensor.dtype}, expected {dtype}: call {name}.to({dtype})")


def check_layout(device: torch.device, arguments: Mapping[str, Tensor | None]) -> None:
    """Hold every given tensor to one device, and its last axis to stride 1.

    Raises:
        KernelError: at the first that is elsewhere or strided.
    """
    for name, tensor in arguments.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise KernelError(f"{name} is on {tensor.device}, expected {device}: call {name}.to({str(device)!r})")
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise KernelError(
                f"{name} has strides {tuple(tensor.stride())}; its last axis must be contiguous: call "
                f"{name}.contiguous()"
            )
