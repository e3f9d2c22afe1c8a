"""How many edges a circuit needs: the first size at which it is as faithful as asked."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.errors import PromptError
from workbench_circuits.discovery.select import Ranking, order_of, select
from workbench_circuits.run import CircuitRunner
from workbench_circuits.wiring import Mask

SIZES_PER_DECADE = 8
SMALLEST = 8


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A circuit and the search that found it.

    Attributes:
        mask: the circuit.
        taken: edges taken before unconnected ones were dropped.
        faithfulness: of the circuit, on the prompts of the search.
        reached: whether the target was reached at any size.
        tried: every size tried: `taken`, `n_edges`, `faithfulness`.
    """

    mask: Mask
    taken: int
    faithfulness: float
    reached: bool
    tried: pd.DataFrame


def smallest(
    runner: CircuitRunner, ranking: Ranking, *, target: float = 0.8, algorithm: str = "greedy", at_once: int = 4
) -> Sized:
    """The smallest circuit by a ranking whose faithfulness is at least `target`.

    Sizes are tried upwards on a grid of eight a decade; between the first that suffices and the one before it, the
    search goes on by halving. Faithfulness need not grow with size, so a smaller circuit that suffices can exist
    between two sizes that do not.

    Args:
        runner: model, prompts, ablation and metric.
        ranking: edges and scores.
        target: faithfulness asked for.
        algorithm: `threshold` or `greedy`.
        at_once: sizes run together.

    Raises:
        PromptError: if the target is not positive, or the metric has no gap to recover.
    """
    if not target > 0:
        raise PromptError(f"target={target!r}: the faithfulness asked for must be above 0, such as 0.8")
    order = order_of(ranking, algorithm)
    from_input = runner.ablation == "resample"
    total = len(order)
    if total == 0:
        raise PromptError("no edge of the ranking leads to the logits: compute effects of all edges")
    tried: dict[int, tuple[Mask, float]] = {}

    def run(sizes: list[int]) -> None:
        fresh = [n for n in sizes if n not in tried]
        masks = [select(ranking, n, algorithm=algorithm, from_input=from_input, order=order) for n in fresh]
        for n, mask, f in zip(fresh, masks, runner.f(runner.run(masks)), strict=True):
            tried[n] = mask, float(f)

    decades = np.log10(max(total, SMALLEST + 1) / SMALLEST)
    count = max(2, round(decades * SIZES_PER_DECADE))
    grid = [0, *sorted({min(total, round(n)) for n in np.geomspace(min(SMALLEST, total), total, count)})]
    low, high = 0, None
    for first in range(0, len(grid), at_once):
        part = grid[first : first + at_once]
        run(part)
        enough = [n for n in part if tried[n][1] >= target]
        if enough:
            high = enough[0]
            low = max([n for n in grid if n < high], default=0)
            break
    if high is None:
        best = total
        return _sized(tried, best, reached=False)
    while high - low > max(1, high // 100):
        inner = sorted({int(n) for n in np.linspace(low, high, at_once + 2)[1:-1]} - {low, high})
        if not inner:
            break
        run(inner)
        enough = [n for n in inner if tried[n][1] >= target]
        high, low = (enough[0], max([low, *(n for n in inner if n < enough[0])])) if enough else (high, inner[-1])
    return _sized(tried, high, reached=True)


def _sized(tried: dict[int, tuple[Mask, float]], n: int, *, reached: bool) -> Sized:
    rows = [{"taken": size, "n_edges": int(mask.sum()), "faithfulness": f} for size, (mask, f) in sorted(tried.items())]
    mask, f = tried[n]
    return Sized(mask=mask, taken=n, faithfulness=f, reached=reached, tried=pd.DataFrame(rows))
