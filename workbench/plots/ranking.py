"""Rankings of heads, rates over inputs, and one metric against another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.errors import DataError
from workbench.plots.labels import head_name, interval, is_missing, number, percent
from workbench.plots.panels import head_panels, hover_text
from workbench.plots.style import MUTED, SEQUENTIAL, SERIES, SYMBOLS, dress

if TYPE_CHECKING:
    from workbench.tables import HeadTable


def top_heads(
    table: HeadTable,
    metrics: str | Sequence[str] | None = None,
    *,
    k: int = 5,
    title: str | None = None,
    **where: Any,
) -> Any:
    """The `k` heads with the largest values, with their confidence intervals; one panel a metric.

    Signed metrics are ranked by absolute value.

    Args:
        table: head-level rows.
        metrics: which metrics, in order; all if None.
        k: heads a panel.
        title: title above the panels, plain text.
        where: selection by column.

    Returns:
        A plotly `Figure`, one scatter trace a panel, strongest head on top.

    Raises:
        DataError: if no head-level rows are left.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    panels = head_panels(table, metrics, **where)
    columns = min(len(panels), 3)
    rows = math.ceil(len(panels) / columns)
    height = rows * (26 * k + 20) + (rows - 1) * 80
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[f"<b>{panel.label}</b>" for panel in panels],
        horizontal_spacing=0.36 / columns,
        vertical_spacing=80 / height if rows > 1 else 0,
    )
    for place, panel in enumerate(panels):
        frame = strongest(panel.frame, k)
        row, column = place // columns + 1, place % columns + 1
        figure.add_trace(
            go.Scatter(
                x=frame["value"].astype(float).tolist(),
                y=[head_name(layer, head) for layer, head in zip(frame["layer"], frame["head"], strict=True)],
                error_x=_error_bars(frame),
                mode="markers",
                marker={"size": 9, "color": SERIES[0]},
                hovertext=[hover_text(each, panel.label) for each in frame.to_dict("records")],
                hoverinfo="text",
                name=panel.label,
            ),
            row=row,
            col=column,
        )
        figure.update_xaxes(title=escape(panel.unit) or None, rangemode="tozero", row=row, col=column)
    dress(figure, height=height + 110, title=None if title is None else escape(title))
    figure.update_yaxes(autorange="reversed", type="category", showgrid=True)
    figure.update_xaxes(zeroline=True)
    figure.update_annotations(font={"size": 13}, yshift=4)
    return figure


