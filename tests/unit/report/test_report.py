import csv
import errno
import hashlib
import html
import json
import re
import sys

import pandas as pd
import plotly.graph_objects as go
import pytest

import workbench as wb
from families import tiny_module
from head_tables import grid, row, table_of
from workbench.errors import DataError, OutputError, WorkbenchError
from workbench.report import ReportContext, Section
from workbench.report.build import write_report
from workbench.report.output import prepare, write_atomic
from workbench.tables import HeadTable

EVIL = "<script>alert('x')</script>"
FIRST = [[0.1, 0.9], [0.7, 0.2]]
SECOND = [[0.5, 0.4], [0.3, 0.6]]


@pytest.fixture(scope="module")
def model():
    return wb.wrap_model(tiny_module("llama"), name=f"tiny {EVIL}")


def section(name, rows, **fields):
    filled = {
        "title": f"Title of {name}",
        "order": 1,
        "sentence": f"Sentence of {name}.",
        "method": "By hand.",
        "limits": "All of them.",
        **fields,
    }
    return lambda context: Section(name=name, tables=(table_of(rows),) if rows else (), **filled)


def broken(context):
    raise RuntimeError(f"no luck {EVIL}")


def page(folder):
    return (folder / "index.html").read_text(encoding="utf-8")


def own_markup(folder):
    """The page without the library and without the data, both of which hold the odd "<script" in strings."""
    return re.sub(r"<script.*?</script>", "", page(folder), flags=re.DOTALL)


