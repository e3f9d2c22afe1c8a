"""Launches of the kernels of receiver scoring."""

import torch
import triton
from torch import Tensor

from workbench_kernels.blocks import block_shapes, power_of_two
from workbench_kernels.ops.score.inputs import Attention, Patch
from workbench_kernels.ops.score.kernel import base_kernel, score_kernel, value_kernel


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.stride(0), tensor.stride(1), tensor.stride(2)


def base_attention(attention: Attention, precision: str) -> tuple[Tensor, Tensor]:
    """Launch `base_kernel`; see the dispatch."""
    n, width, n_heads, d_head = attention.queries.shape
    length = attention.keys.shape[1]
    worth = torch.empty(n, n_heads, width, dtype=torch.float32, device=attention.queries.device)
    log = torch.empty_like(worth)
    blocks = block_shapes(width, length, d_head, attention.queries.dtype, precision)
    base_kernel[(n * triton.cdiv(width, blocks.rows), n_heads)](
        attention.queries, attention.keys, attention.values, attention.gradient, attention.start, worth, log,
        width, length,
        *_strides(attention.queries), *_strides(attention.keys), *_strides(attention.values),
        *_strides(attention.gradient),
        attention.scale,
        CAUSAL=attention.causal, GROUP=attention.group, D_HEAD=d_head,
        HB=power_of_two(d_head // 2), DP=power_of_two(d_head), BM=blocks.rows, BU=blocks.keys, PRECISION=precision,
        num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return worth, log


def value_gradient(attention: Attention, log: Tensor, precision: str) -> Tensor:
    """Launch `value_kernel`; see the dispatch."""
    n, width, n_heads, d_head = attention.queries.shape
    kv_heads = attention.keys.shape[2]
    found = torch.empty(n, width, kv_heads, d_head, dtype=torch.float32, device=attention.queries.device)
    blocks = block_shapes(width, width, d_head, attention.queries.dtype, precision)
    value_kernel[(n * triton.cdiv(width, blocks.keys), kv_heads)](
        attention.queries, attention.keys, attention.gradient, attention.start, log, found,
        width, n_heads,
        *_strides(attention.queries), *_strides(attention.keys), *_strides(attention.gradient),
        attention.scale,
        CAUSAL=attention.causal, GROUP=attention.group, D_HEAD=d_head,
        DP=power_of_two(d_head), BT=blocks.rows, BU=blocks.keys, PRECISION=precision,
        num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return found


def receiver_effects(
    attention: Attention, patch: Patch, channel: str, heads: Tensor, worth: Tensor, precision: str
) -> Tensor:
    """Launch `score_kernel`; see the dispatch."""
    n, width, n_heads, d_head = attention.queries.shape
    length, keys = attention.keys.shape[1], channel == "k"
    rows = width * (attention.group if keys else 1)
    blocks = block_shapes(rows, length, d_head, attention.queries.dtype, precision)
    tiles = triton.cdiv(rows, blocks.rows)
    out = torch.empty(n, patch.senders, len(heads), tiles, dtype=torch.float32, device=attention.queries.device)
    if patch.moved is not None:
        delta, d_inner = patch.moved, 0
        matrix, matrix_strides = delta, (0, 0)
        delta_strides = delta.stride()[:4]
    else:
        assert patch.mixed is not None
        assert patch.matrices is not None
        delta, d_inner = patch.mixed, patch.mixed.shape[-1]
        matrix = patch.matrices.contiguous()
        matrix_strides = (matrix.stride(0), matrix.stride(1))
        delta_strides = (delta.stride(1), delta.stride(2), delta.stride(0), 0)
    absent = patch.inverse
    constant = absent if patch.constant is None else patch.constant
    cos, sin = (absent if table is None else table for table in (patch.cos, patch.sin))
    if patch.sin is not None and sin.stride() != cos.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    score_kernel[(n * tiles, patch.senders, len(heads))](
        attention.queries, attention.keys, attention.values, attention.gradient, attention.start, heads,
        delta, matrix, patch.base, patch.inverse, constant,
        absent if patch.norm_weight is None else patch.norm_weight, cos, sin, worth, out,
        width, length, patch.senders, n_heads,
        *_strides(attention.queries), *_strides(attention.keys), *_strides(attention.values),
        *_strides(attention.gradient), *delta_strides, *matrix_strides, *_strides(patch.base), *_strides(patch.inverse),
        0 if patch.constant is None else constant.stride(0), *((0, 0) if patch.cos is None else cos.stride()[:2]),
        attention.scale, patch.norm_eps,
        KEYS=keys, FACTORED=patch.moved is None, CONSTANT=patch.constant is not None,
        NORM=patch.norm_weight is not None, CAUSAL=attention.causal,
        GROUP=attention.group, D_HEAD=d_head, D_INNER=d_inner, HALF_ROT=patch.rotary_dim // 2,
        HB=power_of_two(d_head // 2), DP=power_of_two(d_head), BM=blocks.rows, BU=blocks.keys,
        BI=min(32, power_of_two(d_inner)), PRECISION=precision,
        num_warps=blocks.warps, num_stages=blocks.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return out.sum(-1)
