"""`workbench heads` and the report's section on head effects, on a tiny model of whole words."""

import re
from importlib.metadata import entry_points
from types import SimpleNamespace

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import workbench as wb
import workbench_circuits as wc
from tiny_text import tiny_text_model
from workbench.errors import PromptError
from workbench.report.heads import main_rows
from workbench.report.section import ReportContext
from workbench.tables import HeadTable
from workbench_circuits import report_heads
from workbench_circuits._head_figures import mlp_bars, span_heatmap, total_against_direct
from workbench_circuits.cli.heads import heads_text, register
from workbench_circuits.report_heads import by_span, describe, head_effects_section, made_up_for, sentence


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


def run(app, *words):
    return CliRunner().invoke(app, ["heads", *map(str, words)])


@pytest.fixture(scope="module")
def section(model):
    return head_effects_section(ReportContext(model=model, seed=2, quick=True))


def test_the_verb_prints_the_strongest_heads_and_saves_all(app, model, tmp_path):
    result = run(app, "--task", "ioi", "--n", 4, "--corruption", "s2_flip", "--out", tmp_path, "--top", 3, "--seed", 5)
    assert result.exit_code == 0, result.output
    pairs = wc.load_task("ioi").pairs(model, 4, seed=5, corruption="s2_flip")
    expected = wb.head_effects(model, pairs, direct=True)
    table = HeadTable.load(tmp_path)
    np.testing.assert_allclose(table.matrix("total_effect"), expected.matrix("total_effect"), rtol=0, atol=1e-5)
    np.testing.assert_allclose(table.matrix("direct_effect"), expected.matrix("direct_effect"), rtol=0, atol=1e-5)
    blocks = result.output.split("\n\n")
    for metric in ("total effect", "direct effect"):
        block = next(block for block in blocks if block.startswith(f"strongest heads by {metric}"))
        lines = block.splitlines()[1:]
        best = table.top(metric.replace(" ", "_"), 3)
        assert len(lines) == 3
        for line, row in zip(lines, best.to_dict("records"), strict=True):
            assert line.split()[0] == f"a{row['layer']}.h{row['head']}"
            assert f"{row['value']:+.3f}" in line
            assert f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]" in line
            assert "indirect" in line
    assert table.provenance["competence"]["verdict"] == "not solved"
    assert "[not solved by this model]" in result.output
    assert "warning: not solved" in result.output
    assert not (tmp_path / "unfinished").exists()


