"""Head effects as a result: the table, its places, and what must not change it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from families import REFUSED
from unit.patching.patching_cases import LATE, model_of, tiny_prompts
from workbench.errors import BudgetError, DataError, PromptError
from workbench.interventions import Ablation
from workbench.patching.head_effects import settings_of
from workbench.patching.head_sweep import sweep
from workbench.prompts import PromptPairs
from workbench.tables import HeadTable

TEMPLATES = ("x", "y", "x", "y", "x")


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def pairs(model):
    return replace(tiny_prompts(model), templates=TEMPLATES)


def measured(model, pairs, *, budget_bytes=1 << 31, reference=None, **options):
    settings = settings_of(model, pairs, reference=reference, **options)
    return sweep(model, pairs, settings, reference=reference, budget_bytes=budget_bytes)[0]


def exchanged(pairs):
    """Clean and corrupted in each other's place, the answers as they are."""
    return replace(pairs, clean=pairs.corrupted, corrupted=pairs.clean)


def test_the_table(model, pairs, tmp_path):
    table = wb.head_effects(model, pairs, direct=True).validate()
    assert HeadTable.load(table.save(tmp_path)).frame.equals(table.frame)
    per_prompt = measured(model, pairs, direct=True)
    heads = {"total_effect", "direct_effect", "indirect_effect", "direct_effect_frozen_norm"}
    assert set(table.frame["metric"]) == heads | {f"mlp_{each}" for each in heads} | {"base_value", "patch_value"}
    for metric in heads:
        assert table.matrix(metric).shape == (3, 4)
        assert not np.isnan(table.matrix(metric)).any()
        assert len(table.select(f"mlp_{metric}")) == 3
    total, direct = per_prompt.total[0][6], per_prompt.direct[0][6]
    component = per_prompt.components[6]
    at = {"layer": component.layer, "head": component.head}
    for metric, values in (("total_effect", total), ("direct_effect", direct), ("indirect_effect", total - direct)):
        row = table.select(metric, **at).iloc[0]
        assert row["value"] == pytest.approx(values.mean(), abs=1e-12)
        assert row["stderr"] == pytest.approx(values.std(ddof=1) / 5**0.5, abs=1e-12), "paired, prompt by prompt"
        assert (row["n"], row["unit"], row["path_taken"]) == (5, "logits", "fast")
        assert row["method"] == "noising, resample ablation, logit_diff"
    assert table.select("base_value")["value"].item() == pytest.approx(per_prompt.base.mean())
    assert table.provenance["settings"]["ablation"] == "resample"
    assert 0 < table.provenance["noise_floor"] < 1e-12


@pytest.mark.parametrize("ablation", list(Ablation))
def test_neither_batches_nor_their_order_change_an_effect(model, pairs, ablation):
    options = {"ablation": ablation, "positions": "all", "direct": True}
    whole = measured(model, pairs, **options)
    means = {"reference": pairs} if ablation is Ablation.MEAN else {}
    order = [3, 1, 4, 0, 2]
    small = measured(model, pairs.subset(order), budget_bytes=700_000, **means, **options)
    for name in ("total", "direct", "frozen"):
        np.testing.assert_allclose(getattr(small, name), getattr(whole, name)[..., order], rtol=0, atol=1e-10)
    np.testing.assert_allclose(small.base, whole.base[order], rtol=0, atol=1e-10)


@pytest.mark.parametrize("ablation", list(Ablation))
def test_denoising_is_noising_with_the_versions_exchanged(model, pairs, ablation):
    there = measured(model, pairs, ablation=ablation, direction="denoising", direct=True)
    back = measured(model, exchanged(pairs), ablation=ablation, direct=True)
    for name in ("total", "direct", "frozen", "base", "patch"):
        np.testing.assert_allclose(getattr(there, name), getattr(back, name), rtol=0, atol=1e-10)


def test_identical_versions_have_no_effect_when_resampled_and_one_when_zeroed(model, pairs):
    same = replace(pairs, corrupted=pairs.clean)
    assert abs(measured(model, same).total).max() < 1e-12
    assert abs(measured(model, same, ablation="zero").total).max() > 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "neox_parallel"])
