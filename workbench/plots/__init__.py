"""Figures from tables, drawn with plotly, which is imported when the first figure is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError
from workbench.plots.heatmap import head_heatmap
from workbench.plots.layers import layer_lines
from workbench.plots.ranking import metric_scatter, rates, top_heads

if TYPE_CHECKING:
    from workbench.tables import HeadTable

__all__ = ["head_heatmap", "layer_lines", "metric_scatter", "plot", "rates", "top_heads"]

_KINDS = ("heatmap", "top", "rates", "scatter")


def plot(
    table: HeadTable,
    metric: str | Sequence[str] | None = None,
    kind: str | None = None,
    **options: Any,
) -> Any:
    """Draw a table.

    Args:
        table: the table.
        metric: one metric or several; all if None. A scatter takes exactly two.
        kind: "heatmap" (layer by head), "top" (strongest heads with CI), "rates" (whole-model shares over
            inputs) or "scatter"; None is "heatmap" if there are numbers of single heads, else "rates".
        options: passed on; selections by column (`input="natural"`), `k=` for "top", `title=`.

    Returns:
        A plotly `Figure`.

    Raises:
        DataError: if the kind is unknown, or the table has nothing of that kind.
    """
    if kind is None:
        kind = "heatmap" if table.frame["head"].notna().any() else "rates"
    if kind == "heatmap":
        return head_heatmap(table, metric, **options)
    if kind == "top":
        return top_heads(table, metric, **options)
    if kind == "rates":
        names = [metric] if isinstance(metric, str) else list(metric or table.frame["metric"].unique())
        if len(names) != 1:
            raise DataError(f"a figure of kind 'rates' shows one metric, not {names!r}: pass metric=")
        return rates(table, names[0], **options)
    if kind == "scatter":
        if metric is None or isinstance(metric, str) or len(metric) != 2:
            raise DataError(f"a scatter needs two metrics, metric=(x, y), not {metric!r}")
        return metric_scatter(table, metric[0], metric[1], **options)
    raise DataError(f"unknown kind of figure {kind!r}: use one of {', '.join(map(repr, _KINDS))}")
