"""The patching engine gives the same effects on a GPU as on the CPU."""

import copy

import pytest
import torch

import workbench as wb
from families import FAMILIES, tiny_module, tiny_pairs

pytestmark = pytest.mark.gpu

METHODS = ("exact", "receiver_exact", "eap", "eap_ig")


def pairs_for(module: torch.nn.Module) -> wb.PromptPairs:
    tensors = tiny_pairs(module)
    tensors.pop("first_difference")
    return wb.PromptPairs.from_tokens(**tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_effects_on_the_gpu_equal_those_on_the_cpu(family: str, cuda: torch.device) -> None:
    module = tiny_module(family, dtype=torch.float64)
    pairs = pairs_for(module)
    here, there = wb.wrap_model(module), wb.wrap_model(copy.deepcopy(module).to(cuda))
    for method in METHODS:
        a = wb.edge_effects(here, pairs, method=method, per_prompt=True)
        b = wb.edge_effects(there, pairs, method=method, per_prompt=True)
        assert a.per_prompt is not None
        assert b.per_prompt is not None
        assert abs(a.per_prompt - b.per_prompt).max() < 1e-9


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_float32_on_the_gpu_is_within_its_noise_floor_of_float64(family: str, cuda: torch.device) -> None:
    exact = tiny_module(family, dtype=torch.float64)
    single = tiny_module(family, dtype=torch.float32).to(cuda)
    pairs = pairs_for(exact)
    a = wb.edge_effects(wb.wrap_model(exact), pairs, method="exact")
    b = wb.edge_effects(wb.wrap_model(single), pairs, method="exact")
    assert (a.frame.effect - b.frame.effect).abs().max() < 20 * b.noise_floor
