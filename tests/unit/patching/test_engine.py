"""The entrance: what it refuses and how it says so, going on after an interruption, and results as objects."""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import workbench as wb
from families import REFUSED, tiny_pairs
from unit.patching.patching_cases import model_of, prompts, tiny_prompts
from workbench.errors import BudgetError, DataError, OutputError, PromptError, UnsupportedModelError
from workbench.patching import engine, estimate_cost, exact, partial
from workbench.patching.effects import COLUMNS, EdgeEffects
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Graph

EDGES = ["input->a1.h2<q>", "a0.h1->a2.kv1<k>", "m0->a1.kv0<v>", "a1.h3->m2", "m1->logits"]


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def pairs(model):
    return tiny_prompts(model)


@pytest.fixture(scope="module")
def every(model, pairs):
    """All edges, exactly."""
    return wb.edge_effects(model, pairs, per_prompt=True)


# What is refused


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "exakt"}, "method 'exakt' is not one of exact, receiver_exact, eap, eap_ig, verified"),
        ({"direction": "up"}, "direction 'up' is not one of noising, denoising"),
        ({"metric": "loss"}, "metric 'loss' is not one of logit_diff, answer_logprob, kl_to_clean"),
        ({"ablation": "mean"}, "ablation 'mean' is not one of resample"),
        ({"method": "eap_ig", "steps": 0}, "steps=0: eap_ig needs at least one gradient"),
        ({"method": "verified", "top_k": -1}, "top_k=-1 is negative"),
        ({"method": "verified", "sample": -1}, "sample=-1 is negative"),
        ({"edges": "head"}, "edges='head' is neither 'all' nor 'heads'; pass a list"),
        ({"edges": []}, "edges is empty: name at least one edge"),
        ({"edges": ["a0.h1"]}, "'a0.h1' is not an edge: write sender->receiver"),
        ({"edges": ["a0.h9->logits"]}, "'a0.h9' is not a sender of this model; near it: a0.h"),
        ({"edges": ["m0->a1.h0<z>"]}, "'a1.h0<z>' is not a receiver of this model; near it: a1.h0<q>"),
        ({"edges": ["logits->m0"]}, "'logits' is not a sender"),
        ({"edges": ["m0->input"]}, "'input' is not a receiver"),
        ({"edges": ["m1->a1.h0<q>"]}, "m1 writes after a1.h0<q> has read"),
        ({"edges": ["a2.h0->a2.kv0<v>"]}, "a2.h0 writes after a2.kv0<v> has read"),
        (
            {"edges": ["m0->a1.h0<k>"]},
            "Query heads share 2 key/value heads here: name them a0.kv0<k>, or load the model with ungroup=True",
        ),
    ],
    ids=str,
)
def test_wrong_arguments(model, pairs, arguments, says):
    with pytest.raises(PromptError, match=re.escape(says)):
        wb.edge_effects(model, pairs, **arguments)


@pytest.mark.parametrize("method", ["receiver_exact", "eap", "verified"])
def test_divergence_has_no_gradient_at_the_clean_run(model, pairs, method):
    with pytest.raises(PromptError, match=r"zero gradient.*would return zeros.*method='exact' or 'eap_ig'.*denoising"):
        wb.edge_effects(model, pairs, method=method, metric="kl_to_clean")
    for allowed in ({"method": "eap_ig"}, {"method": "exact"}, {"method": method, "direction": "denoising"}):
        result = wb.edge_effects(model, pairs, metric="kl_to_clean", edges=EDGES, steps=2, **allowed)
        assert (result.frame["effect"].abs() > 1e-6).all()


def test_a_sequential_mlp_reads_its_own_heads_and_a_parallel_one_does_not():
    name = ["a1.h0->m1"]
    assert len(Graph(model_of("neox_sequential").spec).edges(name)) == 1
    with pytest.raises(PromptError, match=r"a1\.h0 writes after m1 has read"):
        Graph(model_of("neox_parallel").spec).edges(name)


