import csv
import errno
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench as wb
from families import tiny_module
from head_tables import grid, row, table_of
from workbench.errors import DataError, OutputError
from workbench.tables import COLUMNS, SCHEMA_VERSION, HeadTable, provenance

VALUES = [[0.1, 0.9, -0.3], [0.7, 0.2, 0.4]]
SOURCE = {"n_layers": 2, "n_heads": 3, "path_taken": "fast", "model": {"name": "small", "hash": "a" * 64}}


def table(rows=None, **source):
    return HeadTable(table_of(grid("a", VALUES) if rows is None else rows).frame, {**SOURCE, **source})


# the schema


def test_every_column_gets_its_dtype():
    wild = pd.DataFrame(
        {
            "path_taken": "fast",
            "method": pd.Categorical(["m", "m"]),
            "analysis": "x",
            "layer": [0.0, 1.0],
            "head": np.array([1, 2], dtype=np.int32),
            "metric": "a",
            "value": np.array([0.5, 1.5], dtype=np.float32),
            "stderr": None,
            "ci_low": pd.array([None, None], dtype="Float64"),
            "ci_high": np.nan,
            "n": [4, None],
            "unit": "",
            "input": "",
            "position": pd.NA,
        },
        index=[7, 3],
    )
    frame = HeadTable(wild, {}).validate().frame
    assert tuple(frame.columns) == COLUMNS
    assert frame.index.tolist() == [0, 1]
    assert {str(frame[name].dtype) for name in ("layer", "head", "n", "position")} == {"Int64"}
    assert {str(frame[name].dtype) for name in ("value", "stderr", "ci_low", "ci_high")} == {"float64"}
    assert frame["n"].tolist() == [4, pd.NA]
    assert frame["value"].tolist() == [0.5, 1.5]
    assert frame["stderr"].isna().all()


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("layer", [0.5, 1], "column 'layer' must hold whole numbers"),
        ("head", ["one", "two"], "column 'head' must hold whole numbers: it holds"),
        ("layer", [True, False], "column 'layer' must hold whole numbers"),
        ("value", ["0.5", "0.7"], "column 'value' must hold numbers"),
        ("value", [1 + 2j, 1], "column 'value' must hold numbers"),
        ("stderr", [object(), 1.0], "column 'stderr' must hold numbers: it holds <object"),
        ("unit", [None, "s"], "column 'unit' must hold text: it holds (None|nan)"),
        ("input", [1, 2], "column 'input' must hold text: it holds 1"),
    ],
)
def test_values_of_another_dtype_are_refused(column, values, message):
    frame = table_of(grid("a", [[0.1, 0.2]])).frame.astype(object)
    frame[column] = values
    with pytest.raises(DataError, match=message):
        HeadTable(frame)


def test_columns_must_be_those_of_the_schema():
    frame = table().frame
    with pytest.raises(DataError, match=r"missing: stderr, n; foreign: none"):
        HeadTable(frame.drop(columns=["n", "stderr"]))
    with pytest.raises(DataError, match=r"missing: none; foreign: extra\)"):
        HeadTable(frame.assign(extra=1))
    with pytest.raises(DataError, match="expected each once"):
        HeadTable(pd.concat([frame, frame[["n"]]], axis=1))


def test_rows_may_leave_out_what_they_do_not_have():
    made = HeadTable.from_rows(
        [{"metric": "a", "value": 1.0, "layer": 0, "head": 2}, {"metric": "b", "value": 2.0, "n": 5}],
        {"path_taken": "hooks"},
        analysis="some",
        unit="nats",
    ).validate()
    assert made.frame["path_taken"].tolist() == ["hooks", "hooks"]
    assert made.frame["analysis"].tolist() == ["some", "some"]
    assert made.frame["head"].tolist() == [2, pd.NA]
    assert made.frame["n"].tolist() == [pd.NA, 5]
    assert made.frame["input"].tolist() == ["", ""]
    with pytest.raises(DataError, match="columns the schema does not know: heads"):
        HeadTable.from_rows([{"metric": "a", "value": 1.0, "heads": 2}])


