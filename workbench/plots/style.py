"""The look of every figure: light, quiet, and told apart without red against green."""

from __future__ import annotations

from typing import Any

INK = "#1f2933"
MUTED = "#52606d"
GRID = "#e4e7eb"
MISSING = "#d9dde3"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

# Lightness alone orders the first scale; blue against orange, equally dark, carries the sign in the second.
SEQUENTIAL = ((0.0, "#f5f8fc"), (0.25, "#bdd3ea"), (0.5, "#6fa3d0"), (0.75, "#2b6ca8"), (1.0, "#0b2f5b"))
DIVERGING = (
    (0.0, "#7a3402"),
    (0.2, "#c8691c"),
    (0.4, "#f3cfa6"),
    (0.5, "#f7f7f7"),
    (0.6, "#b9d2ea"),
    (0.8, "#3f7fb8"),
    (1.0, "#0b2f5b"),
)
# Distinct under the three common colour deficiencies and in grey print together with the marker shapes.
SERIES = ("#0b5394", "#d17a00", "#3a3a3a", "#5aa9d6", "#8c4a8c", "#7a9a01")
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "x")


def dress(figure: Any, *, height: int, title: str | None = None, top: int = 48, left: int = 64) -> Any:
    """Give a figure the house style, in place.

    Args:
        figure: a plotly figure; its width is left to the page.
        height: pixels.
        title: plain text with plotly's own tags allowed; already escaped.
        top: margin above the panels, in pixels.
        left: margin for the labels on the left, in pixels.

    Returns:
        The same figure.
    """
    figure.update_layout(
        template=None,
        height=height,
        autosize=True,
        font={"family": FONT, "size": 12, "color": INK},
        title={"text": title, "font": {"size": 14}, "x": 0, "xanchor": "left", "pad": {"l": 4}} if title else None,
        margin={"l": left, "r": 24, "t": top + (24 if title else 0), "b": 48},
        paper_bgcolor="#ffffff",
        plot_bgcolor="#ffffff",
        hoverlabel={
            "bgcolor": "#ffffff",
            "bordercolor": MUTED,
            "font": {"family": FONT, "size": 12, "color": INK},
        },
        showlegend=False,
    )
    axis = {
        "gridcolor": GRID,
        "zerolinecolor": "#9aa5b1",
        "linecolor": "#9aa5b1",
        "ticks": "outside",
        "tickcolor": "#9aa5b1",
        "ticklen": 4,
        "automargin": True,
        "title": {"standoff": 8},
    }
    figure.update_xaxes(**axis)
    figure.update_yaxes(**axis)
    return figure
