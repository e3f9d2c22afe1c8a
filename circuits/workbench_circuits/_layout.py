"""Where the nodes of a circuit stand in its figure: layers upward, few crossings; and the curves between them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from workbench.errors import DataError

Kind = Literal["input", "kv", "head", "mlp", "logits"]
_ORDER: tuple[Kind, ...] = ("input", "kv", "head", "mlp", "logits")
_NAME = re.compile(r"(?:a(?P<attn>\d+)\.(?P<what>h|kv)(?P<index>\d+)|m(?P<mlp>\d+)|(?P<end>input|logits))$")
_CHANNEL = re.compile(r"(?P<node>.+)<(?P<channel>[qkv])>$")
_SWEEPS = 12
LAYER_GAP = 0.6


@dataclass(frozen=True, kw_only=True, order=True)
class Node:
    """A node of the figure, in the order in which nodes write.

    Attributes:
        layer: -1 for the input; behind the last for the logits.
        level: place of its kind within the layer.
        index: head or key-value head; 0 for the others.
        name: as in edges.
        kind: what it is.
    """

    layer: int
    level: int
    index: int
    name: str
    kind: Kind


def node_of(name: str, n_layers: int) -> Node:
    """The node of a name without channel.

    Raises:
        DataError: if it is no name of a node.
    """
    match = _NAME.match(name)
    if match is None:
        raise DataError(f"{name!r} is no node: expected input, logits, a3.h1, a3.kv0 or m5")
    kind: Kind
    if match["end"] is not None:
        kind = "input" if name == "input" else "logits"
        layer = -1 if kind == "input" else n_layers
    elif match["mlp"] is not None:
        kind, layer = "mlp", int(match["mlp"])
    else:
        kind, layer = ("head" if match["what"] == "h" else "kv"), int(match["attn"])
    if kind not in ("input", "logits") and layer >= n_layers:
        raise DataError(f"{name!r} is in layer {layer} and the model has {n_layers}: give the spec of the edges' model")
    return Node(layer=layer, level=_ORDER.index(kind), index=int(match["index"] or 0), name=name, kind=kind)


def receiver_parts(receiver: str) -> tuple[str, str]:
    """Node and channel of a receiver: `q`, `k`, `v`, `mlp` or `logits`.

    Raises:
        DataError: if a head is named without its channel.
    """
    match = _CHANNEL.match(receiver)
    if match is not None:
        return match["node"], match["channel"]
    if receiver == "logits":
        return receiver, "logits"
    if receiver.startswith("m"):
        return receiver, "mlp"
    raise DataError(f"{receiver!r} is no receiver: expected logits, m5, a3.h1<q>, a3.h1<k>, a3.h1<v> or a3.kv0<k>")


def place(
    nodes: Iterable[Node], links: Sequence[tuple[str, str]], widths: Mapping[str, float] | None = None
) -> dict[str, tuple[float, float]]:
    """Coordinates of every node: one row for each kind within each layer that occurs, nodes side by side.

    Rows are centred; within a row nodes are ordered by the mean place of their neighbours, over several sweeps up and
    down (Sugiyama, Tagawa and Toda 1981).

    Args:
        nodes: all different.
        links: pairs of names.
        widths: of the nodes by name; 1 where there is none.
    """
    wide = widths or {}
    rows: dict[tuple[int, int], list[Node]] = {}
    for node in sorted(nodes):
        rows.setdefault((node.layer, node.level), []).append(node)
    height, y, before = 0.0, {}, None
    for layer, level in rows:
        if before is not None:
            height += 1 + (LAYER_GAP if layer != before else 0)
        y[layer, level], before = height, layer
    x = {node.name: at - (len(row) - 1) / 2 for row in rows.values() for at, node in enumerate(row)}
    neighbours: dict[str, list[str]] = {name: [] for name in x}
    for a, b in links:
        neighbours[a].append(b)
        neighbours[b].append(a)
    for sweep in range(_SWEEPS):
        for row in list(rows.values())[:: 1 if sweep % 2 == 0 else -1]:
            wanted = [float(np.mean([x[other] for other in neighbours[node.name]] or [x[node.name]])) for node in row]
            sizes = [wide.get(node.name, 1.0) for node in row]
            for node, at in zip(row, _apart(wanted, sizes), strict=True):
                x[node.name] = at
    return {node.name: (x[node.name], y[at]) for at, row in rows.items() for node in row}


def _apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Places near the wanted ones, in their order, so that nodes do not overlap, with the mean they had."""
    order = np.argsort(wanted, kind="stable")
    placed, sizes = np.asarray(wanted, dtype=float)[order], np.asarray(widths, dtype=float)[order]
    for at in range(1, len(placed)):
        placed[at] = max(placed[at], placed[at - 1] + (sizes[at - 1] + sizes[at]) / 2)
    placed += np.mean(wanted) - placed.mean()
    found = np.empty(len(placed))
    found[order] = placed
    return found.tolist()


def curve(start: tuple[float, float], end: tuple[float, float], bend: float) -> tuple[list[float], list[float]]:
    """A curve from below to above, sideways by `bend` in its middle, as points (a cubic Bezier curve)."""
    t = np.linspace(0, 1, 25)
    (x0, y0), (x3, y3) = start, end
    x1, x2 = x0 + bend * 4 / 3, x3 + bend * 4 / 3
    y1, y2 = y0 + (y3 - y0) * 0.3, y0 + (y3 - y0) * 0.7
    weights = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    across = sum(w * x for w, x in zip(weights, (x0, x1, x2, x3), strict=True))
    up = sum(w * y for w, y in zip(weights, (y0, y1, y2, y3), strict=True))
    return np.asarray(across).tolist(), np.asarray(up).tolist()


def bend_of(
    start: tuple[float, float],
    end: tuple[float, float],
    places: Mapping[str, tuple[float, float]],
    widths: Mapping[str, float],
) -> float:
    """How far an edge swings sideways: not at all if its straight line passes no node, else past the nodes."""
    (x0, y0), (x1, y1) = start, end
    if y1 <= y0:
        return 0.6

    def clear(bend: float) -> bool:
        xs, ys = (np.array(part) for part in curve(start, end, bend))
        between = ((x, y, widths.get(name, 1.0)) for name, (x, y) in places.items() if y0 < y < y1)
        return all(abs(np.interp(y, ys, xs) - x) >= width / 2 + 0.05 for x, y, width in between)

    middle = np.mean([x for x, _ in places.values()]) if places else 0.0
    side = 1 if (x0 + x1) / 2 >= middle else -1
    for size in np.arange(0, 6.1, 0.4):
        for bend in (side * size, -side * size):
            if clear(float(bend)):
                return float(bend)
    return side * 3.0
