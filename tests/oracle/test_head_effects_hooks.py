"""Effects of every head and MLP: the fast path and the hook path against plain hooks and TransformerLens."""

from dataclasses import replace

import pytest
import torch

import workbench as wb
from families import FAMILIES, tiny_module, tiny_pairs
from oracle.head_oracle import HeadOracle
from unit.patching.patching_cases import LATE, prompts
from workbench.interventions import Ablation
from workbench.models import Model
from workbench.patching.head_effects import settings_of
from workbench.patching.head_sweep import sweep

TOLERANCE = 1e-8
BASE = {"noising": "clean", "denoising": "corrupted"}
TEMPLATES = ("x", "y", "x", "y", "x")


def name_of(component):
    if component.kind == "mlps":
        return f"m{component.layer}"
    return f"a{component.layer}" + ("" if component.head is None else f".h{component.head}")


def measured(model, pairs, **options):
    """Per-prompt effects by place and name, and the rest."""
    found, _ = sweep(model, pairs, settings_of(model, pairs, **options))
    names = [name_of(component) for component in found.components]
    return found, names


def with_templates(pairs):
    return replace(pairs, templates=TEMPLATES[: len(pairs)])


def by_hooks(module):
    """The same model, as if the fast path were refused."""
    return Model(name="by hooks", module=module, weights=None, refusal="to test the other path")


def all_kinds(ablation):
    return ["heads", "attention", "mlps"] if ablation.on_mlps else ["heads", "attention"]


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel", "qwen3", "llama_bias", "llama_mqa"])
def test_every_ablation_of_every_component_agrees_with_plain_hooks(family, direction):
    """Total and direct effects; mixed lengths and first differences; grouped queries one head at a time."""
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    model, pairs = wb.wrap_model(module), with_templates(prompts(raw))
    oracle = HeadOracle(module, raw, base=BASE[direction], templates=TEMPLATES)
    for ablation in Ablation:
        found, names = measured(
            model, pairs, direction=direction, ablation=ablation, components=all_kinds(ablation), direct=True
        )
        total = torch.stack([oracle.total(name, ablation.value) for name in names])
        assert total.abs().mean(1).median() > 1e-3, "large enough to tell right from wrong"
        assert (torch.from_numpy(found.total[0]) - total).abs().max() <= TOLERANCE, ablation
        if ablation is not Ablation.QUERY_ZERO:  # the oracle's writes do not see through a second hook
            direct = torch.stack([oracle.direct(name, ablation.value) for name in names])
            assert (torch.from_numpy(found.direct[0]) - direct).abs().max() <= TOLERANCE, ablation
        torch.testing.assert_close(torch.from_numpy(found.base), oracle.base_value, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in {"gpt2", "llama", "neox_parallel"}])
def test_resampling_agrees_with_plain_hooks_in_every_family(family):
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=3)
    oracle = HeadOracle(module, raw)
    found, names = measured(wb.wrap_model(module), prompts(raw))
    total = torch.stack([oracle.total(name, "resample") for name in names])
    assert (torch.from_numpy(found.total[0]) - total).abs().max() <= TOLERANCE