def test_a_model_on_the_hook_path():
    refused = wb.wrap_model(REFUSED["sliding_window"]())
    raw = tiny_pairs(refused.module)
    with pytest.raises(UnsupportedModelError, match=r"not served by the fast path.*sliding_window"):
        wb.edge_effects(refused, prompts(raw))


@pytest.mark.parametrize("method", ["exact", "eap"])
def test_too_small_a_budget(model, pairs, method):
    with pytest.raises(BudgetError, match=r"one prompt of 1\d tokens needs .* GiB.*raise budget_bytes, or shorten"):
        wb.edge_effects(model, pairs, method=method, budget_bytes=1 << 10)


def test_a_token_outside_the_vocabulary(model, pairs):
    clean = pairs.clean.clone()
    clean[2, 3] = 101
    with pytest.raises(PromptError, match=r"clean\[2\] has token id 101, but the model's vocabulary has 101 tokens"):
        wb.edge_effects(model, replace(pairs, clean=clean))


# The frame


def test_frame(model, pairs, every):
    frame, values = every.frame, every.per_prompt
    edges = Graph(model.spec).all_edges()
    assert tuple(frame.columns) == COLUMNS
    assert (frame["sender"] + "->" + frame["receiver"]).tolist() == edges.names
    assert frame["edge_class"].tolist() == edges.classes.tolist()
    n = values.shape[1]
    np.testing.assert_allclose(frame["effect"], values.mean(1), rtol=0, atol=1e-14)
    np.testing.assert_allclose(frame["stderr"], values.std(1, ddof=1) / np.sqrt(n), rtol=1e-12)
    half = stats.t.ppf(0.975, n - 1) * frame["stderr"]
    np.testing.assert_allclose(frame["ci_low"], frame["effect"] - half, rtol=0, atol=1e-9)
    np.testing.assert_allclose(frame["ci_high"], frame["effect"] + half, rtol=0, atol=1e-9)
    constant = {"n_prompts": 5, "method": "exact", "direction": "noising", "ablation": "resample"}
    for column, value in (constant | {"metric": "logit_diff", "path_taken": "fast"}).items():
        assert set(frame[column]) == {value}
    assert not frame["below_noise"].any()
    assert wb.edge_effects(model, pairs, edges=EDGES).per_prompt is None


@pytest.mark.parametrize(("direction", "version"), [("noising", "clean"), ("denoising", "corrupted")])
def test_base_is_the_metric_of_the_base_run(model, pairs, direction, version):
    with torch.no_grad():
        logits = model.module(getattr(pairs, version)).logits
    at = logits[torch.arange(len(pairs)), pairs.answer_positions]
    expected = at.gather(1, pairs.answers).mean(1) - at.gather(1, pairs.wrong_answers).mean(1)
    result = wb.edge_effects(model, pairs, edges=EDGES, direction=direction)
    assert result.frame["base"].to_numpy() == pytest.approx(float(expected.mean()), abs=1e-12)


def test_a_single_prompt_has_no_interval(model, pairs):
    frame = wb.edge_effects(model, pairs.subset([1]), edges=EDGES).frame
    assert frame["effect"].notna().all()
    assert frame[["stderr", "ci_low", "ci_high"]].isna().all(axis=None)
    assert set(frame["n_prompts"]) == {1}


def test_sets_of_edges(model, pairs, every):
    heads = wb.edge_effects(model, pairs, edges="heads").frame
    expected = every.frame[every.frame["edge_class"] == "head to head"].reset_index(drop=True)
    assert set(heads["sender"].str[0]) == {"a"}
    assert heads["receiver"].str.endswith(("<q>", "<k>", "<v>")).all()
    pd.testing.assert_frame_equal(heads, expected, atol=1e-12, rtol=0)


def test_provenance(model, pairs, every):
    record = every.provenance
    assert record["model"]["hash"] == model.model_hash
    assert record["data_hash"] == pairs.data_hash
    assert record["path_taken"] == "fast"
    assert record["settings"]["method"] == "exact"
    assert record["settings"]["ablation"] == "resample"
    assert record["seconds"] > 0
    json.dumps(record)


