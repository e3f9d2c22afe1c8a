"""Heads and their numbers as the sections put them into words and small tables."""

from __future__ import annotations

from collections.abc import Iterable
from html import unescape
from typing import Any

import pandas as pd

from workbench.plots.labels import head_name, interval, number
from workbench.plots.panels import Panel
from workbench.plots.ranking import strongest


def enumerate_heads(frame: pd.DataFrame) -> str:
    """`a3.h1 0.930 [0.910, 0.950], a2.h0 ...`: the heads of some tidy rows, in their order."""
    return ", ".join(_words(row) for row in frame.to_dict("records"))


def strongest_table(panels: Iterable[Panel], k: int, caption: str) -> pd.DataFrame:
    """The `k` strongest heads of every panel side by side, with their intervals."""
    columns: dict[str, Any] = {}
    for panel in panels:
        rows = strongest(panel.frame, k).to_dict("records")
        columns[unescape(panel.label)] = [_words(row) for row in rows]
    longest = max((len(column) for column in columns.values()), default=0)
    padded = {name: column + [""] * (longest - len(column)) for name, column in columns.items()}
    frame = pd.DataFrame({"rank": [str(place + 1) for place in range(longest)], **padded})
    frame.attrs["caption"] = caption
    return frame


def _words(row: dict[Any, Any]) -> str:
    name = head_name(row["layer"], row["head"])
    return f"{name} {number(row['value'])} {interval(row['ci_low'], row['ci_high'])}".strip()
