"""Direct logit attribution: its terms, one by one and summed."""

import pytest
import torch

import workbench as wb
from families import FAMILIES, REFUSED, tiny_module, tiny_pairs
from oracle.hook_oracle import HookOracle, anatomy
from unit.patching.patching_cases import model_of, prompts, tiny_prompts
from workbench.errors import PromptError, UnsupportedModelError
from workbench.patching.ablated import ablated_runs, components_of, direct_effects_of
from workbench.patching.direct_effects import FrozenNorm, attribute
from workbench.tables import HeadTable

RUNS = {"clean": "clean", "corrupted": "corrupted"}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_terms_sum_to_the_logit_difference_of_the_module(family, run):
    """Centring norms, biases of W_O, MLP, norm; parallel blocks; several right answers; mixed lengths."""
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    found = attribute(wb.wrap_model(module), prompts(raw), run=run)
    theirs = HookOracle(module, raw, base=RUNS[run]).base_value
    assert theirs.abs().max() > 0.5
    torch.testing.assert_close(found.sum, theirs, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.logit_diff, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox_parallel", "llama_bias"])
def test_each_term_is_what_the_modules_norm_and_unembedding_make_of_that_write(family):
    """The final norm is affine once its scale is held: a term is what a write adds to its output, times W_U."""
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    oracle, parts = HookOracle(module, raw), anatomy(module)
    rows = torch.arange(5)
    end = {}

    def keep(_module, args):
        end["stream"] = args[0][rows, raw["answer_positions"]]

    oracle.run((parts.final_norm, "pre", keep))
    stream, matrix = end["stream"], module.get_output_embeddings().weight
    through = matrix[raw["answers"]].mean(1) - matrix[raw["wrong_answers"]].mean(1)
    centred = family in {"gpt2", "neox_parallel"}
    gain = parts.final_norm.weight
    spread = stream.std(-1, unbiased=False) if centred else stream.square().mean(-1).sqrt()

    def term(write):
        write = write[rows, raw["answer_positions"]]
        write = write - write.mean(-1, keepdim=True) if centred else write
        return (write / spread[:, None] * gain * through).sum(-1)

    found = attribute(wb.wrap_model(module), prompts(raw))
    near = {"rtol": 1e-4, "atol": 1e-5}  # the epsilon under the root is left out here
    torch.testing.assert_close(found.embedding, term(oracle.base_writes["input"]), **near)
    for layer in range(3):
        torch.testing.assert_close(found.mlps[layer], term(oracle.base_writes[f"m{layer}"]), **near)
        for head in range(4):
            torch.testing.assert_close(found.heads[layer, head], term(oracle.base_writes[f"a{layer}.h{head}"]), **near)
    assert (found.attention_bias is not None) == (family != "llama")
    if found.attention_bias is not None:
        bias = parts.blocks[1].out.bias.expand(5, raw["clean"].shape[1], -1)
        torch.testing.assert_close(found.attention_bias[1], term(bias), **near)
    assert (found.norm_bias is not None) == centred
    if found.norm_bias is not None:
        torch.testing.assert_close(found.norm_bias, through @ parts.final_norm.bias)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_frozen_direct_effect_is_the_exact_ones_first_order(family):
    """Holding the scale is a linearisation only along directions that keep it: the sum rule over runs shows it.

    What all writes of the other run change, with the scale held, is the other run's stream read at this run's scale.
    """
    model = model_of(family)
    pairs = tiny_prompts(model)
    runs = ablated_runs(
        model.fast_weights, pairs, ablation=wb.Ablation.RESAMPLE, direction="noising", metric="logit_diff"
    )
    components = components_of(model.spec, ("heads", "mlps"))
    exact, change = direct_effects_of(runs, components, None)
    frozen = FrozenNorm.of(model.fast_weights, runs.pairs, runs.final)
    own, other = (attribute(model, pairs, run=run) for run in ("clean", "corrupted"))
    there = FrozenNorm.of(model.fast_weights, runs.pairs, runs.final + change.sum(0) + at_answer(runs))
    ratio = (there.direction / frozen.direction).mean(-1)
    flat = torch.cat([torch.cat([own.heads[i], own.mlps[i : i + 1]]) for i in range(3)])
    flat_other = torch.cat([torch.cat([other.heads[i], other.mlps[i : i + 1]]) for i in range(3)])
    torch.testing.assert_close(frozen.read(change), flat_other / ratio - flat, rtol=1e-8, atol=1e-10)
    assert (exact - frozen.read(change)).abs().max() > 1e-3, "the norm's scale matters"


def at_answer(runs):
    return runs.window.at_answer(runs.delta_input).squeeze(-2)


def test_the_table(tmp_path):
    model = model_of("gpt2", torch.float32)
    pairs = tiny_prompts(model)
    table = wb.direct_effects(model, pairs).validate()
    assert HeadTable.load(table.save(tmp_path)).frame.equals(table.frame)
    assert len(table.select("direct_logit_attribution")) == 12
    assert len(table.select("mlp_direct_logit_attribution")) == len(
        table.select("attention_bias_direct_logit_attribution")
    )
    whole = table.frame[table.frame["layer"].isna()].set_index("metric")["value"]
    assert set(whole.index) == {
        "embedding_direct_logit_attribution",
        "norm_bias_direct_logit_attribution",
        "sum_of_terms",
        "logit_diff",
    }
    terms = table.frame[table.frame["metric"].str.endswith("direct_logit_attribution")]["value"].sum()
    assert terms == pytest.approx(whole["logit_diff"], abs=1e-5)
    assert 0 <= table.provenance["largest_remainder"] < 1e-5
    assert set(table.frame["n"]) == {5}
    assert set(table.frame["unit"]) == {"logits"}
    values = attribute(model, pairs).heads[1, 2].double()
    row = table.select("direct_logit_attribution", layer=1, head=2).iloc[0]
    assert row["value"] == pytest.approx(float(values.mean()))
    assert row["stderr"] == pytest.approx(float(values.std() / 5**0.5))


def test_low_precision_is_accumulated_in_float32():
    low = attribute(model_of("llama", torch.bfloat16), tiny_prompts(model_of("llama")))
    high = attribute(model_of("llama"), tiny_prompts(model_of("llama")))
    assert low.heads.dtype == torch.float32
    assert (low.sum - low.logit_diff).abs().max() < 0.15
    assert (low.heads.double() - high.heads).abs().max() < 0.15


def test_what_does_not_fit_is_refused():
    model = model_of("llama")
    pairs = tiny_prompts(model)
    with pytest.raises(PromptError, match="run='both' is neither"):
        wb.direct_effects(model, pairs, run="both")
    refused = wb.wrap_model(REFUSED["sliding_window"]())
    with pytest.raises(UnsupportedModelError, match="sliding_window"):
        wb.direct_effects(refused, pairs)
