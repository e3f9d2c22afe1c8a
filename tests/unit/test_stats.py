import math
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench import stats
from workbench.errors import DataError
from workbench.stats import bootstrap, mean_estimate, mean_estimates, proportion, student_t_quantile


def covered(estimates, truth):
    return int(((estimates.ci_low <= truth) & (truth <= estimates.ci_high)).sum())


def within_binomial_bounds(hits, trials, probability):
    """Whether a count is at most four standard deviations from its expectation."""
    return abs(hits - trials * probability) <= 4 * math.sqrt(trials * probability * (1 - probability))


# Student's t


@pytest.mark.parametrize("probability", [0.6, 0.9, 0.975, 0.995, 0.9999])
def test_t_quantile_in_closed_form(probability):
    """One and two degrees of freedom have elementary quantiles; three have an elementary distribution function."""
    p = probability
    assert student_t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-10)
    assert student_t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-10)
    u = student_t_quantile(p, 3) / math.sqrt(3)
    assert 0.5 + (u / (1 + u * u) + math.atan(u)) / math.pi == pytest.approx(p, abs=1e-11)


@pytest.mark.parametrize(
    ("degrees", "printed"), [(1, 12.706), (4, 2.776), (9, 2.262), (10, 2.228), (30, 2.042), (60, 2.000), (120, 1.980)]
)
def test_t_quantile_of_printed_tables(degrees, printed):
    assert student_t_quantile(0.975, degrees) == pytest.approx(printed, abs=5e-4)


# means


def test_mean_by_hand():
    """For 1, 2, 3: s = 1, two degrees of freedom, t = 4.302653."""
    estimate = mean_estimate([1.0, 2.0, 3.0])
    half = (2 * 0.975 - 1) / math.sqrt(2 * 0.975 * 0.025) / math.sqrt(3)
    assert (estimate.value, estimate.n) == (2.0, 3)
    assert estimate.stderr == pytest.approx(1 / math.sqrt(3), rel=1e-12)
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((2 - half, 2 + half), rel=1e-10)


@pytest.mark.parametrize(("n", "level"), [(2, 0.95), (8, 0.95), (50, 0.95), (8, 0.5)])
def test_mean_interval_covers_at_its_level(n, level):
    trials = 20_000
    x = np.random.default_rng(1).normal(3.0, 2.0, size=(n, trials))
    hits = covered(mean_estimates(x, level=level), 3.0)
    assert within_binomial_bounds(hits, trials, level)
    assert not within_binomial_bounds(covered(mean_estimates(x, level=level - 0.03), 3.0), trials, level)


def test_columns_are_estimated_each_by_itself():
    x = np.random.default_rng(2).exponential(size=(9, 3, 4))
    together = mean_estimates(x)
    assert together.value.shape == (3, 4)
    for place in product(range(3), range(4)):
        alone = mean_estimate(x[(slice(None), *place)])
        assert vars(together[place]) == pytest.approx(vars(alone), rel=1e-14)


@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=20),
    st.floats(0.01, 100) | st.floats(-100, -0.01),
    st.floats(-100, 100),
)
def test_mean_moves_with_its_sample(x, scale, shift):
    before, after = mean_estimate(x), mean_estimate(scale * np.array(x) + shift)
    ends = sorted(scale * end + shift for end in (before.ci_low, before.ci_high))
    assert (after.ci_low, after.ci_high) == pytest.approx(ends, rel=1e-9, abs=1e-9)
    assert after.stderr == pytest.approx(abs(scale) * before.stderr, rel=1e-9, abs=1e-9)
    assert after.ci_low <= after.value <= after.ci_high


def test_one_observation_has_no_known_error():
    for estimate in (mean_estimate([0.25]), bootstrap([0.25], seed=0)[()], bootstrap([0.25], np.median, seed=0)[()]):
        assert (estimate.value, estimate.n) == (0.25, 1)
        assert all(math.isnan(each) for each in (estimate.stderr, estimate.ci_low, estimate.ci_high))


