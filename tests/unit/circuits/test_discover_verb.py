"""`workbench discover`: what it prints and writes is what the library says."""

import json

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from tiny_text import tiny_text_model
from workbench_circuits.circuit import Circuit
from workbench_circuits.cli.discover import as_patched, register
from workbench_circuits.discovery import find


@pytest.fixture(scope="module")
def model():
    return tiny_text_model(seed=1)


@pytest.fixture
def call(monkeypatch, model):
    monkeypatch.setattr("workbench.cli.console.open_model", lambda *args, **options: model)
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return lambda *arguments: CliRunner().invoke(app, ["discover", *map(str, arguments)])


def test_the_whole_way(call, model, tmp_path):
    out = tmp_path / "deep" / "ioi.json"
    sizes = ("--n", 4, "--n-held-out", 4, "--n-edges", 12, "--random", 2, "--seed", 3)
    result = call("--task", "ioi", "--out", out, *sizes, "--compare", "eap,eap_ig")
    assert result.exit_code == 0, (result.stderr, result.exception)
    circuit = Circuit.load(out)
    expected = find(model, "ioi", n=4, n_held_out=4, n_edges=12, seed=3).circuit
    assert circuit.edges == expected.edges
    assert circuit.held_out.faithfulness.value == pytest.approx(expected.held_out.faithfulness.value, rel=1e-4)
    assert f"{len(circuit):,} of {circuit.graph.n_edges:,} edges" in result.stdout
    assert str(circuit.held_out) in result.stdout
    assert "does not solve ioi" in result.stdout
    assert "warning:" in result.stdout
    assert {p.name for p in out.parent.iterdir()} >= {
        "ioi.json",
        "ioi.curves.csv",
        "ioi.areas.csv",
        "ioi.differences.csv",
        "ioi.curves.html",
    }
    areas = pd.read_csv(out.with_name("ioi.areas.csv"))
    assert areas["method"].tolist() == ["this circuit's", "eap", "eap_ig", "random"]
    for row in areas.to_dict("records"):
        assert f"{row['cmd']:.3f}" in result.stdout
    assert "random circuits of" in result.stdout
    assert not out.with_name("ioi.unfinished").exists()
    json.loads(out.read_text())


def test_a_task_of_your_own(call, tmp_path):
    """From a CSV file to a circuit."""
    rows = ["clean,corrupted,correct,incorrect"]
    names = ["Mary", "John", "Tom", "Anna"]
    said = "When {0} and {1} went to the store {1} gave a drink to"
    both = [(a, b) for a in names for b in names if a != b]
    rows += [f"{said.format(a, b)},{said.format(b, a)}, {a}, {b}" for a, b in both]
    (tmp_path / "mine.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    out = tmp_path / "mine.json"
    result = call(
        "--task",
        tmp_path / "mine.csv",
        "--out",
        out,
        "--n-edges",
        10,
        "--compare",
        "",
        "--random",
        0,
        "--no-figures",
        "--no-roles",
        "--algorithm",
        "greedy",
        "--method",
        "eap",
    )
    assert result.exit_code == 0, (result.stderr, result.exception)
    circuit = Circuit.load(out)
    assert circuit.task == "mine"
    assert circuit.held_out.n_prompts == 6
    assert (circuit.algorithm, circuit.method) == ("greedy", "eap")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nothing"], "nothing"),
        (["--task", "no_such.csv"], "no_such.csv"),
        (["--task", "ioi", "--compare", "best"], "--compare 'best' is not one of"),
        (["--task", "ioi", "--algorithm", "best"], "algorithm 'best' is not one of"),
        (["--task", "ioi", "--target", "-1"], "must be above 0"),
    ],
)
def test_what_is_wrong_is_named(call, tmp_path, arguments, message):
    result = call(*arguments, "--out", tmp_path / "c.json")
    assert result.exit_code != 0
    assert message in str(result.exception)


@pytest.mark.parametrize("metric", ["logit_diff", "kl_to_clean"])
def test_the_figure_is_drawn_by_what_patching_does_whichever_way_effects_were_measured(model, metric):
    options = {"n": 4, "n_held_out": 4, "n_edges": 30, "metric": metric, "seed": 3, "n_resamples": 0, "method": "exact"}
    drawn = {}
    for direction in ("noising", "both"):
        circuit = find(model, "ioi", direction=direction, algorithm="threshold", **options).circuit
        assert circuit.direction == direction
        frame = as_patched(circuit)
        drawn[direction] = dict(zip(frame["sender"] + "->" + frame["receiver"], frame["effect"], strict=True))
    shared = set(drawn["noising"]) & set(drawn["both"])
    strong = [e for e in shared if min(abs(drawn[way][e]) for way in drawn) > 0.2 * abs(drawn["noising"][e])]
    agree = sum(drawn["noising"][e] * drawn["both"][e] > 0 for e in strong)
    assert len(strong) >= 5
    assert agree > 0.75 * len(strong)
