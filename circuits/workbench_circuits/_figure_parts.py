"""What the figures of circuits share."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


def mark_line(mark: str) -> list[str]:
    """The line of a title that says what must be said of a task; none for a task that the model solves."""
    return [f"<span style='color:#b3360b'><b>{escape(mark)}</b></span>"] if mark else []


def pin_title(figure: Any) -> None:
    """Put the title at the very top."""
    figure.update_layout(title={"y": 1, "yanchor": "top", "yref": "container", "pad": {"t": 12, "l": 4}})


def need(frame: pd.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise a `DataError` unless a frame has rows and these columns."""
    missing = [name for name in columns if name not in frame.columns]
    if missing:
        raise DataError(f"{what} lacks the columns {missing}; it has {list(frame.columns)}")
    if frame.empty:
        raise DataError(f"{what} has no rows: nothing to draw")