def test_query_zero_is_uniform_and_value_zero_is_zero(family):
    model = model_of(family)
    pairs = tiny_prompts(model)
    totals = {
        how: measured(model, pairs, ablation=how, components=["heads"]).total
        for how in Ablation
        if not how.needs_prompts
    }
    np.testing.assert_allclose(totals["query_zero"], totals["uniform_pattern"], rtol=0, atol=1e-12)
    np.testing.assert_allclose(totals["value_zero"], totals["zero"], rtol=0, atol=1e-12)
    for one, other in (
        ("zero", "uniform_pattern"),
        ("zero", "pattern_to_first"),
        ("uniform_pattern", "pattern_to_first"),
    ):
        assert abs(totals[one] - totals[other]).max() > 1e-2, (one, other)


def test_single_precision_is_near_double(pairs):
    low, high = (measured(model_of("llama", dtype), pairs) for dtype in (torch.float32, torch.float64))
    assert low.total.dtype == np.float32
    assert abs(low.total - high.total).max() < 1e-4
    assert low.noise_floor > 1e-9 > high.noise_floor


def test_positions_before_the_first_difference_have_no_effect_and_count(model):
    """The versions agree there, so a resample changes nothing: exactly nothing."""
    pairs = tiny_prompts(model, rows=LATE)
    table = wb.head_effects(model, pairs, positions="each", components=["heads", "attention"])
    first, last = int(pairs.first_difference.min()), int(pairs.answer_positions.max())
    assert first > 0
    assert sorted(set(table.select("total_effect")["position"])) == list(range(last + 1))
    early = table.frame[table.frame["position"].fillna(first) < first]
    assert len(early) == first * 3 * 5
    assert (early["value"] == 0).all()
    assert (table.select("total_effect", position=first)["value"] != 0).any()
    for position in range(last + 1):
        n = int((pairs.answer_positions >= position).sum())
        assert set(table.select("total_effect", position=position)["n"]) == {n}


def test_after_one_layer_positions_add_up_when_nothing_reads_in_between():
    """In the last layer only the answer position is read: all positions at once are that one."""
    model = model_of("llama")
    pairs = tiny_prompts(model, rows=LATE)
    spans = replace(pairs, spans={"END": pairs.answer_positions})
    last = [index for index in range(15) if index >= 10]
    at_end = measured(model, spans, positions="spans").total[0]
    np.testing.assert_allclose(at_end[last], measured(model, pairs).total[0][last], rtol=0, atol=1e-12)


def test_spans_are_named_and_leave_out_prompts_that_have_none(model, pairs):
    at = torch.tensor([3, -1, 5, 1, 4])
    nowhere = torch.full((5,), -1)
    spans = replace(pairs, spans={"word": at, "END": pairs.answer_positions, "nowhere": nowhere}, task="made up")
    table = wb.head_effects(model, spans, positions="spans")
    rows = table.select("total_effect")
    assert set(rows["input"]) == {"made up, word", "made up, END"}
    assert set(rows[rows["input"] == "made up, word"]["n"]) == {4}
    assert set(rows[rows["input"] == "made up, END"]["n"]) == {5}


def test_the_mean_is_over_the_reference_and_the_provenance_says_so(model, pairs):
    others = replace(tiny_prompts(model, 30, seed=5), templates=("x", "y") * 15)
    table = wb.head_effects(model, pairs, ablation="mean", reference=others)
    assert table.provenance["reference_prompts_per_template"] == {"min": 15, "max": 15}
    assert table.provenance["reference_hash"] == others.data_hash
    own = wb.head_effects(model, pairs, ablation="mean")
    assert own.provenance["reference_prompts_per_template"] == {"min": 2, "max": 3}
    assert abs(table.matrix("total_effect") - own.matrix("total_effect")).max() > 1e-3
    with pytest.raises(PromptError, match="no prompt of template 'y'"):
        wb.head_effects(model, pairs, ablation="mean", reference=others.subset(slice(0, None, 2)))