def test_no_rows_make_a_table(tmp_path):
    empty = HeadTable.from_rows([], SOURCE).validate()
    assert len(HeadTable.load(empty.save(tmp_path))) == 0


def test_a_table_does_not_share_its_numbers():
    frame = table_of(grid("a", VALUES)).frame
    made = HeadTable(frame)
    frame.loc[0, "value"] = 5.0
    assert made.frame.loc[0, "value"] == 0.1
    with pytest.raises(AttributeError):
        made.frame = frame


# validate


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": np.nan}, "value is nan and must be finite"),
        ({"value": np.inf, "ci_high": np.inf}, "value is inf and must be finite"),
        ({"stderr": -0.1}, "stderr is -0.1 and must be >= 0 or missing"),
        ({"stderr": np.inf}, "stderr is inf and"),
        ({"ci_low": np.nan}, "ci_low .* must both be finite or both be missing"),
        ({"ci_high": np.inf}, "both be finite"),
        ({"ci_low": 0.21}, r"value is 0.2 and must lie between ci_low and ci_high \[0.21, 0.22\]"),
        ({"ci_high": 0.19}, r"must lie between ci_low and ci_high"),
        ({"n": 0}, "n is 0 and must be at least 1"),
        ({"position": -1}, "position is -1 and must be a key position, counted from 0"),
        ({"layer": -1}, "layer is -1 and must be counted from 0"),
        ({"layer": 2}, "layer is 2 and must be below 2"),
        ({"head": 3}, "head is 3 and must be below 3"),
        ({"head": -1}, "head is -1 and must be counted from 0"),
        ({"layer": pd.NA}, "layer is <NA> and must be given where the head is"),
        ({"metric": ""}, "metric is '' and must have a name"),
        ({"analysis": ""}, "analysis is '' and must have a name"),
        ({"path_taken": "slow"}, "path_taken is 'slow' and must be one of fast, hooks"),
        ({"head": 0}, "stands twice"),
    ],
)
def test_impossible_rows_are_refused(changes, message):
    frame = table().validate().frame.copy()
    for name, value in changes.items():
        frame.loc[4, name] = value
    with pytest.raises(DataError, match=message) as caught:
        HeadTable(frame, SOURCE).validate()
    assert str(caught.value).startswith("row 4 (")


@pytest.mark.parametrize("difference", [{"input": "random"}, {"position": 1}, {"method": "other"}, {"analysis": "b"}])
def test_rows_differ_in_one_column_of_the_key(difference):
    one = row("a", 0.5, layer=0, head=0)
    table([one, {**one, **difference}]).validate()
    with pytest.raises(DataError, match=r"row 1 .*stands twice"):
        table([one, {**one, "value": 0.51}]).validate()
    whole = row("a", 0.5)
    with pytest.raises(DataError, match="stands twice"):
        table([whole, whole]).validate()


def test_missing_intervals_and_larger_models_are_valid():
    bare = row("a", 0.5, layer=9, stderr=None, ci_low=None, ci_high=None, n=1)
    table_of([bare]).validate()
    with pytest.raises(DataError, match="must be below 2"):
        table([bare]).validate()


def test_a_frame_changed_in_place_is_noticed():
    made = table()
    made.frame["value"] = made.frame["value"].astype("float32")
    with pytest.raises(DataError, match="were changed"):
        made.validate()


# saving and loading

NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(max_size=8)


@st.composite
def rows(draw):
    low, value, high = sorted(draw(st.tuples(NUMBERS, NUMBERS, NUMBERS)))
    given_interval = draw(st.booleans())
    return {
        "value": value,
        "ci_low": low if given_interval else None,
        "ci_high": high if given_interval else None,
        "stderr": draw(st.none() | st.floats(0, 1e300)),
        "n": draw(st.none() | st.integers(1, 2**63 - 1)),
        "position": draw(st.none() | st.integers(0, 2**53 + 1)),
        **{name: draw(TEXTS) for name in ("unit", "input", "method")},
    }


