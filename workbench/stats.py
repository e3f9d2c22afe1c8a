"""Means, shares and other statistics of a sample of prompts, with their uncertainty.

Every interval is two-sided, of level 95 % unless asked otherwise, and takes the prompts as independent draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from workbench.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Statistic = Callable[..., Any]

_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its uncertainty.

    Attributes:
        value: the number.
        stderr: its standard error; NaN if one observation is all there is.
        ci_low: lower end of the interval, at most `value`; NaN with `stderr`.
        ci_high: upper end, at least `value`; NaN with `stderr`.
        n: observations behind it.
    """

    value: float
    stderr: float
    ci_low: float
    ci_high: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """Many numbers of one sample, each with its uncertainty.

    Attributes:
        value: array of any shape.
        stderr: array of that shape, as in `Estimate`.
        ci_low: likewise.
        ci_high: likewise.
        n: observations behind each.
    """

    value: Floats
    stderr: Floats
    ci_low: Floats
    ci_high: Floats
    n: int

    def __getitem__(self, index: int | tuple[int, ...]) -> Estimate:
        """One of them."""
        return Estimate(
            value=float(self.value[index]),
            stderr=float(self.stderr[index]),
            ci_low=float(self.ci_low[index]),
            ci_high=float(self.ci_high[index]),
            n=self.n,
        )


def mean_estimate(x: ArrayLike | Tensor, *, level: float = 0.95) -> Estimate:
    """The mean of a sample and its Student t interval, mean ± t(n - 1) s / sqrt(n) (Student, 1908).

    Exact for normal observations, close for others unless the sample is small and skewed.

    Args:
        x: `[n]` observations. A single one has a mean and no known error: `stderr` and the interval are NaN.
        level: probability that the interval holds the mean.

    Raises:
        DataError: if `x` is empty, not one-dimensional or not finite, or the level is not between 0 and 1.
    """
    sample = _observations(x)
    if sample.ndim != 1:
        raise DataError(f"x must be [n], not of shape {sample.shape}: mean_estimates takes further axes")
    return mean_estimates(sample, level=level)[()]


def mean_estimates(x: ArrayLike | Tensor, *, level: float = 0.95) -> Estimates:
    """`mean_estimate` of every column.

    Args:
        x: `[n, ...]` observations.
        level: probability that an interval holds its mean (each by itself, not all at once).

    Returns:
        Arrays of the shape of one observation.

    Raises:
        DataError: if there are no observations, one is not finite, or the level is not between 0 and 1.
    """
    sample = _observations(x)
    _check_level(level)
    n = len(sample)
    value = sample.mean(axis=0)
    if n == 1:
        return _without_error(value)
    stderr = sample.std(axis=0, ddof=1) / math.sqrt(n)
    half = student_t_quantile((1 + level) / 2, n - 1) * stderr
    return Estimates(value=value, stderr=stderr, ci_low=value - half, ci_high=value + half, n=n)


