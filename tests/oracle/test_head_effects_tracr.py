"""Compiled programs: which heads and MLPs they use is known, and which of them the unembedding reads."""

import pytest
import torch

from oracle.head_oracle import HeadOracle
from oracle.test_tracr import metric
from oracle.tracr_programs import PROGRAMS, TracrModule, circuit, tracr_pairs, workbench_model
from unit.patching.patching_cases import prompts
from workbench.patching.direct_effects import attribute
from workbench.patching.head_effects import settings_of
from workbench.patching.head_sweep import sweep

NOTHING = 1e-12


def name_of(component):
    return f"m{component.layer}" if component.head is None else f"a{component.layer}.h{component.head}"


@pytest.fixture(scope="module", params=[(p, s) for p in PROGRAMS for s in ("tokens", "slots")], ids="-".join)
def module(request):
    return TracrModule(*request.param)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_the_components_with_an_effect_are_those_of_the_program(module, direction):
    raw = tracr_pairs(module)
    model, pairs = workbench_model(module), prompts(raw)
    found, _ = sweep(model, pairs, settings_of(model, pairs, direction=direction, direct=True))
    used = {edge.partition("->")[0] for edge in circuit(module)} - {"input"}
    read = {edge.partition("->")[0] for edge in circuit(module) if edge.endswith("->logits")} - {"input"}
    assert read < used
    total, direct = (abs(values[0]).mean(1) for values in (found.total, found.direct))
    for component, t, d in zip(found.components, total, direct, strict=True):
        name = name_of(component)
        assert (t > 0.05) if name in used else (t < NOTHING), (name, t)
        assert (d > 0.05) if name in read else (d < NOTHING), (name, d)
    # without a final norm there is nothing to freeze
    assert abs(found.direct - found.frozen).max() < NOTHING


@pytest.mark.parametrize("ablation", ["resample", "zero"])
def test_attention_that_is_not_causal_agrees_with_plain_hooks(module, ablation):
    raw = tracr_pairs(module)
    model, pairs = workbench_model(module), prompts(raw)
    oracle = HeadOracle(module, raw, metric=metric)
    for positions in ("all", "each"):
        found, _ = sweep(model, pairs, settings_of(model, pairs, ablation=ablation, positions=positions))
        for place, values in zip(found.places, torch.from_numpy(found.total), strict=True):
            where = None if place.position is None else torch.arange(raw["clean"].shape[1]) == place.position
            where = None if where is None else where.expand(len(pairs), -1)
            assert not values.isnan().any(), "what stands behind the answer counts too"
            for component, ours in zip(found.components, values, strict=True):
                theirs = oracle.total(name_of(component), ablation, where)
                assert (ours - theirs).abs().max() < 1e-10, (name_of(component), place.position)


def test_the_logit_difference_is_what_the_read_components_write(module):
    raw = tracr_pairs(module)
    found = attribute(workbench_model(module), prompts(raw))
    torch.testing.assert_close(found.sum, found.logit_diff, rtol=0, atol=1e-10)
    read = {edge.partition("->")[0] for edge in circuit(module) if edge.endswith("->logits")}
    for layer, heads in enumerate(found.heads):
        for head, term in enumerate(heads):
            if f"a{layer}.h{head}" in read:
                assert term.abs().max() > 0.05
