"""Faithfulness, areas, ROC, completeness and minimality: against their definitions, written out again."""

import math

import numpy as np
import pytest

import workbench as wb
from unit.patching.patching_cases import model_of, tiny_prompts
from workbench.errors import PromptError
from workbench_circuits._roc import edge_roc, head_roc, roc
from workbench_circuits.criteria import completeness, minimality
from workbench_circuits.discovery.select import Ranking, select
from workbench_circuits.evaluation import (
    MIB_SIZES,
    curves,
    curves_of,
    evaluate,
    random_circuits,
    trapezoid,
)
from workbench_circuits.run import CircuitRunner


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def pairs(model):
    return tiny_prompts(model, n=6)


@pytest.fixture(scope="module")
def runner(model, pairs):
    return CircuitRunner(model, pairs)


@pytest.fixture(scope="module")
def effects(model, pairs):
    return {name: wb.edge_effects(model, pairs, method=name) for name in ("exact", "eap")}


def test_trapezoid():
    """By hand, and for a straight line, whose area is exact."""
    assert trapezoid([0.0, 1.0, 3.0], np.array([0.0, 2.0, 4.0])) == pytest.approx(1 + 6)
    x = np.array(MIB_SIZES)
    assert trapezoid(MIB_SIZES, 3 * x + 1) == pytest.approx(1.5 * (1 - 1e-6) + 0.999)
    np.testing.assert_allclose(trapezoid([0, 1], np.array([[1.0, 3.0], [0.0, 0.0]])), [2.0, 0.0])


def test_curves_by_running_every_circuit_by_itself(runner, effects, model, pairs):
    sizes = (0.05, 0.2, 0.5, 1.0)
    found = curves(model, pairs, effects, sizes=sizes, random=3, seed=1)
    gap = runner.clean.mean() - runner.none.mean()
    areas = found.areas.set_index("method")
    for name, effect in effects.items():
        ranking = Ranking.of(runner.wiring.graph, effect)
        strongest = effect.top(len(effect))
        names = (strongest["sender"] + "->" + strongest["receiver"]).tolist()
        f = []
        for row, share in zip(found.frame[found.frame["method"] == name].to_dict("records"), sizes, strict=True):
            assert row["taken"] == int(share * len(names))
            mask = runner.wiring.prune(runner.wiring.mask(names[: row["taken"]]))
            np.testing.assert_array_equal(mask, select(ranking, row["taken"]))
            assert row["n_edges"] == mask.sum()
            f.append((runner.run([mask])[0].mean() - runner.none.mean()) / gap)
            assert row["faithfulness"] == pytest.approx(f[-1], abs=1e-9)
            assert row["ci_low"] <= row["faithfulness"] <= row["ci_high"]
        assert f[-1] == pytest.approx(1)
        widths = np.diff(sizes)
        cmd = (widths * (np.abs(1 - np.array(f))[1:] + np.abs(1 - np.array(f))[:-1]) / 2).sum()
        cpr = (widths * (np.array(f)[1:] + np.array(f)[:-1]) / 2).sum()
        assert areas.loc[name, "cpr"] == pytest.approx(cpr)
        assert areas.loc[name, "cmd"] == pytest.approx(cmd)
        assert areas.loc[name, "cmd_low"] <= cmd <= areas.loc[name, "cmd_high"]
    difference = found.differences.iloc[0]
    assert (difference["method"], difference["minus"]) == ("exact", "eap")
    assert difference["cmd"] == pytest.approx(areas.loc["exact", "cmd"] - areas.loc["eap", "cmd"])
    drawn = found.frame[found.frame["method"] == "random"]
    assert len(drawn) == len(sizes)
    assert drawn["faithfulness"].iloc[-1] == pytest.approx(1)
    assert set(found.frame["path_taken"]) == {"fast"}


def test_curves_refuse_what_they_cannot_judge(runner, effects, model, pairs):
    part = wb.edge_effects(model, pairs, edges=["m0->logits"])
    for rankings, options, message in (
        ({"part": part}, {}, "1 of 190 edges"),
        (effects, {"sizes": (0.5, 0.1)}, "ascending"),
        (effects, {"sizes": (0.5, 1.5)}, "between 0 and 1"),
        ({}, {"random": 0}, "rankings is empty"),
        ({"random": effects["eap"]}, {}, "taken by the random baseline"),
    ):
        with pytest.raises(PromptError, match=message):
            curves(model, pairs, rankings, **options)


def test_a_function_stands_for_a_ranking(runner):
    found = curves_of(runner, {"all": lambda n: runner.wiring.everything if n else runner.wiring.empty()}, random=0)
    empty = int((np.array(MIB_SIZES) * 190 < 1).sum())  # too few of 190 edges to take one
    expected = MIB_SIZES[empty - 1] - MIB_SIZES[0] + (MIB_SIZES[empty] - MIB_SIZES[empty - 1]) / 2
    assert found.areas["cmd"].iloc[0] == pytest.approx(expected)


def test_evaluation_is_the_ratio_of_means(runner, model, pairs):
    mask = runner.wiring.everything.copy()
    mask[:20, 3] = False
    found = evaluate(model, pairs, mask, seed=2)
    values = runner.run([mask])[0]
    assert found.faithfulness.value == pytest.approx(
        (values.mean() - runner.none.mean()) / (runner.clean.mean() - runner.none.mean())
    )
    assert (found.circuit.value, found.model.value) == (
        pytest.approx(values.mean()),
        pytest.approx(runner.clean.mean()),
    )
    assert (found.n_prompts, found.n_edges, found.data_hash) == (6, int(mask.sum()), pairs.data_hash)


