"""Verification: what is chosen, what its calibration says, and that its bound holds."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta

import workbench as wb
from unit.patching.patching_cases import model_of, tiny_prompts
from workbench.patching.effects import agreement
from workbench.patching.graph import Graph
from workbench.patching.verified import STRONG, Selection, calibrate, select, upper_bound


def names_of(frame):
    return (frame["sender"] + "->" + frame["receiver"]).to_numpy()


@pytest.fixture(scope="module")
def edges():
    return Graph(model_of("gpt2").spec).all_edges()


def random_scores(edges, seed=0):
    rng = np.random.default_rng(seed)
    return {"one": rng.standard_normal(len(edges)) ** 3, "two": rng.standard_normal(len(edges)) ** 3}


def is_always(name):
    return name.startswith(("input->", "m0->")) or name.endswith("->m0")


def test_selection(edges):
    scores = random_scores(edges)
    found = select(edges, scores, top_k=10, sample=40, seed=0)
    for values in scores.values():
        assert found.top[np.argsort(abs(values))[-10:]].all()
    assert 10 <= found.top.sum() <= 20
    assert found.always.tolist() == [is_always(name) for name in edges.names]
    assert not (found.sampled & (found.top | found.always)).any()
    assert (found.chosen == (found.top | found.always | found.sampled)).all()
    assert not found.chosen.all()


def test_sample_is_stratified(edges):
    found = select(edges, random_scores(edges), top_k=10, sample=40, seed=0)
    rest = ~(found.top | found.always)
    for name in ("head to head", "MLP", "logits"):
        of_class = edges.classes == name
        left, drawn = (rest & of_class).sum(), (found.sampled & of_class).sum()
        assert drawn == min(left, max(round(40 * left / rest.sum()), 4))
        assert drawn > 0


def test_sample_depends_on_the_seed_alone_and_reaches_every_edge(edges):
    scores = random_scores(edges)
    draws = [select(edges, scores, top_k=10, sample=40, seed=seed).sampled for seed in (*range(60), 0)]
    assert (draws[0] == draws[-1]).all()
    assert (draws[0] != draws[1]).any()
    first = select(edges, scores, top_k=10, sample=40, seed=0)
    assert (np.sum(draws, axis=0) > 0)[~(first.top | first.always)].all()


def test_more_than_there_is(edges):
    assert select(edges, random_scores(edges), top_k=10**6, sample=0, seed=0).chosen.all()
    assert select(edges, random_scores(edges), top_k=0, sample=10**6, seed=0).chosen.all()
    nothing = select(edges, random_scores(edges), top_k=0, sample=0, seed=0)
    assert (nothing.chosen == nothing.always).all()


def test_agreement_by_plain_means():
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(60)
    estimate = exact + 0.3 * rng.standard_normal(60)
    found = agreement(estimate, exact, k=10)
    assert found["r"] == pytest.approx(np.corrcoef(estimate, exact)[0, 1])
    assert found["relative_error"] == pytest.approx(np.sqrt(((estimate - exact) ** 2).sum() / (exact**2).sum()))
    top, guess = (pd.Series(abs(x)).nlargest(10).index for x in (exact, estimate))
    assert found["recall"] == len(set(top) & set(guess)) / 10
    assert 0 < found["recall"] < 1
    assert agreement(estimate, exact, k=50)["k"] == 30  # of half of the edges at most: more would come by itself
    assert np.isnan(agreement(np.zeros(3), np.array([1.0, 2, 3]))["r"])
    assert np.isnan(agreement(np.ones(3), np.zeros(3))["relative_error"])


@pytest.fixture(scope="module")
def computed():
    """A verified result, and all edges by each method it draws on."""
    model = model_of("gpt2")
    pairs = tiny_prompts(model)
    verified = wb.edge_effects(model, pairs, method="verified", top_k=40, sample=50, steps=3, per_prompt=True)
    others = {
        method: wb.edge_effects(model, pairs, method=method, steps=3, per_prompt=True)
        for method in ("exact", "receiver_exact", "eap_ig")
    }
    return verified, others


def test_verified_rows_are_exact_and_say_so(computed):
    verified, others = computed
    method = verified.frame["method"].to_numpy()
    assert set(method) == {"exact", "receiver_exact"}
    for name in set(method):
        expected = others[name].per_prompt[method == name]
        np.testing.assert_allclose(verified.per_prompt[method == name], expected, rtol=0, atol=1e-12)
    chosen = method == "exact"
    for name in ("receiver_exact", "eap_ig"):
        assert chosen[np.argsort(-others[name].frame["effect"].abs().to_numpy())[:40]].all()
    assert chosen[[is_always(name) for name in names_of(verified.frame)]].all()


def test_calibration_recomputed_naively(computed):
    verified, others = computed
    frame, table = verified.frame, verified.calibration
    chosen = frame["method"] == "exact"
    exact = others["exact"].frame["effect"]
    assert set(table["edge_class"]) == {"all", "head to head", "MLP", "input", "logits"}
    assert set(table["method"]) == {"receiver_exact", "eap_ig"}
    assert len(table) == 2 * 5 * 2
    for row in table.itertuples():
        among = chosen & ((frame["edge_class"] == row.edge_class) | (row.edge_class == "all"))
        if row.largest_edge == "without":
            among &= exact.abs() < exact[among].abs().max()
        a, b = others[row.method].frame["effect"][among], exact[among]
        assert row.n == among.sum()
        assert row.r == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)
        assert row.relative_error == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b), abs=1e-9)
        best, guess = (set(x.abs().nlargest(row.k).index) for x in (b, a))
        assert row.recall == pytest.approx(len(best & guess) / row.k)
        left = ~chosen & ((frame["edge_class"] == row.edge_class) | (row.edge_class == "all"))
        assert row.unverified == left.sum()
        expected = upper_bound(row.sampled_strong, row.sampled) if left.any() else 0
        assert row.missed_share == pytest.approx(expected)
    logits = table[(table["edge_class"] == "logits") & (table["method"] == "receiver_exact")]
    assert logits["relative_error"].max() < 1e-12
    assert (logits["recall"] == 1).all()


def test_random_sample_in_the_calibration(edges):
    """Hits are counted over the random sample alone, against the strongest of all that were verified."""
    scores = random_scores(edges)
    selection = select(edges, scores, top_k=30, sample=60, seed=1)
    exact = np.where(selection.chosen, scores["one"] + scores["two"], np.nan)
    table = calibrate(edges, selection, scores, exact)
    strong = np.nan_to_num(abs(exact)) >= np.sort(abs(exact[selection.chosen]))[-STRONG]
    assert strong.sum() == STRONG
    for row in table.itertuples():
        drawn = selection.sampled & ((edges.classes == row.edge_class) | (row.edge_class == "all"))
        assert row.sampled == drawn.sum()
        assert row.sampled_strong == (drawn & strong).sum()
    assert table["sampled_strong"].max() > 0


def test_verifying_everything_is_exact(computed):
    _, others = computed
    model = model_of("gpt2")
    every = wb.edge_effects(
        model, tiny_prompts(model), method="verified", top_k=10**6, sample=0, steps=1, per_prompt=True
    )
    assert set(every.frame["method"]) == {"exact"}
    assert (every.per_prompt == others["exact"].per_prompt).all()
    assert (every.calibration["unverified"] == 0).all()
    assert (every.calibration["missed_share"] == 0).all()


def test_upper_bound():
    for n in (50, 300, 3000):
        assert upper_bound(0, n) == pytest.approx(1 - 0.05 ** (1 / n))
        assert upper_bound(0, n) == pytest.approx(3 / n, rel=0.04)
    assert upper_bound(0, 0) == 1
    assert upper_bound(5, 5) == 1
    assert upper_bound(2, 100) == pytest.approx(beta.ppf(0.95, 3, 98))
    bounds = [upper_bound(hits, 40) for hits in range(41)]
    assert bounds == sorted(bounds)


@pytest.mark.parametrize("strong_share", [0.01, 0.05, 0.2])
def test_the_bound_holds_in_95_of_100_draws(strong_share):
    """Edges are drawn without replacement from a finite graph, for which the binomial bound is on the safe side."""
    rng = np.random.default_rng(0)
    total, drawn, runs = 2000, 200, 2000
    strong = round(strong_share * total)
    hits = rng.hypergeometric(strong, total - strong, drawn, size=runs)
    bound = np.array([upper_bound(int(h), drawn) for h in range(hits.max() + 1)])
    held = (bound[hits] >= strong / total).mean()
    assert held >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / runs)
    assert (bound[hits] < 1).all()


def test_the_bound_holds_for_the_edges_that_verification_leaves(edges):
    """First-order scores that know nothing: what the sample says of the unverified edges is right in 95 of 100."""
    rng = np.random.default_rng(0)
    exact = rng.standard_normal(len(edges)) ** 3
    held = []
    for seed in range(150):
        blind = {"blind": np.random.default_rng(1000 + seed).standard_normal(len(edges))}
        selection: Selection = select(edges, blind, top_k=20, sample=60, seed=seed)
        table = calibrate(edges, selection, blind, np.where(selection.chosen, exact, np.nan))
        row = table[table["edge_class"] == "all"].iloc[0]
        threshold = np.sort(abs(exact[selection.chosen]))[-STRONG]
        left = ~selection.chosen
        held.append((abs(exact[left]) >= threshold).mean() <= row["missed_share"])
        assert row["unverified"] == left.sum()
        assert row["missed_share"] < 1
    assert np.mean(held) >= 0.95 - 3 * np.sqrt(0.05 * 0.95 / len(held))
