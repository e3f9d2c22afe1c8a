"""Launches of the kernels of norms."""

import torch
import triton
from torch import Tensor

from workbench_kernels.blocks import Blocks
from workbench_kernels.ops.norm.kernel import inverse_sigma_kernel, norm_delta_kernel


def row_block(d_model: int) -> Blocks:
    """A whole row at once."""
    block = triton.next_power_of_2(d_model)
    return Blocks(rows=1, keys=block, warps=max(1, min(16, block // 256)), stages=1)


def sender_block(d_model: int, senders: int) -> Blocks:
    """Some senders, and a stretch of the stream at a time."""
    rows = min(16, triton.next_power_of_2(senders))
    return Blocks(rows=rows, keys=min(128, triton.next_power_of_2(d_model)), warps=4, stages=3)


def norm_delta(kind: str, base: Tensor, delta: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Launch `norm_delta_kernel`; see the dispatch."""
    edges, n, width, d_model = delta.shape
    block = row_block(d_model)
    flat, moved = base.reshape(-1, d_model), delta.reshape(edges, -1, d_model)
    out = torch.empty(delta.shape, dtype=base.dtype, device=base.device)
    norm_delta_kernel[(n * width * edges,)](
        flat, moved, weight, weight if bias is None else bias, out,
        n * width, d_model,
        flat.stride(0), moved.stride(0), moved.stride(1), eps,
        LAYERNORM=kind == "layernorm", BIAS=bias is not None, BD=block.keys,
        num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def inverse_sigma(kind: str, unit: Tensor, sigma: Tensor, deltas: Tensor, eps: float) -> Tensor:
    """Launch `inverse_sigma_kernel`; see the dispatch."""
    n, width, senders, d_model = deltas.shape
    out = torch.empty(n, width, senders, dtype=torch.float32, device=deltas.device)
    block = sender_block(d_model, senders)
    inverse_sigma_kernel[(n * width, triton.cdiv(senders, block.rows))](
        unit, sigma, deltas, out,
        width, senders, d_model,
        unit.stride(0), unit.stride(1), sigma.stride(0), sigma.stride(1),
        deltas.stride(0), deltas.stride(1), deltas.stride(2), eps,
        LAYERNORM=kind == "layernorm", BS=block.rows, BD=block.keys,
        num_warps=block.warps, num_stages=block.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out