def test_tensors_are_summed_in_double():
    x = torch.full((4096,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    assert mean_estimate(x).value == float(torch.tensor(0.1, dtype=torch.bfloat16))


# bootstrap


def test_bootstrap_of_all_resamples():
    """Every one of the 4^4 equally likely resamples, enumerated, against the drawn ones."""
    x = np.array([0.0, 1.0, 3.0, 8.0])
    means = np.array([np.mean(each) for each in product(x, repeat=4)])
    drawn = bootstrap(x, seed=0, n_resamples=40_000)[()]
    error = means.std() * math.sqrt((((means - means.mean()) / means.std()) ** 4).mean() - 1) / (2 * math.sqrt(40_000))
    assert abs(drawn.stderr - means.std()) < 4 * error
    sampling = 4 * math.sqrt(0.025 * 0.975 / 40_000)
    assert (means < drawn.ci_low).mean() <= 0.025 + sampling
    assert (means <= drawn.ci_low).mean() >= 0.025 - sampling
    assert (means > drawn.ci_high).mean() <= 0.025 + sampling
    assert (means >= drawn.ci_high).mean() >= 0.025 - sampling


def test_bootstrap_interval_of_a_mean_covers_as_theory_says():
    """Of normal samples it has half width z s sqrt((n-1)/n) / sqrt(n) nearly, so P(|T(n-1)| <= z sqrt((n-1)/n))."""
    from scipy.special import stdtr

    n, trials = 30, 4000
    x = np.random.default_rng(3).normal(size=(n, trials))
    expected = 1 - 2 * stdtr(n - 1, -1.959964 * math.sqrt((n - 1) / n))
    assert 0.93 < expected < 0.95
    assert within_binomial_bounds(covered(bootstrap(x, seed=4, n_resamples=4000), 0.0), trials, expected)


def test_bootstrap_interval_of_a_median_covers():
    trials = 600
    x = np.random.default_rng(5).normal(size=(41, trials))
    hits = covered(bootstrap(x, np.median, seed=6, n_resamples=600), 0.0)
    assert within_binomial_bounds(hits, trials, 0.95)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 3), (7, 0)])
def test_mean_by_counts_is_mean_by_resampling(shape):
    x = np.random.default_rng(7).normal(size=shape)
    default, plain = bootstrap(x, seed=8, n_resamples=50), bootstrap(x, np.mean, seed=8, n_resamples=50)
    for name in ("value", "stderr", "ci_low", "ci_high"):
        np.testing.assert_allclose(getattr(default, name), getattr(plain, name), rtol=0, atol=1e-14)


@pytest.mark.parametrize("statistic", [None, np.median])
def test_bootstrap_does_not_depend_on_chunks(statistic, monkeypatch):
    x = np.random.default_rng(9).normal(size=(6, 11))
    whole = bootstrap(x, statistic, seed=1, n_resamples=101)
    monkeypatch.setattr(stats, "_CHUNK_ELEMENTS", 303)
    pieces = bootstrap(x, statistic, seed=1, n_resamples=101)
    for name in ("value", "stderr", "ci_low", "ci_high"):
        np.testing.assert_allclose(getattr(pieces, name), getattr(whole, name), rtol=0, atol=1e-14)


def test_observations_are_drawn_whole():
    """A difference of columns that is the same in every observation has no spread."""
    x = np.random.default_rng(10).normal(size=20)
    pairs = np.stack([x, x + 2], axis=1)
    estimate = bootstrap(pairs, lambda s, axis: (s[..., 1] - s[..., 0]).mean(axis), seed=0, n_resamples=100)[()]
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((2, 2), abs=1e-12)
    alone = bootstrap(x, seed=0, n_resamples=100)[()]
    assert alone.ci_high - alone.ci_low > 0.1


