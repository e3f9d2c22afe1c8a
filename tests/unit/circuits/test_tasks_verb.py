"""`workbench task`: every task at once, and tasks of the user's own."""

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import workbench_circuits as wc
from tiny_text import tiny_text_model
from workbench.errors import OutputError, PromptError
from workbench_circuits._competence import RULE, survey
from workbench_circuits.cli.task import register
from workbench_circuits.tasks import TASKS


@pytest.fixture(scope="module")
def model():
    return tiny_text_model(seed=1)


@pytest.fixture
def app(monkeypatch, model):
    monkeypatch.setattr("workbench.cli.console.open_model", lambda *args, **options: model)
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def test_all_measures_every_task(app, model, tmp_path):
    out = tmp_path / "all.csv"
    result = CliRunner().invoke(app, ["task", "--all", "--n", "12", "--seed", "3", "--out", str(out)])
    assert result.exit_code == 0
    assert RULE in result.output
    lines = result.output.splitlines()
    frame = pd.read_csv(out)
    for name in TASKS:
        pairs = wc.load_task(name).pairs(model, 12, seed=3)
        found = wc.competence(model, pairs)
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert found.verdict in line
        assert f"{100 * found.accuracy.value:.0f} % [" in line
        row = frame[(frame["task"] == name) & (frame["quantity"] == "accuracy")].iloc[0]
        assert row["value"] == pytest.approx(found.accuracy.value)
        assert row["chance"] == pytest.approx(found.chance)
        assert str(row["mark"] if isinstance(row["mark"], str) else "") == found.mark
        assert row["data_hash"] == pairs.data_hash


def test_without_a_verb_it_explains_itself_and_all_is_for_the_verb_alone(app):
    result = CliRunner().invoke(app, ["task"])
    assert result.exit_code == 0
    assert "--all" in result.output
    result = CliRunner().invoke(app, ["task", "--all", "list"])
    assert isinstance(result.exception, PromptError)
    result = CliRunner().invoke(app, ["task", "--all", "--n", "2", "--out", "/no/such/folder/x.csv"])
    assert isinstance(result.exception, OutputError)


def test_a_task_that_this_tokenizer_cannot_make_is_named_with_its_reason():
    names = tuple(f"{number:02}" for number in range(100))
    model = tiny_text_model(without=names)
    found = survey(model, n=3, tasks=["greater_than", "ioi"])
    assert [result.task for result in found.results] == ["ioi"]
    assert "greater_than: greater_than needs a tokenizer" in found.text
    with pytest.raises(PromptError, match="no task could be measured"):
        survey(model, n=3, tasks=["greater_than"])
    with pytest.raises(PromptError, match="n=0 prompts a task"):
        survey(model, n=0)


def test_every_corruption(model):
    found = survey(model, n=3, tasks=["docstring"], every_corruption=True)
    assert [result.corruption for result in found.results] == list(wc.load_task("docstring").corruptions)
    assert len(found.frame) == 3 * 4


def test_show_takes_a_file(app, model, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_text(
        "clean,corrupted,correct,incorrect\nthe dog and the,the cat and the, Mary, John\n", encoding="utf-8"
    )
    result = CliRunner().invoke(app, ["task", "show", str(path), "--competence"])
    assert result.exit_code == 0
    assert "mine: prompts from mine.csv." in result.output
    assert "the [[dog]] and the" in result.output
    assert "Mary" in result.output
    assert "1 prompts" in result.output
