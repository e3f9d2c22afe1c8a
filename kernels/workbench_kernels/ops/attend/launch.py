"""Launch of the kernel of suffix attention."""

import torch
import triton
from torch import Tensor

from workbench_kernels.blocks import block_shapes, power_of_two
from workbench_kernels.ops.attend.kernel import suffix_kernel


def suffix_attention(
    q: Tensor, k: Tensor, v: Tensor, prefix_k: Tensor, prefix_v: Tensor, start: Tensor, scale: float, precision: str
) -> Tensor:
    """Launch `suffix_kernel`; see the dispatch."""
    edges, n, width, n_heads, d_head = q.shape
    kv_heads = k.shape[3]
    group = n_heads // kv_heads
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    blocks = block_shapes(width * group, max(width, prefix_k.shape[1]), d_head, q.dtype, precision)
    suffix_kernel[(edges * n, kv_heads, triton.cdiv(width * group, blocks.rows))](
        q, k, v, prefix_k, prefix_v, start, out,
        n, width, prefix_k.shape[1], kv_heads,
        *q.stride()[:4], *k.stride()[:4], *v.stride()[:4], *prefix_k.stride()[:3], *prefix_v.stride()[:3],
        scale,
        GROUP=group, D_HEAD=d_head, DP=power_of_two(d_head), BM=blocks.rows, BU=blocks.keys, PRECISION=precision,
        num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out
