"""Figures of circuits: the circuit itself with layers upward, and how faithful circuits are by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from workbench_circuits._curve_figure import faithfulness_figure
from workbench_circuits._figure_parts import mark_line, need, pin_title
from workbench_circuits._layout import LAYER_GAP, bend_of, curve, node_of, place, receiver_parts

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models.spec import ModelSpec

__all__ = ["CHANNELS", "circuit_figure", "faithfulness_figure"]

CHANNELS = {
    "q": ("#0b5394", "into a query"),
    "k": ("#d17a00", "into a key"),
    "v": ("#3d8b37", "into a value"),
    "mlp": ("#8c4a8c", "into an MLP"),
    "logits": ("#3a3a3a", "into the logits"),
}
"""Colour and meaning of the channels of edges."""

_FILL = {"input": "#eef1f4", "kv": "#fff6e8", "head": "#ffffff", "mlp": "#f5edf5", "logits": "#eef1f4"}
_ROW, _WIDEST, _THINNEST = 44, 6.0, 0.8
_UNIT, _PER_LETTER = 56, 5.2


def circuit_figure(
    edges: pd.DataFrame,
    spec: ModelSpec,
    *,
    title: str = "Circuit",
    faithfulness: tuple[float, float, float] | None = None,
    held_out: bool = True,
    n_edges: int | None = None,
    n_all: int | None = None,
    mark: str = "",
    metric: str = "logit difference",
    unit: str = "logits",
    roles: Mapping[str, str] | None = None,
    max_edges: int = 150,
) -> Any:
    """Draw a circuit: layers upward, edges coloured by what they go into, as wide as their effect is large.

    Solid edges lower the metric when they are patched, dashed ones raise it. Only layers with nodes have a row. With
    grouped queries the native key-value heads are nodes of their own, below the heads that they serve, with dotted
    lines to those.

    Args:
        edges: columns `sender`, `receiver` and, if known, `effect`; names as everywhere (`a3.h1`, `a3.h1<q>`, `m5`).
        spec: of the model, for its layers and heads.
        title: what the circuit is of: task and model.
        faithfulness: value and the ends of its interval.
        held_out: whether that was measured on prompts that had no part in finding the circuit.
        n_edges: edges of the circuit, where `edges` has only a part of them; default: the rows of `edges`.
        n_all: edges of the whole model.
        mark: what must be said of the task, as `Competence.mark` has it; shown in the title.
        metric: name of the metric in the legend.
        unit: unit of the effects.
        roles: roles by name of node, as `HeadRoles.labels` has them, written below it, each on a line.
        max_edges: draw only so many, the strongest; the title says so.

    Returns:
        A plotly `Figure`.

    Raises:
        DataError: if there is no edge, a column is missing, or a name is no node of the model.
    """
    import numpy as np
    import plotly.graph_objects as go

    from workbench.plots.style import MUTED, dress

    need(edges, ("sender", "receiver"), "edges")
    total = len(edges) if n_edges is None else n_edges
    frame = edges[["sender", "receiver"]].assign(effect=edges["effect"].astype(float) if "effect" in edges else np.nan)
    strongest = frame["effect"].abs().fillna(0).sort_values(ascending=False, kind="stable").index[:max_edges]
    drawn = frame.loc[strongest].reset_index(drop=True)
    parts = [
        (str(sender), *receiver_parts(str(receiver)), float(effect))
        for sender, receiver, effect in zip(drawn["sender"], drawn["receiver"], drawn["effect"], strict=True)
    ]
    names = dict.fromkeys(name for sender, node, *_ in parts for name in (sender, node))
    nodes = {name: node_of(name, spec.n_layers) for name in names}
    groups = _groups(nodes.values(), spec)
    words = {name: role.split(", ") for name, role in (roles or {}).items() if role and name in nodes}
    widths = {name: max(1.0, (_PER_LETTER * max(map(len, lines)) + 10) / _UNIT) for name, lines in words.items()}
    places = place(nodes.values(), [(sender, node) for sender, node, *_ in parts] + groups, widths)
    figure = go.Figure()
    for kv, head in groups:
        (x0, y0), (x1, y1) = places[kv], places[head]
        figure.add_scatter(
            x=[x0, x1],
            y=[y0, y1],
            mode="lines",
            line={"color": "#9aa5b1", "width": 1, "dash": "dot"},
            hoverinfo="skip",
            showlegend=False,
        )
    sizes = np.array([abs(effect) for *_, effect in parts])
    largest = float(np.nanmax(sizes)) if np.isfinite(sizes).any() else 0.0
    middles: list[tuple[float, float, str]] = []
    reach = [x + side * widths.get(name, 1.0) / 2 for name, (x, _) in places.items() for side in (-1, 1)]
    between: list[tuple[str, str]] = []
    for sender, node, channel, effect in reversed(parts):
        share = abs(effect) / largest if largest > 0 and np.isfinite(effect) else 0.0
        bend = bend_of(places[sender], places[node], places, widths)
        beside = between.count((sender, node))
        between.append((sender, node))
        xs, ys = curve(places[sender], places[node], bend + (0.25 * beside if bend >= 0 else -0.25 * beside))
        reach += xs
        figure.add_scatter(
            x=xs,
            y=ys,
            mode="lines",
            line={
                "color": CHANNELS[channel][0],
                "width": _THINNEST + (_WIDEST - _THINNEST) * share,
                "dash": "dash" if effect > 0 else "solid",
            },
            opacity=0.45 + 0.5 * share,
            hoverinfo="skip",
            showlegend=False,
        )
        said = f"{effect:+.3g} {unit}" if np.isfinite(effect) else "effect not known"
        name = f"{sender}->{node}" + (f"<{channel}>" if channel in "qkv" else "")
        middles.append((xs[12], ys[12], f"<b>{escape(name)}</b><br>{escape(said)}"))
    figure.add_scatter(
        x=[x for x, *_ in middles],
        y=[y for _, y, _ in middles],
        mode="markers",
        marker={"size": 14, "color": "rgba(0,0,0,0)"},
        text=[text for *_, text in middles],
        hovertemplate="%{text}<extra></extra>",
        showlegend=False,
    )
    _legend(figure, {channel for _, _, channel, _ in parts}, [effect for *_, effect in parts], metric)
    for name, (x, y) in places.items():
        role = "<br>".join(map(escape, words.get(name, [])))
        figure.add_annotation(
            x=x,
            y=y,
            text=escape(name) + (f"<br><span style='font-size:9px;color:{MUTED}'>{role}</span>" if role else ""),
            showarrow=False,
            bgcolor=_FILL[nodes[name].kind],
            bordercolor="#7b8794",
            borderwidth=1,
            borderpad=3,
            font={"size": 11},
        )
    heads = sum(node.kind == "head" for node in nodes.values())
    lines = _title(title, faithfulness, held_out, total, n_all, heads, len(parts), mark)
    top = max(y for _, y in places.values())
    dress(
        figure,
        height=int(150 + 19 * len(lines) + _ROW * (top + 1)),
        title="<br>".join(lines),
        top=16 + 19 * len(lines),
        left=70,
    )
    pin_title(figure)
    left, right = min(reach) - 0.3, max(reach) + 0.3
    figure.update_xaxes(visible=False, range=[left, right], autorange=False)
    ticks = _layer_ticks(nodes.values(), places)
    figure.update_yaxes(
        tickvals=[at for at, _ in ticks],
        ticktext=[text for _, text in ticks],
        ticks="",
        showgrid=False,
        zeroline=False,
        showline=False,
        range=[-0.7, top + 0.7],
        autorange=False,
    )
    figure.update_layout(
        showlegend=True,
        legend={"orientation": "h", "x": 0, "y": -0.02, "yanchor": "top", "font": {"size": 11}},
        shapes=_bands(nodes.values(), places, left, right),
    )
    return figure


def _groups(nodes: Any, spec: ModelSpec) -> list[tuple[str, str]]:
    """Pairs of a key-value head and a head that reads it, both in the figure."""
    group = spec.n_heads // spec.n_kv_heads
    nodes = list(nodes)
    return [
        (kv.name, head.name)
        for kv in nodes
        for head in nodes
        if kv.kind == "kv" and head.kind == "head" and kv.layer == head.layer and head.index // group == kv.index
    ]


def _title(
    title: str,
    faithfulness: tuple[float, float, float] | None,
    held_out: bool,
    total: int,
    n_all: int | None,
    heads: int,
    drawn: int,
    mark: str,
) -> list[str]:
    share = f" of {n_all:,} ({100 * total / n_all:.2g} %)" if n_all else ""
    size = f"{total:,} edges{share}, {heads} heads"
    if drawn < total:
        size += f"; the {drawn} strongest edges are drawn"
    lines = [f"<b>{escape(title)}</b>", escape(size)]
    if faithfulness is not None:
        value, low, high = faithfulness
        where = "held-out prompts" if held_out else "the prompts it was found on"
        lines.append(f"faithfulness {value:.2f} [{low:.2f}, {high:.2f}] on {where}")
    lines += mark_line(mark)
    return lines


def _legend(figure: Any, channels: set[str], effects: Sequence[float], metric: str) -> None:
    """Entries that stand for channels and signs, without data of their own."""
    entries = [(CHANNELS[name][1], CHANNELS[name][0], "solid") for name in CHANNELS if name in channels]
    if any(effect < 0 for effect in effects):
        entries.append((f"patching lowers the {metric}", "#7b8794", "solid"))
    if any(effect > 0 for effect in effects):
        entries.append((f"patching raises the {metric}", "#7b8794", "dash"))
    for name, colour, dash in entries:
        figure.add_scatter(
            x=[None], y=[None], mode="lines", name=escape(name), line={"color": colour, "width": 3, "dash": dash}
        )


def _layer_rows(nodes: Any, places: Mapping[str, tuple[float, float]]) -> dict[int, list[float]]:
    rows: dict[int, list[float]] = {}
    for node in nodes:
        if node.kind not in ("input", "logits"):
            rows.setdefault(node.layer, []).append(places[node.name][1])
    return rows


def _layer_ticks(nodes: Any, places: Mapping[str, tuple[float, float]]) -> list[tuple[float, str]]:
    return [((min(ys) + max(ys)) / 2, f"layer {layer}") for layer, ys in sorted(_layer_rows(nodes, places).items())]


def _bands(nodes: Any, places: Mapping[str, tuple[float, float]], left: float, right: float) -> list[dict[str, Any]]:
    """Pale bands behind every second layer."""
    pad = 0.5 + LAYER_GAP / 2
    return [
        {
            "type": "rect",
            "x0": left,
            "x1": right,
            "y0": min(ys) - pad,
            "y1": max(ys) + pad,
            "fillcolor": "#f6f8fa",
            "line": {"width": 0},
            "layer": "below",
        }
        for at, (_, ys) in enumerate(sorted(_layer_rows(nodes, places).items()))
        if at % 2 == 0
    ]
