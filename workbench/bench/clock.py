"""Timing that a shared machine does not spoil."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass
class Clock:
    """Times by name, one entry a repeat.

    With one thread the clock is the processor time of this process, which other processes do not lengthen except
    through the caches that they share; with several it is the time on the wall.

    Attributes:
        threads: number of threads that work.
        seconds: times by name, in the order in which they were taken.
    """

    threads: int = 1
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def kind(self) -> str:
        """What is measured, in words."""
        return "processor time" if self.threads == 1 else "wall time"

    def now(self) -> float:
        """Seconds since some moment."""
        return time.process_time() if self.threads == 1 else time.perf_counter()

    def time(self, name: str, work: Callable[[], T]) -> T:
        """Do some work, add its time to `name`, hand on its result."""
        began = self.now()
        result = work()
        self.seconds[name].append(self.now() - began)
        return result

    def median(self, name: str) -> float:
        """Median time of `name` in seconds."""
        return statistics.median(self.seconds[name])

    def median_ratio(self, above: str, below: str) -> float:
        """Median over repeats of the ratio of two times taken in the same repeat, so that drift cancels."""
        pairs = zip(self.seconds[above], self.seconds[below], strict=True)
        return statistics.median(a / b for a, b in pairs)


def product_seconds(clock: Clock, size: int) -> float:
    """Time one product of two square float32 matrices as `product`; returns its GFLOP/s."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    clock.time("product", lambda: a @ b)
    return 2 * size**3 / clock.seconds["product"][-1] / 1e9
