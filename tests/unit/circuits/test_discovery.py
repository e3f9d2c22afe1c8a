"""Selecting, sizing, pruning and shrinking circuits, against slow ways to the same thing."""

from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from unit.patching.patching_cases import model_of, tiny_prompts
from workbench.errors import DataError, PromptError
from workbench.patching import EdgeEffects
from workbench_circuits.discovery import (
    Ranking,
    acdc,
    contributions,
    discover,
    find,
    greedy_order,
    refine,
    select,
    smallest,
    stability,
    threshold_order,
)
from workbench_circuits.discovery.prompts import draw_prompts
from workbench_circuits.discovery.scores import measured_effects, two_sided
from workbench_circuits.run import CircuitRunner


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def pairs(model):
    return tiny_prompts(model, n=8)


@pytest.fixture(scope="module")
def runner(model, pairs):
    return CircuitRunner(model, pairs)


@pytest.fixture(scope="module")
def effects(model, pairs):
    return wb.edge_effects(model, pairs, method="exact", per_prompt=True)


@pytest.fixture(scope="module")
def ranking(runner, effects):
    return Ranking.of(runner.wiring.graph, effects)


def nodes_into(receiver, group):
    """Nodes whose value depends on a receiver."""
    node, _, _ = receiver.partition("<")
    if ".kv" not in node:
        return [node]
    layer, kv = node[1:].split(".kv")
    return [f"a{layer}.h{int(kv) * group + i}" for i in range(group)]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=5, deadline=None)
def test_greedy_takes_the_best_edge_that_is_connected(runner, seed):
    """By going over all edges again at every step."""
    edges = runner.wiring.graph.all_edges()
    ranking = Ranking(edges=edges, effect=np.random.default_rng(seed).permutation(len(edges)).astype(float))
    taken = greedy_order(ranking, 40)
    names = edges.names
    reached, left = {"logits"}, set(range(len(names)))
    for edge in taken:
        open_edges = [i for i in left if reached & set(nodes_into(names[i].split("->")[1], 2))]
        assert edge == max(open_edges, key=lambda i: ranking.score[i])
        left.remove(int(edge))
        reached.add(names[edge].split("->")[0])


def test_orders_are_of_all_edges_and_the_threshold_is_one(ranking):
    assert sorted(threshold_order(ranking).tolist()) == list(range(190))
    assert sorted(greedy_order(ranking).tolist()) == list(range(190))
    scores = ranking.score[threshold_order(ranking)]
    assert (np.diff(scores) <= 0).all()


@pytest.mark.parametrize("algorithm", ["threshold", "greedy"])
def test_selection_is_connected_and_of_those_taken(runner, ranking, algorithm):
    for n in (0, 3, 20, 80, 190):
        mask = select(ranking, n, algorithm=algorithm)
        order = threshold_order(ranking) if algorithm == "threshold" else greedy_order(ranking)
        taken = {ranking.edges.names[i] for i in order[:n]}
        assert set(runner.wiring.edges(mask).names) <= taken
        np.testing.assert_array_equal(runner.wiring.prune(mask), mask)
    assert select(ranking, 190).sum() == 190
    with pytest.raises(PromptError, match="n=191"):
        select(ranking, 191)
    with pytest.raises(PromptError, match="algorithm 'best'"):
        select(ranking, 3, algorithm="best")


