"""What must not matter: memory, chunks, order, padding, neighbours in the batch. And what rounding alone does."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from families import tiny_module, tiny_pairs
from unit.patching.patching_cases import model_of, prompts
from workbench.errors import BudgetError
from workbench.patching import exact
from workbench.patching.engine import Settings, _batches
from workbench.patching.graph import Graph
from workbench.patching.noise import noise_floor
from workbench.patching.runs import make_runs

METHODS = ("exact", "receiver_exact", "eap", "eap_ig")
FAMILIES = ("gpt2", "llama", "neox_parallel", "qwen3")
N = 6


class Case:
    """A model, its prompts, and the effects of a third of its edges by every method."""

    def __init__(self, family):
        self.model = model_of(family)
        self.raw = tiny_pairs(self.model.module, n=N)
        self.pairs = prompts(self.raw)
        self.names = Graph(self.model.spec).all_edges().names[::3]
        self.expected = {method: self.effects(method) for method in METHODS}

    def effects(self, method, pairs=None, **arguments):
        arguments = {"edges": self.names, "steps": 2, **arguments}
        pairs = self.pairs if pairs is None else pairs
        return wb.edge_effects(self.model, pairs, method=method, per_prompt=True, **arguments).per_prompt

    def check(self, columns=None, **arguments):
        for method, every in self.expected.items():
            expected = every if columns is None else every[:, columns]
            np.testing.assert_allclose(self.effects(method, **arguments), expected, rtol=0, atol=1e-10, err_msg=method)


CASES: dict[str, Case] = {}


def case_of(family):
    if family not in CASES:
        CASES[family] = Case(family)
    return CASES[family]


@pytest.fixture(params=FAMILIES)
def case(request):
    return case_of(request.param)


def smallest_budget(case, pairs):
    """The least budget, to about 10 %, with which every method still runs."""
    low, high = 1.0, float(1 << 26)
    while high / low > 1.1:
        middle = (low * high) ** 0.5
        try:
            case.effects("eap_ig", pairs, edges=["m0->logits"], budget_bytes=int(middle))
            high = middle
        except BudgetError:
            low = middle
    return int(high)


@pytest.mark.parametrize("family", ["llama", "neox_parallel"])
def test_memory_budget(family):
    """With the least budget every prompt runs alone, and senders are scored one or a few at a time."""
    case, rows = case_of(family), [0, 1, 3]
    pairs = case.pairs.subset(rows)
    least = smallest_budget(case, pairs)
    fixed = Settings(method="eap_ig", direction="noising", metric="logit_diff", steps=2, budget_bytes=least, seed=0)
    parts = _batches(case.model.weights, pairs, fixed, Graph(case.model.spec), sweeping=True)
    assert sorted(torch.cat(parts).tolist()) == [0, 1, 2]
    assert len(parts) == 3
    case.check(rows, pairs=pairs, budget_bytes=least)


@pytest.mark.parametrize("tokens", [1, 150, 1 << 20])
def test_edges_walked_together(case, tokens, monkeypatch):
    monkeypatch.setattr(exact, "CPU_TOKENS", tokens)
    found = case.effects("exact")
    np.testing.assert_allclose(found, case.expected["exact"], rtol=0, atol=1e-10)


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(N)), st.integers(1, N))
def test_order_and_company_of_prompts(order, size):
    """Any of the prompts, in any order: widths and beginnings of windows change with the company."""
    chosen = order[:size]
    case_of("llama").check(chosen, pairs=case_of("llama").pairs.subset(chosen))


def test_prompts_in_two_calls(case):
    for part in ([0, 1, 2], [3, 4, 5]):
        case.check(part, pairs=case.pairs.subset(part))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 6), st.integers(0, 100), st.integers(0, 100))
def test_padding(more, clean, corrupted):
    """Neither its width nor its tokens, which may differ between the versions."""
    raw = {key: value.clone() for key, value in case_of("llama").raw.items()}
    for key, token in (("clean", clean), ("corrupted", corrupted)):
        raw[key] = torch.nn.functional.pad(raw[key], (0, more))
        raw[key][torch.arange(raw[key].shape[1]) >= raw["lengths"][:, None]] = token
    case_of("llama").check(pairs=prompts(raw))


def test_tokens_behind_the_answer_position(case):
    """The answer can be read before the end of a prompt; what comes later, alike in both or not, is not seen."""
    n = len(case.raw["lengths"])
    later = torch.randint(101, (2, n, 3), generator=torch.Generator().manual_seed(3))
    for version in (later[[0, 0]], later):
        raw = dict(case.raw)
        for key, tokens in zip(("clean", "corrupted"), version, strict=True):
            raw[key] = torch.nn.functional.pad(raw[key], (0, 3))
            for row, length in enumerate(raw["lengths"].tolist()):
                raw[key][row, length : length + 3] = tokens[row]
        raw["lengths"] = case.raw["lengths"] + 3
        case.check(pairs=prompts(raw))


def test_a_prompt_that_is_not_corrupted_has_no_effects(case):
    raw = {key: value.clone() for key, value in case.raw.items()}
    raw["corrupted"][[1, 4]] = raw["clean"][[1, 4]]
    others = [0, 2, 3, 5]
    for method, expected in case.expected.items():
        found = case.effects(method, prompts(raw))
        assert abs(found[:, [1, 4]]).max() < 1e-12
        np.testing.assert_allclose(found[:, others], expected[:, others], rtol=0, atol=1e-10)


def test_a_difference_only_behind_the_answer_position_has_no_effects(case):
    """The window is then the answer position alone."""
    raw = {**case.raw, "clean": torch.nn.functional.pad(case.raw["clean"], (0, 2))}
    raw["lengths"] = raw["lengths"] + 2
    raw["corrupted"] = raw["clean"].clone()
    rows = torch.arange(N)
    raw["corrupted"][rows, raw["lengths"] - 1] = (raw["clean"][rows, raw["lengths"] - 1] + 1) % 101
    for method in METHODS:
        assert abs(case.effects(method, prompts(raw))).max() < 1e-12


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_edges_by_name(data):
    """In any order, some of them, some named twice: the same effects, each edge once."""
    case = case_of("llama")
    chosen = data.draw(st.lists(st.integers(0, len(case.names) - 1), min_size=1, max_size=30))
    names = [case.names[i] for i in chosen]
    once = list(dict.fromkeys(chosen))
    for method, expected in case.expected.items():
        result = wb.edge_effects(case.model, case.pairs, method=method, edges=names, steps=2, per_prompt=True)
        assert (result.frame["sender"] + "->" + result.frame["receiver"]).tolist() == [case.names[i] for i in once]
        np.testing.assert_allclose(result.per_prompt, expected[once], rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_off_by_a_small_multiple_of_the_noise_floor(family):
    """An effect is a difference of two rounded metrics: its error in float32 is some noise floors, not hundreds.

    The root mean square error over edges and prompts is held to 3 floors, the largest of some 1,500 effects to 30.
    """
    results = {}
    for dtype in (torch.float32, torch.float64):
        model = wb.wrap_model(tiny_module(family, dtype=dtype))
        results[dtype] = wb.edge_effects(model, prompts(tiny_pairs(model.module, n=N)), per_prompt=True)
    single, double = results[torch.float32], results[torch.float64]
    assert single.per_prompt.dtype == np.float32
    error = abs(single.per_prompt - double.per_prompt)
    assert 0 < double.noise_floor < 1e-7 * single.noise_floor
    assert 1e-8 < single.noise_floor < 1e-5
    assert np.sqrt((error**2).mean()) < 3 * single.noise_floor
    assert error.max() < 30 * single.noise_floor
    assert error.max() > 0.1 * single.noise_floor  # a floor far above what rounding does would flag real effects


def test_noise_floor_is_of_the_size_of_rounding():
    """It scales with the machine epsilon of the dtype, whatever the draw."""
    for dtype in (torch.float32, torch.float64):
        model = model_of("llama", dtype)
        runs = make_runs(
            model.weights, prompts(tiny_pairs(model.module, n=N)), direction="noising", metric="logit_diff"
        )
        floors = [noise_floor(runs, seed) for seed in range(3)]
        assert len(set(floors)) == 3
        assert max(floors) < 3 * min(floors)
        assert 0.1 < floors[0] / torch.finfo(dtype).eps < 100


def test_effects_below_the_noise_floor_are_flagged():
    model = model_of("llama")
    raw = tiny_pairs(model.module, n=N)
    flagged = wb.edge_effects(model, replace(prompts(raw), corrupted=raw["clean"]), edges=["m0->logits"])
    assert flagged.frame["below_noise"].all()
    assert not wb.edge_effects(model, prompts(raw), edges=["m0->logits"]).frame["below_noise"].any()
