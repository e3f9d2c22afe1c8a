"""Two compiled circuits that are known exactly: the oracle and the engine must find them, and nothing else."""

import numpy as np
import pytest
import torch

from oracle.hook_oracle import HookOracle, all_edges, logit_diff
from oracle.tracr_programs import (
    PROGRAMS,
    TracrModule,
    circuit,
    run_program,
    tracr_pairs,
    wired,
    wired_by_label,
    workbench_model,
)
from workbench import PromptPairs
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Graph
from workbench.patching.runs import make_runs

SETTINGS = ("tokens", "slots")

# Read off the programs: reverse computes its length in a0 (how many keys are words) and m0, the opposite index in m1
# and m2, and fetches the token there in a3; xproportion marks x in m0 and averages the marks so far in a1.
CIRCUITS = {
    ("reverse", "tokens"): {
        "input->a0.h0<q>",
        "input->a0.h0<k>",
        "a0.h0->m0",
        "m0->m1",
        "m1->m2",
        "m2->a3.h0<q>",
        "input->a3.h0<v>",
        "a3.h0->logits",
    },
    ("xproportion", "tokens"): {"input->m0", "m0->a1.h0<v>", "a1.h0->logits"},
}
# With positions (and BOS, whose value a0 averages) resampled too:
CIRCUITS["reverse", "slots"] = CIRCUITS["reverse", "tokens"] | {"input->a0.h0<v>", "input->m1", "input->a3.h0<k>"}
CIRCUITS["xproportion", "slots"] = CIRCUITS["xproportion", "tokens"] | {"input->a1.h0<q>", "input->a1.h0<k>"}


@pytest.fixture(params=[(p, s) for p in PROGRAMS for s in SETTINGS], ids="-".join)
def module(request):
    return TracrModule(*request.param)


def metric(logits, pairs):
    """Logit difference where an unused token, with logit 0, stands beside the program's own outputs."""
    return logit_diff(torch.nn.functional.pad(logits, (0, 1)), pairs)


def roc_auc(scores, truth):
    """Probability that an edge of the circuit scores above one outside it, ties counted half."""
    inside = np.array([score for edge, score in scores.items() if edge in truth])
    outside = np.array([score for edge, score in scores.items() if edge not in truth])
    assert len(inside) == len(truth)
    assert len(outside) > 0
    above = inside[:, None] - outside[None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def noising(module, pairs):
    oracle = HookOracle(module, pairs, metric=metric)
    return {f"{s}->{r}": oracle.edge_effect(s, r) for s, r in all_edges(module)}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_module_computes_what_tracr_computes(program):
    module = TracrModule(program)
    stream = torch.from_numpy(module.arrays["expected"]).double()
    expected = stream @ module.head.weight.T
    ours = module(torch.from_numpy(module.arrays["inputs"])).logits
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)  # theirs is float32
    assert expected.abs().max() > 0.4


def test_the_module_computes_the_program(module):
    rng = np.random.default_rng(1)
    vocabulary = sorted(set(module.arrays["tokens"].tolist()) - {"BOS", "PAD"})
    outputs = module.arrays["outputs"].tolist()
    for index in range(40):
        words = rng.choice(vocabulary, size=1 + index % 5).tolist()
        logits = module(torch.tensor([module.ids(words)])).logits[0, 1 : len(words) + 1]
        says = run_program(module.program, words)
        if module.program == "reverse":
            assert [outputs[i] for i in logits.argmax(-1)] == says
        else:
            torch.testing.assert_close(logits[:, 0], torch.tensor(says, dtype=logits.dtype), rtol=0, atol=1e-6)


def test_in_slots_a_prompt_is_a_set():
    module = TracrModule("reverse", "slots")
    order = [4, 2, 0, 5, 1, 3]
    plain, mixed = (torch.tensor([module.ids(["1", "3", "2"], o)]) for o in (None, order))
    torch.testing.assert_close(module(plain).logits[:, order], module(mixed).logits, rtol=0, atol=1e-12)


def test_workbench_model_agrees_with_the_module(module):
    pairs = tracr_pairs(module)
    model = workbench_model(module)
    for tokens in (pairs["clean"], pairs["corrupted"]):
        ours, theirs = model.forward(tokens), module(tokens).logits
        n_outputs = theirs.shape[-1]
        torch.testing.assert_close(ours[..., :n_outputs], theirs, rtol=0, atol=1e-12)
        assert ours[..., n_outputs:].abs().max() == 0
    assert model.path == "fast"
    assert not model.spec.causal


def test_ground_truth(module):
    """By weights, by the names of directions, and as the programs are understood."""
    assert wired(module) == wired_by_label(module)
    assert circuit(module) == CIRCUITS[module.program, module.setting]
    # m0 of reverse also reads which slot is BOS, and clears there a direction that nobody reads again
    dead = {"input->m0"} if (module.program, module.setting) == ("reverse", "slots") else set()
    assert wired(module) - circuit(module) == dead


def test_the_oracle_finds_the_circuit_and_nothing_else(module):
    effects = {edge: float(e.abs().mean()) for edge, e in noising(module, tracr_pairs(module)).items()}
    truth = circuit(module)
    assert roc_auc(effects, truth) == 1.0
    assert min(effects[edge] for edge in truth) > 0.05
    assert max(effect for edge, effect in effects.items() if edge not in truth) < 1e-12


def engine_effects(module, pairs):
    """Exact effects by the engine, per prompt."""
    model = workbench_model(module)
    prompts = PromptPairs.from_tokens(
        pairs["clean"],
        pairs["corrupted"],
        pairs["answers"],
        pairs["wrong_answers"],
        lengths=pairs["lengths"],
        answer_positions=pairs["answer_positions"],
    )
    runs = make_runs(model.fast_weights, prompts, direction="noising", metric="logit_diff")
    edges = Graph(model.spec).all_edges()
    found = {}
    for index, values in exact_effects(runs, edges, budget_bytes=1 << 28):
        found |= {edges.names[int(i)]: value for i, value in zip(index, values, strict=True)}
    return found


@pytest.mark.parametrize("reads", ["anywhere", "early"])
def test_the_engine_finds_the_circuit_and_nothing_else(module, reads):
    """`early`: every prompt is read at its first word, which depends on later words, as attention is not causal."""
    pairs = tracr_pairs(module)
    if reads == "early":
        first = pairs["answer_positions"] == 1
        pairs = {name: value[first] for name, value in pairs.items()}
    ours, theirs = engine_effects(module, pairs), noising(module, pairs)
    assert set(ours) == set(theirs)
    for edge, effect in theirs.items():
        torch.testing.assert_close(ours[edge], effect, rtol=0, atol=1e-10, msg=f"{edge}: {ours[edge]} {effect}")
    scores = {edge: float(effect.abs().mean()) for edge, effect in ours.items()}
    if reads == "anywhere":
        assert roc_auc(scores, circuit(module)) == 1.0