def test_signed_rankings_put_what_helps_first(model, pairs, runner):
    graph = runner.wiring.graph
    noising = wb.edge_effects(model, pairs, method="exact", per_prompt=True)
    denoising = wb.edge_effects(model, pairs, method="exact", direction="denoising", per_prompt=True)
    harms_most = noising.frame.sort_values("effect").iloc[0]
    first = Ranking.of(graph, noising, signed=True)
    assert first.edges.names[threshold_order(first)[0]] == f"{harms_most['sender']}->{harms_most['receiver']}"
    gives_most = denoising.frame.sort_values("effect").iloc[-1]
    second = Ranking.of(graph, denoising, signed=True)
    assert second.edges.names[threshold_order(second)[0]] == f"{gives_most['sender']}->{gives_most['receiver']}"
    both = two_sided(graph, noising, denoising)
    expected = (denoising.frame["effect"] - noising.frame["effect"]) / 2
    np.testing.assert_allclose(both.frame["effect"], expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(Ranking.of(graph, both, signed=True).score, expected, rtol=0, atol=1e-12)
    assert set(both.frame["direction"]) == {"both"}
    kl = wb.edge_effects(model, pairs, method="exact", metric="kl_to_clean")
    assert Ranking.of(graph, kl, signed=True).score[0] == kl.frame["effect"].iloc[0], "KL grows where an edge is missed"
    with pytest.raises(PromptError, match="per_prompt=True"):
        two_sided(graph, noising, kl)


@pytest.mark.parametrize("target", [0.9])
def test_the_smallest_size_that_suffices(runner, ranking, target):
    found = smallest(runner, ranking, target=target, algorithm="threshold", at_once=3)
    assert found.reached
    assert found.faithfulness >= target
    f = {row["taken"]: row["faithfulness"] for row in found.tried.to_dict("records")}
    for n, value in f.items():
        assert value == pytest.approx(float(runner.f(runner.run([select(ranking, n)]))[0]))
        if n < found.taken:
            assert value < target, "a smaller size that was tried suffices"
    below = max(n for n in f if n < found.taken)
    assert found.taken - below <= max(1, found.taken // 50)


def test_a_target_that_nothing_reaches(runner, ranking):
    found = smallest(runner, ranking, target=50.0)
    assert not found.reached
    assert found.taken == 190
    with pytest.raises(PromptError, match="target=0"):
        smallest(runner, ranking, target=0)


def one_by_one(runner, start, tau, *, absolute):
    """ACDC as the paper has it: one removal, one run."""
    mask = start.copy()
    value = float(runner.run([mask])[0].mean())
    for r in range(mask.shape[0] - 1, -1, -1):
        for s in range(mask.shape[1] - 1, -1, -1):
            if not mask[r, s]:
                continue
            mask[r, s] = False
            new = float(runner.run([mask])[0].mean())
            harm = abs(new - value) if absolute else value - new
            if harm < tau:
                value = new
            else:
                mask[r, s] = True
    return mask, value


@pytest.mark.parametrize(("tau", "absolute"), [(0.03, True), (0.02, False)])
def test_acdc_is_one_removal_at_a_time(runner, ranking, tau, absolute):
    start = select(ranking, 50)
    expected, value = one_by_one(runner, start, tau, absolute=absolute)
    for block in (1, 16):
        found = acdc(runner, start, tau=tau, absolute=absolute, block=block)
        np.testing.assert_array_equal(found.mask, expected)
        assert found.value == pytest.approx(value)
        assert found.tried + found.dead == start.sum()
    assert 0 < expected.sum() < start.sum()


def test_acdc_goes_on_where_it_was_broken_off(runner, ranking, tmp_path):
    start = select(ranking, 50)
    expected = acdc(runner, start, tau=0.01)
    state = tmp_path / "acdc.json"
    calls = []

    def interrupt(line):
        calls.append(line)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        acdc(runner, start, tau=0.01, resume=state, progress=interrupt)
    assert state.exists()
    with pytest.raises(DataError, match="holds a pruning of another"):
        acdc(runner, start, tau=0.02, resume=state)
    after = []
    found = acdc(runner, start, tau=0.01, resume=state, progress=after.append)
    np.testing.assert_array_equal(found.mask, expected.mask)
    assert found.tried + found.dead == start.sum()
    assert not state.exists()
    state.write_text("{")
    with pytest.raises(DataError, match="is damaged"):
        acdc(runner, start, tau=0.01, resume=state)


def test_contributions_add_up_to_what_the_circuit_does(runner):
    """Completeness of integrated gradients, over edges (Sundararajan et al. 2017)."""
    mask = runner.wiring.everything & (np.random.default_rng(0).random(runner.wiring.shape) < 0.6)
    found = contributions(runner, mask, steps=40)
    expected = runner.run([mask])[0].mean() - runner.none.mean()
    assert found[mask].sum() == pytest.approx(expected, abs=0.03 * abs(found[mask]).sum())
    assert (found[~runner.wiring.everything] == 0).all()


@pytest.mark.parametrize("family", ["gpt2", "neox_parallel", "qwen3"])
def test_contributions_are_derivatives(family):
    """Of the metric by the weight of an edge: at an edge that enters linearly, adding it is its derivative."""
    model = model_of(family)
    runner = CircuitRunner(model, tiny_prompts(model, n=3), metric="logit_diff")
    names = [name for name in runner.wiring.graph.all_edges().names if not name.endswith("logits")]
    base = runner.wiring.mask(names)
    found = contributions(runner, base, steps=1)
    from workbench_circuits._walk import Plan, walk

    step = 1e-5
    kv = "kv1" if model.spec.group_size > 1 else "h3"
    for name in ("input->logits", "a0.h1->m1", f"m0->a2.{kv}<v>", "a1.h0->a2.h0<q>", f"input->a1.{kv}<k>"):
        place = np.nonzero(runner.wiring.mask([name]))
        values = []
        for sign in (1, -1):
            weights = base.astype(float)
            weights[place] += sign * step
            everyone = np.ones(runner.wiring.shape[1], dtype=bool)
            plan = Plan(masks=weights[None], active=everyone, own=~everyone)
            total = sum(float(ref.metric.read(walk(ref, runner.wiring, plan)).sum()) for _, ref in runner.references())
            values.append(total / 3)
        assert found[place][0] == pytest.approx((values[0] - values[1]) / (2 * step), abs=1e-6), name


def test_the_same_prompts_again_give_the_same_circuit(ranking, effects):
    """Without spread among prompts every resample is the sample."""
    mask = select(ranking, 40, algorithm="greedy")
    equal = np.repeat(effects.per_prompt.mean(1, keepdims=True), 5, axis=1)
    found = stability(ranking, equal, mask, taken=40, n_resamples=5)
    assert (found.inclusion == 1).all()
    assert (found.jaccard.value, found.head_jaccard.value, found.pairwise) == (1, 1, 1)
    assert found.core == mask.sum()


def test_stability_by_hand(ranking, effects, runner):
    mask = select(ranking, 40)
    found = stability(ranking, effects.per_prompt, mask, taken=40, algorithm="threshold", n_resamples=6, seed=9)
    draw = np.random.default_rng(9)
    sets = []
    for _ in range(6):
        rows = draw.integers(8, size=8)
        again = replace(ranking, effect=effects.per_prompt[:, rows].mean(1))
        sets.append(set(runner.wiring.edges(select(again, 40)).names))
    names = runner.wiring.edges(mask).names
    own = [len(s & set(names)) / len(s | set(names)) for s in sets]
    pairwise = [len(a & b) / len(a | b) for i, a in enumerate(sets) for b in sets[i + 1 :]]
    np.testing.assert_allclose(found.inclusion, [np.mean([n in s for s in sets]) for n in names])
    assert found.jaccard.value == pytest.approx(np.mean(own))
    assert found.pairwise == pytest.approx(np.mean(pairwise))


@pytest.mark.parametrize("algorithm", ["refine", "greedy", "threshold", "acdc"])
def test_discover_goes_the_whole_way(model, algorithm, tmp_path):
    pairs = tiny_prompts(model, n=16)
    said = []
    options = {"algorithm": algorithm, "method": "eap_ig", "n_edges": 60, "n_resamples": 4}
    found = find(model, pairs, resume=tmp_path / "work", progress=said.append, **options)
    circuit = found.circuit
    assert len(circuit) <= 60 or algorithm == "acdc"
    assert circuit.algorithm == algorithm
    hashes = {p.data_hash for p in (found.prompts.train, found.prompts.sizing, found.prompts.held_out)}
    assert len(hashes) == 3
    assert circuit.held_out.data_hash == found.prompts.held_out.data_hash
    assert circuit.train.data_hash == found.prompts.train.data_hash
    again = circuit.evaluate(model, found.prompts.held_out)
    assert again.faithfulness.value == pytest.approx(circuit.held_out.faithfulness.value)
    assert circuit.competence.verdict in {"solved", "above chance", "not solved"}
    assert (circuit.stability is None) == (algorithm == "acdc")
    assert circuit.provenance["seed"] == 0
    assert said
    assert discover(model, pairs, resume=tmp_path / "work", **options).edges == circuit.edges


def test_effects_are_kept_and_taken_up(model, pairs, tmp_path, monkeypatch):
    first = measured_effects(model, pairs, method="eap", resume=tmp_path)
    monkeypatch.setattr("workbench.patching.edge_effects", lambda *a, **k: pytest.fail("computed again"))
    again = measured_effects(model, pairs, method="eap", resume=tmp_path)
    assert isinstance(again, EdgeEffects)
    np.testing.assert_array_equal(again.per_prompt, first.per_prompt)


def test_prompts_are_parted_by_template(model, pairs):
    named = replace(pairs, templates=tuple(f"t{i // 2}/x" for i in range(8)))
    parts = draw_prompts(model, named)
    families = [set(p.templates) for p in (parts.train, parts.held_out)]
    assert not families[0] & families[1]
    assert parts.split == "templates of their own"
    assert draw_prompts(model, pairs).split == "prompts of the same templates"
    given = draw_prompts(model, pairs, held_out=named)
    assert given.held_out is named


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "best"}, "algorithm 'best' is not one of refine, greedy, threshold, acdc"),
        ({"target": None}, "give the faithfulness to reach"),
        ({"target": -1.0}, "must be above 0"),
        ({"n_edges": 10**6, "algorithm": "greedy", "method": "eap"}, "n_edges=1000000"),
    ],
)
def test_bad_arguments(model, pairs, options, message):
    with pytest.raises(PromptError, match=message):
        discover(model, pairs, **options)


