"""Small tables of heads whose every number is known, for the tests of figures and reports."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from workbench.tables import HeadTable

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


def row(
    metric: str, value: float, *, layer: int | None = None, head: int | None = None, **fields: Any
) -> dict[str, Any]:
    """One tidy row with an interval of 0.02 on either side."""
    filled = {
        "analysis": "made_up",
        "stderr": 0.01,
        "ci_low": value - 0.02,
        "ci_high": value + 0.02,
        "n": 50,
        "unit": "probability",
        "input": "",
        "position": None,
        "method": "made up",
        "path_taken": "fast",
        **fields,
    }
    return {"layer": layer, "head": head, "metric": metric, "value": value, **filled}


def table_of(rows: Iterable[dict[str, Any]]) -> HeadTable:
    """A table of such rows."""
    frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
    frame = frame.astype({"layer": "Int64", "head": "Int64", "position": "Int64", "n": "Int64"})
    return HeadTable(frame=frame, provenance={"data_hash": "0" * 64, "seed": 0})


def grid(metric: str, values: Sequence[Sequence[float]], **fields: Any) -> list[dict[str, Any]]:
    """Rows for every head of a [layers, heads] grid of values."""
    return [
        row(metric, value, layer=layer, head=head, **fields)
        for layer, line in enumerate(values)
        for head, value in enumerate(line)
    ]
