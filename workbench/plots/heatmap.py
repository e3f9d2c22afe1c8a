"""Layer by head maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.plots.panels import Panel, head_panels
from workbench.plots.style import DIVERGING, MISSING, SEQUENTIAL, dress

if TYPE_CHECKING:
    from workbench.tables import HeadTable

_ROW_GAP = 64


def head_heatmap(
    table: HeadTable,
    metrics: str | Sequence[str] | None = None,
    *,
    signed: bool | None = None,
    title: str | None = None,
    **where: Any,
) -> Any:
    """Layer by head map, one panel a metric (and an input, a position ... where they vary).

    Panels of one unit share one colour scale, so that they can be compared; it is centred on zero and
    diverging when there are negative values, and begins at zero otherwise. A head without a number is grey.

    Args:
        table: head-level rows.
        metrics: which metrics, in order; all if None.
        signed: whether the scale is the diverging one; None decides from the data.
        title: title above the panels, plain text.
        where: selection by column, for example `input="natural"`.

    Returns:
        A plotly `Figure` of one heat map trace a panel; its `z` is [layers, heads] in the unit of the metric.

    Raises:
        DataError: if no head-level rows are left, or a head has two numbers in one panel.
    """
    from plotly.subplots import make_subplots

    panels = head_panels(table, metrics, **where)
    matrices = [panel.matrix() for panel in panels]
    n_layers = max(len(matrix) for matrix in matrices)
    n_heads = max(matrix.shape[1] for matrix in matrices)
    columns = min(len(panels), 3 if n_heads <= 16 else 2 if n_heads <= 32 else 1)
    rows = math.ceil(len(panels) / columns)
    panel_height = n_layers * min(30.0, max(9.0, 400.0 / n_layers))
    height = rows * panel_height + (rows - 1) * _ROW_GAP
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[f"<b>{panel.label}</b>" for panel in panels],
        horizontal_spacing=0.14 / columns,
        vertical_spacing=_ROW_GAP / height if rows > 1 else 0,
    )
    units = list(dict.fromkeys(panel.unit for panel in panels))
    for place, (panel, matrix) in enumerate(zip(panels, matrices, strict=True)):
        row, column = place // columns + 1, place % columns + 1
        figure.add_trace(_trace(panel, matrix, units.index(panel.unit)), row=row, col=column)
        _axes(figure, row, column, matrix.shape, last_row=place + columns >= len(panels))
    dress(figure, height=round(height) + 120, title=None if title is None else escape(title))
    figure.update_layout(plot_bgcolor=MISSING, margin={"r": 30 + 64 * len(units)})
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
    figure.update_annotations(font={"size": 13}, yshift=4)
    for index, unit in enumerate(units):
        shown = [matrix for panel, matrix in zip(panels, matrices, strict=True) if panel.unit == unit]
        scale = _scale(np.concatenate([matrix.ravel() for matrix in shown]), unit, signed)
        scale["colorbar"]["x"] = 1.01 + 0.1 * index
        figure.update_layout({f"coloraxis{index + 1 if index else ''}": scale})
    return figure


def _trace(panel: Panel, matrix: np.ndarray, axis: int) -> Any:
    import plotly.graph_objects as go

    gap = 1 if max(matrix.shape) <= 40 else 0.5
    return go.Heatmap(
        z=[[None if math.isnan(value) else float(value) for value in row] for row in matrix],
        hovertext=panel.hover().tolist(),
        hoverinfo="text",
        hoverongaps=False,
        xgap=gap,
        ygap=gap,
        coloraxis=f"coloraxis{axis + 1 if axis else ''}",
        name=panel.label,
    )


def _axes(figure: Any, row: int, column: int, shape: tuple[int, ...], *, last_row: bool) -> None:
    n_layers, n_heads = shape
    figure.update_xaxes(
        title="head" if last_row else None,
        dtick=_step(n_heads),
        tick0=0,
        range=[-0.5, n_heads - 0.5],
        row=row,
        col=column,
    )
    figure.update_yaxes(
        title="layer" if column == 1 else None,
        dtick=_step(n_layers),
        tick0=0,
        range=[n_layers - 0.5, -0.5],
        row=row,
        col=column,
    )


def _step(count: int) -> int:
    """Distance of the labels on an axis of `count` integers: at most 17 of them."""
    return next(step for step in (1, 2, 4, 5, 8, 10, 16, 32, 64, 128, 256) if count / step <= 16.5 or step == 256)


def _scale(values: np.ndarray, unit: str, signed: bool | None) -> dict[str, Any]:
    finite = values[np.isfinite(values)]
    low = float(finite.min(initial=0.0))
    high = float(finite.max(initial=0.0))
    if signed is None:
        signed = low < 0
    bound = max(abs(low), abs(high)) or 1.0
    return {
        "colorscale": [list(stop) for stop in (DIVERGING if signed else SEQUENTIAL)],
        "cmin": -bound if signed else min(0.0, low),
        "cmax": bound if signed else high or 1.0,
        "colorbar": {
            "title": {"text": escape(unit), "side": "right", "font": {"size": 11}},
            "thickness": 12,
            "outlinewidth": 0,
            "len": 1,
            "tickfont": {"size": 11},
        },
    }