def test_unfinished_work_is_taken_up(model, pairs, tmp_path, monkeypatch):
    import workbench.patching.head_sweep as module

    class StopError(Exception):
        pass

    real, calls = module.total_effects, []

    def counting(runs, components, where):
        calls.append(len(components))
        if len(calls) == 3:
            raise StopError
        return real(runs, components, where)

    monkeypatch.setattr(module, "total_effects", counting)
    monkeypatch.setattr(module, "components_per_batch", lambda runs, budget: 4)
    monkeypatch.setattr("workbench.patching.partial.SECONDS_BETWEEN_WRITES", 0.0)
    with pytest.raises(StopError):
        wb.head_effects(model, pairs, resume=tmp_path / "work")
    with pytest.raises(DataError, match="unfinished work of another model"):
        wb.head_effects(model, pairs, resume=tmp_path / "work", ablation="zero")
    calls[:] = [0] * 3
    resumed = wb.head_effects(model, pairs, resume=tmp_path / "work")
    assert sum(calls) == 15 - 8, "two batches of four were known"
    assert not (tmp_path / "work").exists()
    monkeypatch.undo()
    whole = wb.head_effects(model, pairs)
    np.testing.assert_allclose(resumed.matrix("total_effect"), whole.matrix("total_effect"), rtol=0, atol=1e-12)


def test_progress_is_told(model, pairs):
    lines = []
    wb.head_effects(model, pairs, progress=lines.append)
    assert lines[-1].startswith("resample ablation: 75 of 75 effects")


def test_one_prompt_has_a_value_and_no_interval(model):
    table = wb.head_effects(model, tiny_prompts(model, rows=[1])).validate()
    assert table.frame["stderr"].isna().all()
    assert table.frame["value"].notna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "up"}, "direction 'up' is not one of noising, denoising"),
        ({"metric": "loss"}, "metric 'loss' is not one of logit_diff"),
        ({"positions": "some"}, "positions 'some' is not one of all, each, spans"),
        ({"positions": "spans"}, "these prompts name none"),
        ({"ablation": "none"}, "ablation 'none' is not one of zero"),
        ({"components": ["head"]}, r"components=\['head'\]: give a list of heads, attention, mlps"),
        ({"components": "heads"}, "components='heads': give a list"),
        ({"components": []}, "give a list"),
        ({"components": ["mlps"], "ablation": "query_zero"}, "'query_zero' speaks of attention"),
        ({"direct": True, "positions": "each"}, "direct=True goes with positions='all'"),
    ],
)
def test_what_does_not_fit_is_refused(model, pairs, options, message):
    with pytest.raises(PromptError, match=message):
        wb.head_effects(model, pairs, **options)


def test_a_reference_without_mean_and_too_small_a_budget_are_refused(model, pairs):
    with pytest.raises(PromptError, match="reference is for ablation 'mean'"):
        wb.head_effects(model, pairs, reference=pairs)
    with pytest.raises(BudgetError, match="raise budget_bytes"):
        wb.head_effects(model, pairs, budget_bytes=1000)
    with pytest.raises(BudgetError, match="means of 2 templates"):
        wb.head_effects(model, pairs, ablation="mean", budget_bytes=1000)


def test_a_refused_model_takes_the_hook_path_and_says_so():
    model = wb.wrap_model(REFUSED["sliding_window"]())
    pairs = PromptPairs.from_tokens([[1, 2, 3, 4]], [[1, 5, 3, 4]], [7], [8])
    table = wb.head_effects(model, pairs, direct=True).validate()
    assert set(table.frame["path_taken"]) == {"hooks"}
    assert table.provenance["noise_floor"] is None
    assert table.matrix("total_effect").shape == (3, 4)
    assert not (table.frame["metric"] == "direct_effect_frozen_norm").any()
    last = table.select("mlp_indirect_effect", layer=2)["value"].item()
    assert abs(last) < 1e-5, "nothing reads the last MLP but the unembedding"
