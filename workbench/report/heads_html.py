"""The table of heads as HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from workbench.plots.labels import head_name, interval, is_missing, number
from workbench.report.heads import Column, heads_of

_PRINTED_ROWS = 40


def heads_table(columns: tuple[Column, ...]) -> str:
    """The table of heads with its tools; static HTML that `assets/report.js` makes sortable and filterable."""
    if not columns:
        return ""
    cells: list[dict[Any, dict[Any, Any]]] = [column.rows.to_dict("index") for column in columns]
    names = ["head", *(column.label for column in columns)]
    buttons = "".join(
        f'<th scope="col" aria-sort="{"ascending" if place == 0 else "none"}">'
        f'<button type="button" data-column="{place}">{_breakable(name)}</button>'
        f'<span class="print-only">{_breakable(name)}</span>'
        + (f'<span class="unit">{escape(columns[place - 1].unit)}</span>' if place else "")
        + "</th>"
        for place, name in enumerate(names)
    )
    filters = "<td>minimum</td>" + "".join(
        f'<th><input type="number" step="any" data-column="{place + 1}" '
        f'aria-label="minimum of {escape(column.label)}"></th>'
        for place, column in enumerate(columns)
    )
    rows = []
    heads = heads_of(columns)
    for place, (layer, head) in enumerate(heads):
        numbers = "".join(_number_cell(column.get((layer, head))) for column in cells)
        beyond = ' class="beyond"' if place >= _PRINTED_ROWS else ""
        rows.append(
            f'<tr{beyond} data-names="{head_name(layer, head)} l{layer}h{head} l{layer} h{head} {layer}.{head}">'
            f'<th scope="row" data-v="{place}">{head_name(layer, head)}</th>{numbers}</tr>'
        )
    return (
        '<section id="heads"><h2>All heads</h2>'
        f"<p>One row a head, {len(heads)} in all; under the pointer each number shows its confidence interval and "
        "sample size. The same numbers, one row each, are in heads.csv and heads.parquet.</p>"
        '<p class="screen-only">A heading sorts; the boxes below it keep the heads with at least that value.</p>'
        f'<p class="print-only">Printed: the first {_PRINTED_ROWS} rows of the table as sorted and filtered.</p>'
        '<div id="heads-tools"><label>Search <input id="heads-search" type="search" '
        'placeholder="a3.h1, L3, L3H1, 3.1"></label><button type="button" id="heads-clear">Clear filters</button>'
        f'<span id="heads-count" role="status" aria-live="polite">{len(heads)} of {len(heads)} heads</span></div>'
        f'<div id="heads-box" tabindex="0" role="region" aria-label="Table of heads"><table id="heads-table">'
        f'<thead><tr>{buttons}</tr><tr id="heads-filters">{filters}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>\n"
    )


def _breakable(name: str) -> str:
    """A name that a narrow column may break after an underscore."""
    return escape(name).replace("_", "_<wbr>")


def _number_cell(row: dict[Any, Any] | None) -> str:
    if row is None or is_missing(row["value"]):
        return "<td>–</td>"
    hint = " ".join(
        word
        for word in (
            interval(row["ci_low"], row["ci_high"]),
            "" if is_missing(row["n"]) else f"n = {int(row['n'])}",
        )
        if word
    )
    title = f' title="{escape(hint)}"' if hint else ""
    return f'<td data-v="{float(row["value"])!r}"{title}>{number(row["value"])}</td>'
