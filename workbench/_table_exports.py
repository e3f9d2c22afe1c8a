"""Tables in the forms that other programs read: one JSON file, and a tab-separated matrix a metric."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench._table_checks import COLUMNS, is_whole
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.tables import HeadTable

KIND = "workbench table"
_GROUP = ("analysis", "metric", "input", "position", "method", "unit")


def as_json(frame: pd.DataFrame, provenance: Mapping[str, Any], *, schema_version: int) -> str:
    """Rows and provenance as one JSON document, column by column; a missing value is null.

    Raises:
        DataError: if the provenance holds what JSON cannot.
    """
    columns = {name: [None if pd.isna(x) else x for x in frame[name].astype(object)] for name in COLUMNS}
    record = {
        "kind": KIND,
        "schema_version": schema_version,
        "rows": len(frame),
        "provenance": dict(provenance),
        "columns": columns,
    }
    try:
        return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise DataError(
            f"the table cannot be written as JSON ({error}): give strings, finite numbers, lists"
        ) from error


def from_json(text: str, where: str, *, schema_version: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What `as_json` wrote.

    Args:
        text: the document.
        where: what errors call it.
        schema_version: version of the columns that this program understands.

    Raises:
        DataError: if it is no such document, is damaged or of another version.
    """
    try:
        record = json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): it was cut short or changed; make the table again") from error
    if not isinstance(record, dict) or record.get("kind") != KIND or not isinstance(record.get("columns"), dict):
        raise DataError(f"{where} is not a workbench table: give a file that HeadTable.to_json wrote")
    if record.get("schema_version") != schema_version:
        raise DataError(
            f"{where} is of schema version {record.get('schema_version')!r} and this program reads {schema_version}: "
            "use the mi-workbench that wrote it, or make the table again"
        )
    columns, rows, provenance = record["columns"], record.get("rows"), record.get("provenance")
    whole = set(columns) == set(COLUMNS) and all(
        isinstance(each, list) and len(each) == rows for each in columns.values()
    )
    if not whole or not isinstance(provenance, dict):
        raise DataError(f"{where} does not hold {rows!r} rows of every column: it was changed; make the table again")
    frame = pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
    return frame, provenance


def matrices(table: HeadTable) -> dict[str, str]:
    """Every number of single heads as a matrix of layers by heads, tab-separated.

    Returns:
        Text by file name, such as `attention_sinks.alpha.natural.position-0.tsv`. The first row names the heads, the
        first column the layers; a head without a number has an empty cell; numbers read back exactly.
    """
    frame = table.frame[table.frame["layer"].notna() & table.frame["head"].notna()]
    found: dict[str, str] = {}
    keys = frame[list(_GROUP)].astype(object).where(frame[list(_GROUP)].notna(), "")
    several = {name: keys.groupby(["analysis", "metric"])[name].transform("nunique") > 1 for name in _GROUP[2:]}
    for _, group in frame.groupby([keys[name] for name in _GROUP], sort=False):
        first = group.index[0]
        words = [str(keys.at[first, "analysis"]), str(keys.at[first, "metric"])]
        for name in _GROUP[2:]:
            value: Any = keys.at[first, name]
            if several[name].at[first] and value != "":
                words.append(f"position-{value}" if name == "position" else str(value))
        stem = name_of = ".".join(re.sub(r"[^A-Za-z0-9_-]+", "-", word).strip("-") or "none" for word in words)
        count = 1
        while f"{name_of}.tsv" in found:
            count += 1
            name_of = f"{stem}.{count}"
        found[f"{name_of}.tsv"] = _tsv(group, _extent(table, "n_layers"), _extent(table, "n_heads"))
    return found


def _tsv(group: pd.DataFrame, n_layers: int | None, n_heads: int | None) -> str:
    layers, heads = group["layer"].to_numpy(int), group["head"].to_numpy(int)
    values = np.full((n_layers or layers.max() + 1, n_heads or heads.max() + 1), np.nan)
    values[layers, heads] = group["value"].to_numpy(float)
    matrix = pd.DataFrame(values, index=pd.RangeIndex(len(values), name="layer"))
    text: str = matrix.to_csv(sep="\t", lineterminator="\n")
    return text


def _extent(table: HeadTable, name: str) -> int | None:
    value: Any = table.provenance.get(name)
    return int(value) if is_whole(value) else None


def write_text(path: Path, text: str) -> Path:
    """Write a file whole or not at all.

    Raises:
        OutputError: if it cannot be written.
    """
    from workbench.report.output import refused, write_atomic

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refused(path.parent, error) from error
    write_atomic(path, text)
    return path
