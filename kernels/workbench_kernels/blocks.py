# mypy: allow-untyped-defs, allow-incomplete-defs
"""Pieces that the kernels share: constants, loading a tile, and the shapes of blocks."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)
"""Where running maxima begin; finite, so that a row that sees nothing yet gives no NaN."""


@triton.jit
def tile(rows, columns, row_ok, column_ok):
    """Load a tile from row pointers, zero where it does not exist."""
    return tl.load(rows[:, None] + columns[None, :], mask=row_ok[:, None] & column_ok[None, :], other=0.0)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How a kernel cuts its work.

    Attributes:
        rows: of queries in a block.
        keys: in a block.
        warps: per block.
        stages: depth of software pipelining.
    """

    rows: int
    keys: int
    warps: int
    stages: int


def power_of_two(size: int, least: int = 16) -> int:
    """The smallest power of two that holds `size`, and no less than what the matrix units take."""
    return max(least, triton.next_power_of_2(size))


def block_shapes(rows: int, keys: int, d_head: int, dtype: torch.dtype, precision: str) -> Blocks:
    """Blocks that fit registers and shared memory of compute capability 9.0, as `bench.resources` measures them.

    Float32 products that are not rounded run outside the matrix units, with their operands in registers: smaller blocks
    for those, and for wide heads. Short prompts get blocks that they fill.
    """
    wide = power_of_two(d_head)
    if dtype == torch.float32 and precision == "ieee":
        (most, warps, stages), most_keys = {256: (32, 8, 1), 128: (32, 8, 1)}.get(wide, (32, 4, 2)), 16
    elif dtype == torch.float32:
        narrow = 32 if precision == "tf32x3" else 64
        most, warps, stages = {256: (32, 8, 1), 128: (narrow, 8, 2)}.get(wide, (64, 4, 2))
        most_keys = 16 if wide >= 128 else 32
    else:
        most, warps, stages = {256: (32, 8, 2), 128: (64, 8, 2)}.get(wide, (64, 4, 3))
        most_keys = 16 if wide == 256 else 32
    return Blocks(
        rows=min(most, power_of_two(rows)), keys=min(most_keys, power_of_two(keys)), warps=warps, stages=stages
    )