def test_the_verb_draws_a_reference_of_its_own_for_means(app, model, tmp_path):
    result = run(app, "--n", 3, "--ablation", "mean", "--reference", 120, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    source = HeadTable.load(tmp_path).provenance
    reference = wc.load_task("ioi").pairs(model, 120, seed=1)
    assert source["reference_hash"] == reference.data_hash
    assert source["reference_prompts"] == 120


def test_the_verb_names_positions(app, tmp_path):
    result = run(app, "--n", 3, "--positions", "spans", "--corruption", "s2_flip", "--out", tmp_path, "--top", 4)
    assert result.exit_code == 0, result.output
    places = re.findall(r"a\d\.h\d at (\S+)", result.output)
    assert len(places) == 4
    assert set(places) <= {"S2", "END"}, "nothing else can differ"
    result = run(app, "--n", 3, "--positions", "each", "--corruption", "s2_flip", "--out", tmp_path, "--top", 4)
    assert result.exit_code == 0, result.output
    assert all(at.isdigit() for at in re.findall(r"a\d\.h\d at (\S+)", result.output))


def test_the_verb_refuses_what_does_not_fit(app, tmp_path):
    for words, message in (
        (("--ablation", "none"), "ablation 'none' is not one of"),
        (("--task", "nothing"), "nothing"),
        (("--direction", "up"), "direction 'up'"),
    ):
        result = run(app, "--out", tmp_path, "--n", 2, *words)
        assert isinstance(result.exception, PromptError)
        assert message in str(result.exception)


def test_the_text_marks_self_repair_columns_and_a_model_without_floor(model):
    pairs = wc.load_task("ioi").pairs(model, 3, corruption="s2_flip")
    table = wb.head_effects(model, pairs, metric="answer_logprob", ablation="zero", components=["heads"])
    text = heads_text(table, 2)
    assert "direct" not in text
    assert "MLP" not in text
    assert "answer_logprob in nats, 3 prompts" in text
    assert "rounding alone" in text
    silent = HeadTable(frame=table.frame, provenance={**table.provenance, "noise_floor": None})
    assert "rounding" not in heads_text(silent, 2)


def test_the_section_shows_and_says_what_its_tables_hold(section, model):
    (table,) = section.tables
    effects = table.validate()
    assert set(table.frame["analysis"]) == {"head_effects", "direct_effects"}
    assert [set(rows.frame["metric"]) for rows in main_rows(section)] == [{"total_effect", "direct_effect"}]
    heat, scatter, bars, by_position = section.figures
    np.testing.assert_allclose(np.array(heat.data[0].z, dtype=float), effects.matrix("total_effect"))
    np.testing.assert_allclose(np.array(heat.data[1].z, dtype=float), effects.matrix("direct_effect"))
    assert len(scatter.data[0].x) == model.spec.n_layers * model.spec.n_heads
    assert list(bars.data[0].y) == effects.select("mlp_total_effect", input="ioi")["value"].tolist()
    assert list(by_position.data[0].x) == ["S2", "END"]
    at_end = table.select("attention_total_effect", input="ioi, END")["value"].tolist()
    assert [row[1] for row in by_position.data[0].z] == at_end
    best = effects.top("total_effect", 1).iloc[0]
    assert f"strongest in total are a{best['layer']}.h{best['head']} " in section.sentence
    assert "which the model cannot do" in section.sentence
    assert any("does not solve ioi" in warning for warning in section.warnings)
    remainder = float(re.search(r"add up to the logit difference within (\S+) logits", section.method)[1])
    assert 0 < remainder < 1e-4
    assert "6 IOI prompts (seed 2)" in section.method


def test_quick_takes_fewer_prompts(monkeypatch, model):
    asked = []

    def stop(_model, pairs, **options):
        asked.append(len(pairs))
        raise PromptError("enough")

    monkeypatch.setattr(report_heads, "head_effects", stop)
    for quick in (True, False):
        with pytest.raises(PromptError, match="enough"):
            head_effects_section(ReportContext(model=model, quick=quick))
    assert asked[0] < asked[1]


def table_of(total, direct, half=0.1):
    """A table of one layer with given total and direct effects; every interval is `value +- half`."""
    indirect = [t - d for t, d in zip(total, direct, strict=True)]
    rows = [
        {
            "metric": f"{kind}_effect",
            "layer": 0,
            "head": head,
            "value": value,
            "ci_low": value - half,
            "ci_high": value + half,
            "n": 9,
        }
        for kind, values in (("total", total), ("direct", direct), ("indirect", indirect))
        for head, value in enumerate(values)
    ]
    rows += [{"metric": f"{which}_value", "value": 3.0, "n": 9} for which in ("base", "patch")]
    source = {"n_layers": 1, "n_heads": len(total), "n": 9, "prompt_seed": 0, "noise_floor": None}
    source["path_taken"] = "fast"
    return HeadTable.from_rows(rows, source, analysis="head_effects", unit="logits", input="ioi", method="m")


def test_self_repair_is_an_indirect_effect_clearly_against_the_direct_one():
    table = table_of(total=[-1.0, -2.0, -2.5, 0.5, -1.95], direct=[-2.0, -1.0, -2.5, 1.5, -2.0])
    found = made_up_for(table)
    assert [row["head"] for row in found] == [0, 3], "head 4's indirect effect of 0.05 is not clear"
    able = SimpleNamespace(verdict="solved", solved=True)
    text = sentence(table, able)
    assert "clearly (95 % interval without 0) for 5 of 5 heads" in text
    assert "in 2 of the 5 heads" in text
    assert "a0.h0 (direct −2.00, total −1.00)" in text
    assert "MLP" not in text
    none = sentence(table_of(total=[-1.0, 0.05], direct=[-1.0, 0.0]), able)
    assert "In none of the 2 heads" in none
    assert "for 1 of 2 heads" in none


def test_a_section_without_mlps_positions_or_attribution():
    table = table_of(total=[-1.0, 0.5], direct=[-2.0, 0.5])
    section = describe(None, SimpleNamespace(verdict="solved", solved=True), table, None, None)
    assert len(section.figures) == 2
    assert section.tables[0].frame.equals(table.frame)
    assert section.warnings == ()


def test_figures_escape_names_and_survive_zeros():
    table = table_of(total=[0.0, 0.0], direct=[0.0, 0.0])
    assert total_against_direct(table).layout.shapes
    rows = [
        {"metric": metric, "layer": layer, "head": None, "value": 0.0, "n": 3, "input": "ioi, <b>S2</b>"}
        for metric in ("attention_total_effect", "mlp_total_effect")
        for layer in range(2)
    ]
    spans = HeadTable.from_rows(rows, {"path_taken": "fast"}, analysis="head_effects", unit="logits", method="m")
    assert list(span_heatmap(spans).data[0].x) == ["&lt;b&gt;S2&lt;/b&gt;"]
    bars = [{"metric": f"mlp_{kind}_effect", "layer": 0, "value": 0.0, "n": 3} for kind in ("total", "direct")]
    assert mlp_bars(HeadTable.from_rows(bars, {"path_taken": "fast"}, analysis="a", unit="logits", method="m")).data


def test_positions_before_the_first_difference_are_left_out(model):
    pairs = wc.load_task("ioi").pairs(model, 3, corruption="s2_flip")
    table = by_span(model, pairs)
    assert set(table.frame["input"]) == {"ioi, S2", "ioi, END"}
    every = by_span(model, wc.load_task("ioi").pairs(model, 3, corruption="abc"))
    assert len(set(every.frame["input"])) == 5


def test_they_are_installed():
    assert "heads" in {point.name for point in entry_points(group="workbench.verbs")}
    assert "head_effects" in {point.name for point in entry_points(group="workbench.report_sections")}