def test_refining_ends_at_the_size_asked_for(runner, ranking, monkeypatch):
    monkeypatch.setattr(import_module("workbench_circuits.discovery.refine"), "START", 0.3)
    found = refine(runner, ranking, 5)
    rows = found.frame.to_dict("records")
    assert rows[0]["n_edges"] <= 57
    assert len(rows) > 3
    assert rows[-1]["n_edges"] <= 5
    for mask, row in zip(found.masks, rows, strict=True):
        assert mask.sum() == row["n_edges"]
        assert float(runner.f(runner.run([mask]))[0]) == pytest.approx(row[row["rule"]])
        np.testing.assert_array_equal(runner.wiring.prune(mask), mask)
        if not np.isnan(row["within"]):
            other = {"within": "ranking", "ranking": "within"}[row["rule"]]
            assert abs(1 - row[row["rule"]]) <= abs(1 - row[other])
    np.testing.assert_array_equal(found.at(runner, 80), select(ranking, 80))
    np.testing.assert_array_equal(select(ranking, 190), runner.wiring.everything)
    assert found.at(runner, 190).sum() == 190
    assert found.at(runner, 5).sum() <= 5
    with pytest.raises(PromptError, match="n_edges=0"):
        refine(runner, ranking, 0)


def test_refining_goes_on_where_it_was_broken_off(runner, ranking, tmp_path, monkeypatch):
    monkeypatch.setattr(import_module("workbench_circuits.discovery.refine"), "START", 0.3)
    state = tmp_path / "rounds.safetensors"
    expected = refine(runner, ranking, 4)

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine(runner, ranking, 4, resume=state, progress=interrupt)
    with pytest.raises(DataError, match="of another model"):
        refine(runner, ranking, 3, resume=state)
    found = refine(runner, ranking, 4, resume=state)
    np.testing.assert_array_equal(found.masks[-1], expected.masks[-1])
    assert not state.exists()