@settings(max_examples=25, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=5))
def test_what_is_saved_is_what_is_loaded(some):
    made = HeadTable.from_rows(
        [{"metric": f"m {place}\n", **each} for place, each in enumerate(some)],
        {**SOURCE, "note": 'naïve – \u2028 "quoted", 1/3'},
        analysis="x, y",
    )
    with tempfile.TemporaryDirectory() as folder:
        loaded = HeadTable.load(made.save(folder))
        with (Path(folder) / "table.csv").open(newline="", encoding="utf-8") as stream:
            lines = list(csv.DictReader(stream))
    pd.testing.assert_frame_equal(loaded.frame, made.frame, check_exact=True)
    assert loaded.provenance == made.provenance
    assert list(lines[0]) == list(COLUMNS)
    for line, each in zip(lines, made.frame.to_dict("records"), strict=True):
        for name in ("value", "stderr", "ci_low", "ci_high"):
            assert (line[name] == "") if np.isnan(each[name]) else (float(line[name]) == each[name])
        for name in ("layer", "head", "n", "position"):
            assert (line[name] == "") if pd.isna(each[name]) else (int(line[name]) == each[name])
        for name in ("analysis", "metric", "unit", "input", "method", "path_taken"):
            assert line[name] == each[name]


def test_saving_again_replaces_and_leaves_nothing_else(tmp_path):
    home = tmp_path / "deep" / "folder"
    assert table().save(home) == home
    table([row("b", 1.0)]).save(str(home))
    assert sorted(path.name for path in home.iterdir()) == ["provenance.json", "table.csv", "table.parquet"]
    assert HeadTable.load(home).frame["metric"].tolist() == ["b"]
    record = json.loads((home / "provenance.json").read_text(encoding="utf-8"))
    assert record["schema_version"] == SCHEMA_VERSION
    for name, digest in record["files"].items():
        assert hashlib.sha256((home / name).read_bytes()).hexdigest() == digest


def test_invalid_tables_are_not_saved(tmp_path):
    with pytest.raises(DataError, match="stands twice"):
        table([row("a", 0.5), row("a", 0.5)]).save(tmp_path / "out")
    with pytest.raises(DataError, match="provenance cannot be written as JSON"):
        table(odd={1, 2}).save(tmp_path / "out")
    with pytest.raises(DataError, match="provenance cannot be written as JSON"):
        table(odd=float("nan")).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize("name", ["table.csv", "table.parquet", "provenance.json"])
def test_full_disk_leaves_the_earlier_table(tmp_path, name):
    table([row("old", 1.0)]).save(tmp_path)
    (tmp_path / f".{name}.{os.getpid()}.part").symlink_to("/dev/full")
    with pytest.raises(OutputError, match=r"no room for a table of [\d,]+ bytes .*free some space"):
        table([row("new", 1.0)]).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["provenance.json", "table.csv", "table.parquet"]
    assert HeadTable.load(tmp_path).frame["metric"].tolist() == ["old"]


