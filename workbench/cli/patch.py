"""What `workbench patch` needs that knows nothing of tasks: edges by file, and a result as text."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from workbench.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.patching import EdgeEffects


def edges_argument(text: str) -> list[str] | Literal["all", "heads"]:
    """What `--edges` names: `all`, `heads`, or a file with one edge a line; `#` begins a comment.

    Raises:
        DataError: if the file cannot be read or names no edge.
    """
    if text == "all":
        return "all"
    if text == "heads":
        return "heads"
    path = Path(text).expanduser()
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--edges {text!r} is neither 'all' nor 'heads' nor a readable file with one edge a line: {error}"
        ) from error
    names = [line for line in lines if line]
    if not names:
        raise DataError(f"--edges {text!r} names no edge: write one a line, for example a9.h3->a10.h0<q>")
    return names


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def top_text(effects: EdgeEffects, k: int) -> str:
    """The strongest edges with their intervals, aligned."""
    rows = effects.top(k)
    first = effects.frame.iloc[0]
    lines = [
        f"strongest of {len(effects):,} edges ({first['direction']}, {first['metric']}, {first['n_prompts']} prompts, "
        f"base {first['base']:+.3f})"
    ]
    for row in rows.to_dict("records"):
        interval = f"[{row['ci_low']:+.4f}, {row['ci_high']:+.4f}]" if row["ci_low"] == row["ci_low"] else ""
        note = "  below noise" if row["below_noise"] else ""
        name = f"{row['sender']}->{row['receiver']}"
        lines.append(f"  {name:<24}{row['effect']:+10.4f}  {interval:<22}  {row['method']}{note}".rstrip())
    lines.append(f"noise floor {effects.noise_floor:.1e}; {int(effects.frame['below_noise'].sum()):,} edges below it")
    return "\n".join(lines)


def calibration_text(table: pd.DataFrame) -> str:
    """How far the first-order methods are from exact, by class of edge."""
    lines = ["first-order methods against exact effects, on the verified edges:"]
    shown = table.copy()
    shown["class"] = shown["edge_class"] + shown["largest_edge"].map({"with": "", "without": " (without largest)"})
    shown["missed_share"] = shown["missed_share"].map(lambda x: f"<= {x:.3f}")
    columns = ["method", "class", "n", "r", "relative_error", "k", "recall", "sampled", "sampled_strong", "unverified"]
    text = shown[[*columns, "missed_share"]].to_string(index=False, float_format=lambda x: f"{x:.3f}")
    lines += [f"  {line}" for line in text.splitlines()]
    lines.append("  missed_share: at 95 %, no larger share of the unverified edges belongs to the strongest")
    return "\n".join(lines)
