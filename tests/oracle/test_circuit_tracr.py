"""Circuits of compiled programs, which are known exactly: ways of finding circuits must give them, edge by edge."""

import pytest
import torch

import workbench as wb
from oracle.circuit_oracle import CircuitOracle
from oracle.test_tracr import CIRCUITS, SETTINGS, metric
from oracle.tracr_programs import PROGRAMS, TracrModule, circuit, tracr_pairs, workbench_model
from workbench import PromptPairs
from workbench_circuits._roc import edge_roc
from workbench_circuits.discovery import Ranking, acdc, select, smallest
from workbench_circuits.run import CircuitRunner


@pytest.fixture(scope="module", params=[(p, s) for p in PROGRAMS for s in SETTINGS], ids="-".join)
def case(request):
    """Module, raw pairs, model, prompts and the edges of the circuit."""
    module = TracrModule(*request.param)
    raw = tracr_pairs(module)
    keys = ("clean", "corrupted", "answers", "wrong_answers", "lengths", "answer_positions")
    pairs = PromptPairs.from_tokens(**{key: raw[key] for key in keys})
    assert circuit(module) == CIRCUITS[request.param]
    return module, raw, workbench_model(module), pairs, CIRCUITS[request.param]


def names(runner, mask):
    return set(runner.wiring.edges(mask).names)


def test_the_known_circuit_does_all_that_the_program_does(case):
    """Nothing outside it matters; without any one of its edges the program fails on some prompt."""
    _, _, model, pairs, truth = case
    runner = CircuitRunner(model, pairs)
    whole, *lacking = runner.run([truth, *(truth - {edge} for edge in sorted(truth))])
    torch.testing.assert_close(torch.from_numpy(whole), torch.from_numpy(runner.clean), rtol=0, atol=1e-9)
    for edge, values in zip(sorted(truth), lacking, strict=True):
        assert abs(values - runner.clean).max() > 0.05, edge


def test_runs_agree_with_hooks_where_attention_is_not_causal(case):
    module, raw, model, pairs, truth = case
    oracle = CircuitOracle(module, raw, metric=metric)
    everything = names(CircuitRunner(model, pairs), CircuitRunner(model, pairs).wiring.everything)
    few = sorted(truth)[::2]
    circuits = [truth, few, everything - set(few), set()]
    expected = torch.stack([metric(oracle.logits(edges), raw) for edges in circuits])
    found = torch.from_numpy(CircuitRunner(model, pairs).run(circuits))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("tau", [1e-3, 1e-2])
def test_acdc_recovers_it(case, tau):
    _, _, model, pairs, truth = case
    runner = CircuitRunner(model, pairs)
    assert names(runner, acdc(runner, runner.wiring.everything, tau=tau).mask) == truth


@pytest.mark.parametrize("algorithm", ["threshold", "greedy"])
@pytest.mark.parametrize("method", ["exact", "eap"])
def test_selection_by_scores_recovers_it(case, method, algorithm):
    """Given its size, and as the smallest circuit that does all of it."""
    _, _, model, pairs, truth = case
    runner = CircuitRunner(model, pairs)
    ranking = Ranking.of(runner.wiring.graph, wb.edge_effects(model, pairs, method=method))
    assert edge_roc(ranking, truth).auc == 1.0
    assert names(runner, select(ranking, len(truth), algorithm=algorithm)) == truth
    sized = smallest(runner, ranking, target=1 - 1e-9, algorithm=algorithm, at_once=3)
    assert sized.reached
    assert names(runner, sized.mask) == truth