def test_save_interrupted_between_the_files_is_noticed(tmp_path, monkeypatch):
    table([row("old", 1.0)]).save(tmp_path)
    replace = Path.replace

    def stop(path, target):
        if target.name == "provenance.json":
            raise OSError(errno.EIO, "Input/output error")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", stop)
    with pytest.raises(OutputError, match="Input/output error"):
        table([row("new", 1.0)]).save(tmp_path)
    with pytest.raises(DataError, match="a save was interrupted"):
        HeadTable.load(tmp_path)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        with pytest.raises(OutputError, match=r"a file is in the way; choose another folder"):
            table().save(tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a file system without room for files")
def test_places_that_nobody_may_write():
    with pytest.raises(OutputError, match=r"cannot save a table in /proc/.*choose a folder that you may write to"):
        table().save("/proc/self/table")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied; choose a folder that you may write to"):
        table().save(tmp_path)


def rewrite(folder, *, frame=None, **record):
    """A folder that is whole in itself, with other contents."""
    path = folder / "provenance.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    if frame is not None:
        frame.to_parquet(folder / "table.parquet")
        old["files"]["table.parquet"] = hashlib.sha256((folder / "table.parquet").read_bytes()).hexdigest()
    path.write_text(json.dumps({**old, **record}), encoding="utf-8")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign_parquet(folder):
    (folder / "table.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    digest = hashlib.sha256((folder / "table.parquet").read_bytes()).hexdigest()
    rewrite(folder, files={"table.parquet": digest})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "table.parquet"), r"table.parquet has sha256 .* was cut short or changed"),
        (lambda folder: cut(folder / "provenance.json"), "provenance.json is not JSON .*cut short"),
        (lambda folder: (folder / "provenance.json").write_bytes(b"\xff\xfe"), "is not JSON"),
        (lambda folder: (folder / "table.parquet").unlink(), r"there is no .*table.parquet"),
        (lambda folder: (folder / "provenance.json").unlink(), r"there is no .*provenance.json"),
        (lambda folder: (folder / "provenance.json").write_text("[]"), "not the record of a workbench table"),
        (lambda folder: rewrite(folder, kind="workbench report"), "not the record of a workbench table"),
        (lambda folder: rewrite(folder, schema_version=99), "schema version 99 and this program reads 1"),
        (lambda folder: rewrite(folder, schema_version=None), "schema version None"),
        (lambda folder: rewrite(folder, files={}), "sha256"),
        (foreign_parquet, "is not a Parquet file that can be read"),
        (lambda folder: rewrite(folder, frame=table().frame.drop(columns="n")), "valid table: .*missing: n"),
        (lambda folder: rewrite(folder, frame=table().frame.assign(layer=5)), "valid table: row 0 .*layer is 5"),
    ],
)
def test_damaged_and_foreign_folders_are_refused(tmp_path, damage, message):
    table().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        HeadTable.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"give a folder that HeadTable\.save wrote"):
        HeadTable.load(tmp_path / "nowhere")


# asking


def test_matrix_is_by_layer_and_head():
    made = table([*grid("a", VALUES)[::-1], *grid("b", [[5.0]]), row("a", 0.5, layer=1), row("a", 0.6)])
    np.testing.assert_array_equal(made.matrix("a"), VALUES)
    expected = np.full((2, 3), np.nan)
    expected[0, 0] = 5.0
    np.testing.assert_array_equal(made.matrix("b"), expected)
    np.testing.assert_array_equal(table_of(grid("b", [[5.0, 6.0]])).matrix("b"), [[5.0, 6.0]])


def test_matrix_of_permuted_heads_is_permuted():
    order = [2, 0, 1]
    permuted = [{**each, "head": order.index(each["head"])} for each in grid("a", VALUES)]
    np.testing.assert_array_equal(table(permuted).matrix("a"), np.array(VALUES)[:, order])


def test_matrix_refuses_heads_outside_the_model():
    for place in ({"layer": 2, "head": 0}, {"layer": 0, "head": 3}, {"layer": -1, "head": 0}):
        with pytest.raises(DataError, match="outside the 2 x 3 heads"):
            table([row("a", 1.0, **place)]).matrix("a")


def test_top_is_by_size_if_signs_differ():
    best = table().top("a", 3)
    assert best[["layer", "head"]].to_numpy().tolist() == [[0, 1], [1, 0], [1, 2]]
    assert best["value"].tolist() == [0.9, 0.7, 0.4]
    signed = table(grid("a", [[-0.9, 0.5, 0.1]])).top("a", 2)
    assert signed["value"].tolist() == [-0.9, 0.5]
    assert len(table().top("a", 100)) == 6


