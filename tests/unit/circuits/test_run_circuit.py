"""Running circuits: what batches, budgets and circuits of many kinds must not change."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from families import tiny_module, tiny_pairs
from unit.patching.patching_cases import model_of, prompts, tiny_prompts
from workbench.errors import BudgetError, PromptError
from workbench.prompts import PromptPairs
from workbench_circuits.run import CircuitRunner, run_circuit, run_circuits
from workbench_circuits.wiring import Wiring


@pytest.fixture(scope="module")
def runner():
    model = model_of("llama")
    return CircuitRunner(model, tiny_prompts(model))


def drawn(wiring, seed, share):
    draw = np.random.default_rng(seed)
    return wiring.everything & (draw.random(wiring.shape) < share)


@given(seed=st.integers(0, 10**6), share=st.sampled_from([0.02, 0.1, 0.3, 0.7, 0.97]))
@settings(max_examples=10, deadline=None)
def test_what_no_path_from_input_to_logits_uses_changes_nothing(runner, seed, share):
    mask = drawn(runner.wiring, seed, share)
    pruned = runner.wiring.prune(mask)
    whole, rest = runner.run([mask])[0], runner.run([pruned])[0]
    assert not (pruned & ~mask).any()
    np.testing.assert_allclose(rest, whole, rtol=0, atol=1e-10)
    again = runner.wiring.prune(pruned)
    np.testing.assert_array_equal(again, pruned)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_circuits_do_not_depend_on_those_they_are_run_with(runner, seed):
    """Among them some that differ in one edge, and so share most of their run."""
    draw = np.random.default_rng(seed)
    base = drawn(runner.wiring, seed, 0.5)
    masks = [base]
    for _ in range(3):
        other = base.copy()
        receivers, senders = np.nonzero(base)
        i = draw.integers(len(receivers))
        other[receivers[i], senders[i]] = False
        masks.append(other)
    masks.append(drawn(runner.wiring, seed + 1, 0.2))
    alone = np.concatenate([runner.run([mask]) for mask in masks])
    np.testing.assert_allclose(runner.run(masks), alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
def test_prompts_do_not_depend_on_those_they_are_run_with(ablation):
    model = model_of("gpt2")
    raw = tiny_pairs(model.module, n=5)
    mask = drawn(Wiring(CircuitRunner(model, prompts(raw)).wiring.graph), 3, 0.4)
    together = run_circuits(model, prompts(raw), [mask], ablation=ablation)[0]
    if ablation == "mean":  # prompts of unlike length are never averaged, so each stands for itself
        lengths = raw["lengths"].tolist()
        groups = [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]
    else:
        groups = [[i] for i in range(5)]
    for rows in groups:
        alone = run_circuits(model, prompts(raw, rows), [mask], ablation=ablation)[0]
        np.testing.assert_allclose(together[rows], alone, rtol=0, atol=1e-10)


def test_a_small_budget_changes_nothing():
    model = model_of("llama")
    pairs = tiny_prompts(model)
    wide = CircuitRunner(model, pairs)
    masks = [drawn(wide.wiring, seed, 0.4) for seed in range(5)]
    narrow = CircuitRunner(model, pairs, budget_bytes=1_500_000)
    assert len(narrow._batches) > len(wide._batches)
    assert not narrow._keep
    np.testing.assert_allclose(narrow.run(masks), wide.run(masks), rtol=0, atol=1e-10)


def test_a_budget_that_is_too_small_is_refused():
    model = model_of("llama")
    with pytest.raises(BudgetError, match="raise budget_bytes"):
        CircuitRunner(model, tiny_prompts(model), budget_bytes=10_000)


def test_mean_of_one_prompt_is_its_corrupted_value():
    model = model_of("llama")
    pairs = tiny_prompts(model, rows=[0])
    mask = drawn(CircuitRunner(model, pairs).wiring, 0, 0.5)
    resampled, averaged = (run_circuits(model, pairs, [mask], ablation=a) for a in ("resample", "mean"))
    np.testing.assert_allclose(averaged, resampled, rtol=0, atol=1e-10)


def test_result_of_one_circuit(runner):
    names = runner.wiring.edges(drawn(runner.wiring, 1, 0.6)).names
    found = run_circuit(runner.model, runner.pairs, names)
    assert found.n_edges == len(names)
    assert (found.metric, found.ablation, found.path_taken) == ("logit_diff", "resample", "fast")
    expected = (found.values.mean() - found.none.mean()) / (found.clean.mean() - found.none.mean())
    f = found.faithfulness()
    assert f.value == pytest.approx(expected)
    assert f.ci_low <= f.value <= f.ci_high
    assert found.estimate.value == pytest.approx(found.values.mean())
    assert run_circuit(runner.model, runner.pairs, runner.wiring.everything).faithfulness().value == pytest.approx(1)
    assert run_circuit(runner.model, runner.pairs, []).faithfulness().value == pytest.approx(0, abs=1e-12)


def test_bfloat16_is_close_to_float32():
    low = wb.wrap_model(tiny_module("llama", dtype=torch.bfloat16))
    high = wb.wrap_model(tiny_module("llama"))
    runners = [CircuitRunner(model, tiny_prompts(model)) for model in (low, high)]
    masks = [drawn(runners[0].wiring, seed, 0.5) for seed in range(3)]
    a, b = (r.run(masks) for r in runners)
    assert a.dtype == b.dtype == np.float32
    assert np.abs(a - b).max() < 0.15
    whole = runners[0].run([runners[0].wiring.everything])[0]
    assert np.abs(whole - runners[0].clean).max() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablation": "noise"}, "ablation 'noise' is not one of resample, mean, zero"),
        ({"metric": "accuracy"}, "metric 'accuracy' is not one of"),
        ({"edges": ["a0.h0->a9.h9<q>"]}, "'a9.h9<q>' is not a receiver"),
        ({"edges": "a0.h0->m1"}, "pass a list of edges"),
        ({"edges": np.zeros((2, 2), dtype=bool)}, "a mask has shape"),
    ],
)
def test_bad_arguments(runner, options, message):
    edges = options.pop("edges", [])
    with pytest.raises(PromptError, match=message):
        run_circuit(runner.model, runner.pairs, edges, **options)


def test_prompts_without_a_difference_cannot_be_judged(runner):
    model, pairs = runner.model, runner.pairs
    same = PromptPairs.from_tokens(
        pairs.clean, pairs.clean, pairs.answers, pairs.wrong_answers, pairs.lengths, pairs.answer_positions
    )
    found = run_circuit(model, same, [])
    np.testing.assert_allclose(found.values, found.clean)
    with pytest.raises(PromptError, match="use a corruption that changes the answer"):
        found.faithfulness()


def test_nodes_and_edges_between_them(runner):
    wiring = runner.wiring
    mask = wiring.between(["input", "a0.h1", "a1.h0", "m2", "logits"])
    names = set(wiring.edges(mask).names)
    assert {"input->a0.h1<q>", "a0.h1->a1.kv0<k>", "a1.h0->m2", "m2->logits", "input->logits"} <= names
    assert not any("a0.h2" in name or "m0" in name for name in names)
    assert "a0.h1->a1.h1<q>" not in names
    assert wiring.nodes(mask) == ("input", "a0.h1", "a1.h0", "m2", "logits")
    assert wiring.heads(mask) == ((0, 1), (1, 0))
    assert wiring.between(wiring.graph.sender_names).sum() == wiring.everything.sum()
    with pytest.raises(PromptError, match=r"'a0\.h9' is not a node that writes"):
        wiring.between(["a0.h9"])
