import json
import re
from importlib.metadata import entry_points

import pytest
import typer
from typer.testing import CliRunner

import workbench_circuits as wc
from tiny_text import tiny_text_model
from workbench.errors import PromptError
from workbench.report.section import ReportContext
from workbench.stats import mean_estimate, proportion
from workbench_circuits._competence import Competence
from workbench_circuits.cli.task import describe, register
from workbench_circuits.report import competence_figure, competence_section, finding


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


def test_list_names_every_task(app):
    result = CliRunner().invoke(app, ["task", "list"])
    assert result.exit_code == 0
    for words in ("ioi ", "abc, s2_flip", "50%", "colored_objects", "33%", "mindiff", "Wang et al. 2022"):
        assert words in result.output


def test_show_marks_what_differs(app, model):
    result = CliRunner().invoke(app, ["task", "show", "ioi", "--n", "2", "--seed", "4", "--corruption", "s2_flip"])
    assert result.exit_code == 0
    pairs = wc.load_task("ioi").pairs(model, 2, seed=4, corruption="s2_flip")
    clean = [line for line in result.output.splitlines() if line.startswith("  clean")]
    corrupted = [line for line in result.output.splitlines() if line.startswith("  s2_flip")]
    for i in range(2):
        s, io = (model.to_str_tokens(ids[i])[0] for ids in (pairs.wrong_answers, pairs.answers))
        assert re.findall(r"\[\[(.*?)\]\]", clean[i]) == [s.strip()]
        assert re.findall(r"\[\[(.*?)\]\]", corrupted[i]) == [io.strip()]
        plain = clean[i].replace("[[", "").replace("]]", "").removeprefix("  clean").strip()
        assert plain == "".join(model.to_str_tokens(pairs.clean[i, : int(pairs.lengths[i])]))
        assert f"{io}   (not{s})" in result.output
    assert "solve" not in result.output


def test_show_measures_competence_when_asked(app, model):
    words = ["task", "show", "colored_objects", "--n", "1", "--competence", "--prompts", "20"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0
    pairs = wc.load_task("colored_objects").pairs(model, 20)
    assert wc.competence(model, pairs).sentence in result.output
    assert "midpoint between chance and 1" in result.output


def test_show_refuses_before_it_loads_a_model(app, monkeypatch):
    monkeypatch.setattr("workbench.cli.console.open_model", lambda *args, **options: pytest.fail("loaded"))
    for words, message in (
        (["iot"], "did you mean 'ioi'"),
        (["ioi", "--corruption", "s2flip"], "did you mean 's2_flip'"),
    ):
        result = CliRunner().invoke(app, ["task", "show", *words])
        assert isinstance(result.exception, PromptError)
        assert message in str(result.exception)


def test_a_prompt_of_several_lines_is_indented(model):
    task = wc.load_task("colored_objects")
    text = describe(task, model, n=1, seed=0, corruptions=task.corruptions)
    assert re.search(r"\n {2}clean {6}Q: .*\n {13}A: \w+\n {13}Q: .*\[\[\w+\]\]\?\n {13}A:\n", text)


def test_verb_and_section_are_entry_points():
    verbs = {point.name: point.value for point in entry_points(group="workbench.verbs")}
    sections = {point.name: point.value for point in entry_points(group="workbench.report_sections")}
    assert verbs["task"] == "workbench_circuits.cli.task:register"
    assert sections["competence"] == "workbench_circuits.report:competence_section"


# --- the section --------------------------------------------------------------------------------------


def made(task, corruption, right, n, chance, clean, corrupted):
    spread = [-1.0, 1.0] * (n // 2)
    return Competence(
        model="M",
        task=task,
        corruption=corruption,
        n=n,
        chance=chance,
        accuracy=proportion(right, n),
        top1=proportion(right // 2, n),
        metric_clean=mean_estimate([clean + x for x in spread]),
        metric_corrupted=mean_estimate([corrupted + x for x in spread]),
        data_hash="h",
        seed=0,
        prepends_bos=False,
        path_taken="fast",
    )


def results(ioi=98, objects=36, clean=4.5):
    return [
        ("IOI", made("ioi", "abc", ioi, 100, 0.5, clean, 0.12)),
        ("IOI", made("ioi", "s2_flip", ioi, 100, 0.5, clean, -4.0)),
        ("Colored Objects", made("colored_objects", "mindiff", objects, 100, 1 / 3, 0.2, -0.2)),
    ]


def test_the_sentence_says_what_the_model_can_and_cannot_do():
    text = finding("M", results())
    assert "M can do IOI: accuracy 98 % [93, 99] among the candidates, chance 50 %" in text
    assert "corrupted: 0.120 with abc, −4.00 with s2_flip" in text
    assert "M cannot do Colored Objects: accuracy 36 %" in text
    assert text.count("IOI") == 1
    other = finding("M", results(ioi=51, objects=99, clean=0.05))
    assert "M cannot do IOI: accuracy 51 %" in other
    assert "M can do Colored Objects: accuracy 99 %" in other
    assert "better than chance" in finding("M", results(objects=60))


def test_the_figure_holds_the_numbers_their_intervals_and_chance():
    rows = results()
    figure = competence_figure(rows)
    bars = {trace.name: trace for trace in figure.data}
    assert list(bars["among the candidates"].y) == [0.98, 0.36]
    assert list(bars["clean prompts"].y) == pytest.approx([4.5, 4.5, 0.2])
    assert list(bars["corrupted prompts"].y) == pytest.approx([0.12, -4.0, -0.2])
    accuracy, error = rows[2][1].accuracy, bars["among the candidates"].error_y
    assert error.array[1] == pytest.approx(accuracy.ci_high - accuracy.value)
    assert error.arrayminus[1] == pytest.approx(accuracy.value - accuracy.ci_low)
    chance = [shape.y0 for shape in figure.layout.shapes if shape.line.dash == "dash"]
    assert chance == pytest.approx([0.5, 1 / 3])
    json.loads(figure.to_json())


def test_the_section_of_a_tiny_model(model):
    told = []
    section = competence_section(ReportContext(model=model, seed=2, quick=True, progress=told.append))
    assert len(told) == 3
    expected = []
    for name in ("ioi", "colored_objects"):
        task = wc.load_task(name)
        for corruption in task.corruptions:
            pairs = task.pairs(model, 32, seed=2, corruption=corruption)
            expected.append((task.title, wc.competence(model, pairs)))
    assert section.sentence == finding("tiny-words", expected)
    (tidy,) = section.tables
    frame = tidy.validate().frame
    assert frame["layer"].isna().all()
    assert len(frame) == 4 * len(expected)
    for (_, found), rows in zip(expected, (frame.iloc[at : at + 4] for at in (0, 4, 8)), strict=True):
        assert set(rows["input"]) == {f"{found.task}, {found.corruption}"}
        assert list(rows["value"]) == list(found.frame["value"])
        assert tidy.provenance["verdict"][rows["input"].iloc[0]] == found.verdict
    (table,) = section.html_tables
    assert list(table["verdict"]) == [each.verdict for _, each in expected]
    assert list(table["corruption"]) == ["abc", "s2_flip", "mindiff"]
    assert len(section.warnings) == len({title for title, each in expected if not each.solved})
    assert "32 prompts a task, drawn with seed 2" in section.method
    assert "without BOS" in section.method
