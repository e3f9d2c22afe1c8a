"""Time, memory and the two ceilings of a device."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One piece of work on one device.

    Attributes:
        seconds: median time.
        spread: largest over smallest time.
        peak_bytes: most memory that was allocated while it ran, its inputs included; None on a CPU.
    """

    seconds: float
    spread: float
    peak_bytes: int | None


def measure(work: Callable[[], object], device: torch.device, *, repeats: int, warm_up: int = 2) -> Measured:
    """Time some work with device events (on a CPU by the clock), after warming up.

    Args:
        work: what is timed.
        device: where it runs.
        repeats: how often; the median is reported.
        warm_up: runs before that, in which kernels are compiled and handles made.
    """
    for _ in range(warm_up):
        work()
    times = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1000)
        else:
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Measured(seconds=statistics.median(times), spread=max(times) / min(times), peak_bytes=peak)


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What a device does at best, measured.

    Attributes:
        flops: of a large square product per second.
        bytes: read and written by a large copy per second.
    """

    flops: float
    bytes: float


def ceilings(device: torch.device, dtype: torch.dtype, precision: str, *, size: int, copied: int) -> Ceilings:
    """Measure both ceilings on random numbers: zeros run faster than any data will.

    Args:
        device: where.
        dtype: of the product's operands.
        precision: of float32 operands; `tf32x3` has no ceiling of its own and gets that of `tf32` over 3.
        size: side of the square matrices.
        copied: bytes that are copied.
    """
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == torch.float32 and precision != "ieee"
    try:
        product = measure(lambda: torch.mm(a, b), device, repeats=5)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    copy = measure(lambda: target.copy_(source), device, repeats=10)
    flops = 2 * size**3 / product.seconds
    return Ceilings(flops=flops / 3 if precision == "tf32x3" else flops, bytes=2 * copied / copy.seconds)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over norm of the truth; NaN if anything is not finite."""
    difference = found.double() - truth.double()
    return float(difference.norm() / truth.double().norm())
