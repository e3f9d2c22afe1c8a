# mypy: allow-untyped-defs, allow-incomplete-defs
"""Attention of edges' windows over shared prefixes in Triton: prefix keys are read where they lie, once for all edges.

A program owns a block of (query, member) pairs of one key/value head of one edge and prompt, so that short windows of
grouped heads still fill a block of the matrix units. It meets the prefix first, then the edge's own keys.
"""

import triton
import triton.language as tl

from workbench_kernels.blocks import LOG2E, LOWEST, tile


@triton.jit
def _take(top, mass, mixed, q, k, v, seen, PRECISION: tl.constexpr):
    """Take a block of keys and values into the running softmax."""
    scores = tl.where(seen, tl.dot(q, tl.trans(k), input_precision=PRECISION), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    mixed = tl.dot(weights.to(v.dtype), v, acc=mixed * fade[:, None], input_precision=PRECISION)
    return higher, mass * fade + tl.sum(weights, 1), mixed


@triton.jit(do_not_specialize=["n_prompts", "width", "prefix", "kv_heads"])
def suffix_kernel(
    q, k, v, prefix_k, prefix_v, start, out,
    n_prompts, width, prefix, kv_heads,
    q_e, q_n, q_t, q_h, k_e, k_n, k_t, k_h, v_e, v_n, v_t, v_h, pk_n, pk_t, pk_h, pv_n, pv_t, pv_h,
    scale,
    GROUP: tl.constexpr, D_HEAD: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Mixed values of a block of window queries."""
    edge = (tl.program_id(0) // n_prompts).to(tl.int64)
    n = (tl.program_id(0) % n_prompts).to(tl.int64)
    kv = tl.program_id(1)
    row = tl.program_id(2) * BM + tl.arange(0, BM)
    t = row // GROUP
    head = kv * GROUP + row % GROUP
    t_ok = t < width
    d = tl.arange(0, DP)
    d_ok = d < D_HEAD
    qt = tile(q + edge * q_e + n * q_n + t * q_t + head * q_h, d, t_ok, d_ok)
    qt = (qt.to(tl.float32) * (scale * LOG2E)).to(qt.dtype)
    own = tl.minimum(tl.load(start + n).to(tl.int32), prefix)
    top = tl.full([BM], LOWEST, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    mixed = tl.zeros([BM, DP], tl.float32)
    pk = prefix_k + n * pk_n + kv * pk_h
    pv = prefix_v + n * pv_n + kv * pv_h
    for first in range(0, own, BU):
        u = first + tl.arange(0, BU)
        u_ok = u < own
        seen = u_ok[None, :] & t_ok[:, None]
        kt = tile(pk + u * pk_t, d, u_ok, d_ok)
        top, mass, mixed = _take(top, mass, mixed, qt, kt, tile(pv + u * pv_t, d, u_ok, d_ok), seen, PRECISION)
    ks = k + edge * k_e + n * k_n + kv * k_h
    vs = v + edge * v_e + n * v_n + kv * v_h
    for first in range(0, tl.max(tl.where(t_ok, t, 0), 0) + 1, BU):
        u = first + tl.arange(0, BU)
        u_ok = u < width
        seen = u_ok[None, :] & (u[None, :] <= t[:, None])
        kt = tile(ks + u * k_t, d, u_ok, d_ok)
        top, mass, mixed = _take(top, mass, mixed, qt, kt, tile(vs + u * v_t, d, u_ok, d_ok), seen, PRECISION)
    mixed = mixed / tl.where(mass > 0, mass, 1.0)[:, None]
    place = (((edge * n_prompts + n) * width + t) * (kv_heads * GROUP) + head) * D_HEAD
    tl.store(out + place[:, None] + d[None, :], mixed, mask=t_ok[:, None] & d_ok[None, :])
