"""Numbers of whole layers, over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError
from workbench.plots.labels import interval, is_missing, number
from workbench.plots.style import SERIES, SYMBOLS, dress

if TYPE_CHECKING:
    import pandas as pd

    from workbench.tables import HeadTable


def layer_lines(
    table: HeadTable,
    panels: Sequence[Mapping[str, str]],
    *,
    titles: Sequence[str],
    log: bool = False,
    title: str | None = None,
    **where: Any,
) -> Any:
    """Metrics of whole layers as lines with their 95 % intervals, one panel beside another.

    Args:
        table: rows with a layer and without a head.
        panels: for each panel, what to call which metric, in the order of the legend.
        titles: one a panel, plain text.
        log: logarithmic values; those that are not positive are left out.
        title: title above the panels, plain text.
        where: selection by column.

    Returns:
        A plotly `Figure`, one scatter trace a metric.

    Raises:
        DataError: if a metric has no row of a whole layer, or two for one.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=len(panels),
        subplot_titles=[f"<b>{escape(each)}</b>" for each in titles],
        horizontal_spacing=0.12,
    )
    for column, lines in enumerate(panels, 1):
        for index, (metric, label) in enumerate(lines.items()):
            frame = table.select(metric, **where)
            frame = frame[frame["layer"].notna() & frame["head"].isna()].sort_values("layer")
            if frame.empty or frame["layer"].duplicated().any():
                raise DataError(f"metric {metric!r} has no row, or several, for a whole layer: select further")
            _line(figure, frame, label, index, column, log)
        figure.update_xaxes(title="layer", row=1, col=column)
        units = list(dict.fromkeys(table.select(next(iter(lines)), **where)["unit"]))
        figure.update_yaxes(title=escape(" / ".join(units)), row=1, col=column)
    dress(figure, height=400, title=None if title is None else escape(title))
    if log:
        figure.update_yaxes(type="log", dtick=1, exponentformat="power", minorloglabels="none")
    for column in range(1, len(panels) + 1):
        home = figure.layout["xaxis" if column == 1 else f"xaxis{column}"].domain
        name = "legend" if column == 1 else f"legend{column}"
        figure.update_layout({name: {"x": home[0], "y": -0.2, "yanchor": "top", "orientation": "h"}})
    figure.update_layout(showlegend=True, margin={"b": 96})
    figure.update_annotations(font={"size": 13}, yshift=4)
    return figure


def _line(figure: Any, frame: pd.DataFrame, label: str, index: int, column: int, log: bool) -> None:
    import plotly.graph_objects as go

    rows = [row for row in frame.to_dict("records") if not is_missing(row["value"]) and (row["value"] > 0 or not log)]
    color = SERIES[index % len(SERIES)]
    figure.add_trace(
        go.Scatter(
            x=[int(row["layer"]) for row in rows],
            y=[float(row["value"]) for row in rows],
            error_y={
                "type": "data",
                "symmetric": False,
                "array": [_reach(row["ci_high"], row["value"]) for row in rows],
                "arrayminus": [min(_reach(row["value"], row["ci_low"]), _room(row["value"], log)) for row in rows],
                "thickness": 1,
                "width": 0,
                "color": color,
            },
            mode="lines+markers",
            line={"width": 1.5, "color": color},
            marker={"size": 6, "symbol": SYMBOLS[index % len(SYMBOLS)], "color": color},
            hovertext=[_hover(row, label) for row in rows],
            hoverinfo="text",
            name=escape(label),
            legend="legend" if column == 1 else f"legend{column}",
        ),
        row=1,
        col=column,
    )


def _reach(high: Any, low: Any) -> float:
    return 0.0 if is_missing(high) or is_missing(low) else float(high) - float(low)


def _room(value: float, log: bool) -> float:
    """How far down an interval may be drawn: on a logarithmic axis, not to zero."""
    return 0.99 * float(value) if log else float("inf")


def _hover(row: Mapping[Any, Any], label: str) -> str:
    span = interval(row["ci_low"], row["ci_high"])
    tail = f"<br>95 % CI {span}" if span else ""
    count = "" if is_missing(row["n"]) else f"<br>n = {int(row['n'])}"
    return f"<b>layer {int(row['layer'])}</b><br>{escape(label)}: <b>{number(row['value'])}</b>{tail}{count}"
