"""How faithful circuits are by size, as a figure."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError
from workbench_circuits._figure_parts import mark_line, need, pin_title

if TYPE_CHECKING:
    import pandas as pd

_RANDOM = "#8a939c"


def faithfulness_figure(
    curves: pd.DataFrame,
    *,
    title: str = "Faithfulness by size",
    mark: str = "",
    areas: pd.DataFrame | None = None,
    random: str = "random",
    target: float | None = None,
) -> Any:
    """Draw how faithful circuits are by the share of edges that they have, for several rankings of the edges.

    Args:
        curves: columns `method`, `fraction` (of all edges, above 0) and `faithfulness`, and `ci_low`, `ci_high` where
            known: `Curves.frame`.
        title: what was measured: task, model, prompts.
        mark: what must be said of the task, as `Competence.mark` has it.
        areas: columns `method`, `cpr`, `cmd`, written into the legend: `Curves.areas`.
        random: the method that is the baseline, in grey.
        target: a faithfulness that was asked for, as a line.

    Returns:
        A plotly `Figure`: the share on a logarithmic axis, bands for the intervals.

    Raises:
        DataError: if there is nothing to draw or a column is missing.
    """
    import plotly.graph_objects as go

    from workbench.plots.style import SERIES, SYMBOLS, dress

    need(curves, ("method", "fraction", "faithfulness"), "curves")
    frame = curves[curves["fraction"] > 0]
    if frame.empty:
        raise DataError("curves has no circuit of more than no edges: give fractions above 0")
    figure = go.Figure()
    methods = sorted(dict.fromkeys(frame["method"]), key=lambda name: name == random)
    colours = iter(SERIES * (1 + len(methods) // len(SERIES)))
    symbols = iter(SYMBOLS * (1 + len(methods) // len(SYMBOLS)))
    for method in methods:
        own = frame[frame["method"] == method].sort_values("fraction")
        colour = _RANDOM if method == random else next(colours)
        x, share = own["fraction"].tolist(), (100 * own["fraction"]).tolist()
        if {"ci_low", "ci_high"} <= set(own.columns) and own[["ci_low", "ci_high"]].notna().all(axis=None):
            figure.add_scatter(
                x=share + share[::-1],
                y=own["ci_high"].tolist() + own["ci_low"].tolist()[::-1],
                mode="lines",
                fill="toself",
                line={"width": 0},
                fillcolor=_pale(colour),
                hoverinfo="skip",
                showlegend=False,
            )
        label = str(method)
        if areas is not None and method in set(areas["method"]):
            row = areas[areas["method"] == method].iloc[0]
            label += f" (CPR {row['cpr']:.2f}, CMD {row['cmd']:.2f})"
        sizes = own["n_edges"].tolist() if "n_edges" in own else [float("nan")] * len(x)
        figure.add_scatter(
            x=share,
            y=own["faithfulness"].tolist(),
            mode="lines+markers",
            name=escape(label),
            line={"color": colour, "width": 2, "dash": "dot" if method == random else "solid"},
            marker={"size": 7, "symbol": "circle-open" if method == random else next(symbols), "color": colour},
            customdata=sizes,
            hovertemplate=f"{escape(label)}<br>%{{x:.3g}} % of the edges, %{{customdata:,.0f}} connected<br>"
            "faithfulness %{y:.3f}<extra></extra>",
        )
    lines = [f"<b>{escape(title)}</b>"]
    lines += mark_line(mark)
    dress(figure, height=460, title="<br>".join(lines), top=16 + 19 * len(lines))
    pin_title(figure)
    figure.add_hline(y=1, line={"color": "#52606d", "width": 1, "dash": "dash"})
    if target is not None:
        figure.add_hline(
            y=target, line={"color": "#52606d", "width": 1, "dash": "dot"}, annotation_text=f"target {target:g}"
        )
    shares = sorted({round(100 * value, 6) for value in frame["fraction"]})
    figure.update_xaxes(
        type="log",
        title_text="edges taken, % of all (logarithmic)",
        tickvals=shares,
        ticktext=[f"{s:g}" for s in shares],
    )
    figure.update_yaxes(title_text="faithfulness (0: nothing, 1: the model)")
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top", "font": {"size": 11}, "traceorder": "normal"},
        margin={"b": 100},
    )
    return figure


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.15)"
