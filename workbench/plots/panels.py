"""From a tidy table to what one panel of a figure shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import DataError
from workbench.plots.labels import head_name, interval, is_missing, number

if TYPE_CHECKING:
    from workbench.tables import HeadTable

_TELLS_APART = ("metric", "input", "position", "method", "analysis", "unit")


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One number for every head.

    Attributes:
        label: what sets this panel apart from its neighbours, escaped.
        metric: the metric's name as in the table.
        unit: the metric's unit, "" if it has none.
        frame: rows of the tidy table, one a head, sorted by layer and head.
        shape: layers of the model and heads of a layer.
    """

    label: str
    metric: str
    unit: str
    frame: pd.DataFrame
    shape: tuple[int, int]

    def matrix(self) -> np.ndarray:
        """Values as [layers, heads]; NaN where the table has no row."""
        layers = self.frame["layer"].to_numpy(dtype=int)
        heads = self.frame["head"].to_numpy(dtype=int)
        values = np.full(self.shape, np.nan)
        values[layers, heads] = self.frame["value"].to_numpy(dtype=float, na_value=np.nan)
        return values

    def hover(self) -> np.ndarray:
        """What is shown for each head under the pointer, as [layers, heads] of escaped text."""
        texts = np.full(self.shape, "", dtype=object)
        for row in self.frame.to_dict("records"):
            texts[int(row["layer"]), int(row["head"])] = hover_text(row, self.label)
        return texts


def hover_text(row: dict[Any, Any], label: str) -> str:
    """Name, layer, head, value, interval and sample size of one row, escaped; `label` is escaped already."""
    head = head_name(row["layer"], row["head"])
    lines = [f"<b>{head}</b>  layer {int(row['layer'])}, head {int(row['head'])}"]
    unit = escape(str(row.get("unit") or ""))
    lines.append(f"{label}: <b>{number(row['value'])}</b> {unit}".rstrip())
    span = interval(row.get("ci_low"), row.get("ci_high"))
    if span:
        lines.append(f"95 % CI {span}")
    if not is_missing(row.get("n")):
        lines.append(f"n = {int(row['n'])}")
    return "<br>".join(lines)


def head_panels(table: HeadTable, metrics: str | Sequence[str] | None = None, **where: Any) -> tuple[Panel, ...]:
    """Split the head-level rows of a table into panels of one number a head.

    Args:
        table: the table.
        metrics: the metrics, in the order wanted; all if None.
        where: as for `HeadTable.select`.

    Raises:
        DataError: if there are no such rows, or a head has two numbers that nothing in the table tells apart.
    """
    names = [metrics] if isinstance(metrics, str) else list(metrics or [])
    frame = table.select(**where)
    if names:
        frame = frame[frame.index.isin([index for name in names for index in table.select(name, **where).index])]
    frame = frame[frame["layer"].notna() & frame["head"].notna()]
    if frame.empty:
        raise DataError(
            f"the table has no row of a single head for metric {', '.join(names) or 'any'}: "
            "a heat map and a ranking need numbers with both layer and head"
        )
    columns = [column for column in _TELLS_APART if column in frame.columns]
    keys = frame[columns].astype(object).where(frame[columns].notna(), "")
    varying = [column for column in columns if keys[column].nunique() > 1 and column != "unit"]
    shape = (
        max(int(table.provenance.get("n_layers") or 0), int(frame["layer"].max()) + 1),
        max(int(table.provenance.get("n_heads") or 0), int(frame["head"].max()) + 1),
    )
    groups: dict[tuple[Any, ...], Panel] = {}
    for key, rows in frame.groupby([keys[column] for column in columns], sort=False):
        values = dict(zip(columns, key if isinstance(key, tuple) else (key,), strict=True))
        if rows.duplicated(["layer", "head"]).any():
            twice = rows[rows.duplicated(["layer", "head"])].iloc[0]
            name = head_name(twice["layer"], twice["head"])
            raise DataError(
                f"metric {values['metric']!r} has two numbers for {name}: "
                "select further, by a column in which they differ"
            )
        words = [str(values["metric"])] if "metric" in varying or not varying else []
        words += [f"position {values[c]}" if c == "position" else str(values[c]) for c in varying if c != "metric"]
        groups[key if isinstance(key, tuple) else (key,)] = Panel(
            label=escape(" · ".join(word for word in words if word)),
            metric=str(values["metric"]),
            unit=str(values.get("unit", "")),
            frame=rows.sort_values(["layer", "head"], kind="stable").reset_index(drop=True),
            shape=shape,
        )
    panels = list(groups.values())
    if names:
        panels.sort(key=lambda panel: names.index(panel.metric))
    return tuple(panels)
