"""Tidy rows out of arrays of estimates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from jaxtyping import Float
    from torch import Tensor

    from workbench.stats import Estimates

_ESTIMATED = ("value", "stderr", "ci_low", "ci_high")


def rows(estimates: Estimates, **constants: Any) -> pd.DataFrame:
    """One row a number.

    Args:
        estimates: of shape `[n_layers, n_heads]` (heads), `[n_layers]` (layers) or `[]` (the model as a whole).
        constants: the other columns of the tidy schema.
    """
    import pandas as pd

    from workbench.tables import COLUMNS

    shape = estimates.value.shape
    places: list[Any] = list(np.indices(shape).reshape(len(shape), -1)) if shape else []
    layer, head = (*places, pd.NA, pd.NA)[:2]
    numbers = {name: getattr(estimates, name).reshape(-1) for name in _ESTIMATED}
    frame = pd.DataFrame(numbers).assign(layer=layer, head=head, n=estimates.n)
    for name, value in constants.items():
        frame[name] = pd.NA if value is None else value
    return frame[list(COLUMNS)].astype(dict.fromkeys(("layer", "head", "position", "n"), "Int64"))


def mean_shares(x: Float[Tensor, "n *shape"]) -> Estimates:
    """Means of numbers that lie between 0 and 1: Student's t interval, cut to what a mean of such numbers can be."""
    from dataclasses import replace

    from workbench.stats import mean_estimates

    found = mean_estimates(x)
    low = np.maximum(found.ci_low, np.minimum(found.value, 0.0))
    return replace(found, ci_low=low, ci_high=np.minimum(found.ci_high, np.maximum(found.value, 1.0)))


def share_estimates(hits: Float[Tensor, "n *shape"]) -> Estimates:
    """Share of samples with a hit, with its Wilson interval, which has a width at shares of 0 and 1 too.

    Args:
        hits: 1 or 0.
    """
    from workbench.stats import Estimates, proportion

    n = len(hits)
    counts = hits.sum(0).round().long().numpy()
    by_count = [proportion(count, n) for count in range(n + 1)]
    numbers = {name: np.array([getattr(each, name) for each in by_count])[counts] for name in _ESTIMATED}
    return Estimates(**numbers, n=n)
