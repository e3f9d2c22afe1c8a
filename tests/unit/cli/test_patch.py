import json

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import workbench as wb
import workbench_circuits as wc
from tiny_text import tiny_text_model
from workbench.cli import make_app
from workbench.cli.patch import calibration_text, edges_argument, peak_bytes, top_text
from workbench.errors import DataError
from workbench.patching import EdgeEffects, engine, partial
from workbench_circuits.cli.patch import register


@pytest.fixture(scope="module")
def model():
    return tiny_text_model(seed=1)


@pytest.fixture
def patch(monkeypatch, model, tmp_path):
    monkeypatch.setattr("workbench.cli.console.open_model", lambda *args, **options: model)
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)

    def call(*arguments, out=tmp_path / "out", task="ioi"):
        given = [] if task is None else ["--task", task]
        return CliRunner().invoke(app, ["patch", *given, "--out", str(out), *map(str, arguments)])

    return call


def test_verified_is_what_edge_effects_returns(patch, model, tmp_path):
    result = patch("--n", 6, "--seed", 3, "--corruption", "s2_flip", "--budget-gib", 0.5)
    assert result.exit_code == 0, result.stderr
    saved = EdgeEffects.load(tmp_path / "out")
    pairs = wc.load_task("ioi").pairs(model, 6, seed=3, corruption="s2_flip")
    expected = wb.edge_effects(model, pairs, method="verified", seed=3)
    pd.testing.assert_frame_equal(saved.frame, expected.frame, rtol=1e-4, atol=1e-5)
    shown = [line.split()[0] for line in result.stdout.splitlines() if "->" in line]
    top = saved.top(20)
    assert shown == (top["sender"] + "->" + top["receiver"]).tolist()
    assert "first-order methods against exact effects" in result.stdout
    assert "peak memory" in result.stdout
    assert not (tmp_path / "out" / "unfinished").exists()


def test_competence_is_shown_and_kept_with_a_warning_where_it_is_missing(patch, model, tmp_path):
    result = patch("--n", 2, "--method", "eap")
    able = wc.competence(model, wc.load_task("ioi").pairs(model, 100, seed=0))
    assert able.verdict == "not solved"  # random weights
    assert able.sentence in result.stdout
    assert "warning: not solved" in result.stderr
    record = json.loads((tmp_path / "out" / "effects.json").read_text())["provenance"]
    accuracy = next(row for row in record["competence"] if row["quantity"] == "accuracy")
    assert (accuracy["value"], accuracy["n"]) == (able.accuracy.value, 100)
    assert record["peak_resident_bytes"] > 50e6
    assert record["wall_seconds"] > 0


def test_exact_tells_its_cost_first_and_takes_edges_from_a_file(patch, tmp_path):
    (tmp_path / "edges.txt").write_text("# two\ninput->m0\n\na0.h1->a1.kv0<k>  # a key\n")
    result = patch("--n", 3, "--method", "exact", "--edges", tmp_path / "edges.txt", "--direction", "denoising")
    assert result.exit_code == 0, result.stderr
    assert "estimate: 2 edges" in result.stderr
    frame = EdgeEffects.load(tmp_path / "out").frame
    assert frame["sender"].tolist() == ["input", "a0.h1"]
    assert set(frame["direction"]) == {"denoising"}


def test_interrupted_work_is_kept_and_taken_up(patch, monkeypatch, tmp_path):
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_WRITES", 0.0)
    usual = engine.exact_effects
    done = []

    def stopping(runs, edges, **options):
        done.append(len(edges))
        for index, effects in usual(runs, edges, budget_bytes=1):  # one edge at a time
            yield index, effects
            if len(done) == 1 and index.max() > 20:
                raise KeyboardInterrupt

    monkeypatch.setattr(engine, "exact_effects", stopping)
    arguments = ("--n", 2, "--method", "exact", "--edges", "heads")
    monkeypatch.setattr(
        "workbench.patching.estimate_cost", lambda *_: {"edges": 0, "seconds_per_edge": 0, "seconds": 0}
    )
    stopped = patch(*arguments)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    assert list((tmp_path / "out" / "unfinished").glob("*.safetensors"))
    other = patch(*arguments, "--seed", 5)
    assert isinstance(other.exception, DataError)
    assert "--no-resume" in str(other.exception)
    assert patch(*arguments).exit_code == 0
    assert done[1] < done[0] - 5
    first = EdgeEffects.load(tmp_path / "out").frame
    assert patch(*arguments, "--no-resume").exit_code == 0
    assert done[2] == done[0]
    pd.testing.assert_frame_equal(first, EdgeEffects.load(tmp_path / "out").frame, rtol=1e-4, atol=1e-5)


def test_prompts_from_csv(patch, model, tmp_path):
    pairs = wc.load_task("ioi").pairs(model, 3, seed=0)
    rows = [
        {
            "clean": model.tokenizer.decode(pairs.clean[i, : pairs.lengths[i]]),
            "corrupted": model.tokenizer.decode(pairs.corrupted[i, : pairs.lengths[i]]),
            "correct_idx": int(pairs.answers[i, 0]),
            "incorrect_idx": int(pairs.wrong_answers[i, 0]),
        }
        for i in range(3)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "mine.csv", index=False)
    result = patch("--csv", tmp_path / "mine.csv", "--method", "eap", "--top", 0, task=None)
    assert result.exit_code == 0, result.stderr
    expected = wb.edge_effects(model, pairs, method="eap").frame
    pd.testing.assert_frame_equal(EdgeEffects.load(tmp_path / "out").frame, expected, rtol=1e-4, atol=1e-6)
    assert "->" not in result.stdout


def test_folder_and_edges_are_checked_before_a_model_is_loaded(tmp_path):
    def call(*arguments):
        return CliRunner().invoke(make_app(), ["patch", "--model", "no such model", *map(str, arguments)])

    (tmp_path / "taken").write_text("")
    refused = call("--task", "ioi", "--out", tmp_path / "taken")
    assert (refused.exit_code, "a file is in the way" in refused.stderr) == (2, True)
    refused = call("--task", "ioi", "--out", tmp_path, "--edges", tmp_path / "none.txt")
    assert (refused.exit_code, "neither 'all' nor 'heads'" in refused.stderr) == (2, True)
    for both_or_neither in ([], ["--task", "ioi", "--csv", "x.csv"]):
        refused = call("--out", tmp_path, *both_or_neither)
        assert (refused.exit_code, "either --task or --csv" in refused.stderr) == (2, True)


def test_edges_argument(tmp_path):
    assert [edges_argument("all"), edges_argument("heads")] == ["all", "heads"]
    (tmp_path / "edges").write_text("# nothing\n")
    with pytest.raises(DataError, match="names no edge"):
        edges_argument(str(tmp_path / "edges"))


def test_text_of_one_prompt_has_no_interval(model):
    effects = wb.edge_effects(model, wc.load_task("ioi").pairs(model, 1), method="verified", top_k=5, sample=20)
    first = top_text(effects, 1).splitlines()[1]
    assert "nan" not in first
    assert "[" not in first
    assert "m0" in top_text(effects, 20)
    text = calibration_text(effects.calibration)
    assert "head to head (without largest)" in text
    assert peak_bytes() > 50e6
