"""The page: everything in one file, nothing from the network, every text escaped."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.plots.labels import is_missing, number
from workbench.report.heads import Column
from workbench.report.heads_html import heads_table
from workbench.report.run import Outcome
from workbench.report.section import Section

_ASSETS = Path(__file__).parent / "assets"
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page says.

    Attributes:
        title: heading, plain text.
        byline: size of the model and the like, plain text.
        created: date and time in ISO 8601; the only thing that differs between two pages of the same results.
        outcomes: the sections, in reading order.
        columns: columns of the table of heads.
        provenance: where the numbers come from; nested values are allowed.
        files: names of the files beside the page.
    """

    title: str
    byline: str
    created: str
    outcomes: Sequence[Outcome]
    columns: tuple[Column, ...]
    provenance: Mapping[str, Any]
    files: Sequence[str]

    def render(self) -> str:
        """The HTML of the page."""
        from plotly.offline import get_plotlyjs

        style = (_ASSETS / "report.css").read_text(encoding="utf-8")
        script = (_ASSETS / "report.js").read_text(encoding="utf-8")
        entries = [
            (f"section-{each.name}", each.section.title if each.section else each.name) for each in self.outcomes
        ]
        if self.columns:
            entries.append(("heads", "All heads"))
        entries += [("reading", "Reading this report"), ("provenance", "Provenance")]
        links = "".join(f'<li><a href="#{escape(anchor)}">{escape(text)}</a></li>' for anchor, text in entries)
        parts = [
            _findings(self.outcomes),
            *(_section(outcome) for outcome in self.outcomes),
            heads_table(self.columns),
            _reading(self.files),
            _provenance(self.provenance),
        ]
        day = self.created[:16].replace("T", " ")
        header = (
            f'<header><h1>{escape(self.title)}</h1><p class="byline">{escape(self.byline)} · '
            f'<time datetime="{escape(self.created)}">{escape(day)} UTC</time></p></header>'
        )
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(self.title)}</title>\n<style>\n{style}</style>\n"
            f"<script>{get_plotlyjs()}</script>\n</head>\n<body>\n"
            f'<div class="page">\n{header}\n<nav aria-label="Contents"><h2>Contents</h2><ol>{links}</ol></nav>\n'
            f"<main>\n{''.join(parts)}</main>\n</div>\n<script>\n{script}</script>\n</body>\n</html>\n"
        )


def _findings(outcomes: Iterable[Outcome]) -> str:
    items = []
    for outcome in outcomes:
        text = outcome.section.sentence if outcome.section else f"failed: {outcome.error}"
        title = outcome.section.title if outcome.section else outcome.name
        items.append(f'<li><a href="#section-{escape(outcome.name)}"><b>{escape(title)}</b></a>: {_prose(text)}</li>')
    return (
        '<section class="findings" aria-label="Key findings"><h2>Key findings</h2>'
        f"<ul>{''.join(items)}</ul></section>\n"
    )


def _prose(text: str) -> str:
    """Escaped text in which no line breaks within an interval or before a per cent sign."""
    unbroken = re.sub(r"\[[^][]{1,40}\]", lambda found: found[0].replace(" ", "\u00a0"), text)
    return escape(re.sub(r"(?<=\d) %", "\u00a0%", unbroken))


def _section(outcome: Outcome) -> str:
    anchor = f"section-{escape(outcome.name)}"
    if outcome.section is None:
        return (
            f'<section id="{anchor}" class="failed"><h2>{escape(outcome.name)}</h2>'
            f'<div class="error" role="alert"><b>This section failed.</b> {escape(outcome.error or "")}<br>'
            "The others are not affected; the traceback is in manifest.json.</div></section>\n"
        )
    section = outcome.section
    warnings = "".join(f"<li>{escape(text)}</li>" for text in section.warnings)
    body = [f'<section id="{anchor}"><h2>{escape(section.title)}</h2>']
    if warnings:
        body.append(f'<div class="warnings" role="note"><ul>{warnings}</ul></div>')
    body.append(f'<p class="finding">{_prose(section.sentence)}</p>')
    body += [_figure(section, place) for place in range(len(section.figures))]
    body += [_small_table(frame) for frame in section.html_tables]
    body.append(
        f'<div class="notes"><div><h3>Method</h3><p>{escape(section.method)}</p></div>'
        f"<div><h3>Limits</h3><p>{escape(section.limits)}</p></div></div></section>\n"
    )
    return "".join(body)


def _figure(section: Section, place: int) -> str:
    import plotly.io

    name = f"figure-{escape(section.name)}-{place + 1}"
    label = escape(f"{section.title}, figure {place + 1} of {len(section.figures)}")
    figure = plotly.io.to_json(section.figures[place], validate=False)
    height = section.figures[place].layout.height or 450
    return (
        f'<figure><div class="plot" id="{name}" role="img" aria-label="{label}" style="min-height:{int(height)}px">'
        "</div><noscript>This figure needs JavaScript; its numbers are in heads.csv.</noscript>"
        f'<script type="application/json" data-figure="{name}">{_in_script(figure)}</script></figure>\n'
    )


def _in_script(text: str) -> str:
    """JSON as it may stand in a script element: nothing in it can end the element or open a comment."""
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _small_table(frame: pd.DataFrame) -> str:
    numeric = [pd.api.types.is_numeric_dtype(frame[column]) for column in frame.columns]
    head = "".join(
        f"<th{_right(right)}>{escape(str(column))}</th>" for column, right in zip(frame.columns, numeric, strict=True)
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_right(right)}>{_prose(_cell(value))}</td>" for value, right in zip(row, numeric, strict=True))
        + "</tr>"
        for row in frame.itertuples(index=False, name=None)
    )
    caption = frame.attrs.get("caption")
    label = f"<caption>{escape(str(caption))}</caption>" if caption else ""
    return (
        f'<div class="wide"><table class="small">{label}<thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>\n"
    )


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple, dict)):
        return str(value)
    if is_missing(value):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, float) else str(value)


def _reading(files: Sequence[str]) -> str:
    links = ", ".join(f'<a href="{escape(name)}">{escape(name)}</a>' for name in files)
    return (
        '<section id="reading"><h2>Reading this report</h2>'
        "<p><code>a3.h1</code> is head 1 of layer 3; layers, heads and positions are counted from 0. "
        "Square brackets hold 95 % confidence intervals: over the sampled inputs, not over models. "
        "Many heads are looked at, so some of them are large by chance: an interval speaks of one head, "
        "not of the largest of all.</p>"
        f"<p>Beside this page: {links}.</p></section>\n"
    )


def _provenance(provenance: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(_plain(value))}</td></tr>'
        for name, value in _flat(provenance)
        if name != "created"
    )
    return (
        '<section id="provenance"><h2>Provenance</h2><div class="wide"><table class="small"><tbody>'
        f"{rows}</tbody></table></div></section>\n"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Names and values, those of nested mappings one by one, as `model: name`."""
    for name, value in values.items():
        if isinstance(value, Mapping) and not prefix and name != "versions":
            yield from _flat(value, f"{name}: ")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(each)}" for key, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_plain(each) for each in value)
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, default=str)