def test_top_breaks_ties_by_layer_and_head():
    made = table(grid("a", [[0.5, 0.5, 0.5], [0.5, 0.6, 0.5]])[::-1])
    assert made.top("a", 4)[["layer", "head"]].to_numpy().tolist() == [[1, 1], [0, 0], [0, 1], [0, 2]]


def test_selecting():
    made = table(
        [
            *grid("a", VALUES, input="natural"),
            *grid("a", [[9.0, 8.0]], input="random", position=0),
            *grid("a", [[7.0]], input="random", position=1),
        ]
    )
    assert len(made.select("a", input="random")) == 3
    assert len(made.select(input=["random", "natural"], layer=0)) == 6
    assert len(made.select(position=None)) == 6
    assert len(made.select(position=[None, 1])) == 7
    assert made.matrix("a", input="random", position=0)[0].tolist()[:2] == [9.0, 8.0]
    for ask in (made.matrix, made.top):
        with pytest.raises(DataError, match=r"several values for layer 0, head 0: .*input: \['natural', 'random'\]"):
            ask("a")
    with pytest.raises(DataError, match=r"no row has input = 'code'; there are 'natural', 'random'"):
        made.top("a", input="code")
    with pytest.raises(DataError, match=r"no row has metric = 'b'; there are 'a'"):
        made.matrix("b")
    with pytest.raises(DataError, match="cannot select by 'inputs': the columns are analysis"):
        made.select("a", inputs="natural")
    with pytest.raises(DataError, match="k is 0"):
        made.top("a", 0)
    with pytest.raises(DataError, match="no row of a single head"):
        table([row("w", 0.5, layer=1)]).matrix("w")


def test_plot_draws_the_values():
    figure = table().plot(metric="a")
    drawn = next(np.array(trace.z, dtype=float) for trace in figure.data if trace.type == "heatmap")
    np.testing.assert_array_equal(drawn, VALUES)


# putting together


def test_concat_keeps_rows_and_sources():
    one = table(grid("a", VALUES), data_hash="1", seed=0)
    two = table(grid("b", VALUES), data_hash="2", seed=0)
    both = HeadTable.concat([one, two])
    np.testing.assert_array_equal(both.matrix("b"), VALUES)
    assert both.frame.index.tolist() == list(range(12))
    shared = {name: both.provenance[name] for name in (*SOURCE, "seed")}
    assert shared == {**SOURCE, "seed": 0}
    assert "data_hash" not in both.provenance
    assert [part["data_hash"] for part in both.provenance["parts"]] == ["1", "2"]
    three = HeadTable.concat([both, table([row("c", 1.0)], data_hash="3", seed=7)])
    assert [part["data_hash"] for part in three.provenance["parts"]] == ["1", "2", "3"]
    assert [part["seed"] for part in three.provenance["parts"]] == [0, 0, 7]
    assert three.provenance["n_layers"] == 2


def test_concat_of_one_changes_nothing(tmp_path):
    one = table()
    same = HeadTable.concat([one])
    assert same.provenance == one.provenance
    pd.testing.assert_frame_equal(same.frame, one.frame)


def test_concat_refuses_nothing_and_two_models():
    with pytest.raises(DataError, match="tables is empty"):
        HeadTable.concat([])
    other = table([row("b", 1.0)], model={"name": "other", "hash": "b" * 64})
    with pytest.raises(DataError, match="different models \\(small aaaaaaaa, other bbbbbbbb\\)"):
        HeadTable.concat([table(), other])
    with pytest.raises(DataError, match="stands twice"):
        HeadTable.concat([table(), table()]).validate()


# provenance


class Tokenizer:
    name_or_path = "/home/someone/models/my-model"
    bos_token_id = 1

    def __call__(self, text):
        return {"input_ids": [1, 5]}