def strongest(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    """The `k` rows of largest value (absolute, if any value is negative); ties by layer, then head."""
    frame = frame[frame["value"].notna()]
    size = frame["value"].astype(float)
    size = size.abs() if (size < 0).any() else size
    order = frame.assign(_size=size).sort_values(["_size", "layer", "head"], ascending=[False, True, True])
    return order.drop(columns="_size").head(k).reset_index(drop=True)


def rates(table: HeadTable, metric: str, *, title: str | None = None, **where: Any) -> Any:
    """Shares of the whole model over the kinds of input, with their CI, one colour a key position.

    Args:
        table: rows without layer and head, values between 0 and 1.
        metric: which metric.
        title: title above the panel, plain text.
        where: selection by column.

    Returns:
        A plotly `Figure`, one scatter trace a key position; x in per cent.

    Raises:
        DataError: if there are no such rows.
    """
    import plotly.graph_objects as go

    frame = table.select(metric, **where)
    frame = frame[frame["layer"].isna() & frame["head"].isna()]
    if frame.empty:
        raise DataError(f"metric {metric!r} has no row for the whole model (without layer and head) to draw")
    inputs = [escape(str(each)) or "all" for each in dict.fromkeys(frame["input"])]
    figure = go.Figure()
    groups = list(frame.groupby("position", sort=True, dropna=False))
    for place, (position, rows) in enumerate(groups):
        label = "all positions" if is_missing(position) else f"key position {position}"
        hover = [
            f"<b>{escape(str(each['input']))}</b>, {label}<br>{percent(each['value'])} "
            f"{interval(each['ci_low'], each['ci_high'], share=True)}"
            + ("" if is_missing(each["n"]) else f"<br>n = {int(each['n'])}")
            for each in rows.to_dict("records")
        ]
        figure.add_trace(
            go.Scatter(
                x=[100 * float(value) for value in rows["value"]],
                y=[escape(str(each)) or "all" for each in rows["input"]],
                error_x=_error_bars(rows, scale=100),
                mode="markers",
                marker={"size": 10, "color": SERIES[place % 6], "symbol": SYMBOLS[place % 6]},
                cliponaxis=False,
                hovertext=hover,
                hoverinfo="text",
                name=label,
            )
        )
    dress(figure, height=110 + 40 * len(inputs), title=None if title is None else escape(title), top=32)
    figure.update_xaxes(title=f"{escape(metric.replace('_', ' '))}, %", rangemode="tozero", zeroline=True)
    figure.update_yaxes(type="category", categoryorder="array", categoryarray=inputs[::-1])
    figure.update_layout(showlegend=len(groups) > 1, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure


def metric_scatter(
    table: HeadTable,
    x: str,
    y: str,
    *,
    x_where: dict[str, Any] | None = None,
    y_where: dict[str, Any] | None = None,
    label: int = 5,
    title: str | None = None,
) -> Any:
    """One metric against another, a point a head, its colour the layer.

    Args:
        table: head-level rows of both metrics.
        x: metric on the horizontal axis.
        y: metric on the vertical axis.
        x_where: selection of the rows of `x`, as for `HeadTable.select`.
        y_where: selection of the rows of `y`.
        label: how many heads farthest from the median, in standard deviations, are named; one whose label
            would cover another's is not.
        title: title above the panel, plain text.

    Returns:
        A plotly `Figure` with one scatter trace.

    Raises:
        DataError: if a metric has no head-level rows, several numbers a head, or they have no head in common.
    """
    import plotly.graph_objects as go

    sides = []
    for name, where in ((x, x_where or {}), (y, y_where or {})):
        panels = head_panels(table, name, **where)
        if len(panels) > 1:
            found = ", ".join(panel.label for panel in panels)
            raise DataError(
                f"metric {name!r} has {len(panels)} numbers a head ({found}): choose one with x_where or y_where"
            )
        sides.append(panels[0])
    frame = sides[0].frame.merge(sides[1].frame, on=["layer", "head"], suffixes=("_x", "_y"))
    frame = frame[frame["value_x"].notna() & frame["value_y"].notna()].reset_index(drop=True)
    if frame.empty:
        raise DataError(f"metrics {x!r} and {y!r} have no head in common")
    values = frame[["value_x", "value_y"]].astype(float)
    spread = values.std(ddof=0).replace(0, 1).fillna(1)
    distance = (((values - values.median()) / spread) ** 2).sum(axis=1)
    places = _label_places(values.to_numpy(), distance.nlargest(label).index.tolist())
    names = [head_name(layer, head) for layer, head in zip(frame["layer"], frame["head"], strict=True)]
    titles = [escape(f"{side.metric} ({side.unit})" if side.unit else side.metric) for side in sides]
    figure = go.Figure(
        go.Scatter(
            x=values["value_x"].tolist(),
            y=values["value_y"].tolist(),
            mode="markers+text",
            text=[name if place in places else "" for place, name in enumerate(names)],
            textposition=[places.get(place, "top center") for place in range(len(names))],
            textfont={"size": 11, "color": MUTED},
            cliponaxis=False,
            marker={
                "size": 8,
                "opacity": 0.85,
                "line": {"width": 0.5, "color": MUTED},
                "color": frame["layer"].astype(int).tolist(),
                "colorscale": [list(stop) for stop in SEQUENTIAL],
                "colorbar": {"title": {"text": "layer", "side": "right"}, "thickness": 12, "outlinewidth": 0},
            },
            hovertext=[
                f"<b>{name}</b><br>{titles[0]}: {number(a)}<br>{titles[1]}: {number(b)}"
                for name, a, b in zip(names, values["value_x"], values["value_y"], strict=True)
            ],
            hoverinfo="text",
        )
    )
    dress(figure, height=420, title=None if title is None else escape(title), top=24)
    figure.update_xaxes(title=titles[0])
    figure.update_yaxes(title=titles[1])
    return figure


def _label_places(points: np.ndarray, named: list[int]) -> dict[int, str]:
    """Where the label of each named point goes: towards the middle, out of the way of labels placed before it."""
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    unit = (points - low) / np.where(span > 0, span, 1.0)
    rows = {"middle": 0.0, "top": 0.05, "bottom": -0.05}
    labels: list[tuple[float, float]] = []
    places: dict[int, str] = {}
    for index in named:
        x, y = unit[index]
        side, centre = ("right", x + 0.06) if x < 0.5 else ("left", x - 0.06)
        others = [(unit[other][0], unit[other][1]) for other in named if other != index]
        for row, rise in rows.items():
            clear_of_labels = all(abs(centre - u) > 0.1 or abs(y + rise - v) > 0.045 for u, v in labels)
            clear_of_points = all(abs(centre - u) > 0.05 or abs(y + rise - v) > 0.03 for u, v in others)
            if clear_of_labels and clear_of_points:
                labels.append((centre, y + rise))
                places[index] = f"{row} {side}"
                break
    return places


def _error_bars(frame: pd.DataFrame, *, scale: float = 1.0) -> dict[str, Any]:
    value = frame["value"].astype(float)
    above = (frame["ci_high"].astype(float) - value).clip(lower=0).fillna(0) * scale
    below = (value - frame["ci_low"].astype(float)).clip(lower=0).fillna(0) * scale
    return {
        "type": "data",
        "symmetric": False,
        "array": above.tolist(),
        "arrayminus": below.tolist(),
        "thickness": 1.5,
        "width": 4,
        "color": MUTED,
    }