# What can be asked of a result


def test_top(every):
    top = every.top(7)
    assert top["effect"].abs().is_monotonic_decreasing
    left = every.frame.merge(top[["sender", "receiver"]], how="outer", indicator=True)
    assert len(top) == 7
    assert top["effect"].abs().min() >= left.loc[left["_merge"] == "left_only", "effect"].abs().max()
    assert len(every.top(10**6)) == len(every)


def test_node_sums(every):
    table = every.node_sums()
    for role in ("sender", "receiver"):
        nodes = dict.fromkeys(every.frame[role])
        rows = table[table["role"] == role].set_index("node")
        assert set(rows.index) == set(nodes)
        for node in nodes:
            effects = [e for e, name in zip(every.frame["effect"], every.frame[role], strict=True) if name == node]
            assert rows.loc[node, "n_edges"] == len(effects)
            assert rows.loc[node, "effect"] == pytest.approx(sum(effects))
            assert rows.loc[node, "absolute"] == pytest.approx(sum(abs(e) for e in effects))


def test_compare(model, pairs, every):
    some = [n for i, n in enumerate(Graph(model.spec).all_edges().names) if i % 2]
    other = wb.edge_effects(model, pairs, method="eap", edges=some[::-1])
    table = wb.compare(other, every).set_index(["edge_class", "largest_edge"])
    exact_values = dict(zip(every.frame["sender"] + "->" + every.frame["receiver"], every.frame["effect"], strict=True))
    a = other.frame["effect"].to_numpy()
    b = np.array([exact_values[n] for n in some[::-1]])
    row = table.loc["all", "with"]
    assert row["n"] == len(some)
    assert row["r"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert row["relative_error"] == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b))
    same = wb.compare(every, every)
    assert same["r"].to_numpy() == pytest.approx(1)
    assert (same["relative_error"] == 0).all()
    assert (same["recall"] == 1).all()


def test_compare_refuses_what_cannot_be_compared(model, pairs, every):
    other = wb.edge_effects(model, pairs, edges=EDGES, metric="answer_logprob")
    with pytest.raises(DataError, match="cannot compare effects on"):
        wb.compare(other, every)
    one, two = (replace(every, frame=every.frame.iloc[part]) for part in (slice(0, 5), slice(5, 9)))
    with pytest.raises(DataError, match="no edge in common"):
        wb.compare(one, two)


# On disk


def assert_same(a, b):
    pd.testing.assert_frame_equal(a.frame, b.frame, check_exact=True)
    assert a.noise_floor == b.noise_floor
    assert a.provenance == b.provenance
    assert (a.calibration is None) == (b.calibration is None)
    if a.calibration is not None:
        pd.testing.assert_frame_equal(a.calibration, b.calibration, check_dtype=False, rtol=0, atol=1e-15)
    assert (a.per_prompt is None) == (b.per_prompt is None)
    if a.per_prompt is not None:
        assert a.per_prompt.dtype == b.per_prompt.dtype
        assert (a.per_prompt == b.per_prompt).all()


