"""The default model's head effects against TransformerLens hooks, and its direct logit attribution against itself."""

import pytest
import torch

import workbench_circuits as wc
from workbench.interventions import Ablation
from workbench.models import Model
from workbench.patching.ablated import Component, ablated_runs, direct_effects_of, total_effects
from workbench.patching.direct_effects import attribute
from workbench.patching.head_hooks import HookRuns

pytestmark = pytest.mark.model

COMPONENTS = [
    Component(kind="heads", layer=17, head=4),
    Component(kind="heads", layer=23, head=3),
    Component(kind="mlps", layer=29),
]


@pytest.fixture(scope="module")
def pairs(default_model):
    return wc.load_task("ioi").pairs(default_model, 2, corruption="s2_flip")


@pytest.fixture(scope="module")
def hooked(default_model):
    model = Model(name="by hooks", module=default_model.module, weights=None, refusal="to test the other path")
    model.bridge = default_model.bridge
    return model


@pytest.mark.parametrize("ablation", [Ablation.RESAMPLE, Ablation.UNIFORM_PATTERN])
def test_head_effects_agree_with_hooks(default_model, hooked, pairs, ablation):
    options = {"ablation": ablation, "direction": "noising", "metric": "logit_diff", "means": None}
    runs = ablated_runs(default_model.fast_weights, pairs, **options)
    by_hooks = HookRuns.make(hooked, pairs, direct=True, **options)
    components = [each for each in COMPONENTS if ablation.on_mlps or each.kind == "heads"]
    total = total_effects(runs, components, None)
    direct, _ = direct_effects_of(runs, components, None)
    theirs = [by_hooks.effects(each, None, direct=True) for each in components]
    assert total.abs().max() > 0.5
    assert (total - torch.stack([each for each, _ in theirs])).abs().max() < 1e-4
    assert (direct - torch.stack([each for _, each in theirs])).abs().max() < 1e-4


def test_direct_logit_attribution_adds_up(default_model, pairs):
    found = attribute(default_model, pairs)
    assert found.logit_diff.abs().max() > 1
    assert (found.sum - found.logit_diff).abs().max() < 1e-4
