"""The section about extreme tokens says what its table says."""

import numpy as np
import pytest
import torch

import workbench
from families import tiny_module
from workbench.analyzers.extreme_tokens import run
from workbench.errors import DataError
from workbench.plots import layer_lines
from workbench.report.section import ReportContext
from workbench.report.sections.extreme_tokens import describe, loss_table, massive_table, section, sentence


@pytest.fixture(scope="module")
def found():
    module = tiny_module("llama", dtype=torch.float64)
    with torch.no_grad():
        module.model.embed_tokens.weight[:, 7] = 5000.0
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight[7] = 0
            layer.mlp.down_proj.weight[7] = 0
    return run(workbench.wrap_model(module), length=12, n=4, n_loss=4)


@pytest.fixture(scope="module")
def none():
    return run(workbench.wrap_model(tiny_module("gpt2")), length=12, n=4, n_loss=4)


def test_the_sentence_names_layer_dimension_and_losses(found):
    lines = sentence(found).split("\n")
    assert lines[0] == (
        "Massive activations appear at layer 0 (100.0 % of the documents; last seen at layer 2), at the first and "
        "later tokens, in dimension 7 (5000), 7 (5000)."
    )
    delta = found.select("delta_loss_set_zero")["value"].iloc[0]
    assert f"by {'+' if delta > 0 else ''}{delta:.3g}"[:6].replace("-", "−") in lines[1]
    assert "of 12 heads have values at the first token" in lines[2]


def test_the_sentence_without_massive_activations_tells_how_near_it_came(none):
    ratio = none.provenance["largest_ratio"]
    assert sentence(none).startswith("No layer has massive activations in most documents; the largest activation is")
    assert f"{ratio:.2f}" in sentence(none)
    assert loss_table(none) is None
    assert massive_table(none) is None
    assert len(describe(none).html_tables) == 0


def test_the_tables_hold_the_numbers(found):
    massive = massive_table(found)
    assert massive["dimension"].tolist() == [7, 7]
    assert massive["layers"].tolist() == ["0 to 2", "0 to 2"]
    changes = loss_table(found)
    assert len(changes) == 4
    assert changes["difference"].tolist()[0] == ""
    assert "layer 0" in changes.attrs["caption"]


def test_lines_are_drawn_where_there_are_layers(found):
    figure = layer_lines(found, [{"largest_1": "largest"}, {"resid_norm_rest": "rest"}], titles=["a", "b"], log=True)
    assert [trace.name for trace in figure.data] == ["largest", "rest"]
    np.testing.assert_allclose(figure.data[0].y, found.select("largest_1")["value"])
    low = np.array(figure.data[0].y) - np.array(figure.data[0].error_y.arrayminus)
    assert (low > 0).all(), "an interval on a logarithmic axis stays above zero"
    with pytest.raises(DataError, match="no row, or several, for a whole layer"):
        layer_lines(found, [{"value_ratio": "of heads"}], titles=["a"])


def test_a_short_context_and_a_missing_tokenizer_are_told():
    module = tiny_module("gpt2")
    model = workbench.wrap_model(module)
    model.spec = type(model.spec)(**{**vars(model.spec), "n_ctx": 24})
    made = section(ReportContext(model=model, quick=True))
    assert any("holds 24 tokens" in warning for warning in made.warnings)
    assert any("no tokenizer" in warning for warning in made.warnings)
    assert made.main
