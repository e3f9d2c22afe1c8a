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
    square = tl.zeros([BS], tl.float32)
    cross = tl.zeros([BS], tl.float32)
    total = tl.zeros([BS], tl.float32)
    rows = deltas + n * d_n + t * d_t + sender.to(tl.int64) * d_s
    for first in range(0, d_model, BD):
        column = first + tl.arange(0, BD)
        ok = column < d_model
        d = tl.load(rows[:, None] + column[None, :], mask=sender_ok[:, None] & ok[None, :], other=0.0).to(tl.float32)
        x = tl.load(unit + n * u_n + t * u_t + column, mask=ok, other=0.0).to(tl.float32)
        square += tl.sum(d * d, 1)
        cross += tl.sum(d * x[None, :], 1)
        if LAYERNORM:
            total += tl.sum(d, 1)
    own = tl.load(sigma + n * s_n + t * s_t)
    if LAYERNORM:
        square -= total * total / d_model
    power = tl.maximum((own * own - eps) * d_model + 2.0 * own * cross + square, 0.0) / d_model
    place = (n * width + t) * senders + sender
    tl.store(out + place, tl.rsqrt(power + eps), mask=sender_ok)
