"""`workbench analyze --cache`: an analysis of a capture gives what one of the model gives."""

import numpy as np
import pytest
from typer.testing import CliRunner

import workbench as wb
from families import tiny_module
from workbench.analyzers import head_patterns
from workbench.cli import make_app
from workbench.tables import HeadTable


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    model = wb.wrap_model(tiny_module("llama"), name="tiny")
    drawn = head_patterns.sequences(model, n=4, period=12)
    folder = tmp_path_factory.mktemp("cache") / "c"
    wb.capture(model, drawn.tokens, "pattern", labels=drawn.labels, store=folder)
    return model, folder


def test_the_table_is_that_of_the_model(captured, tmp_path):
    model, folder = captured
    ran = CliRunner().invoke(
        make_app(), ["analyze", "head_patterns", "--cache", str(folder), "--out", str(tmp_path)], catch_exceptions=False
    )
    assert ran.exit_code == 0, ran.output
    ours = HeadTable.load(tmp_path)
    theirs = head_patterns.run(model, n=4, period=12)
    for metric in ("induction", "previous_token", "duplicate_token"):
        np.testing.assert_allclose(ours.matrix(metric), theirs.matrix(metric), atol=1e-6)
    assert "induction" in ran.output


def test_a_model_beside_a_cache_and_an_analysis_that_needs_one_are_refused(captured, tmp_path):
    _, folder = captured
    common = ["--cache", str(folder), "--out", str(tmp_path)]
    for words, message in (
        (["head_patterns", "--model", "gpt2"], "leave --model 'gpt2' out"),
        (["extreme_tokens"], "extreme_tokens needs a model to run"),
    ):
        ran = CliRunner().invoke(make_app(), ["analyze", *words, *common])
        assert ran.exit_code != 0
        assert message in ran.output + str(ran.exception)
