"""Figures of the effects of heads and MLPs: total against direct, MLPs by layer, layers by named position."""

from __future__ import annotations

from html import escape
from typing import Any

from workbench.plots.labels import interval, number
from workbench.tables import HeadTable


def total_against_direct(effects: HeadTable) -> Any:
    """Scatter of total against direct effects; on the dashed line the total effect is the direct one."""
    from workbench.plots import metric_scatter
    from workbench.plots.style import MUTED

    figure = metric_scatter(
        effects,
        "direct_effect",
        "total_effect",
        label=12,
        title="Total against direct effect: off the dashed line, later components add to it or make up for it",
    )
    values = effects.select("direct_effect")["value"]
    low, high = float(min(values.min(), 0)), float(max(values.max(), 0))
    figure.add_shape(
        type="line", x0=low, y0=low, x1=high, y1=high, line={"color": MUTED, "width": 1, "dash": "dash"}, layer="below"
    )
    return figure


def mlp_bars(effects: HeadTable) -> Any:
    """Total and direct effect of every MLP, with 95 % intervals."""
    import plotly.graph_objects as go

    from workbench.plots.style import INK, SERIES, dress

    figure = go.Figure()
    for name, colour in (("total", SERIES[0]), ("direct", SERIES[1])):
        rows = effects.frame[effects.frame["metric"] == f"mlp_{name}_effect"]
        figure.add_trace(
            go.Bar(
                name=name,
                x=rows["layer"].astype(int).tolist(),
                y=rows["value"].tolist(),
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (rows["ci_high"] - rows["value"]).fillna(0).tolist(),
                    "arrayminus": (rows["value"] - rows["ci_low"]).fillna(0).tolist(),
                    "color": INK,
                    "thickness": 1,
                    "width": 2,
                },
                marker={"color": colour},
                hovertext=[
                    f"<b>m{row['layer']}</b>, {name}: {number(row['value'])} {interval(row['ci_low'], row['ci_high'])}"
                    for row in rows.to_dict("records")
                ],
                hoverinfo="text",
            )
        )
    dress(figure, height=340, title="Effect of each MLP on the logit difference, with 95 % CI", top=32)
    figure.update_layout(
        barmode="group",
        bargap=0.25,
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    n_layers = int(effects.frame["layer"].max()) + 1
    step = next(step for step in (1, 2, 5, 10, 20) if n_layers / step <= 34 or step == 20)
    figure.update_xaxes(
        title_text="MLP of layer", tick0=0, dtick=step, range=[-0.6, n_layers - 0.4], showgrid=False, zeroline=False
    )
    figure.update_yaxes(title_text=escape(str(effects.frame["unit"].iloc[0])), zeroline=True)
    return figure


def span_heatmap(spans: HeadTable) -> Any:
    """Layer by named position: total effects of whole attention layers and of MLPs, on one scale."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from workbench.plots.style import DIVERGING, dress

    frame = spans.frame[spans.frame["metric"].isin(["attention_total_effect", "mlp_total_effect"])]
    kinds = {"attention_total_effect": "attention layers", "mlp_total_effect": "MLPs"}
    kinds = {metric: words for metric, words in kinds.items() if (frame["metric"] == metric).any()}
    figure = make_subplots(
        rows=1, cols=len(kinds), subplot_titles=[f"<b>{words}</b>" for words in kinds.values()], horizontal_spacing=0.08
    )
    bound = float(frame["value"].abs().max()) or 1.0
    names = {each: each.split(", ")[-1] for each in dict.fromkeys(frame["input"])}
    layers = sorted({int(layer) for layer in frame["layer"]})
    for column, metric in enumerate(kinds, start=1):
        rows = {(row["input"], int(row["layer"])): row for row in frame[frame["metric"] == metric].to_dict("records")}
        figure.add_trace(
            go.Heatmap(
                x=[escape(name) for name in names.values()],
                y=layers,
                z=[[rows[each, layer]["value"] for each in names] for layer in layers],
                hovertext=[
                    [
                        f"layer {layer} at {escape(name)}: {number(rows[each, layer]['value'])} "
                        f"{interval(rows[each, layer]['ci_low'], rows[each, layer]['ci_high'])}"
                        for each, name in names.items()
                    ]
                    for layer in layers
                ],
                hoverinfo="text",
                coloraxis="coloraxis",
                xgap=2,
                ygap=1,
            ),
            row=1,
            col=column,
        )
    dress(figure, height=150 + 13 * len(layers), title="Total effect by layer and position")
    figure.update_annotations(font={"size": 13}, yshift=4)
    step = 1 if len(layers) <= 16 else 2 if len(layers) <= 34 else 5
    figure.update_yaxes(range=[len(layers) - 0.5, -0.5], dtick=step, showgrid=False, zeroline=False)
    figure.update_yaxes(title_text="layer", col=1)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_layout(
        margin={"r": 90},
        coloraxis={
            "colorscale": [list(stop) for stop in DIVERGING],
            "cmin": -bound,
            "cmax": bound,
            "colorbar": {
                "title": {"text": escape(str(frame["unit"].iloc[0])), "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
            },
        },
    )
    return figure
