"""Circuits on the fast path against plain hooks, and against TransformerLens where both can say the same."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from families import tiny_module, tiny_pairs
from oracle.circuit_oracle import CircuitOracle
from oracle.hook_oracle import all_edges, logit_diff
from unit.patching.patching_cases import LATE, prompts
from workbench_circuits.run import CircuitRunner

CASES = [
    *((family, ablation) for family in ("gpt2", "neox_parallel", "llama") for ablation in ("resample", "mean", "zero")),
    *((family, "resample") for family in ("neox_sequential", "llama_mqa", "llama_bias", "qwen3")),
]
TOLERANCE = 1e-9
TEMPLATES = ("a", "b", "a", "a", "b")


def random_circuits(module, seed=0):
    """Circuits of several sizes; some without MLP edges, some of few edges, so that whole layers fall out."""
    names = [f"{s}->{r}" for s, r in all_edges(module)]
    rng = np.random.default_rng(seed)
    found = [[name for name in names if rng.random() < share] for share in (0.02, 0.1, 0.3, 0.6, 0.9)]
    found.append([name for name in names if "m" not in name])
    found.append([*found[3][:40], *found[2][-60:]])
    return [*found, names, []]


def raw_pairs(module, *, like=False):
    """Five pairs; with `like` all of one length, so that prompts of a template can be averaged."""
    raw = tiny_pairs(module, n=5)
    if not like:
        return raw
    length = int(raw["lengths"].min())
    raw = {name: raw[name].clone() for name in ("clean", "corrupted", "answers", "wrong_answers")}
    raw = {name: x[:, :length] if name in {"clean", "corrupted"} else x for name, x in raw.items()}
    return raw | {"lengths": torch.full((5,), length), "answer_positions": torch.full((5,), length - 1)}


def other_writes(oracle, ablation):
    """What stands for an ablated edge, from the corrupted run's writes."""
    corrupted = oracle.other_writes
    if ablation == "resample":
        return corrupted
    if ablation == "zero":
        return {name: torch.zeros_like(x) for name, x in corrupted.items()}
    rows = [[j for j, name in enumerate(TEMPLATES) if name == own] for own in TEMPLATES]
    return {name: torch.stack([x[same].mean(0) for same in rows]) for name, x in corrupted.items()}


@pytest.mark.parametrize(("family", "ablation"), CASES)
def test_agrees_with_hooks(family, ablation):
    module = tiny_module(family, dtype=torch.float64)
    raw = raw_pairs(module, like=ablation == "mean")
    oracle = CircuitOracle(module, raw)
    oracle.other = other_writes(oracle.plain, ablation)
    circuits = random_circuits(module)
    expected = torch.stack([logit_diff(oracle.logits(edges), raw) for edges in circuits])
    pairs = replace(prompts(raw), templates=TEMPLATES)
    runner = CircuitRunner(wb.wrap_model(module), pairs, ablation=ablation)
    found = torch.from_numpy(runner.run(circuits))
    assert len({round(float(x), 6) for x in expected.mean(1)}) > 6, "the circuits should differ"
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(torch.from_numpy(runner.clean), expected[-2], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(torch.from_numpy(runner.none), expected[-1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_windows_that_begin_late_agree_with_hooks(family):
    """Prompts that first differ late are run from there on, over the keys of the positions before."""
    module = tiny_module(family, dtype=torch.float64)
    raw = {name: x[list(LATE)] for name, x in raw_pairs(module).items()}
    oracle = CircuitOracle(module, raw)
    circuits = random_circuits(module, seed=1)
    expected = torch.stack([logit_diff(oracle.logits(edges), raw) for edges in circuits])
    runner = CircuitRunner(wb.wrap_model(module), prompts(raw))
    assert runner._reference(runner._batches[0]).window.prefix > 0
    torch.testing.assert_close(torch.from_numpy(runner.run(circuits)), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", ["gpt2", "neox_parallel", "llama"])
def test_whole_graph_is_the_clean_run_and_no_edges_the_corrupted_run(family):
    """By the module itself, without any hook."""
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    at = torch.arange(5), raw["answer_positions"]
    with torch.no_grad():
        clean, corrupted = (logit_diff(module(raw[name]).logits[at], raw) for name in ("clean", "corrupted"))
    runner = CircuitRunner(wb.wrap_model(module), prompts(raw))
    whole, none = torch.from_numpy(runner.run([runner.wiring.everything, []]))
    torch.testing.assert_close(whole, clean, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(none, corrupted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("metric", ["answer_logprob", "kl_to_clean"])
def test_other_metrics_agree_with_hooks(metric):
    module = tiny_module("llama", dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    oracle = CircuitOracle(module, raw)
    circuits = random_circuits(module, seed=2)
    with torch.no_grad():
        clean = module(raw["clean"]).logits[torch.arange(5), raw["answer_positions"]].log_softmax(-1)

    def score(logits):
        if metric == "answer_logprob":
            return logits.softmax(-1).gather(1, raw["answers"]).sum(1).log()
        return (clean.exp() * (clean - logits.log_softmax(-1))).sum(-1)

    expected = torch.stack([score(oracle.logits(edges)) for edges in circuits])
    found = CircuitRunner(wb.wrap_model(module), prompts(raw), metric=metric).run(circuits)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=TOLERANCE)


def test_a_circuit_that_lacks_one_edge_is_that_edge_noised():
    """Then a circuit's run and the effect of an edge are the same thing, measured by another engine."""
    module = tiny_module("llama", dtype=torch.float64)
    model, pairs = wb.wrap_model(module), prompts(tiny_pairs(module, n=5))
    effects = wb.edge_effects(model, pairs, method="exact", per_prompt=True)
    runner = CircuitRunner(model, pairs)
    names = (effects.frame["sender"] + "->" + effects.frame["receiver"]).tolist()
    chosen = range(0, len(names), 7)
    lacking = []
    for index in chosen:
        mask = runner.wiring.everything.copy()
        mask &= ~runner.wiring.mask([names[index]])
        lacking.append(mask)
    found = runner.run(lacking) - runner.clean
    np.testing.assert_allclose(found, effects.per_prompt[list(chosen)], rtol=0, atol=TOLERANCE)
    assert np.abs(found).max() > 0.05
