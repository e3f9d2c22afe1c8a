"""What an ablation does to a head, and that it does nothing else."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from families import REFUSED, tiny_pairs
from unit.patching.patching_cases import model_of, prompts, tiny_prompts
from workbench.errors import BudgetError, PromptError
from workbench.interventions import Ablation, ablate
from workbench.interventions.measured import measure_means
from workbench.metrics import logit_diff
from workbench.patching.head_effects import settings_of
from workbench.patching.head_sweep import sweep

FREE = [ablation for ablation in Ablation if not ablation.needs_prompts]
TEMPLATES = ("x", "y", "x", "y", "x")


def observed(model, tokens, site, edit=None):
    seen = {}
    model.forward(tokens, edit=edit, observe={site: seen.__setitem__})
    return seen


def templated(model, n=5):
    return replace(tiny_prompts(model, n), templates=TEMPLATES[:n])


@pytest.fixture(scope="module", params=["gpt2", "llama", "qwen3", "neox_parallel"])
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


def test_only_the_named_heads_change_and_layers_before_them_do_not(model):
    """With grouped queries the other heads of the group keep their z too."""
    pairs = templated(model)
    plain = observed(model, pairs.clean, "z")
    for ablation in Ablation:
        given_prompts = {"pairs": pairs} if ablation.needs_prompts else {}
        edit = ablate(model, ["a1.h1", "a1.h2"], ablation, **given_prompts)
        after = observed(model, pairs.clean, "z", edit)
        torch.testing.assert_close(after[0], plain[0], rtol=0, atol=1e-12)
        changed = (after[1] - plain[1]).abs().amax((0, 1, 3))
        assert changed[[0, 3]].max() < 1e-12, ablation
        assert changed[[1, 2]].min() > 1e-3, ablation
        assert (after[2] - plain[2]).abs().max() > 1e-3


def test_the_formulas(model):
    """z' of every ablation that needs no prompts, from the values, query by query."""
    tokens = tiny_prompts(model).clean
    v = observed(model, tokens, "v")[1].repeat_interleave(model.spec.group_size, dim=2)[:, :, 1]
    expected = {
        "zero": torch.zeros_like(v),
        "value_zero": torch.zeros_like(v),
        "pattern_to_first": v[:, :1].expand_as(v),
        "uniform_pattern": torch.stack([v[:, : q + 1].mean(1) for q in range(v.shape[1])], dim=1),
    }
    expected["query_zero"] = expected["uniform_pattern"]
    assert set(expected) == set(FREE)
    for ablation, z in expected.items():
        found = observed(model, tokens, "z", ablate(model, ["a1.h1"], ablation))[1][:, :, 1]
        torch.testing.assert_close(found, z, rtol=0, atol=1e-12)


def test_a_zero_query_attends_evenly_to_what_it_sees(model):
    tokens = tiny_prompts(model).clean
    pattern = observed(model, tokens, "pattern", ablate(model, ["a2.h3"], "query_zero"))[2]
    seen = torch.ones(tokens.shape[1], tokens.shape[1], dtype=pattern.dtype).tril()
    torch.testing.assert_close(pattern[:, 3], (seen / seen.sum(1, keepdim=True)).expand_as(pattern[:, 3]))
    assert (pattern[:, 2] - pattern[:, 3]).abs().max() > 0.1


def test_zeroing_a_shared_value_is_another_intervention(llama):
    """The value of a group serves two heads: zeroing it silences both; value_zero of one head is its z at zero."""
    tokens = tiny_prompts(llama).clean

    def no_shared_value(layer, v):
        v = v.clone()
        v[:, :, 0] *= layer != 1
        return v

    shared = observed(llama, tokens, "z", {"v": no_shared_value})[1]
    one = observed(llama, tokens, "z", ablate(llama, ["a1.h0"], "value_zero"))[1]
    zero = observed(llama, tokens, "z", ablate(llama, ["a1.h0"], "zero"))[1]
    assert torch.equal(one, zero)
    assert shared[:, :, :2].abs().max() == 0
    assert one[:, :, 0].abs().max() == 0
    assert one[:, :, 1].abs().max() > 0.1
    both = ablate(llama, ["a1.h0", "a1.h1"], "value_zero")
    torch.testing.assert_close(llama.forward(tokens, edit=both), llama.forward(tokens, edit={"v": no_shared_value}))


