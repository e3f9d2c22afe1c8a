"""The patching engine gives the same effects on a GPU as on the CPU."""

import copy
from collections.abc import Callable

import numpy as np
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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["exact", "receiver_exact"])
def test_kernels_give_what_torch_gives(
    family: str, method: str, cuda: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tiny_module(family, dtype=torch.float32).to(cuda)
    model, pairs = wb.wrap_model(module), pairs_for(module)
    monkeypatch.setenv("WORKBENCH_KERNELS", "torch")
    plain = wb.edge_effects(model, pairs, method=method, per_prompt=True)
    monkeypatch.delenv("WORKBENCH_KERNELS")
    fused = wb.edge_effects(model, pairs, method=method, per_prompt=True)
    assert plain.per_prompt is not None
    assert fused.per_prompt is not None
    assert np.linalg.norm(fused.per_prompt - plain.per_prompt) < 1e-4 * np.linalg.norm(plain.per_prompt)
    assert not np.array_equal(fused.per_prompt, plain.per_prompt), "the kernels must have taken part"


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("method", ["exact", "receiver_exact", "eap", "verified"])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_rounded_products_state_their_error(
    family: str, method: str, precision: str, cuda: torch.device, record_property: Callable[[str, object], None]
) -> None:
    module = tiny_module(family, dtype=torch.float32).to(cuda)
    model, pairs = wb.wrap_model(module), pairs_for(module)
    before = torch.backends.cuda.matmul.allow_tf32
    precise = wb.edge_effects(model, pairs, method=method, per_prompt=True)
    found = wb.edge_effects(model, pairs, method=method, precision=precision, per_prompt=True)
    assert torch.backends.cuda.matmul.allow_tf32 == before
    assert precise.provenance["settings"]["precision"] == "fp32"
    assert found.provenance["settings"]["precision"] == precision
    stated = found.provenance["precision_error"]
    record_property("precision_error", stated)
    limit = {"tf32": 0.02, "bf16": 0.15}[precision]
    assert all(0 < error["relative"] < limit for error in stated.values())
    assert found.noise_floor >= max(error["root_mean_square"] for error in stated.values())
    if method != "verified":  # which edges are verified may differ
        away = np.linalg.norm(found.per_prompt - precise.per_prompt) / np.linalg.norm(precise.per_prompt)
        assert 0 < away < 2 * limit


def test_tf32_stays_off_unless_asked_for(cuda: torch.device) -> None:
    """Whatever torch was set to, a float32 sweep multiplies in float32, and leaves the setting as it was."""
    module = tiny_module("llama", dtype=torch.float32).to(cuda)
    model, pairs = wb.wrap_model(module), pairs_for(module)
    plain = wb.edge_effects(model, pairs, method="exact", per_prompt=True)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        again = wb.edge_effects(model, pairs, method="exact", per_prompt=True)
        assert torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert np.array_equal(plain.per_prompt, again.per_prompt)


def test_memory_of_a_sweep_grows_no_faster_than_the_prompts(cuda: torch.device) -> None:
    """Peak memory of receiver-exact scoring, less what is there before: linear in the number of tokens."""
    module = tiny_module("llama_mha", dtype=torch.float32).to(cuda)
    model = wb.wrap_model(module)
    peaks = []
    for length in (32, 64, 128):
        tensors = tiny_pairs(module, n=2, length=length)
        tensors.pop("first_difference")
        tensors["corrupted"][:, 0] = (tensors["clean"][:, 0] + 1) % 101
        pairs = wb.PromptPairs.from_tokens(**tensors)
        wb.edge_effects(model, pairs, method="receiver_exact")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wb.edge_effects(model, pairs, method="receiver_exact")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] - peaks[1] < 3 * (peaks[1] - peaks[0]), "a square would grow by 4, a line by 2"
