"""The schema of tables: which columns, which dtypes, and what a row must satisfy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.errors import DataError

COLUMNS = (
    "analysis",
    "layer",
    "head",
    "metric",
    "value",
    "stderr",
    "ci_low",
    "ci_high",
    "n",
    "unit",
    "input",
    "position",
    "method",
    "path_taken",
)
KEY = ("analysis", "layer", "head", "metric", "input", "position", "method")
PATHS = ("fast", "hooks")
_WHOLE = ("layer", "head", "n", "position")
_REAL = ("value", "stderr", "ci_low", "ci_high")
_FLOATS = (float, np.floating)
_TEXT = tuple(name for name in COLUMNS if name not in _WHOLE + _REAL)


def conform(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows in the order of columns and the dtypes of the schema; no value is changed.

    Raises:
        DataError: if a column is missing or foreign, or a value does not fit its dtype.
    """
    missing = [name for name in COLUMNS if name not in frame.columns]
    foreign = [str(name) for name in frame.columns if name not in COLUMNS]
    if missing or foreign or frame.columns.has_duplicates:
        raise DataError(
            f"the columns do not fit the schema (missing: {', '.join(missing) or 'none'}; "
            f"foreign: {', '.join(foreign) or 'none'}): expected each once of {', '.join(COLUMNS)}"
        )
    columns = {}
    for name in COLUMNS:
        try:
            columns[name] = _text(frame[name]) if name in _TEXT else _number(frame[name], whole=name in _WHOLE)
        except (TypeError, ValueError, OverflowError) as error:
            wanted = "text" if name in _TEXT else "whole numbers" if name in _WHOLE else "numbers"
            raise DataError(f"column {name!r} must hold {wanted}: {error}") from error
    return pd.DataFrame(columns).copy()


def check_rows(frame: pd.DataFrame, *, n_layers: int | None, n_heads: int | None) -> None:
    """Refuse a table with an impossible row; see `HeadTable.validate`.

    Args:
        frame: rows as from `conform`.
        n_layers: layers of the model, if known.
        n_heads: heads a layer, if known.

    Raises:
        DataError: names the first such row.
    """
    if list(frame.columns) != list(COLUMNS) or any(frame[name].dtype != _dtype(name) for name in COLUMNS):
        raise DataError("the columns or dtypes of the frame were changed: make a new HeadTable of the changed frame")
    value, stderr, low, high = (frame[name].to_numpy() for name in _REAL)
    layer, head, n, position = (frame[name] for name in _WHOLE)
    unknown = np.isnan(low) & np.isnan(high)
    known = np.isfinite(low) & np.isfinite(high)
    _refuse(frame, ~np.isfinite(value), "value", "must be finite: leave rows without a number out")
    _refuse(frame, ~(np.isnan(stderr) | (np.isfinite(stderr) & (stderr >= 0))), "stderr", "must be >= 0 or missing")
    _refuse(frame, ~(unknown | known), "ci_low", "and ci_high must both be finite or both be missing")
    _refuse(frame, known & ~((low <= value) & (value <= high)), "value", "must lie between ci_low and ci_high")
    _refuse(frame, (n < 1).fillna(False), "n", "must be at least 1 or missing")
    _refuse(frame, (position < 0).fillna(False), "position", "must be a key position, counted from 0, or missing")
    for name, index, extent in (("layer", layer, n_layers), ("head", head, n_heads)):
        _refuse(frame, (index < 0).fillna(False), name, "must be counted from 0")
        if extent is not None:
            _refuse(frame, (index >= extent).fillna(False), name, f"must be below {extent}, of which the model has")
    _refuse(frame, head.notna() & layer.isna(), "layer", "must be given where the head is")
    for name in ("analysis", "metric"):
        _refuse(frame, frame[name] == "", name, "must have a name")
    _refuse(frame, ~frame["path_taken"].isin(PATHS), "path_taken", f"must be one of {', '.join(PATHS)}")
    _refuse(frame, frame.duplicated(list(KEY)), "key", f"stands twice: rows must differ in one of {', '.join(KEY)}")


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number and no truth value."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _dtype(name: str) -> Any:
    if name in _WHOLE:
        return pd.Int64Dtype()
    return np.dtype(np.float64) if name in _REAL else pd.Series([""], dtype=str).dtype


def _number(column: pd.Series[Any], *, whole: bool) -> pd.Series[Any]:
    if pd.api.types.is_bool_dtype(column) or pd.api.types.is_complex_dtype(column):
        raise TypeError(f"it holds {column.dtype}")
    if column.dtype == object:
        odd = [each for each in column if not (pd.isna(each) or is_whole(each) or isinstance(each, _FLOATS))]
        if odd:
            raise TypeError(f"it holds {odd[0]!r}")
    elif not pd.api.types.is_numeric_dtype(column) and not column.isna().all():
        raise TypeError(f"it holds {column.dtype}")
    if whole and column.dtype == object:
        return pd.Series(pd.array([None if pd.isna(each) else each for each in column], dtype="Int64"))
    if whole:
        return column.astype("Int64").reset_index(drop=True)
    values = column.to_numpy(dtype=np.float64, na_value=np.nan, copy=True)
    return pd.Series(values, dtype=np.float64)


def _text(column: pd.Series[Any]) -> pd.Series[Any]:
    values = column.tolist()
    odd = [value for value in values if not isinstance(value, str)]
    if odd:
        raise TypeError(f'it holds {odd[0]!r} (where there is nothing to say, give "")')
    return pd.Series(values, dtype=str)


def _refuse(frame: pd.DataFrame, bad: Any, column: str, demand: str) -> None:
    places = np.flatnonzero(np.asarray(bad, dtype=bool))
    if not len(places):
        return
    row = frame.iloc[int(places[0])]
    key = ", ".join(f"{name}={row[name]}" for name in KEY if not pd.isna(row[name]) and row[name] != "")
    value = "" if column == "key" else row[column]
    found = "" if column == "key" else f" is {value!r} and" if isinstance(value, str) else f" is {value} and"
    more = f" ({len(places)} rows)" if len(places) > 1 else ""
    interval = f" [{row['ci_low']}, {row['ci_high']}]" if "between" in demand or column == "ci_low" else ""
    raise DataError(f"row {int(places[0])} ({key}): {column}{found} {demand}{interval}{more}")
