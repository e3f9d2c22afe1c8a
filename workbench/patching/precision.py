"""How float32 operands of products are read, and what that costs: float32, TF32 or bfloat16 inputs on a GPU.

Sums are kept in float32 whichever is chosen, and so are the residual stream, norms and softmax. The base run is always
computed in float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from workbench.errors import PromptError

Precision = Literal["fp32", "tf32", "bf16"]


def check_precision(precision: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a precision that this model cannot be swept in here.

    Raises:
        PromptError: if it is unknown, or rounds more than the model and its device allow.
    """
    if precision not in get_args(Precision):
        raise PromptError(f"precision {precision!r} is not one of {', '.join(get_args(Precision))}")
    if precision == "fp32":
        return
    if device.type != "cuda":
        raise PromptError(
            f"precision={precision!r} needs a CUDA device and the model is on {device}: use precision='fp32', or move "
            "the model to a GPU"
        )
    if dtype != torch.float32:
        raise PromptError(
            f"precision={precision!r} rounds the products of a float32 model and this one is {dtype}: use "
            "precision='fp32', which leaves its dtype as it is, or load the model in float32"
        )


@contextmanager
def products(precision: Precision, device: torch.device) -> Iterator[None]:
    """Read operands of matrix products at a precision, on CUDA; elsewhere nothing changes.

    Whatever torch was set to is set aside: TF32 is on in here if and only if it was asked for.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        if precision == "bf16":
            with Rounded(torch.bfloat16):
                yield
        else:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def precision_error(rounded: Float[np.ndarray, "edges n"], precise: Float[np.ndarray, "edges n"]) -> dict[str, float]:
    """How far effects from rounded products are from those in float32.

    Returns:
        `edges` and `prompts` that were compared; `relative`: norm of the difference over norm of the effects;
        `root_mean_square` and `largest` difference of one prompt's effect, in units of the metric.
    """
    difference = np.asarray(rounded, dtype=np.float64) - precise
    norm = float(np.linalg.norm(precise))
    return {
        "edges": difference.shape[0],
        "prompts": difference.shape[1],
        "relative": float(np.linalg.norm(difference)) / norm if norm else float("nan"),
        "root_mean_square": float(np.sqrt(np.mean(difference**2))),
        "largest": float(np.abs(difference).max()),
    }


class Rounded(TorchDispatchMode):
    """Round float32 operands of matrix products, and keep the products' sums in float32.

    On CUDA the product itself takes rounded operands; elsewhere rounded operands are multiplied in float32, which is
    the same but for the order of sums.

    Args:
        dtype: what operands are rounded to.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation, a product with rounded operands."""
        kwargs = kwargs or {}
        first = _FIRST_OPERAND.get(func)
        if first is None or kwargs or len(args) > first + 2:
            return func(*args, **kwargs)
        a, b = args[first : first + 2]
        if a.dtype != torch.float32 or b.dtype != torch.float32:
            return func(*args)
        plain = torch.ops.aten.mm if a.dim() == 2 else torch.ops.aten.bmm
        a, b = a.to(self.dtype), b.to(self.dtype)
        if a.is_cuda:
            made: Tensor = plain.dtype(a, b, torch.float32)
        else:
            made = plain.default(a.float(), b.float())
        return made if first == 0 else made + args[0]


_FIRST_OPERAND = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
"""Matrix products, by the place of their first operand."""
