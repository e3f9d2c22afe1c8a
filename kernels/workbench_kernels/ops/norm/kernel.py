# mypy: allow-untyped-defs, allow-incomplete-defs
"""Norms of patched streams in Triton, each delta read once."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def norm_delta_kernel(
    base, delta, weight, bias, out,
    rows, d_model,
    b_row, d_edge, d_row, eps,
    LAYERNORM: tl.constexpr, BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One row of one edge's stream: the sum is normalised without being written."""
    row = (tl.program_id(0) % rows).to(tl.int64)
    edge = (tl.program_id(0) // rows).to(tl.int64)
    column = tl.arange(0, BD)
    ok = column < d_model
    x = tl.load(base + row * b_row + column, mask=ok, other=0.0).to(tl.float32)
    x += tl.load(delta + edge * d_edge + row * d_row + column, mask=ok, other=0.0).to(tl.float32)
    if LAYERNORM:
        x = tl.where(ok, x - tl.sum(x, 0) / d_model, 0.0)
    unit = x * tl.rsqrt(tl.sum(x * x, 0) / d_model + eps)
    gain = tl.load(weight + column, mask=ok, other=0.0)
    if LAYERNORM:
        found = unit * gain.to(tl.float32)
        if BIAS:
            found += tl.load(bias + column, mask=ok, other=0.0).to(tl.float32)
    else:
        found = unit.to(gain.dtype) * gain
    tl.store(out + (edge * rows + row) * d_model + column, found, mask=ok)


@triton.jit(do_not_specialize=["width", "senders"])
def inverse_sigma_kernel(
    unit, sigma, deltas, out,
    width, senders, d_model,
    u_n, u_t, s_n, s_t, d_n, d_t, d_s, eps,
    LAYERNORM: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """1/sigma of some senders' patched streams at one position, from `x.x`, `x.d`, `d.d` and the sum of d."""
    n = (tl.program_id(0) // width).to(tl.int64)
    t = (tl.program_id(0) % width).to(tl.int64)
    sender = tl.program_id(1) * BS + tl.arange(0, BS)
    sender_ok = sender < senders
    # summed over the stream at the end: Triton 3.6 does not compile sums within the loop
    squares = tl.zeros([BS, BD], tl.float32)
    crosses = tl.zeros([BS, BD], tl.float32)
    totals = tl.zeros([BS, BD], tl.float32)
    rows = deltas + n * d_n + t * d_t + sender.to(tl.int64) * d_s
    for first in range(0, d_model, BD):
        column = first + tl.arange(0, BD)
        ok = column < d_model
        d = tl.load(rows[:, None] + column[None, :], mask=sender_ok[:, None] & ok[None, :], other=0.0).to(tl.float32)
        x = tl.load(unit + n * u_n + t * u_t + column, mask=ok, other=0.0).to(tl.float32)
        squares += d * d
        crosses += d * x[None, :]
        if LAYERNORM:
            totals += d
    square = tl.sum(squares, 1)
    own = tl.load(sigma + n * s_n + t * s_t)
    if LAYERNORM:
        total = tl.sum(totals, 1)
        square -= total * total / d_model
    power = tl.maximum((own * own - eps) * d_model + 2.0 * own * tl.sum(crosses, 1) + square, 0.0) / d_model
    place = (n * width + t) * senders + sender
    tl.store(out + place, tl.rsqrt(power + eps), mask=sender_ok)
