# mypy: allow-untyped-defs, allow-incomplete-defs
"""Receiver scoring in Triton: scores, softmax and worth of a block of keys at a time, never all of them in memory.

A program owns a block of queries of one prompt, one sender and one receiver. It forms what is patched on the fly (from
projected deltas, or as rank-d_head factors times the pair's matrix), walks over the keys with a running maximum, and
contracts each block of the softmax with the worth of its keys, `value . gradient`, at once. Its result is one number;
those of a prompt's blocks are added afterwards in a fixed order.

A head's columns are held as two halves, `a` and `b`, so that rotation pairs equal places of both: dot products do not
mind the order of columns. Dimensions that do not rotate fill up the halves.
"""

import triton
import triton.language as tl

from workbench_kernels.blocks import LOG2E, LOWEST, tile


@triton.jit
def _columns(D_HEAD: tl.constexpr, HALF_ROT: tl.constexpr, HB: tl.constexpr):
    """Columns of both halves, and which of them exist."""
    pair = tl.arange(0, HB)
    if HALF_ROT == 0 or HALF_ROT == D_HEAD // 2:
        a = pair
        b = D_HEAD // 2 + pair
    else:
        a = tl.where(pair < HALF_ROT, pair, HALF_ROT + pair)
        b = tl.where(pair < HALF_ROT, HALF_ROT + pair, D_HEAD // 2 + pair)
    return a, b, pair < D_HEAD // 2


@triton.jit
def _meet(top, mass, gain, qa, qb, g, ka, kb, v, seen, PRECISION: tl.constexpr):
    """Take a block of keys into the running softmax: maximum, normaliser, and worth so far."""
    scores = tl.dot(qa, tl.trans(ka), input_precision=PRECISION)
    scores = tl.dot(qb, tl.trans(kb), acc=scores, input_precision=PRECISION)
    scores = tl.where(seen, scores, float("-inf"))
    worth = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    fade = tl.exp2(top - higher)
    return higher, mass * fade + tl.sum(weights, 1), gain * fade + tl.sum(weights * worth, 1)


@triton.jit
def _clean_keys(
    top, mass, gain, qa, qb, g, k, v, k_row, v_row, limit, stop, a, b, pair_ok, d, d_ok,
    BU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Meet the clean keys before `stop`; each query those before its own `limit`."""
    for first in range(0, stop, BU):
        u = first + tl.arange(0, BU)
        u_ok = u < stop
        ka = tile(k + u * k_row, a, u_ok, pair_ok)
        kb = tile(k + u * k_row, b, u_ok, pair_ok)
        vt = tile(v + u * v_row, d, u_ok, d_ok)
        seen = u_ok[None, :] & (u[None, :] < limit[:, None])
        top, mass, gain = _meet(top, mass, gain, qa, qb, g, ka, kb, vt, seen, PRECISION)
    return top, mass, gain


@triton.jit
def _patched(
    delta, matrix, base, inverse, constant, norm, cos, sin, ok, a, b, pair_ok, norm_eps,
    FACTORED: tl.constexpr, CONSTANT: tl.constexpr, NORM: tl.constexpr,
    D_HEAD: tl.constexpr, D_INNER: tl.constexpr, HALF_ROT: tl.constexpr,
    ROWS: tl.constexpr, HB: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both halves of patched queries or keys, in float32, from pointers to their rows."""
    if FACTORED:
        xa = tl.zeros([ROWS, HB], tl.float32)
        xb = tl.zeros([ROWS, HB], tl.float32)
        for first in range(0, D_INNER, BI):
            inner = first + tl.arange(0, BI)
            inner_ok = inner < D_INNER
            z = tile(delta, inner, ok, inner_ok)
            xa = tl.dot(z, tile(matrix + inner * D_HEAD, a, inner_ok, pair_ok), acc=xa, input_precision=PRECISION)
            xb = tl.dot(z, tile(matrix + inner * D_HEAD, b, inner_ok, pair_ok), acc=xb, input_precision=PRECISION)
    else:
        xa = tile(delta, a, ok, pair_ok).to(tl.float32)
        xb = tile(delta, b, ok, pair_ok).to(tl.float32)
    scale = tl.load(inverse, mask=ok, other=0.0)[:, None]
    xa = (xa + tile(base, a, ok, pair_ok)) * scale
    xb = (xb + tile(base, b, ok, pair_ok)) * scale
    if CONSTANT:
        xa += tl.load(constant + a, mask=pair_ok, other=0.0)[None, :]
        xb += tl.load(constant + b, mask=pair_ok, other=0.0)[None, :]
    if NORM:
        square = (tl.sum(xa * xa, 1) + tl.sum(xb * xb, 1)) / D_HEAD
        unit = tl.rsqrt(square + norm_eps)[:, None]
        xa = xa * unit * tl.load(norm + a, mask=pair_ok, other=0.0)[None, :]
        xb = xb * unit * tl.load(norm + b, mask=pair_ok, other=0.0)[None, :]
    if HALF_ROT > 0:
        pair = tl.arange(0, HB)
        turns = ok[:, None] & (pair < HALF_ROT)[None, :]
        c = tl.load(cos[:, None] + pair[None, :], mask=turns, other=1.0)
        s = tl.load(sin[:, None] + pair[None, :], mask=turns, other=0.0)
        turned = xa * c - xb * s
        xb = xb * c + xa * s
        xa = turned
    return xa, xb


@triton.jit(do_not_specialize=["width", "length"])
def base_kernel(
    q, k, v, g, start, worth_out, log_out,
    width, length,
    q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, g_n, g_t, g_h,
    scale,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, D_HEAD: tl.constexpr,
    HB: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What clean attention of a block of queries of one head is worth, and the logarithm of its normaliser."""
    tiles = tl.cdiv(width, BM)
    n = (tl.program_id(0) // tiles).to(tl.int64)
    head = tl.program_id(1)
    t = (tl.program_id(0) % tiles) * BM + tl.arange(0, BM)
    t_ok = t < width
    a, b, pair_ok = _columns(D_HEAD, 0, HB)
    d = tl.arange(0, DP)
    d_ok = d < D_HEAD
    qs = q + n * q_n + t * q_t + head * q_h
    qa = tile(qs, a, t_ok, pair_ok).to(tl.float32) * (scale * LOG2E)
    qb = tile(qs, b, t_ok, pair_ok).to(tl.float32) * (scale * LOG2E)
    gt = tile(g + n * g_n + t * g_t + head * g_h, d, t_ok, d_ok)
    own = tl.load(start + n).to(tl.int32)
    limit = own + t + 1 if CAUSAL else tl.zeros([BM], tl.int32) + length
    stop = tl.minimum(length, own + tl.max(tl.where(t_ok, t, 0), 0) + 1) if CAUSAL else length
    top = tl.full([BM], LOWEST, tl.float32)
    zero = tl.zeros([BM], tl.float32)
    kv = head // GROUP
    top, mass, gain = _clean_keys(
        top, zero, zero, qa.to(gt.dtype), qb.to(gt.dtype), gt, k + n * k_n + kv * k_h, v + n * v_n + kv * v_h,
        k_t, v_t, limit, stop, a, b, pair_ok, d, d_ok, BU, PRECISION,
    )  # fmt: skip
    place = (n * tl.num_programs(1) + head) * width + t
    tl.store(worth_out + place, gain / mass, mask=t_ok)
    tl.store(log_out + place, (top + tl.log2(mass)) / LOG2E, mask=t_ok)


@triton.jit(do_not_specialize=["width", "length", "senders", "n_heads"])
def score_kernel(
    q, k, v, g, start, heads, delta, matrix, base, inverse, constant, norm, cos, sin, base_worth, out,
    width, length, senders, n_heads,
    q_n, q_t, q_h, k_n, k_t, k_h, v_n, v_t, v_h, g_n, g_t, g_h,
    d_n, d_t, d_s, d_r, m_s, m_r, b_n, b_t, b_r, i_n, i_t, i_s, c_r, r_n, r_t,
    scale, norm_eps,
    KEYS: tl.constexpr, FACTORED: tl.constexpr, CONSTANT: tl.constexpr, NORM: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, D_HEAD: tl.constexpr, D_INNER: tl.constexpr, HALF_ROT: tl.constexpr,
    HB: tl.constexpr, DP: tl.constexpr, BM: tl.constexpr, BU: tl.constexpr, BI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sender's effect on a block of queries of one receiver: KEYS says whether keys are patched, or queries.

    Patched keys serve all query heads of their group: the block's rows are (query, member) pairs.
    """
    MEMBERS: tl.constexpr = GROUP if KEYS else 1
    tiles = tl.cdiv(width * MEMBERS, BM)
    place_of = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    sender = tl.program_id(1).to(tl.int64)
    receiver = tl.program_id(2)
    row = place_of * BM + tl.arange(0, BM)
    t = row // MEMBERS
    t_ok = t < width
    own_head = tl.load(heads + receiver).to(tl.int32)
    if KEYS:
        kv = own_head
        head = own_head * GROUP + row % MEMBERS
    else:
        kv = own_head // GROUP
        head = own_head + tl.zeros([BM], tl.int32)
    a, b, pair_ok = _columns(D_HEAD, HALF_ROT, HB)
    d = tl.arange(0, DP)
    d_ok = d < D_HEAD
    gt = tile(g + n * g_n + t * g_t + head * g_h, d, t_ok, d_ok)
    own = tl.load(start + n).to(tl.int32)
    last = tl.max(tl.where(t_ok, t, 0), 0) + 1
    delta += n * d_n + sender * d_s + receiver * d_r
    matrix += sender * m_s + receiver * m_r
    base += n * b_n + receiver * b_r
    inverse += n * i_n + sender * i_s
    constant += receiver * c_r
    cos += n * r_n
    sin += n * r_n
    k += n * k_n + kv * k_h
    v += n * v_n + kv * v_h
    if KEYS:
        qs = q + n * q_n + t * q_t + head * q_h
        qa = tile(qs, a, t_ok, pair_ok).to(tl.float32)
        qb = tile(qs, b, t_ok, pair_ok).to(tl.float32)
        limit = tl.zeros([BM], tl.int32) + own
        stop = own
    else:
        qa, qb = _patched(
            delta + t.to(tl.int64) * d_t, matrix, base + t * b_t, inverse + t * i_t, constant, norm,
            cos + t * r_t, sin + t * r_t, t_ok, a, b, pair_ok, norm_eps,
            FACTORED, CONSTANT, NORM, D_HEAD, D_INNER, HALF_ROT, BM, HB, BI, PRECISION,
        )  # fmt: skip
        limit = own + t + 1 if CAUSAL else tl.zeros([BM], tl.int32) + length
        stop = tl.minimum(length, own + last) if CAUSAL else length
    qa = (qa * (scale * LOG2E)).to(gt.dtype)
    qb = (qb * (scale * LOG2E)).to(gt.dtype)
    top = tl.full([BM], LOWEST, tl.float32)
    zero = tl.zeros([BM], tl.float32)
    top, mass, gain = _clean_keys(
        top, zero, zero, qa, qb, gt, k, v, k_t, v_t, limit, stop, a, b, pair_ok, d, d_ok, BU, PRECISION
    )
    if KEYS:
        for first in range(0, last if CAUSAL else width, BU):
            u = first + tl.arange(0, BU)
            u_ok = u < width
            ka, kb = _patched(
                delta + u.to(tl.int64) * d_t, matrix, base + u * b_t, inverse + u * i_t, constant, norm,
                cos + u * r_t, sin + u * r_t, u_ok, a, b, pair_ok, norm_eps,
                FACTORED, CONSTANT, NORM, D_HEAD, D_INNER, HALF_ROT, BU, HB, BI, PRECISION,
            )  # fmt: skip
            vt = tile(v + (own + u) * v_t, d, u_ok, d_ok)
            seen = u_ok[None, :] & ((u[None, :] <= t[:, None]) if CAUSAL else t_ok[:, None])
            top, mass, gain = _meet(top, mass, gain, qa, qb, gt, ka.to(gt.dtype), kb.to(gt.dtype), vt, seen, PRECISION)
    before = tl.load(base_worth + (n * n_heads + head) * width + t, mask=t_ok, other=0.0)
    change = tl.where(t_ok, gain / tl.where(mass > 0, mass, 1.0) - before, 0.0)
    place = (n * senders + sender) * tl.num_programs(2) + receiver
    tl.store(out + place * tiles + place_of, tl.sum(change, 0))


@triton.jit(do_not_specialize=["width", "n_heads"])
def value_kernel(
    q, k, g, start, log_in, out,
    width, n_heads,
    q_n, q_t, q_h, k_n, k_t, k_h, g_n, g_t, g_h,
    scale,
    CAUSAL: tl.constexpr, GROUP: tl.constexpr, D_HEAD: tl.constexpr,
    DP: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient at a block of window values of one key/value head: attention paid to them, times the gradient at z."""
    tiles = tl.cdiv(width, BU)
    place_of = tl.program_id(0) % tiles
    n = (tl.program_id(0) // tiles).to(tl.int64)
    kv = tl.program_id(1)
    u = place_of * BU + tl.arange(0, BU)
    u_ok = u < width
    d = tl.arange(0, DP)
    d_ok = d < D_HEAD
    own = tl.load(start + n).to(tl.int32)
    kt = tile(k + n * k_n + kv * k_h + (own + u) * k_t, d, u_ok, d_ok)
    total = tl.zeros([BU, DP], tl.float32)
    begin = (place_of * BU // BT) * BT if CAUSAL else 0
    for member in range(GROUP):
        head = kv * GROUP + member
        for first in range(begin, width, BT):
            t = first + tl.arange(0, BT)
            t_ok = t < width
            qt = tile(q + n * q_n + t * q_t + head * q_h, d, t_ok, d_ok)
            gt = tile(g + n * g_n + t * g_t + head * g_h, d, t_ok, d_ok)
            log = tl.load(log_in + (n * n_heads + head) * width + t, mask=t_ok, other=0.0)
            # scaled and rounded as the logarithm's own scores were
            qt = (qt.to(tl.float32) * (scale * LOG2E)).to(kt.dtype)
            scores = tl.dot(kt, tl.trans(qt), input_precision=PRECISION)
            seen = t_ok[None, :] & u_ok[:, None]
            if CAUSAL:
                seen = seen & (u[:, None] <= t[None, :])
            weights = tl.where(seen, tl.exp2(scores - (log * LOG2E)[None, :]), 0.0)
            total = tl.dot(weights.to(gt.dtype), gt, acc=total, input_precision=PRECISION)
    place = ((n * width + u) * tl.num_programs(1) + kv) * D_HEAD
    tl.store(out + place[:, None] + d[None, :], total, mask=u_ok[:, None] & d_ok[None, :])
