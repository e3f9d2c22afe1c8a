"""The table of heads: one row a head, one column a number."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pandas as pd

if TYPE_CHECKING:
    from workbench.report.section import Section
    from workbench.tables import HeadTable

_QUALIFIERS = ("input", "position", "method")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table of heads.

    Attributes:
        label: heading, unique in the table.
        unit: unit of its numbers, "" if none.
        rows: the tidy rows behind it, indexed by (layer, head).
    """

    label: str
    unit: str
    rows: pd.DataFrame


def main_rows(section: Section) -> list[HeadTable]:
    """The tables of a section with the rows that it wants in the table of heads.

    Raises:
        DataError: if one of its selections fits no row.
    """
    if not section.main:
        return list(section.tables)
    tables = []
    for table in section.tables:
        kept = [index for where in section.main for index in table.select(**where).index]
        tables.append(replace(table, frame=table.frame[table.frame.index.isin(kept)]))
    return tables


def columns_of(table: HeadTable) -> tuple[Column, ...]:
    """Every number that the table has for single heads, as columns.

    A column is named after its metric; the input, the key position and the method are added where the metric
    comes in several of them, and the analysis where two analyses use one name.

    Args:
        table: tidy rows of any analyses; those without a head are left out.
    """
    frame = table.frame[table.frame["layer"].notna() & table.frame["head"].notna()]
    homes = frame.groupby("metric")["analysis"].nunique().to_dict()
    columns = []
    for (analysis, metric), rows in frame.groupby(["analysis", "metric"], sort=False):
        keys = rows[list(_QUALIFIERS)].astype(object).where(rows[list(_QUALIFIERS)].notna(), "")
        varying = [name for name in _QUALIFIERS if keys[name].nunique() > 1]
        groups = rows.groupby([keys[name] for name in varying], sort=False) if varying else [((), rows)]
        for key, some in groups:
            words = [f"{analysis}: {metric}" if homes[metric] > 1 else str(metric)]
            for name, value in zip(varying, key, strict=True):
                if value != "":
                    words.append(f"position {value}" if name == "position" else str(value))
            columns.append(
                Column(
                    label=", ".join(words),
                    unit=str(some["unit"].iloc[0]),
                    rows=some.drop_duplicates(["layer", "head"]).set_index(["layer", "head"]),
                )
            )
    return tuple(columns)


def heads_of(columns: tuple[Column, ...]) -> list[tuple[int, int]]:
    """Every (layer, head) that has a number, in order."""
    return sorted({(int(layer), int(head)) for column in columns for layer, head in column.rows.index})
