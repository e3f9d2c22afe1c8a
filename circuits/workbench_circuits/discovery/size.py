"""How many edges a circuit needs: the first size at which it is as faithful as asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workbench.errors import PromptError
from workbench_circuits.discovery.select import Ranking, order_of, select
from workbench_circuits.run import CircuitRunner, faithfulness_estimate
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
        tried: every size tried: `taken`, `n_edges`, `faithfulness`, `ci_low`.
    """

    mask: Mask
    taken: int
    faithfulness: float
    reached: bool
    tried: pd.DataFrame


def smallest(
    runner: CircuitRunner,
    ranking: Ranking | Callable[[int], Mask],
    *,
    target: float = 0.8,
    algorithm: str = "greedy",
    confident: bool = False,
    sizes: Sequence[int] | None = None,
    at_once: int = 4,
) -> Sized:
    """The smallest circuit by a ranking whose faithfulness is at least `target`.

    Sizes are tried upwards on a grid of eight a decade; between the first that suffices and the one before it, the
    search goes on by halving. Faithfulness need not grow with size, so a smaller circuit that suffices can exist
    between two sizes that do not.

    Args:
        runner: model, prompts, ablation and metric.
        ranking: edges and scores, or a function from a number of edges to a circuit.
        target: faithfulness asked for.
        algorithm: `threshold` or `greedy`, for a ranking.
        confident: ask it of the lower end of the 95 % interval instead of the mean.
        sizes: the grid, if not the one above.
        at_once: sizes run together.

    Raises:
        PromptError: if the target is not positive, or the metric has no gap to recover.
    """
    if not target > 0:
        raise PromptError(f"target={target!r}: the faithfulness asked for must be above 0, such as 0.8")
    if isinstance(ranking, Ranking):
        order = order_of(ranking, algorithm)
        total = len(order)
        ranked, from_input = ranking, runner.ablation == "resample"

        def take(n: int) -> Mask:
            return select(ranked, n, algorithm=algorithm, from_input=from_input, order=order)
    else:
        given, total = ranking, runner.n_edges

        def take(n: int) -> Mask:
            return given(n)

    if total == 0:
        raise PromptError("no edge of the ranking leads to the logits: compute effects of all edges")
    tried: dict[int, tuple[Mask, float, float]] = {}

    def enough(wanted: Sequence[int]) -> list[int]:
        """Those of some sizes that suffice."""
        fresh = [n for n in wanted if n not in tried]
        masks = [take(n) for n in fresh]
        for n, mask, values in zip(fresh, masks, runner.run(masks), strict=True):
            found = faithfulness_estimate(values, runner.clean, runner.none)
            tried[n] = mask, found.value, found.ci_low
        return [n for n in wanted if tried[n][2 if confident and len(runner.pairs) > 1 else 1] >= target]

    low, high = 0, None
    grid = [0, *(_grid(total) if sizes is None else sorted({int(n) for n in sizes if 0 < n <= total}))]
    for first in range(0, len(grid), at_once):
        part = grid[first : first + at_once]
        good = enough(part)
        if good:
            high = good[0]
            low = max([n for n in grid if n < high], default=0)
            break
    if high is None:
        enough([total])
        return _sized(tried, total, reached=False)
    while high - low > max(1, high // 50):
        inner = sorted({int(n) for n in np.linspace(low, high, at_once + 2)[1:-1]} - {low, high})
        if not inner:
            break
        good = enough(inner)
        if good:
            low = max([low, *(n for n in inner if n < good[0])])
            high = good[0]
        else:
            low = inner[-1]
    return _sized(tried, high, reached=True)


def _grid(total: int) -> list[int]:
    decades = np.log10(max(total, SMALLEST + 1) / SMALLEST)
    count = max(2, round(decades * SIZES_PER_DECADE))
    return sorted({min(total, round(n)) for n in np.geomspace(min(SMALLEST, total), total, count)})


def _sized(tried: dict[int, tuple[Mask, float, float]], n: int, *, reached: bool) -> Sized:
    rows = [
        {"taken": size, "n_edges": int(mask.sum()), "faithfulness": f, "ci_low": low}
        for size, (mask, f, low) in sorted(tried.items())
    ]
    mask, f, _ = tried[n]
    return Sized(mask=mask, taken=n, faithfulness=f, reached=reached, tried=pd.DataFrame(rows))
