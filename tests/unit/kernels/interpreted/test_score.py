"""Receiver scoring in the interpreter equals its float64 reference."""

import pytest
import torch

from kernel_cases import SCORES, Case, relative
from workbench_kernels import base_attention, receiver_effects, value_gradient

LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.mark.parametrize("name", SCORES)
def test_effects_equal_the_float64_reference(name: str) -> None:
    case = SCORES[name]
    attention, patch = case.make()
    found = receiver_effects(attention, patch, case.channel, case.receivers, backend="triton")
    attention, patch = case.make(torch.float64)
    truth = receiver_effects(attention, patch, case.channel, case.receivers, backend="torch")
    assert truth.dtype == torch.float64
    assert found.dtype == torch.float32
    if case.length == 1:  # one key gets all attention, whatever is patched
        assert truth.abs().max() < 1e-12
        assert found.abs().max() < 1e-6
        return
    assert truth.abs().min() > 1e-6, "the case must leave every effect measurable"
    assert relative(found, truth) < LIMIT[case.dtype]


@pytest.mark.parametrize("name", ["queries", "two blocks of queries and three of keys", "grouped 3:1", "one token",
                                  "no causal mask", "half precision", "wide head"])  # fmt: skip
def test_clean_attention_and_value_gradient_equal_the_float64_reference(name: str) -> None:
    case = SCORES[name]
    attention, _ = case.make()
    exact, _ = case.make(torch.float64)
    base, truth = base_attention(attention, backend="triton"), base_attention(exact, backend="torch")
    assert relative(base.worth, truth.worth) < LIMIT[case.dtype]
    assert relative(base.log_normaliser, truth.log_normaliser) < LIMIT[case.dtype]
    found = value_gradient(attention, base, backend="triton")
    assert relative(found, value_gradient(exact, backend="torch")) < LIMIT[case.dtype]


def test_some_heads_of_many_are_those_that_were_named() -> None:
    case = Case(heads=4, kv_heads=2, senders=1)
    attention, patch = case.make()
    every = receiver_effects(attention, patch, "q", [0, 1, 2, 3], backend="torch")
    part = type(patch)(
        **{**patch.__dict__, "base": patch.base[:, :, 2:3], "moved": patch.moved[:, :, :, 2:3],
           "constant": patch.constant[2:3]}
    )  # fmt: skip
    found = receiver_effects(attention, part, "q", [2], backend="triton")
    assert relative(found[..., 0], every[..., 2]) < 1e-5


def test_strided_views_are_read_as_they_lie() -> None:
    case = Case(senders=3)
    attention, patch = case.make()
    whole = receiver_effects(attention, patch, "q", case.receivers, backend="triton")
    # a slice of senders, and queries cut out of a joint projection
    joint = torch.cat((attention.queries, torch.full_like(attention.queries, torch.nan)), dim=2)
    attention = type(attention)(**{**attention.__dict__, "queries": joint[:, :, : case.heads]})
    assert not attention.queries.is_contiguous()
    assert patch.moved is not None
    part = type(patch)(**{**patch.__dict__, "moved": patch.moved[:, :, 1:], "inverse": patch.inverse[:, :, 1:]})
    found = receiver_effects(attention, part, "q", case.receivers, backend="triton")
    assert torch.equal(found, whole[:, 1:])


def test_the_same_inputs_give_the_same_bits() -> None:
    case = Case(channel="k", n=1, width=18, length=20, senders=1)
    attention, patch = case.make()
    first, second = (receiver_effects(attention, patch, "k", case.receivers, backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_an_empty_patch_has_no_effect() -> None:
    """Queries that are what they were give back what clean attention is worth."""
    case = Case(rotary=0, norm=False, constant=False, senders=1)
    attention, patch = case.make()
    own = attention.queries[:, :, case.receivers].unsqueeze(2).contiguous()
    patch = type(patch)(moved=own, base=torch.zeros_like(patch.base), inverse=torch.ones_like(patch.inverse))
    found = receiver_effects(attention, patch, "q", case.receivers, backend="triton")
    assert found.abs().max() < 1e-6