def test_bootstrap_has_a_generator_of_its_own():
    x = np.arange(30.0)
    np.random.seed(0)
    before = np.random.get_state()[1].tolist()
    first, again, other = (bootstrap(x, seed=seed)[()] for seed in (1, 1, 2))
    assert np.random.get_state()[1].tolist() == before
    assert first == again
    assert first.stderr != other.stderr


def test_interval_reaches_a_biased_statistic():
    """Resamples hold about 63 of 100 distinct values, so the sample's own number lies beyond all of them."""

    def distinct(samples, axis):
        return np.array([len(np.unique(each)) for each in samples])

    estimate = bootstrap(np.arange(100.0), distinct, seed=0, n_resamples=200)[()]
    assert 50 < estimate.ci_low < 70
    assert estimate.value == estimate.ci_high == 100


# shares


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_as_published(successes, n, low, high):
    """Newcombe (1998), Statistics in Medicine 17, 857-872, table I, method 3."""
    estimate = proportion(successes, n)
    assert (round(estimate.ci_low, 4), round(estimate.ci_high, 4)) == (low, high)
    assert estimate.value == successes / n


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_solves_its_equation(trial):
    """Both ends satisfy |p - share| = z sqrt(p (1 - p) / n); failures mirror successes."""
    successes, n = trial
    estimate, mirrored = proportion(successes, n), proportion(n - successes, n)
    for end in (estimate.ci_low, estimate.ci_high):
        z = 1.959963984540054 * math.sqrt(end * (1 - end) / n)
        assert abs(end - estimate.value) == pytest.approx(z, abs=1e-12)
    assert (1 - mirrored.ci_high, 1 - mirrored.ci_low) == pytest.approx((estimate.ci_low, estimate.ci_high), abs=1e-12)
    assert 0 <= estimate.ci_low <= estimate.value <= estimate.ci_high <= 1


@pytest.mark.parametrize("n", [10, 40])
def test_wilson_interval_covers_on_average(n):
    """Exact coverage, summed over the binomial distribution, averaged over shares, is 95 % within a point."""
    ends = [proportion(k, n) for k in range(n + 1)]
    shares = np.linspace(0.01, 0.99, 197)
    coverage = [
        sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if ends[k].ci_low <= p <= ends[k].ci_high)
        for p in shares
    ]
    assert np.mean(coverage) == pytest.approx(0.95, abs=0.01)
    assert min(coverage) > 0.83


# bad input


@pytest.mark.parametrize("estimator", [mean_estimate, mean_estimates, lambda x: bootstrap(x, seed=0)])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        ([], r"shape \(0,\): give at least one"),
        (3.0, r"shape \(\): give at least one"),
        ([1.0, math.nan], r"x\[1\] is nan: observations must be finite"),
        ([math.inf, 1.0], r"x\[0\] is inf"),
    ],
)
def test_bad_observations_are_refused(estimator, x, message):
    with pytest.raises(DataError, match=message):
        estimator(x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mean_estimate(np.ones((2, 2))), r"x must be \[n\], not of shape \(2, 2\)"),
        (lambda: mean_estimate([1.0, 2.0], level=95), "level is 95"),
        (lambda: bootstrap([1.0, 2.0], seed=0, level=1.0), r"level is 1\.0"),
        (lambda: bootstrap([1.0, 2.0], seed=0, n_resamples=1), "n_resamples is 1"),
        (lambda: bootstrap([1.0, 2.0], lambda s, axis: s.mean(), seed=0), r"returned shape \(\)"),
        (lambda: proportion(3, 2), "3 successes of 2 trials"),
        (lambda: proportion(0, 0), "0 successes of 0 trials"),
        (lambda: proportion(-1, 2), "-1 successes"),
        (lambda: proportion(0.5, 2), "whole numbers"),
        (lambda: proportion(1, 2, level=0), "level is 0"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()


def test_import_is_light():
    code = "import sys, workbench.stats; print([m for m in ('torch', 'scipy', 'pandas') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
