"""What a report section is given and what it hands back.

A section is a function of one `ReportContext` that returns one `Section`. Any installed package may supply
some, by an entry point of the group `workbench.report_sections` that names the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench.tables import HeadTable


def _silent(message: str) -> None:
    """Take a progress message and keep it."""


@dataclass(frozen=True, kw_only=True)
class ReportContext:
    """What every section is given.

    Attributes:
        model: the model the report is about.
        seed: seed of everything that is drawn at random.
        quick: ask for smaller samples; the section says in `method` how many it took.
        progress: called with one short line when something has been done.
    """

    model: Model
    seed: int = 0
    quick: bool = False
    progress: Callable[[str], None] = _silent


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of the report. Texts are plain text: the report escapes them.

    Attributes:
        name: identifier, the same as that of the entry point; used for file names and anchors.
        title: heading.
        order: sections are sorted by it, then by name.
        sentence: what the data show, computed from them; also the key finding at the top of the report.
            A line break in it begins a new line.
        method: how the numbers came about: inputs, sample sizes, formula, source.
        limits: what the numbers do not show.
        figures: plotly figures, in the order in which they are shown.
        tables: the tidy results; they go into `heads.csv` and `heads.parquet`.
        html_tables: small tables to be printed; a caption is read from `frame.attrs["caption"]`.
        warnings: what the reader has to know before trusting the numbers.
        main: which rows of `tables` the table of heads shows as columns: selections as for `HeadTable.select`, of
            which a row must fit one; empty shows all. The files always hold all rows.
    """

    name: str
    title: str
    order: int
    sentence: str
    method: str
    limits: str
    figures: tuple[Any, ...] = ()
    tables: tuple[HeadTable, ...] = ()
    html_tables: tuple[pd.DataFrame, ...] = ()
    warnings: tuple[str, ...] = ()
    main: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for attribute in ("name", "title", "sentence", "method", "limits"):
            if not str(getattr(self, attribute)).strip():
                raise DataError(f"report section {self.name!r} has an empty {attribute}: each states one")
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise DataError(f"report section name {self.name!r} must consist of letters, digits, '_' and '-'")