def test_provenance_of_a_model():
    model = wb.wrap_model(
        tiny_module("llama", dtype=torch.float64),
        Tokenizer(),
        name="/home/someone/models/my-model",
        provenance={"source": "/home/someone/models/my-model", "note": "converted from F32"},
    )
    before = datetime.now(UTC)
    record = provenance(model, data_hash="d" * 64, seed=3, command=["/usr/bin/workbench", "report"], period=50)
    assert record["model"] == {
        "name": "my-model",
        "hash": model.model_hash,
        "source": "my-model",
        "note": "converted from F32",
        "dtype": "float64",
        "device": "cpu",
    }
    assert (record["n_layers"], record["n_heads"]) == (model.spec.n_layers, model.spec.n_heads)
    assert (record["tokenizer"], record["prepends_bos"]) == ("my-model", True)
    assert (record["path_taken"], record["refusal"]) == ("fast", None)
    assert (record["data_hash"], record["seed"], record["period"]) == ("d" * 64, 3, 50)
    assert record["command"] == "workbench report"
    assert record["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    created = datetime.fromisoformat(record["created"])
    assert created.utcoffset().total_seconds() == 0
    assert abs((created - before).total_seconds()) < 60
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_provenance_says_so_without_a_tokenizer():
    record = provenance(wb.wrap_model(tiny_module("gpt2"), name="bare"), data_hash="", seed=None)
    assert (record["tokenizer"], record["prepends_bos"], record["seed"]) == (None, None, None)


def test_provenance_changes_with_the_weights():
    module = tiny_module("gpt2")
    first = provenance(wb.wrap_model(module, name="m"), data_hash="", seed=0)["model"]["hash"]
    with torch.no_grad():
        next(module.parameters()).flatten()[0] += 1
    assert provenance(wb.wrap_model(module, name="m"), data_hash="", seed=0)["model"]["hash"] != first


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["/opt/env/bin/workbench", "report", "--out", "/home/me/out"], "workbench report --out out"),
        (["workbench", "--out=/home/me/a folder", "it's"], "workbench '--out=a folder' 'it'\"'\"'s'"),
        (["C:\\Python\\workbench.exe", "C:\\Users\\me\\out dir"], "workbench.exe 'out dir'"),
        (["python", "report", "--model", "org/name", "../here"], "python report --model org/name ../here"),
        (["workbench", "file:///home/me/model"], "workbench model"),
        (["workbench", "https://host.example/a/b"], "workbench https://host.example/a/b"),
        ("workbench report --out /home/me/out --seed 3", "workbench report --out out --seed 3"),
        ("workbench report --model '/home/me/out'", "workbench report --model 'out'"),
        ("workbench report --model ~/models/mine", "workbench report --model mine"),
    ],
)
def test_commands_do_not_tell_of_the_machine(command, said):
    model = wb.wrap_model(tiny_module("gpt2"), name="m")
    assert provenance(model, data_hash="", seed=0, command=command)["command"] == said


def test_command_of_this_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/workbench", "analyze", "/data/model"])
    model = wb.wrap_model(tiny_module("gpt2"), name="m")
    assert provenance(model, data_hash="", seed=0)["command"] == "workbench analyze model"


def test_extra_is_plain_and_does_not_replace():
    model = wb.wrap_model(tiny_module("gpt2"), name="m")
    record = provenance(model, data_hash="", seed=0, positions=(0, 1), texts=Path("/home/me/a.txt"), eps=0.3)
    assert (record["positions"], record["texts"], record["eps"]) == ([0, 1], "a.txt", 0.3)
    with pytest.raises(TypeError, match="provenance sets created itself"):
        provenance(model, data_hash="", seed=0, created="never")


def test_provenance_imports_no_package():
    code = (
        "import sys; from workbench._provenance import versions; found = versions(); "
        "print(sorted(found.keys() & sys.modules.keys()), 'torch' in found)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == (
        "[] True\n"
    )
