"""Names of heads and figures with their uncertainty, as people read them."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd


def head_name(layer: Any, head: Any) -> str:
    """`a3.h1`: the name that a head has as a node."""
    return f"a{int(layer)}.h{int(head)}"


def number(value: Any, digits: int = 3) -> str:
    """A number to so many significant digits, without exponent from 1e-4 to 1e6; a dash if there is none."""
    if is_missing(value):
        return "–"
    value = float(value)
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "\u2212")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}".replace("-", "\u2212")


def percent(value: Any) -> str:
    """A share between 0 and 1 as a percentage with one decimal."""
    return "–" if is_missing(value) else f"{100 * float(value):.1f} %"


def interval(low: Any, high: Any, *, share: bool = False) -> str:
    """`[low, high]`, or nothing where there is no interval; a share between 0 and 1 in per cent."""
    if is_missing(low) or is_missing(high):
        return ""
    if share:
        return f"[{100 * float(low):.1f}, {100 * float(high):.1f}]"
    return f"[{number(low)}, {number(high)}]"


def is_missing(value: Any) -> bool:
    """Whether a cell of a table holds no number: None, NaN or pandas' NA."""
    return bool(pd.isna(value))