def bootstrap(
    x: ArrayLike | Tensor,
    statistic: Statistic | None = None,
    *,
    seed: int,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> Estimates:
    """Any statistic and its percentile bootstrap interval over the observations (Efron, 1979).

    Whole observations are drawn with replacement, so what hangs together within one stays together. The ends are
    moved out to the statistic of the sample where that lies beyond them (it can for strongly biased statistics).
    Below some twenty observations the interval is too narrow: for means prefer `mean_estimates`.

    Args:
        x: `[n, ...]` observations. A single one has no known error: `stderr` and the interval are NaN.
        statistic: called as `statistic(samples, axis=1)` on `[resamples, n, ...]`, returns `[resamples, ...]`;
            numpy's reductions are such functions. None is the mean.
        seed: seed of a generator of its own; no global one is touched.
        n_resamples: how many resamples are drawn.
        level: probability that an interval holds its number.

    Returns:
        Arrays of the shape of the statistic; `bootstrap(x, seed=0)[()]` is the `Estimate` of a scalar one.

    Raises:
        DataError: if there are no observations, one is not finite, `n_resamples` is below 2, the level is not
            between 0 and 1, or the statistic returns another number of results than it is given samples.
    """
    sample = _observations(x)
    _check_level(level)
    if n_resamples < 2:
        raise DataError(f"n_resamples is {n_resamples}: give 2 or more (a thousand or more for an interval)")
    n = len(sample)
    value = sample.mean(axis=0) if statistic is None else _apply(statistic, sample[None])[0]
    if n == 1:
        return _without_error(value)
    picks = np.random.default_rng(seed).integers(n, size=(n_resamples, n))
    tails = ((1 - level) / 2, (1 + level) / 2)
    if statistic is None:
        stderr, low, high = _bootstrap_mean(sample.reshape(n, -1), picks, tails)
        stderr, low, high = (each.reshape(value.shape) for each in (stderr, low, high))
    else:
        size = max(1, _CHUNK_ELEMENTS // max(1, sample.size))
        chunks = [_apply(statistic, sample[picks[at : at + size]]) for at in range(0, n_resamples, size)]
        stderr, low, high = _spread(np.concatenate(chunks), tails)
    return Estimates(value=value, stderr=stderr, ci_low=np.minimum(low, value), ci_high=np.maximum(high, value), n=n)


def proportion(successes: int, n: int, *, level: float = 0.95) -> Estimate:
    """A share and its Wilson score interval (Wilson, 1927; recommended by Brown, Cai and DasGupta, 2001).

    Args:
        successes: how many of the trials succeeded.
        n: how many trials there were.
        level: probability that the interval holds the true share.

    Returns:
        The share; `stderr` is sqrt(p (1 - p) / n), which is 0 at a share of 0 or 1 while the interval is not.

    Raises:
        DataError: unless 0 <= successes <= n and n >= 1 (whole numbers), and the level is between 0 and 1.
    """
    _check_level(level)
    if int(n) != n or int(successes) != successes:
        raise DataError(f"successes and n must be whole numbers, not {successes!r} of {n!r}")
    successes, n = int(successes), int(n)
    if n < 1 or not 0 <= successes <= n:
        raise DataError(f"{successes} successes of {n} trials make no share: expected 0 <= successes <= n and n >= 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Estimate(
        value=share,
        stderr=math.sqrt(share * (1 - share) / n),
        ci_low=0.0 if successes == 0 else centre - half,
        ci_high=1.0 if successes == n else centre + half,
        n=n,
    )


@lru_cache(maxsize=1024)
def student_t_quantile(probability: float, degrees: int) -> float:
    """The value below which Student's t with `degrees` degrees of freedom stays with `probability`."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _observations(x: ArrayLike | Tensor) -> Floats:
    if hasattr(x, "detach"):
        x = x.detach().cpu().double().numpy()
    sample = np.asarray(x, dtype=np.float64)
    if sample.ndim == 0 or len(sample) == 0:
        raise DataError(f"x has shape {sample.shape}: give at least one observation along its first axis")
    if not np.isfinite(sample).all():
        bad = [int(place) for place in np.argwhere(~np.isfinite(sample))[0]]
        raise DataError(f"x{bad} is {sample[tuple(bad)]}: observations must be finite; leave missing ones out")
    return sample


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError(f"level is {level}: expected a probability between 0 and 1, such as 0.95")


def _without_error(value: Floats) -> Estimates:
    unknown = np.full(value.shape, np.nan)
    return Estimates(value=value, stderr=unknown, ci_low=unknown, ci_high=unknown, n=1)


def _apply(statistic: Statistic, samples: Floats) -> Floats:
    result = np.asarray(statistic(samples, axis=1), dtype=np.float64)
    if result.ndim == 0 or len(result) != len(samples):
        raise DataError(
            f"statistic returned shape {result.shape} for {len(samples)} samples of shape {samples.shape[1:]}: "
            "it must reduce axis 1 and keep axis 0, as numpy.median(samples, axis=1) does"
        )
    return result


def _bootstrap_mean(
    columns: Floats, picks: NDArray[np.int64], tails: tuple[float, float]
) -> tuple[Floats, Floats, Floats]:
    """Spread of the resampled means of `[n, columns]`: how often each row is drawn, times the rows."""
    n, width = columns.shape
    counts = np.zeros((len(picks), n))
    np.add.at(counts, (np.arange(len(picks))[:, None], picks), 1)
    size = max(1, _CHUNK_ELEMENTS // len(picks))
    parts = [_spread(counts @ columns[:, at : at + size] / n, tails) for at in range(0, width, size)]
    if not parts:
        return np.empty(0), np.empty(0), np.empty(0)
    stderr, low, high = (np.concatenate(each) for each in zip(*parts, strict=True))
    return stderr, low, high


def _spread(draws: Floats, tails: tuple[float, float]) -> tuple[Floats, Floats, Floats]:
    low, high = np.quantile(draws, tails, axis=0)
    return draws.std(axis=0, ddof=1), low, high
