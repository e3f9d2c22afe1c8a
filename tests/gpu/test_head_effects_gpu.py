"""Head effects and direct logit attribution are the same on a GPU as on the CPU."""

import copy
from dataclasses import replace

import pytest
import torch

import workbench as wb
from families import tiny_module, tiny_pairs

pytestmark = pytest.mark.gpu


def pairs_for(module: torch.nn.Module) -> wb.PromptPairs:
    tensors = tiny_pairs(module)
    tensors.pop("first_difference")
    pairs = wb.PromptPairs.from_tokens(**tensors)
    return replace(pairs, templates=("x", "y", "x"), spans={"END": pairs.answer_positions})


def same(a: wb.HeadTable, b: wb.HeadTable) -> bool:
    return bool(((a.frame["value"] - b.frame["value"]).abs() < 1e-9).all()) and len(a) == len(b)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel", "qwen3"])
def test_effects_on_the_gpu_equal_those_on_the_cpu(family: str, cuda: torch.device) -> None:
    module = tiny_module(family, dtype=torch.float64)
    pairs = pairs_for(module)
    here, there = wb.wrap_model(module), wb.wrap_model(copy.deepcopy(module).to(cuda))
    assert same(wb.direct_effects(here, pairs), wb.direct_effects(there, pairs))
    for ablation in wb.Ablation:
        a, b = (wb.head_effects(model, pairs, ablation=ablation, direct=True) for model in (here, there))
        assert same(a, b), ablation
    for positions in ("each", "spans"):
        a, b = (wb.head_effects(model, pairs, positions=positions) for model in (here, there))
        assert same(a, b), positions


def test_editors_on_the_gpu_equal_those_on_the_cpu(cuda: torch.device) -> None:
    module = tiny_module("llama", dtype=torch.float64)
    pairs = pairs_for(module)
    here, there = wb.wrap_model(module), wb.wrap_model(copy.deepcopy(module).to(cuda))
    for ablation in wb.Ablation:
        given = {"pairs": pairs} if ablation.needs_prompts else {}
        a, b = (
            model.forward(pairs.clean, edit=wb.ablate(model, ["a0.h1", "a2.h3"], ablation, **given))
            for model in (here, there)
        )
        assert (a - b.cpu()).abs().max() < 1e-9, ablation