def test_save_and_load(model, pairs, every, tmp_path):
    verified = wb.edge_effects(model, pairs, method="verified", top_k=5, sample=10, steps=1, per_prompt=True)
    assert verified.save(tmp_path / "deep" / "verified") == tmp_path / "deep" / "verified"
    assert_same(EdgeEffects.load(tmp_path / "deep" / "verified"), verified)
    assert_same(EdgeEffects.load(every.save(tmp_path / "all")), every)
    written = pd.read_csv(tmp_path / "all" / "edges.csv")
    pd.testing.assert_frame_equal(written, every.frame, rtol=1e-14, atol=0, check_dtype=False)
    # a later result in the same folder does not inherit what it does not have
    bare = replace(every, per_prompt=None)
    assert_same(EdgeEffects.load(bare.save(tmp_path / "deep" / "verified")), bare)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("effects.json", None),
        ("effects.json", b"{"),
        ("effects.json", b"[]"),
        ("effects.json", b"\xff\xfe"),
        ("effects.json", b'{"kind": "head_table", "schema_version": 1}'),
        ("effects.json", b'{"kind": "edge_effects", "schema_version": 99}'),
        ("effects.json", b'{"kind": "edge_effects", "schema_version": 1}'),
        ("effects.json", b'{"kind": "edge_effects", "schema_version": 1, "noise_floor": null, "provenance": {}}'),
        ("edges.parquet", None),
        ("edges.parquet", b"PAR1 and nothing else"),
        ("per_prompt.safetensors", b"short"),
        ("calibration.csv", b""),
    ],
    ids=str,
)
def test_damaged_results(every, tmp_path, name, content):
    every.save(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        EdgeEffects.load(tmp_path)


def test_lacking_columns(every, tmp_path):
    replace(every, frame=every.frame.drop(columns=["effect", "base"])).save(tmp_path)
    with pytest.raises(DataError, match="lacks the columns base, effect"):
        EdgeEffects.load(tmp_path)


def test_a_folder_that_cannot_be_written(model, pairs, every, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match=r"cannot write edge effects to .*file"):
        every.save(tmp_path / "file")
    with pytest.raises(OutputError, match=r"cannot keep unfinished work in .*file"):
        wb.edge_effects(model, pairs, edges=EDGES, resume=tmp_path / "file")


# Going on


class InterruptionError(Exception):
    """What stops a sweep here; Ctrl-C itself would stop the tests where one of them fails."""


class Counted:
    """`exact_effects`, with the number of effects that it computed; fails after some batches if told so."""

    def __init__(self, fail_after=None):
        self.effects, self.batches, self.fail_after = 0, 0, fail_after

    def __call__(self, runs, edges, **arguments):
        for index, values in exact_effects(runs, edges, **arguments):
            if self.batches == self.fail_after:
                raise InterruptionError
            self.batches += 1
            self.effects += values.numel()
            yield index, values


@pytest.fixture
def small_steps(monkeypatch):
    """Small batches, each written at once."""
    monkeypatch.setattr(exact, "CPU_TOKENS", 600)
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_WRITES", 0.0)


def counted(monkeypatch, fail_after=None):
    made = Counted(fail_after)
    monkeypatch.setattr(engine, "exact_effects", made)
    return made


def interrupt(monkeypatch, after, *args, **arguments):
    made = counted(monkeypatch, after)
    with pytest.raises(InterruptionError):
        wb.edge_effects(*args, **arguments)
    return made


@pytest.mark.usefixtures("small_steps")
def test_going_on_after_an_interruption(model, pairs, tmp_path, monkeypatch):
    whole = wb.edge_effects(model, pairs, per_prompt=True)
    first = interrupt(monkeypatch, 7, model, pairs, resume=tmp_path / "part")
    rest = counted(monkeypatch)
    found = wb.edge_effects(model, pairs, resume=tmp_path / "part", per_prompt=True)
    assert first.effects > 0
    assert first.effects + rest.effects == whole.per_prompt.size
    assert (found.per_prompt == whole.per_prompt).all()
    pd.testing.assert_frame_equal(found.frame, whole.frame, check_exact=True)
    assert found.noise_floor == whole.noise_floor
    assert not (tmp_path / "part").exists()  # nothing is left of it


@pytest.mark.usefixtures("small_steps")
def test_an_error_in_progress_is_an_interruption_too(model, pairs, tmp_path, monkeypatch):
    whole = wb.edge_effects(model, pairs, per_prompt=True)
    lines = []

    def say(line):
        lines.append(line)
        if len(lines) == 4:
            raise RuntimeError("enough")

    monkeypatch.setattr(engine.time, "monotonic", iter(range(10**6)).__next__)  # so that every batch is told of
    with pytest.raises(RuntimeError, match="enough"):
        wb.edge_effects(model, pairs, resume=tmp_path / "part", progress=say)
    rest = counted(monkeypatch)
    found = wb.edge_effects(model, pairs, resume=tmp_path / "part", per_prompt=True)
    assert 0 < rest.effects < whole.per_prompt.size
    assert (found.per_prompt == whole.per_prompt).all()


@pytest.mark.usefixtures("small_steps")
def test_going_on_in_verified(model, pairs, tmp_path, monkeypatch):
    arguments = {"method": "verified", "top_k": 10, "sample": 20, "steps": 2}
    whole = wb.edge_effects(model, pairs, per_prompt=True, **arguments)
    interrupt(monkeypatch, 2, model, pairs, resume=tmp_path / "part", **arguments)
    with pytest.raises(DataError, match="unfinished work of another model"):
        wb.edge_effects(model, pairs, resume=tmp_path / "part", **{**arguments, "top_k": 20, "sample": 10})
    counted(monkeypatch)
    monkeypatch.setattr(engine, "attribution_effects", None)  # the first-order sweeps are known
    monkeypatch.setattr(engine, "receiver_exact_effects", None)
    found = wb.edge_effects(model, pairs, resume=tmp_path / "part", per_prompt=True, **arguments)
    assert (found.per_prompt == whole.per_prompt).all()
    pd.testing.assert_frame_equal(found.calibration, whole.calibration, check_exact=True)


@pytest.mark.usefixtures("small_steps")
def test_unfinished_work_of_something_else(model, pairs, tmp_path, monkeypatch):
    interrupt(monkeypatch, 2, model, pairs, resume=tmp_path)
    before = sorted(tmp_path.iterdir())
    other = tiny_prompts(model, seed=1)
    for changed in ({"pairs": other}, {"direction": "denoising"}, {"edges": "heads"}, {"metric": "answer_logprob"}):
        arguments = {"model": model, "pairs": pairs, "resume": tmp_path, **changed}
        with pytest.raises(DataError, match=r"unfinished work of another model.*choose another folder, or delete it"):
            wb.edge_effects(**arguments)
    with pytest.raises(DataError, match="unfinished work of another model"):
        wb.edge_effects(model_of("llama_mha"), pairs, resume=tmp_path)
    assert sorted(tmp_path.iterdir()) == before
    counted(monkeypatch)
    wb.edge_effects(model, pairs, resume=tmp_path, budget_bytes=1 << 24)  # memory is no part of the question


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("damage", ["cut", "shape"])
def test_damaged_unfinished_work_is_computed_again(model, pairs, every, tmp_path, monkeypatch, damage):
    from safetensors.numpy import save_file

    interrupt(monkeypatch, 5, model, pairs, resume=tmp_path)
    (path,) = tmp_path.glob("partial-*.safetensors")
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    else:
        save_file({"effects": np.zeros((3, 3))}, path)
    made = counted(monkeypatch)
    found = wb.edge_effects(model, pairs, resume=tmp_path, per_prompt=True)
    assert made.effects == every.per_prompt.size
    np.testing.assert_allclose(found.per_prompt, every.per_prompt, rtol=0, atol=1e-12)


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b"\xff\xfe"])
def test_a_damaged_manifest(model, pairs, tmp_path, content):
    (tmp_path / "partial.json").write_bytes(content)
    with pytest.raises(DataError, match=r"partial.json is damaged.*Delete .* and begin again"):
        wb.edge_effects(model, pairs, edges=EDGES, resume=tmp_path)


def test_a_folder_with_files_of_others_keeps_them(model, pairs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    wb.edge_effects(model, pairs, edges=EDGES, resume=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_progress_counts_to_the_end(model, pairs):
    lines = []
    wb.edge_effects(model, pairs, progress=lines.append)
    assert re.fullmatch(r"exact: (\d[\d,]*) of \1 edge effects, [\d,]+ a second, 0 s left", lines[-1])
    assert "950 of 950" in lines[-1]


def test_cost_estimate(model, pairs):
    found = estimate_cost(model, pairs)
    assert found["edges"] == Graph(model.spec).n_edges == 190
    assert found["sampled"] == 64
    assert found["seconds"] == pytest.approx(190 * found["seconds_per_edge"])
    assert 0 < found["seconds"] < 60
    assert estimate_cost(model, pairs, EDGES)["sampled"] == len(EDGES)
