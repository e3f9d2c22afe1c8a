"""Circuits of the default model: the ends of the scale, and one that is better than chance on unseen templates."""

import numpy as np
import pytest

import workbench_circuits as wc
from workbench_circuits.discovery import find
from workbench_circuits.evaluation import random_circuits
from workbench_circuits.run import CircuitRunner

pytestmark = pytest.mark.model


def test_whole_graph_and_empty_circuit(default_model):
    pairs = wc.load_task("ioi").pairs(default_model, 4, seed=0)
    runner = CircuitRunner(default_model, pairs)
    at = {"unembed_positions": pairs.answer_positions}
    rows = np.arange(4)
    expected = []
    for tokens in (pairs.clean, pairs.corrupted):
        logits = default_model.forward(tokens, **at).numpy()
        right, wrong = (logits[rows, ids[:, 0].numpy()] for ids in (pairs.answers, pairs.wrong_answers))
        expected.append(right - wrong)
    whole, none = runner.run([runner.wiring.everything, []])
    np.testing.assert_allclose(whole, expected[0], rtol=0, atol=2e-3)
    np.testing.assert_allclose(none, expected[1], rtol=0, atol=2e-3)


def test_a_circuit_of_two_percent_beats_chance_on_unseen_templates(default_model):
    share = 1413
    found = find(
        default_model,
        "ioi",
        n=16,
        n_held_out=8,
        n_edges=share,
        n_resamples=10,
    )
    circuit = found.circuit
    assert len(circuit) <= 0.02 * circuit.graph.n_edges
    assert circuit.competence.verdict == "solved"
    assert circuit.warning is None
    assert not set(found.prompts.train.templates) & set(found.prompts.held_out.templates)
    drawn = random_circuits(found.judge, share, count=2)
    assert circuit.held_out.faithfulness.value > drawn.faithfulness.max() + 0.2
    assert 0 < circuit.stability.jaccard < 1