def test_random_circuits_have_the_size(runner):
    drawn = random_circuits(runner, 30, count=4, connected=False)
    assert (drawn.n_edges == 30).all()
    connected = random_circuits(runner, 30, count=4, seed=1)
    assert (connected.n_edges <= 30).all()
    assert connected.n_edges.mean() > 15
    assert connected.estimate.ci_low <= connected.estimate.value <= connected.estimate.ci_high
    assert random_circuits(runner, 190, count=1).faithfulness[0] == pytest.approx(1)
    with pytest.raises(PromptError, match="n_edges=0"):
        random_circuits(runner, 0)


def test_roc_counts_pairs():
    draw = np.random.default_rng(0)
    scores, truth = draw.integers(0, 6, 40).astype(float), draw.random(40) < 0.4
    found = roc(scores, truth)
    above = scores[truth][:, None] - scores[~truth][None]
    assert found.auc == pytest.approx(((above > 0) + 0.5 * (above == 0)).mean())
    curve = found.frame
    assert np.trapezoid(curve["tpr"], curve["fpr"]) == pytest.approx(found.auc)
    assert curve.iloc[0][["tpr", "fpr"]].tolist() == [0, 0]
    assert curve.iloc[-1][["tpr", "fpr"]].tolist() == [1, 1]
    for row in curve.iloc[1:].to_dict("records"):
        assert row["tpr"] == pytest.approx((scores[truth] >= row["threshold"]).mean())
    with pytest.raises(PromptError, match="needs both"):
        roc(scores, np.ones(40, dtype=bool))
    with pytest.raises(PromptError, match="NaN"):
        roc(np.array([math.nan, 1.0]), np.array([True, False]))


def test_roc_of_edges_and_heads(runner, effects):
    ranking = Ranking.of(runner.wiring.graph, effects["exact"])
    order = np.argsort(-ranking.score)
    names = ranking.edges.names
    best = [names[i] for i in order[:20]]
    assert edge_roc(ranking, best).auc == 1.0
    assert edge_roc(effects["exact"], [names[i] for i in order[-20:]], graph=runner.wiring.graph).auc == 0.0
    first = next(names[i] for i in order if names[i].startswith("a"))
    layer, head = first.split("->")[0][1:].split(".h")
    assert head_roc(ranking, [(int(layer), int(head))]).auc == 1.0
    with pytest.raises(PromptError, match="no score"):
        edge_roc(ranking, ["m0->m9"])
    with pytest.raises(PromptError, match="is not a head"):
        head_roc(ranking, [(9, 9)])


@pytest.mark.parametrize("unit", ["heads", "edges"])
def test_completeness_by_its_definition(runner, unit):
    circuit = runner.wiring.prune(
        runner.wiring.everything & (np.random.default_rng(4).random(runner.wiring.shape) < 0.5)
    )
    found = completeness(runner, circuit, unit=unit, random=4, greedy=2, candidates=3, seed=5)
    assert found.frame["kind"].tolist() == ["random"] * 4 + ["greedy"] * 2
    assert [len(k) for k in found.members] == found.frame["size"].tolist()
    for row, k in zip(found.frame.to_dict("records"), found.members, strict=True):
        values = []
        for base in (circuit, runner.wiring.everything):
            names = runner.wiring.edges(base).names
            left = [e for e in names if (e if unit == "edges" else e.split("->")[0]) not in k]
            values.append(runner.run([left])[0].mean())
        assert (row["circuit"], row["model"]) == (pytest.approx(values[0]), pytest.approx(values[1]))
        assert row["score"] == pytest.approx(abs(values[0] - values[1]))
    assert found.score == pytest.approx(found.frame["score"][:4].mean())
    assert found.worst == found.frame["score"].max()
    assert set(found.members[-2]) < set(found.members[-1])


def test_the_whole_model_is_complete(runner):
    found = completeness(runner, runner.wiring.everything, random=3, greedy=1)
    assert found.worst == pytest.approx(0, abs=1e-9)


def test_minimality_by_its_definition(runner):
    circuit = runner.wiring.between(["input", "a0.h1", "a0.h3", "m1", "a2.h0"])
    found = minimality(runner, circuit, unit="nodes", random=2, seed=3)
    assert set(found.frame["part"]) == {"input", "a0.h1", "a0.h3", "m1", "a2.h0"}
    names = runner.wiring.edges(circuit).names
    base = runner.run([names])[0].mean()
    for row in found.frame.to_dict("records"):
        left = [e for e in names if not e.startswith(row["part"] + "->")]
        alone = abs(runner.run([left])[0].mean() - base)
        assert row["score"] >= alone - 1e-9
        if row["k"] == 0:
            assert row["score"] == pytest.approx(alone)
        assert row["share"] == pytest.approx(row["score"] / abs(runner.clean.mean()))
        assert row["needed"] == (row["share"] > 0.01)
    assert found.needed == found.frame["needed"].sum()


def test_a_part_that_nobody_reads_is_not_needed(runner):
    circuit = runner.wiring.mask(["input->m0", "m0->logits", "a0.h0->m2"])
    scores = minimality(runner, circuit, unit="edges", random=1).frame.set_index("part")["score"]
    assert scores["a0.h0->m2"] == pytest.approx(0, abs=1e-12)
    assert scores["m0->logits"] > 0.01


def test_parts_that_are_not_there(runner):
    circuit = ["input->m0", "m0->logits"]
    with pytest.raises(PromptError, match="has no heads"):
        completeness(runner, circuit)
    with pytest.raises(PromptError, match="unit 'layers'"):
        minimality(runner, circuit, unit="layers")
    with pytest.raises(PromptError, match="'m5' is none of the circuit's nodes"):
        completeness(runner, circuit, unit="nodes", sets={"mine": ["m5"]})