@given(ablation=st.sampled_from(FREE), cut=st.integers(1, 11), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_causality_is_kept(llama, ablation, cut, seed):
    """Tokens from `cut` on, padding among them, change nothing before."""
    model = llama
    tokens = torch.randint(101, (2, 12), generator=torch.Generator().manual_seed(seed))
    other = tokens.clone()
    other[:, cut:] = (other[:, cut:] + 7) % 101
    edit = ablate(model, ["a0.h1", "a1.h2"], ablation)
    torch.testing.assert_close(model.forward(tokens, edit=edit)[:, :cut], model.forward(other, edit=edit)[:, :cut])


@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_editors_give_the_effects_of_head_effects(model, direction):
    pairs = templated(model)
    tokens = pairs.clean if direction == "noising" else pairs.corrupted

    def metric(edit):
        logits = model.forward(tokens, edit=edit, unembed_positions=pairs.answer_positions)
        return logit_diff(logits, pairs)

    for ablation in Ablation:
        found, _ = sweep(model, pairs, settings_of(model, pairs, ablation=ablation, direction=direction))
        given_prompts = {"pairs": pairs, "direction": direction} if ablation.needs_prompts else {}
        for index in (1, 6, len(found.components) - 1):
            each = found.components[index]
            name = f"m{each.layer}" if each.kind == "mlps" else f"a{each.layer}.h{each.head}"
            effect = metric(ablate(model, [name], ablation, **given_prompts)) - metric({})
            torch.testing.assert_close(torch.from_numpy(found.total[0][index]), effect, rtol=0, atol=1e-9)


def test_resampling_all_that_is_written_gives_the_other_run(llama):
    """All but the input is put in from the corrupted run; prompts that have the same last token then agree."""
    pairs = tiny_prompts(llama, 5)
    names = [f"a{layer}.h{head}" for layer in range(3) for head in range(4)] + ["m0", "m1", "m2"]
    edit = ablate(llama, names, "resample", pairs=pairs)
    after = llama.forward(pairs.clean, edit=edit, unembed_positions=pairs.answer_positions)
    other = llama.forward(pairs.corrupted, unembed_positions=pairs.answer_positions)
    rows = torch.arange(5)
    same = pairs.clean[rows, pairs.answer_positions] == pairs.corrupted[rows, pairs.answer_positions]
    assert 0 < same.sum() < 5
    torch.testing.assert_close(after[same], other[same])
    assert (after[~same] - other[~same]).abs().amax(-1).min() > 1e-3


def test_mean_of_one_prompt_a_template_is_resampling(llama):
    pairs = replace(tiny_prompts(llama), templates=tuple("abcde"))
    names = ["a0.h1", "m1", "a2.h0"]
    mean, resample = (ablate(llama, names, how, pairs=pairs) for how in ("mean", "resample"))
    at = pairs.answer_positions
    torch.testing.assert_close(
        llama.forward(pairs.clean, edit=mean, unembed_positions=at),
        llama.forward(pairs.clean, edit=resample, unembed_positions=at),
    )


def test_means_are_over_a_templates_prompts_position_by_position_without_padding(llama):
    pairs = templated(llama)
    edit = ablate(llama, ["a1.h2"], "mean", pairs=pairs)
    z = observed(llama, pairs.corrupted, "z")[1][:, :, 2]
    found = observed(llama, pairs.clean, "z", edit)[1][:, :, 2]
    for row, name in enumerate(TEMPLATES):
        for position in range(int(pairs.lengths[row])):
            same = [i for i in range(5) if TEMPLATES[i] == name and position < pairs.lengths[i]]
            torch.testing.assert_close(found[row, position], z[same, position].mean(0))


def test_without_pairs_the_mean_is_one_vector_over_all_real_tokens(llama):
    pairs = templated(llama)
    z = observed(llama, pairs.corrupted, "z")[1]
    real = torch.arange(z.shape[1]) < pairs.lengths[:, None]
    expected = z[real].mean(0)[2]
    tokens = torch.arange(14)[None] % 101
    by_pairs = observed(llama, tokens, "z", ablate(llama, ["a1.h2"], "mean", reference=pairs))[1]
    torch.testing.assert_close(by_pairs[:, :, 2], expected.expand(1, 14, -1))
    whole = pairs.corrupted[:, :10]
    by_tokens = observed(llama, tokens, "z", ablate(llama, ["a1.h2"], "mean", reference=whole))[1]
    torch.testing.assert_close(by_tokens[0, 0, 2], observed(llama, whole, "z")[1][:, :, 2].mean((0, 1)))


def test_a_sliding_window_bounds_what_is_visible():
    """On the hook path a zero query, which the model itself masks, shows which keys a uniform pattern is over."""
    model = wb.wrap_model(REFUSED["sliding_window"](dtype=torch.float64))
    assert model.path == "hooks"
    tokens = torch.randint(101, (2, 24), generator=torch.Generator().manual_seed(0))
    by_query, by_pattern = (
        model.forward(tokens, edit=ablate(model, ["a0.h1", "a2.h0"], how)) for how in ("query_zero", "uniform_pattern")
    )
    assert (by_query - by_pattern).abs().max() < 1e-5
    assert (by_query - model.forward(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a9.h0"], {}, r"'a9.h0' is no head or MLP of this model of 3 layers x 4 heads.*near it"),
        (["logits"], {}, "'logits' is no head or MLP"),
        ("a0.h1", {}, "give a list of names"),
        ([], {}, "give a list of names"),
        (["a0.h1", "a0.h1"], {}, "stands twice"),
        (["m1", "m1"], {}, "stands twice"),
        (["a0.h1"], {"ablation": "nothing"}, "ablation 'nothing' is not one of zero, mean"),
        (["m1"], {"ablation": "value_zero"}, "'m1' is an MLP"),
        (["a0.h1"], {"ablation": "resample"}, "give pairs"),
        (["a0.h1"], {"ablation": "mean"}, "needs pairs= .* or reference="),
        (["a0.h1"], {"ablation": "zero", "pairs": True}, "leave pairs and reference out"),
    ],
)
def test_what_does_not_fit_is_refused(llama, names, options, message):
    if "pairs" in options:
        options = {**options, "pairs": tiny_prompts(llama)}
    with pytest.raises(PromptError, match=message):
        ablate(llama, names, **options)


def test_editors_of_some_prompts_refuse_others(llama):
    pairs = templated(llama)
    for how in ("mean", "resample"):
        edit = ablate(llama, ["a0.h1"], how, pairs=pairs)
        with pytest.raises(PromptError, match="of 5 prompts and 2 are run"):
            llama.forward(pairs.clean[:2], edit=edit)
    with pytest.raises(PromptError, match="12 positions and 13 are run"):
        llama.forward(torch.zeros(5, 13, dtype=torch.long), edit=ablate(llama, ["a0.h1"], "resample", pairs=pairs))


def test_a_reference_must_have_every_template_as_long_as_the_prompts(llama):
    pairs = templated(llama)
    with pytest.raises(PromptError, match="no prompt of template 'y'"):
        ablate(llama, ["a0.h1"], "mean", pairs=pairs, reference=pairs.subset([0, 2]))
    raw = tiny_pairs(llama.module, n=5)
    cut = {key: raw[key][:, :8] for key in ("clean", "corrupted")}
    short = prompts(raw | cut | {"lengths": torch.full((5,), 8), "answer_positions": torch.full((5,), 7)})
    with pytest.raises(PromptError, match="as long as prompt 0, which is read at position 11"):
        ablate(llama, ["a0.h1"], "mean", pairs=pairs, reference=replace(short, templates=TEMPLATES))


def test_means_beyond_the_budget_are_refused(llama):
    pairs = templated(llama)
    with pytest.raises(BudgetError, match="means of 2 templates by position need"):
        measure_means(llama, pairs.clean, pairs.lengths, pairs.templates, budget=1000)


def test_every_ablation_is_documented_with_its_formula():
    rows = [line for line in (Ablation.__doc__ or "").splitlines() if line.strip().startswith("| `")]
    assert [line.split("`")[1] for line in rows] == [member.name for member in Ablation]