def test_files_and_manifest(model, tmp_path):
    two = {"one": section("one", grid("a", FIRST)), "two": section("two", grid("b", SECOND), order=0)}
    report = write_report(model, tmp_path / "out", sections=two, seed=3)
    assert report.failed == ()
    manifest = json.loads((report.folder / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["seed"] == 3
    assert [each["name"] for each in manifest["sections"]] == ["two", "one"]
    assert {"index.html", "heads.csv", "heads.parquet"} <= {each["path"] for each in manifest["files"]}
    for each in manifest["files"]:
        data = (report.folder / each["path"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (each["bytes"], each["sha256"])
    assert set(manifest["timings"]["section_seconds"]) == {"one", "two"}
    tidy = pd.read_parquet(report.folder / "heads.parquet")
    assert sorted(tidy["value"]) == sorted(value for line in FIRST + SECOND for value in line)
    with (report.folder / "heads.csv").open(newline="") as stream:
        rows = {(each["metric"], each["layer"], each["head"]): float(each["value"]) for each in csv.DictReader(stream)}
    assert rows["b", "1", "0"] == 0.3
    HeadTable.load(report.folder / "sections" / "one" / "table-1").validate()


def test_sections_sentences_and_table_of_heads(model, tmp_path):
    sections = {
        "one": section("one", grid("a", FIRST), html_tables=(captioned({"who": ["x"], "how much": [0.25]}),)),
        "two": section("two", grid("b", SECOND, input="natural") + grid("b", FIRST, input="random"), order=0),
    }
    text = own_markup(write_report(model, tmp_path, sections=sections).folder)
    assert text.index("Sentence of two.") < text.index("Sentence of one.")
    assert text.count("Sentence of one.") == 2, "once as a key finding, once in the section"
    for word in ("By hand.", "All of them.", "<caption>A caption</caption>", "0.250"):
        assert word in text
    heading = re.findall(r'<button type="button" data-column="\d+">(.*?)</button>', text)
    assert heading == ["head", "b, natural", "b, random", "a"]
    line = re.search(r"<tr[^>]*><th[^>]*>a1\.h0</th>(.*?)</tr>", text)
    assert line is not None
    assert re.findall(r'data-v="([^"]*)"', line[1]) == ["0.3", "0.7", "0.7"]


def captioned(columns):
    frame = pd.DataFrame(columns)
    frame.attrs["caption"] = "A caption"
    return frame


def test_page_is_one_file_without_addresses_to_load_from(model, tmp_path):
    figures = (go.Figure(go.Scatter(x=[1], y=[2])), go.Figure(go.Scatter(x=[1], y=[3])))
    write_report(model, tmp_path, sections={"one": section("one", grid("a", FIRST), figures=figures)})
    from plotly.offline import get_plotlyjs

    assert page(tmp_path).count(get_plotlyjs()) == 1
    assert re.findall(r"""(?:src|href)=["'](?!#)([^"']*)""", own_markup(tmp_path)) == [
        "heads.csv",
        "heads.parquet",
        "heads.json",
        "matrices/",
        "manifest.json",
    ]
    assert re.findall(r'data-figure="([^"]*)"', page(tmp_path)) == ["figure-one-1", "figure-one-2"]


def test_same_results_make_the_same_page(model, tmp_path):
    def write(name):
        figure = go.Figure(go.Scatter(x=[1], y=[2]))
        write_report(model, tmp_path / name, sections={"one": section("one", grid("a", FIRST), figures=(figure,))})
        return re.sub(r"<time.*?</time>", "", page(tmp_path / name))

    assert write("first") == write("second")


def test_everything_from_outside_is_escaped(model, tmp_path):
    figure = go.Figure(go.Scatter(x=[1], y=[2], hovertext=[EVIL]))
    table = captioned({EVIL: [EVIL]})
    table.attrs["caption"] = EVIL
    everywhere = dict.fromkeys(("title", "sentence", "method", "limits"), EVIL)
    sections = {
        "one": section(
            "one",
            grid(EVIL, FIRST, unit=EVIL, input=EVIL),
            figures=(figure,),
            html_tables=(table,),
            warnings=(EVIL,),
            **everywhere,
        ),
        "two": broken,
    }
    write_report(model, tmp_path, sections=sections, command=f"workbench report --model {EVIL}")
    assert EVIL not in page(tmp_path)
    assert "alert('x')" not in html.unescape(own_markup(tmp_path)).replace(EVIL, "")
    embedded = re.findall(r"<script[^>]*data-figure[^>]*>(.*?)</script>", page(tmp_path), flags=re.DOTALL)
    assert json.loads(embedded[0])["data"][0]["hovertext"] == [EVIL]


def test_failing_section_is_shown_and_the_others_complete(model, tmp_path):
    sections = {"bad": broken, "good": section("good", grid("a", FIRST)), "odd": lambda context: "not a section"}
    report = write_report(model, tmp_path, sections=sections)
    assert report.failed == ("bad", "odd")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "incomplete"
    assert [each["status"] for each in manifest["sections"]] == ["complete", "failed", "failed"]
    assert "RuntimeError: no luck" in manifest["sections"][1]["error"]
    assert "in broken" in manifest["sections"][1]["traceback"]
    text = own_markup(tmp_path)
    assert "This section failed." in text
    assert "RuntimeError: no luck" in text
    assert "returned a str, not a Section" in text
    assert "Sentence of good." in text
    assert len(pd.read_csv(tmp_path / "heads.csv")) == 4


def test_interrupted_run_keeps_what_was_done(model, tmp_path):
    def interrupt(context):
        raise KeyboardInterrupt

    sections = {"good": section("good", grid("a", FIRST)), "stop": interrupt}
    with pytest.raises(KeyboardInterrupt):
        write_report(model, tmp_path, sections=sections)
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "interrupted"
    assert len(HeadTable.load(tmp_path / "sections" / "good" / "table-1").frame) == 4


def test_earlier_report_in_the_same_folder_is_replaced(model, tmp_path):
    write_report(model, tmp_path, sections={"old": section("old", grid("a", FIRST))})
    (tmp_path / "sections" / "mine").mkdir()
    write_report(model, tmp_path, sections={"new": section("new", grid("b", SECOND))})
    assert sorted(path.name for path in (tmp_path / "sections").iterdir()) == ["mine", "new"]
    assert set(pd.read_csv(tmp_path / "heads.csv")["metric"]) == {"b"}


def test_context_reaches_the_sections(model, tmp_path):
    seen: list[ReportContext] = []

    def look(context):
        seen.append(context)
        return section("look", [])(context)

    write_report(model, tmp_path, sections={"look": look}, seed=7, quick=True)
    assert (seen[0].seed, seen[0].quick, seen[0].model) == (7, True, model)
    assert not (tmp_path / "heads.csv").exists()
    assert 'id="heads-table"' not in page(tmp_path)


def test_rows_without_a_head_stay_out_of_the_table_of_heads(model, tmp_path):
    rows = [*grid("a", FIRST), row("whole", 0.123, input="natural")]
    write_report(model, tmp_path, sections={"one": section("one", rows)})
    assert ">whole<" not in own_markup(tmp_path)
    assert len(pd.read_csv(tmp_path / "heads.csv")) == 5


def test_out_that_is_a_file_is_refused_before_any_work(model, tmp_path):
    (tmp_path / "taken").write_text("mine")
    ran = []
    with pytest.raises(OutputError, match=r"taken: a file is in the way.*--out"):
        write_report(model, tmp_path / "taken", sections={"one": ran.append})
    assert not ran
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.skipif(sys.platform == "win32", reason="no /dev/full")
def test_full_disk_is_found_out_first(tmp_path, monkeypatch):
    import tempfile

    class Full:
        def __init__(self, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def write(self, data):
            with open("/dev/full", "wb", buffering=0) as device:
                device.write(data)

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", Full)
    with pytest.raises(OutputError, match=r"no room to write .*free some space"):
        prepare(tmp_path)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    import os

    target = tmp_path / "file"
    target.write_text("old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="no room"):
        write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_sections_is_an_error(model, tmp_path):
    with pytest.raises(DataError, match="no report sections are installed"):
        write_report(model, tmp_path, sections={})


@pytest.mark.parametrize("field", ["title", "sentence", "method", "limits"])
def test_section_must_say_everything(field):
    with pytest.raises(WorkbenchError, match=f"empty {field}"):
        section("one", [], **{field: " "})(None)


def test_installed_sections_are_found():
    from workbench.report.run import installed_sections

    assert {"attention_sinks", "head_patterns", "competence"} <= set(installed_sections())
