"""The page and the files of a comparison of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.plots.heatmap import head_heatmap
from workbench.plots.labels import head_name, interval, is_missing, number, percent
from workbench.plots.ranking import metric_scatter
from workbench.report.compare import GROUP, LEVEL, TOP, Comparison
from workbench.report.heads import columns_of
from workbench.report.html import Page
from workbench.report.output import prepare, write_atomic
from workbench.report.run import Outcome
from workbench.report.section import Section
from workbench.tables import HeadTable

PANELS = 6
"""Numbers whose differences are drawn for each analysis; the files hold all."""

_LARGEST = 8


def write_comparison(comparison: Comparison, out: str | Path, a: HeadTable, b: HeadTable) -> Path:
    """Write `index.html`, `comparison.csv`, `comparison.parquet`, `summary.csv` and `differences.json`.

    Args:
        comparison: what `compare_runs` found.
        out: the folder.
        a: the first run.
        b: the second.

    Returns:
        The folder's absolute path.

    Raises:
        OutputError: if it cannot be written.
    """
    folder = prepare(out)
    sections = [_overview(comparison), *_analyses(comparison, a, b)]
    shown = [section.tables[0] for section in sections if section.tables]
    first, second = comparison.names
    page = Page(
        title=f"{first} and {second}",
        byline="the same numbers of two runs; a difference is the second minus the first",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        outcomes=[Outcome(name=section.name, section=section, seconds=0.0) for section in sections],
        columns=columns_of(HeadTable.concat(shown)) if shown else (),
        provenance=comparison.provenance,
        files=("comparison.csv", "comparison.parquet", "summary.csv", "differences.json"),
    )
    write_atomic(folder / "comparison.csv", comparison.rows.to_csv(index=False))
    write_atomic(folder / "comparison.parquet", comparison.rows.to_parquet(index=False))
    write_atomic(folder / "summary.csv", comparison.summary.to_csv(index=False))
    comparison.differences().to_json(folder / "differences.json")
    write_atomic(folder / "index.html", page.render())
    return folder


def summary_table(comparison: Comparison) -> pd.DataFrame:
    """Numbers of heads and layers as people read them, one row a number."""
    first, second = comparison.names
    rows = []
    for record in comparison.summary.to_dict("records"):
        if record["level"] == "model":
            continue
        rows.append(
            {
                "number": label(record),
                "of": f"{record['n']} {record['level']}s",
                f"mean, {first}": number(record["mean_a"]),
                f"mean, {second}": number(record["mean_b"]),
                "Pearson r": number(record["pearson"]),
                "Spearman r": number(record["spearman"]),
                "mean |difference|": number(record["mean_abs_difference"]),
                "largest": f"{_place(record)} {_signed(record['largest_difference'])}".strip(),
                f"top {TOP} shared": "–" if is_missing(record["top_overlap"]) else percent(record["top_overlap"]),
                "differ": f"{record['n_different']} of {record['n_tested']}" if record["n_tested"] else "–",
            }
        )
    frame = pd.DataFrame(rows)
    frame.attrs["caption"] = f"Numbers of heads and layers; 'differ' counts those with q < {LEVEL:g}"
    return frame


def model_table(comparison: Comparison) -> pd.DataFrame:
    """Numbers of the whole model, with the interval of their difference."""
    first, second = comparison.names
    whole = comparison.rows[comparison.rows["layer"].isna()]
    frame = pd.DataFrame(
        [
            {
                "number": label(row),
                first: number(row["value_a"]),
                second: number(row["value_b"]),
                "difference": f"{_signed(row['difference'])} {interval(row['ci_low'], row['ci_high'])}".strip(),
                "p": number(row["p"]),
            }
            for row in whole.to_dict("records")
        ]
    )
    frame.attrs["caption"] = "Numbers of the whole model, with 95 % CI of the difference"
    return frame


def label(record: Mapping[Any, Any]) -> str:
    """What sets one number over heads apart, in words."""
    words = [str(record["metric"]), str(record["input"])]
    if not is_missing(record["position"]):
        words.append(f"position {int(record['position'])}")
    return " · ".join(word for word in words if word)


def sentence(comparison: Comparison) -> str:
    """How far the runs agree, and where they differ most."""
    summary = comparison.summary
    tested, different = int(summary["n_tested"].sum()), int(summary["n_different"].sum())
    lines = [
        f"{len(comparison.rows)} numbers are in both runs; {different} of {tested} with a known error differ by more "
        f"than noise (q < {LEVEL:g})."
    ]
    heads = summary[(summary["level"] == "head") & summary["pearson"].notna()]
    if not heads.empty:
        worst = heads.sort_values("pearson").iloc[0]
        lines.append(
            f"Over heads the median correlation is {number(heads['pearson'].median())}; it is lowest for "
            f"{label(worst.to_dict())}, {number(worst['pearson'])}."
        )
    return "\n".join(lines)


def _overview(comparison: Comparison) -> Section:
    return Section(
        name="overview",
        title="Overview",
        order=0,
        sentence=sentence(comparison),
        method=(
            "Rows of the two runs are matched by analysis, layer, head, metric, input, key position and method. The "
            "standard error of a difference is the root of the sum of the squared errors, its 95 % interval is Welch's "
            "(1947); q is the p value after Benjamini and Hochberg (1995) over the heads of one number. The overlap is "
            f"the share of the {TOP} strongest heads of one run that are among those of the other."
        ),
        limits=(
            "The error is that over inputs and takes the two samples as independent: runs on the same inputs are "
            "compared too cautiously, and nothing here is about other seeds of training or other texts."
        ),
        html_tables=tuple(each for each in (summary_table(comparison), model_table(comparison)) if len(each)),
        warnings=comparison.notes,
    )


def _analyses(comparison: Comparison, a: HeadTable, b: HeadTable) -> list[Section]:
    """One section an analysis with numbers of single heads."""
    differences = comparison.differences()
    summary = comparison.summary
    sections = []
    for place, (analysis, numbers) in enumerate(summary[summary["level"] == "head"].groupby("analysis", sort=False)):
        order = numbers.assign(apart=1 - numbers["pearson"].astype(float)).sort_values(
            ["apart", "mean_abs_difference"], ascending=False, na_position="last", kind="stable"
        )
        picked = order.to_dict("records")[:PANELS]
        kept = pd.concat([_rows_of(differences.frame, record) for record in picked])
        table = HeadTable(frame=kept, provenance=differences.provenance)
        sections.append(
            Section(
                name=str(analysis),
                title=str(analysis).replace("_", " ").capitalize(),
                order=place + 1,
                sentence=_most(comparison, picked[0]),
                method=f"The {len(picked)} of {len(numbers)} numbers that agree least over heads; the files hold all.",
                limits="A colour scale is shared by numbers of one unit, so a small difference may look like none.",
                figures=(
                    head_heatmap(table, signed=True, title=f"{comparison.names[1]} minus {comparison.names[0]}"),
                    _scatter(comparison, picked[0], a, b),
                ),
                tables=(table,),
                html_tables=(_largest(comparison, picked),),
            )
        )
    return sections


def _rows_of(frame: pd.DataFrame, record: Mapping[Any, Any]) -> pd.DataFrame:
    kept = frame["head"].notna()
    for name in GROUP:
        kept &= frame[name].isna() if is_missing(record[name]) else frame[name] == record[name]
    return frame[kept]


def _scatter(comparison: Comparison, record: Mapping[Any, Any], a: HeadTable, b: HeadTable) -> Any:
    """The number that agrees least, one run against the other."""
    frames = [
        _rows_of(table.frame, record).assign(input=f"run {side}") for side, table in zip("AB", (a, b), strict=True)
    ]
    both = HeadTable(frame=pd.concat(frames), provenance=comparison.differences().provenance)
    metric = str(record["metric"])
    figure = metric_scatter(
        both,
        metric,
        metric,
        x_where={"input": "run A"},
        y_where={"input": "run B"},
        title=f"{label(record)}: one point a head",
    )
    values = [*figure.data[0].x, *figure.data[0].y]
    low, high = min(values), max(values)
    figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line={"width": 1, "dash": "dot"}, layer="below")
    figure.update_xaxes(title=escape(comparison.names[0]))
    figure.update_yaxes(title=escape(comparison.names[1]))
    return figure


def _most(comparison: Comparison, record: Mapping[Any, Any]) -> str:
    return (
        f"{label(record)} agrees least: {record['n_different']} of {record['n_tested']} heads differ by more than "
        f"noise, {number(record['mean_abs_difference'])} on average, {_place(record)} by "
        f"{_signed(record['largest_difference'])}."
    )


def _largest(comparison: Comparison, picked: list[dict[Any, Any]]) -> pd.DataFrame:
    rows = pd.concat([_rows_of(comparison.rows, record) for record in picked])
    rows = rows.assign(size=rows["difference"].abs() / rows["stderr"].where(rows["stderr"] > 0))
    rows = rows.sort_values(["q", "size"], ascending=[True, False]).head(_LARGEST)
    frame = pd.DataFrame(
        [
            {
                "head": head_name(row["layer"], row["head"]),
                "number": label(row),
                comparison.names[0]: number(row["value_a"]),
                comparison.names[1]: number(row["value_b"]),
                "difference": f"{_signed(row['difference'])} {interval(row['ci_low'], row['ci_high'])}".strip(),
                "q": number(row["q"]),
            }
            for row in rows.to_dict("records")
        ]
    )
    frame.attrs["caption"] = "The surest differences"
    return frame


def _place(record: Mapping[Any, Any]) -> str:
    if not is_missing(record["largest_head"]):
        return head_name(record["largest_layer"], record["largest_head"])
    return "" if is_missing(record["largest_layer"]) else f"layer {int(record['largest_layer'])}"


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else ''}{number(value)}"
