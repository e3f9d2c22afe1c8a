"""Comparison of two runs: what is matched, the numbers, and what a reader is told."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from typer.testing import CliRunner

from head_tables import grid, row, table_of
from workbench.cli import make_app
from workbench.errors import DataError
from workbench.report.build import write_report
from workbench.report.compare import compare_runs, load_run
from workbench.report.compare_page import model_table, summary_table, write_comparison
from workbench.report.section import Section
from workbench.tables import HeadTable

GENERATOR = np.random.default_rng(0)
A = GENERATOR.random((5, 6))
SHAPE = {"n_layers": 5, "n_heads": 6, "path_taken": "fast", "seed": 0}


def table(rows, **source):
    model = {"name": "small", "hash": "a" * 64, "dtype": "float32"}
    return HeadTable(table_of(rows).frame, {"data_hash": "0", "model": model, **SHAPE, **source})


def pair(shift=0.0, **source):
    one = [*grid("alpha", A, input="natural"), *grid("induction", A), row("loss", 2.0), row("peak", 3.0, layer=1)]
    other = [*grid("alpha", A + shift, input="natural"), *grid("induction", A), row("loss", 2.5)]
    return table(one), table([*other, row("peak", 3.0, layer=1)], **source)


def test_a_run_agrees_with_itself():
    one, _ = pair()
    found = compare_runs(one, one)
    assert found.rows["difference"].eq(0).all()
    assert found.rows["p"].eq(1).all()
    heads = found.summary[found.summary["level"] == "head"]
    np.testing.assert_allclose(heads[["pearson", "spearman", "top_overlap"]].astype(float), 1)
    assert found.summary["n_different"].sum() == 0
    assert any("saw the same inputs" in note for note in found.notes)
    assert any("same weights" in note for note in found.notes)


def test_differences_have_welchs_interval_and_benjamini_hochbergs_q():
    one, other = pair(shift=0.02)
    found = compare_runs(one, other, names=("x", "y"))
    alpha = found.rows[found.rows["metric"] == "alpha"]
    np.testing.assert_allclose(alpha["difference"], 0.02)
    np.testing.assert_allclose(alpha["stderr"], 0.01 * np.sqrt(2))
    # the summaries of two samples of 50 with these errors, as scipy tests them
    welch = stats.ttest_ind_from_stats(0.02, 0.01 * np.sqrt(50), 50, 0.0, 0.01 * np.sqrt(50), 50, equal_var=False)
    np.testing.assert_allclose(alpha["p"], welch.pvalue)
    reach = stats.t.ppf(0.975, 98) * 0.01 * np.sqrt(2)
    np.testing.assert_allclose(alpha["ci_high"], 0.02 + reach)
    np.testing.assert_allclose(alpha["q"], stats.false_discovery_control(alpha["p"].to_numpy()))
    loss = found.rows[found.rows["metric"] == "loss"].iloc[0]
    assert loss["difference"] == pytest.approx(0.5)
    assert loss["q"] < 1e-6
    assert found.summary.set_index("metric").loc["loss", "n_different"] == 1


def test_numbers_without_an_error_are_compared_and_not_tested():
    rows = [{**each, "stderr": None, "ci_low": None, "ci_high": None} for each in grid("alpha", A)]
    found = compare_runs(table(rows), table(rows))
    assert found.rows["q"].isna().all()
    assert found.summary["n_tested"].tolist() == [0]
    assert summary_table(found)["differ"].tolist() == ["–"]


def test_overlap_counts_the_strongest_and_ties_have_none():
    order = np.arange(30.0).reshape(5, 6)
    other = order.copy()
    other[4, 5] = -1  # the strongest falls out of the ten, the eleventh takes its place
    found = compare_runs(table(grid("a", order)), table(grid("a", np.abs(other))))
    assert found.summary["top_overlap"].tolist() == [0.9]
    flat = compare_runs(table(grid("a", np.ones((5, 6)))), table(grid("a", order)))
    assert flat.summary["top_overlap"].isna().all()


def test_models_of_other_shapes_are_compared_as_wholes_alone():
    one, _ = pair()
    wide = table([*grid("alpha", np.ones((5, 8)), input="natural"), row("loss", 2.1)], n_heads=8)
    found = compare_runs(one, wide, names=("small", "wide"))
    assert set(found.rows["metric"]) == {"loss"}
    assert any("5 layers x 6 heads and wide 5 layers x 8 heads" in note for note in found.notes)
    with pytest.raises(DataError, match="no head of one is a head of the other"):
        compare_runs(one, table(grid("alpha", np.ones((5, 8))), n_heads=8))


def test_what_differs_besides_the_numbers_is_told():
    one, other = pair(seed=1, model={"name": "tuned", "hash": "b" * 64, "dtype": "bfloat16"}, data_hash="1")
    notes = " ".join(compare_runs(one, other, names=("base", "chat")).notes)
    assert "base is small, chat is tuned" in notes
    assert "The inputs differ" in notes
    assert "seed differs: 0 in base, 1 in chat" in notes
    assert "dtype differs: float32 in base, bfloat16 in chat" in notes
    extra = HeadTable.concat([one, table(grid("more", A))])
    assert "30 numbers are in A alone" in " ".join(compare_runs(extra, one).notes)


def test_the_files_hold_every_difference_and_the_page_escapes_names(tmp_path):
    one, other = pair(shift=0.1)
    found = compare_runs(one, other, names=("<b>a</b>", "b"))
    folder = write_comparison(found, tmp_path / "out", one, other)
    rows = pd.read_parquet(folder / "comparison.parquet")
    assert len(rows) == len(found.rows) == len(pd.read_csv(folder / "comparison.csv")) == 62
    differences = HeadTable.from_json(folder / "differences.json")
    np.testing.assert_allclose(differences.matrix("alpha"), np.full((5, 6), 0.1))
    page = (folder / "index.html").read_text()
    assert "<b>a</b>" not in page.replace("\\u003c", "")
    assert "&lt;b&gt;a&lt;/b&gt;" in page
    assert "agrees least" in page
    assert model_table(found)["number"].tolist() == ["loss"]


def report(folder, values, **options):
    def section(context):
        made = table([*grid("alpha", values), row("rate", 0.5)])
        texts = dict.fromkeys(("title", "sentence", "method", "limits"), "Words.")
        return Section(name="one", order=1, tables=(made,), **texts)

    import workbench
    from families import tiny_module

    write_report(workbench.wrap_model(tiny_module("gpt2")), folder, sections={"one": section}, **options)
    return folder


def test_two_reports_are_compared_in_one_command(tmp_path):
    a, b = report(tmp_path / "a", A), report(tmp_path / "b", A + 0.1, seed=1)
    ran = CliRunner().invoke(make_app(), ["compare", str(a), str(b), "--out", str(tmp_path / "c")])
    assert ran.exit_code == 0, ran.output
    assert "31 numbers are in both runs; 30 of 31" in ran.output
    assert (tmp_path / "c" / "index.html").exists()
    swapped = CliRunner().invoke(make_app(), ["compare", str(a / "heads.json"), str(b), "--names", "old", "new"])
    assert "mean, old" in swapped.output


def test_a_damaged_unfinished_or_foreign_run_is_refused(tmp_path):
    a = report(tmp_path / "a", A)
    with pytest.raises(DataError, match="holds no run"):
        load_run(tmp_path)
    data = (a / "heads.json").read_text()
    (a / "heads.json").write_text(data.replace("0.5", "0.6", 1))
    with pytest.raises(DataError, match=r"heads.json has sha256 .* and the manifest says"):
        load_run(a)
    (a / "heads.json").unlink()
    with pytest.raises(DataError, match="cannot read"):
        load_run(a)
    manifest = json.loads((a / "manifest.json").read_text()) | {"status": "interrupted"}
    (a / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is 'interrupted', not finished"):
        load_run(a)
    (a / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        load_run(a)
