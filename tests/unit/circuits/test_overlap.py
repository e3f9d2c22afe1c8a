"""What circuits share, by counting, and what chance says."""

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from workbench.cli import make_app
from workbench.errors import DataError
from workbench_circuits._overlap import _compare, overlap, spearman
from workbench_circuits.circuit import Able, Circuit, GraphShape

SHAPE = GraphShape(n_layers=2, n_heads=2, n_kv_heads=1, d_model=8, has_mlp=True, parallel=False)


def made(edges, effects=None, **fields):
    effects = tuple(effects or [1.0] * len(edges))
    return Circuit(
        **{"edges": tuple(edges), "effects": effects, "shape": SHAPE, "model": "m", "model_hash": "1"} | fields
    )


A = made(["input->a0.h0<q>", "a0.h0->m1", "a0.h1->logits", "m1->logits"], [-4.0, 3.0, 2.0, -1.0])
B = made(["input->a0.h0<q>", "a0.h0->m1", "a0.h0->logits", "a1.h1->logits", "m1->logits"], [8.0, -3.0, 2.0, 1.0, 4.0])


def test_counts():
    found = overlap(A, B)
    edges, heads, nodes = found.summary.to_dict("records")
    assert (edges["n_a"], edges["n_b"], edges["shared"], edges["union"]) == (4, 5, 3, 6)
    assert edges["jaccard"] == 0.5
    assert edges["of_smaller"] == 0.75
    assert edges["population"] == A.graph.n_edges
    assert edges["expected"] == pytest.approx(20 / A.graph.n_edges)
    assert (heads["n_a"], heads["n_b"], heads["shared"], heads["population"]) == (2, 2, 1, 4)
    assert (nodes["n_a"], nodes["n_b"], nodes["shared"], nodes["population"]) == (4, 4, 3, 7)
    assert edges["spearman"] == pytest.approx(0.5), "sizes 4, 3, 1 against 8, 3, 4"
    assert edges["spearman_n"] == 3
    table = found.heads.set_index(["layer", "head"])
    assert table.loc[(0, 0), ["in_a", "in_b", "score_a", "score_b", "edges_b"]].tolist() == [True, True, 3.0, 5.0, 2]
    assert table.loc[(1, 1), ["in_a", "in_b", "score_a", "edges_a"]].tolist() == [False, True, 0.0, 0]


@given(a=st.integers(0, 6), b=st.integers(0, 6))
@settings(max_examples=20, deadline=None)
def test_chance_is_that_of_all_pairs_of_sets(a, b):
    """By enumeration of every pair of subsets of a population of 6."""
    items = range(6)
    pairs = [(set(x), set(y)) for x in combinations(items, a) for y in combinations(items, b)]
    shared = np.array([len(x & y) for x, y in pairs])
    unions = np.array([max(len(x | y), 1) for x, y in pairs])
    found = _compare(dict.fromkeys(map(str, range(a)), 1.0), dict.fromkeys(map(str, range(b)), 1.0), 6)
    assert found["expected"] == pytest.approx(shared.mean())
    assert found["expected_jaccard"] == pytest.approx((shared / unions).mean())
    assert found["p_value"] == pytest.approx((shared >= min(a, b)).mean())


def test_a_circuit_and_itself_and_its_opposite():
    names = A.graph.all_edges().names
    half, rest = made(names[::2]), made(names[1::2])
    itself = overlap(half, half).summary.iloc[0]
    assert (itself["jaccard"], itself["of_smaller"]) == (1.0, 1.0)
    assert itself["p_value"] < 1e-3
    assert overlap(half, rest).summary.iloc[0]["shared"] == 0
    assert overlap(half, rest).summary.iloc[0]["p_value"] == 1.0
    empty = overlap(made([]), made([])).summary.iloc[0]
    assert math.isnan(empty["jaccard"])


def test_spearman_against_its_definition():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=30), draw.normal(size=30)
    d = np.argsort(np.argsort(x)) - np.argsort(np.argsort(y))
    assert spearman([*x, math.nan], [*y, 1.0]) == (pytest.approx(1 - 6 * (d**2).sum() / (30 * (30**2 - 1))), 30)
    assert math.isnan(spearman([1.0, 2.0], [1.0, 2.0])[0])
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0])[0])


def test_circuits_of_different_models_are_refused():
    with pytest.raises(DataError, match=r"of different models, m .* and other"):
        overlap(A, replace(A, model="other", model_hash="2"))
    with pytest.raises(DataError, match="models with different nodes"):
        overlap(A, made(["input->logits"], shape=replace(SHAPE, n_layers=3)))


def test_what_must_be_said_is_said():
    unable = Able(verdict="not solved", sentence="", accuracy=0.1, chance=0.5, n=9)
    found = overlap(replace(A, competence=unable, task="t"), replace(B, model_hash=""))
    assert "m does not solve t" in found.warnings[0]
    assert "does not know its weights" in found.warnings[1]


def test_the_verb(tmp_path):
    run = CliRunner()
    a, b = A.save(tmp_path / "a.json"), B.save(tmp_path / "b.json")
    result = run.invoke(make_app(), ["overlap", str(a), str(b), "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    line = next(line for line in result.output.splitlines() if line.startswith("edges"))
    assert line.split()[1:4] == ["4", "5", "3"]
    assert "a0.h0" in result.output
    assert (tmp_path / "out" / "overlap.csv").read_text().count("\n") == 4
    assert (tmp_path / "out" / "heads.csv").read_text().count("\n") == 4
