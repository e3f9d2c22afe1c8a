"""Tables as JSON and as matrices, read back by other programs' readers."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from head_tables import grid, row, table_of
from workbench.errors import DataError, OutputError
from workbench.tables import SCHEMA_VERSION, HeadTable

VALUES = [[0.1, 0.9, -0.3], [0.7, 1 / 3, 0.4]]
SOURCE = {"n_layers": 2, "n_heads": 3, "path_taken": "fast", "model": {"name": "small", "hash": "a" * 64}}


def table(rows=None, **source):
    return HeadTable(table_of(grid("a", VALUES) if rows is None else rows).frame, {**SOURCE, **source})


def test_json_reads_back_the_same(tmp_path):
    made = table([*grid("a", VALUES, position=3), row("rate", 0.25), row("top", 7.5, layer=1)], note="ein <b>Ü</b>")
    back = HeadTable.from_json(made.to_json(tmp_path / "deep" / "t.json"))
    pd.testing.assert_frame_equal(back.frame, made.frame)
    assert back.provenance == made.provenance
    record = json.loads((tmp_path / "deep" / "t.json").read_text())
    assert record["schema_version"] == SCHEMA_VERSION
    assert record["columns"]["head"][-2:] == [None, None]
    assert list((tmp_path / "deep").iterdir()) == [tmp_path / "deep" / "t.json"], "nothing half written is left"


@settings(max_examples=40, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False, width=64), text=st.text(min_size=1))
def test_any_number_and_text_survive_json(tmp_path_factory, value, text):
    one = row(text, value, layer=0, head=0) | dict.fromkeys(("stderr", "ci_low", "ci_high"))
    path = tmp_path_factory.mktemp("json") / "t.json"
    try:
        made = HeadTable(pd.DataFrame([one]), SOURCE).validate()
    except DataError:
        return  # a table does not take every text as the name of a metric
    pd.testing.assert_frame_equal(HeadTable.from_json(made.to_json(path)).frame, made.frame)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record.update(schema_version=99), "is of schema version 99 and this program reads 1"),
        (lambda record: record.update(kind="other"), "is not a workbench table"),
        (lambda record: record["columns"]["value"].pop(), "does not hold 6 rows of every column"),
        (lambda record: record["columns"].pop("unit"), "does not hold 6 rows of every column"),
        (lambda record: record["columns"].update(layer=["x"] * 6), "column 'layer' must hold whole numbers"),
        (lambda record: record["columns"].update(layer=[5] * 6), "layer"),
    ],
)
def test_a_changed_file_is_refused(tmp_path, change, message):
    path = table().to_json(tmp_path / "t.json")
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=message):
        HeadTable.from_json(path)


def test_a_file_cut_short_missing_or_in_the_way_is_named(tmp_path):
    path = table().to_json(tmp_path / "t.json")
    path.write_text(path.read_text()[:100])
    with pytest.raises(DataError, match="is not JSON"):
        HeadTable.from_json(path)
    with pytest.raises(DataError, match="cannot read"):
        HeadTable.from_json(tmp_path / "none.json")
    with pytest.raises(OutputError, match="a file is in the way"):
        table().to_json(path / "below.json")


def test_matrices_are_layers_by_heads_one_file_a_number(tmp_path):
    rows = [
        *grid("alpha", VALUES, input="natural", position=0),
        *grid("alpha", np.multiply(VALUES, 2), input="random", position=0),
        *grid("induction", VALUES),
        row("induction", 0.5),
    ]
    files = table(rows).to_tsv(tmp_path)
    assert [path.name for path in files] == [
        "made_up.alpha.natural.tsv",
        "made_up.alpha.random.tsv",
        "made_up.induction.tsv",
    ]
    matrix = pd.read_csv(files[1], sep="\t", index_col="layer")
    assert matrix.columns.tolist() == ["0", "1", "2"]
    np.testing.assert_allclose(matrix.to_numpy(), np.multiply(VALUES, 2), rtol=1e-15)


def test_a_head_without_a_number_is_an_empty_cell_and_names_are_safe(tmp_path):
    files = table([row("a/b ../c", 0.5, layer=1, head=2)]).to_tsv(tmp_path)
    assert files[0].parent == tmp_path
    text = files[0].read_text()
    assert text == "layer\t0\t1\t2\n0\t\t\t\n1\t\t\t0.5\n"
    assert np.isnan(pd.read_csv(io.StringIO(text), sep="\t")["0"]).all()
    twins = table([row("a b", 0.5, layer=0, head=0), row("a-b", 0.7, layer=0, head=0)]).to_tsv(tmp_path)
    assert len({path.name for path in twins}) == 2