@pytest.mark.parametrize("ablation", ["resample", "zero", "uniform_pattern", "query_zero"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel"])
def test_each_position_agrees_with_plain_hooks(family, ablation):
    """Position by position, on prompts whose windows begin late, at position 0, and of unequal length."""
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    rows = list(LATE) if ablation == "resample" else [0, 1, 2]
    part = {key: value[rows] for key, value in raw.items()}
    oracle = HeadOracle(module, part)
    pairs = prompts(raw, rows)
    found, names = measured(wb.wrap_model(module), pairs, ablation=ablation, components=["heads"], positions="each")
    assert len(found.places) == int(pairs.answer_positions.max()) + 1
    positions = torch.arange(part["clean"].shape[1])
    for place, values in zip(found.places, torch.from_numpy(found.total), strict=True):
        where = (positions == place.position).expand(len(rows), -1)
        having = pairs.answer_positions >= place.position
        assert torch.equal(values.isnan().any(0), ~having)
        for name, ours in zip(names[::3], values[::3], strict=True):
            theirs = oracle.total(name, ablation, where)
            assert (ours - theirs)[having].abs().max() <= TOLERANCE, (place.position, name)


def test_spans_agree_with_plain_hooks_and_lie_where_each_prompt_has_them():
    module = tiny_module("llama", dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    at = torch.tensor([4, 0, -1, 6, 9])
    pairs = prompts(raw)
    pairs = replace(pairs, spans={"there": at, "END": pairs.answer_positions})
    oracle = HeadOracle(module, raw)
    found, names = measured(wb.wrap_model(module), pairs, positions="spans")
    positions = torch.arange(raw["clean"].shape[1])
    assert [place.name for place in found.places] == ["there", "END"]
    for place, values in zip(found.places, torch.from_numpy(found.total), strict=True):
        where = positions == pairs.spans[place.name][:, None]
        having = pairs.spans[place.name] >= 0
        assert torch.equal(values.isnan().any(0), ~having)
        for name, ours in zip(names, values, strict=True):
            theirs = oracle.total(name, "resample", where)
            assert (ours - theirs)[having].abs().max() <= TOLERANCE, (place.name, name)


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel", "qwen3"])
def test_hooks_of_transformer_lens_agree_with_the_fast_path(family, direction):
    """Every ablation, total and direct, one forward a component; TransformerLens takes its softmax in float32."""
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=3)
    fast, hooks, pairs = wb.wrap_model(module), by_hooks(module), with_templates(prompts(raw))
    assert hooks.path == "hooks"
    for ablation in Ablation:
        if ablation is Ablation.QUERY_ZERO and family == "neox_parallel":
            continue  # TransformerLens has no hook there
        options = {"direction": direction, "ablation": ablation, "direct": True}
        ours, names = measured(fast, pairs, **options)
        theirs, other_names = measured(hooks, pairs, **options)
        assert names == other_names
        for a, b in ((ours.total, theirs.total), (ours.direct, theirs.direct), (ours.base, theirs.base)):
            assert abs(a - b).max() < 2e-5, ablation
        assert abs(ours.total).max() > 0.05


def test_hooks_of_transformer_lens_agree_at_single_positions_and_for_whole_layers():
    module = tiny_module("llama", dtype=torch.float64)
    pairs = prompts(tiny_pairs(module, n=3))
    for ablation in ("resample", "pattern_to_first"):
        options = {"ablation": ablation, "positions": "each", "components": ["attention"]}
        ours, _ = measured(wb.wrap_model(module), pairs, **options)
        theirs, _ = measured(by_hooks(module), pairs, **options)
        assert abs(ours.total - theirs.total)[~torch.from_numpy(ours.total).isnan().numpy()].max() < 2e-5


@pytest.mark.parametrize("metric", ["answer_logprob", "kl_to_clean"])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_other_metrics_agree_by_hooks(metric, direction):
    module = tiny_module("llama", dtype=torch.float64)
    pairs = prompts(tiny_pairs(module, n=3))
    options = {"metric": metric, "direction": direction, "direct": True}
    ours, _ = measured(wb.wrap_model(module), pairs, **options)
    theirs, _ = measured(by_hooks(module), pairs, **options)
    assert ours.frozen is None
    assert abs(ours.total - theirs.total).max() < 2e-5
    assert abs(ours.direct - theirs.direct).max() < 2e-5


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel"])
def test_the_direct_effect_is_the_edge_to_the_logits(family):
    model = wb.wrap_model(tiny_module(family, dtype=torch.float64))
    pairs = prompts(tiny_pairs(model.module, n=5))
    found, names = measured(model, pairs, direct=True)
    edges = wb.edge_effects(model, pairs, edges=[f"{name}->logits" for name in names], per_prompt=True)
    assert abs(found.direct[0] - edges.per_prompt).max() < 1e-10
    last = [index for index, name in enumerate(names) if name == f"m{model.spec.n_layers - 1}"]
    assert abs(found.total[0] - found.direct[0])[last].max() < 1e-10, "nothing reads the last MLP but the unembedding"
