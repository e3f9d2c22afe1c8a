"""Built-in reductions against loops over plain numbers, with padding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from workbench.cache import Reduction, diagonals, reduction
from workbench.cache.reductions import BUILTIN
from workbench.errors import PromptError


def patterns(n: int, heads: int, pos: int, seed: int) -> Tensor:
    scores = 2 * torch.randn(n, heads, pos, pos, generator=torch.Generator().manual_seed(seed)).double()
    return scores.masked_fill(~torch.ones(pos, pos, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


def cases():
    return st.tuples(st.integers(1, 9), st.integers(0, 10**6), st.lists(st.integers(1, 9), min_size=2, max_size=3))


def expected_of(name: str, a: list[list[float]], length: int) -> list[float] | float:
    """The definition, for one head of one prompt; `a[query][key]`."""
    pos, real = len(a), range(length)
    if name == "key_mean":
        return [sum(a[q][k] for q in real if q >= k) / (length - k) if k < length else 0.0 for k in range(pos)]
    if name == "entropy":
        return sum(-sum(p * math.log(p) for p in a[q] if p > 0) for q in real) / length
    if name == "max":
        return [max(a[q]) if q < length else 0.0 for q in range(pos)]
    if name == "argmax":
        return [a[q].index(max(a[q])) if q < length else 0.0 for q in range(pos)]
    if name == "last":
        return a[length - 1]
    assert name == "mean"
    return [sum(a[q][k] for q in real) / length for k in range(pos)]


@pytest.mark.parametrize("name", ["key_mean", "entropy", "max", "argmax", "last", "mean"])
@given(case=cases())
@settings(max_examples=25, deadline=None)
def test_of_patterns_as_defined(name, case):
    pos, seed, lengths = case
    lengths = [min(length, pos) for length in lengths]
    pattern = patterns(len(lengths), 2, pos, seed)
    found = reduction(name).compute(pattern, torch.tensor(lengths))
    for prompt, length in enumerate(lengths):
        for head in range(2):
            expected = expected_of(name, pattern[prompt, head].tolist(), length)
            torch.testing.assert_close(found[prompt, head].double(), torch.tensor(expected).double())


@given(case=cases(), offsets=st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True), start=st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_diagonals_as_defined(case, offsets, start):
    pos, seed, lengths = case
    lengths = [min(length, pos) for length in lengths]
    pattern = patterns(len(lengths), 2, pos, seed)
    found = diagonals(*offsets, start=start).compute(pattern, torch.tensor(lengths))
    assert found.shape == (len(lengths), 2, len(offsets))
    for prompt, length in enumerate(lengths):
        for at, offset in enumerate(offsets):
            queries = [q for q in range(length) if q >= start + offset]
            for head in range(2):
                a = pattern[prompt, head].tolist()
                value = sum(a[q][q - offset] for q in queries) / len(queries) if queries else math.nan
                assert found[prompt, head, at].item() == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("heads", [(), (3,)])
@pytest.mark.parametrize("name", ["last", "mean", "norm", "absmax"])
def test_of_vectors_as_defined(name, heads):
    lengths = [5, 1, 3]
    x = torch.randn(3, *heads, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    found = reduction(name).compute(x, torch.tensor(lengths))
    for prompt, length in enumerate(lengths):
        real = x[prompt, ..., :length, :]
        if name in ("last", "mean"):
            torch.testing.assert_close(found[prompt], real[..., -1, :] if name == "last" else real.mean(-2))
        else:
            values = real.pow(2).sum(-1).sqrt() if name == "norm" else real.abs().max(-1).values
            torch.testing.assert_close(found[prompt, ..., :length], values)
            assert found[prompt, ..., length:].eq(0).all()


@pytest.mark.parametrize("name", [*BUILTIN, "diagonals(1,2)"])
def test_padding_and_neighbours_do_not_reach_a_prompt(name):
    chosen = reduction(name)
    generator = torch.Generator().manual_seed(1)
    x = patterns(3, 2, 6, 0) if not chosen.fits("z") else torch.randn(3, 2, 6, 6, generator=generator).double()
    lengths = torch.tensor([6, 4, 2])
    noisy = x.clone()
    for prompt, length in enumerate(lengths.tolist()):
        noisy[prompt, :, length:] = 1e6
    found, disturbed = chosen.compute(x, lengths), chosen.compute(noisy, lengths)
    assert torch.equal(found.nan_to_num(-1.0), disturbed.nan_to_num(-1.0))
    for prompt in range(3):
        alone = chosen.compute(x[prompt : prompt + 1], lengths[prompt : prompt + 1])
        torch.testing.assert_close(alone[0], found[prompt], equal_nan=True)


@pytest.mark.parametrize("name", ["key_mean", "entropy", "mean", "norm", "diagonals(1)"])
def test_half_precision_is_summed_in_float32(name):
    chosen = reduction(name)
    x = patterns(1, 2, 200, 0).bfloat16()
    found = chosen.compute(x, torch.tensor([200]))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), chosen.compute(x.double(), torch.tensor([200])), rtol=1e-4, atol=1e-6)


def test_labels_parse_to_the_same_reduction():
    for each in (diagonals(1, 8, 7), diagonals(3, start=1)):
        again = reduction(each.label)
        assert again.identity == each.identity
    assert diagonals(3, start=1).label == "diagonals(3,start=1)"
    assert reduction(" key_mean ") is BUILTIN["key_mean"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("key_meen", "did you mean key_mean"),
        ("nothing like it", "there are key_mean"),
        ("diagonals", "diagonals takes different offsets"),
        ("diagonals(1,1)", "diagonals takes different offsets"),
        ("diagonals(a)", "does not parse"),
        ("diagonals(1,start=1,start=2)", "does not parse"),
        ("key_mean(1)", "did you mean key_mean"),
    ],
)
def test_unknown_names_are_refused_with_near_ones(name, message):
    with pytest.raises(PromptError, match=message):
        reduction(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "two words"}, "must be an identifier"),
        ({"name": "raw"}, "other than 'raw'"),
        ({"name": "entropy"}, "is that of a built-in one"),
        ({"version": ""}, "needs a version"),
        ({"on": ("zz",)}, "unknown sites"),
    ],
)
def test_a_reduction_of_ones_own_is_checked(fields, message):
    with pytest.raises(PromptError, match=message):
        Reduction(**{"name": "mine", "version": "1", "compute": lambda x, lengths: x, **fields})
