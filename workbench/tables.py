"""The one form that every result about heads has: tidy rows, one number a row, with where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd

from workbench._provenance import provenance
from workbench._table_checks import COLUMNS, KEY, check_rows, conform, is_whole
from workbench._table_exports import as_json, from_json, matrices, write_text
from workbench._table_files import read_table, write_table
from workbench.errors import DataError

__all__ = ["COLUMNS", "SCHEMA_VERSION", "HeadTable", "provenance"]

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class HeadTable:
    """Numbers about heads, layers or a whole model.

    Attributes:
        frame: tidy rows with exactly the columns of `COLUMNS`, in that order and in the dtypes of the schema:
            `layer`, `head`, `n` and `position` (of the key) are Int64, the numbers float64, the rest text. A missing
            `head` means a whole layer or an MLP, a missing `layer` too the whole model; a missing interval, that
            none is known.
        provenance: JSON values by name, as from `provenance`; `n_layers` and `n_heads` bound the rows.

    Raises:
        DataError: when made, if columns are missing or foreign, or hold what their dtype cannot.
    """

    frame: pd.DataFrame
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame", conform(self.frame))
        object.__setattr__(self, "provenance", dict(self.provenance))

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any] | None = None, **constant: Any
    ) -> Self:
        """A table of rows that leave out what they do not have.

        Args:
            rows: values by column. Left out, text is "" and numbers are missing.
            provenance: as for the class; its `path_taken` is that of the rows unless they say.
            constant: values by column that all rows share.
        """
        source = dict(provenance or {})
        blank = dict.fromkeys(("analysis", "metric", "unit", "input", "method"), "")
        blank["path_taken"] = str(source.get("path_taken", ""))
        filled = [{**blank, **constant, **row} for row in rows]
        foreign = {name for row in filled for name in row} - set(COLUMNS)
        if foreign:
            raise DataError(f"rows have columns the schema does not know: {', '.join(sorted(foreign))}")
        columns = {name: pd.Series([row.get(name) for row in filled], dtype=object) for name in COLUMNS}
        return cls(frame=pd.DataFrame(columns), provenance=source)

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        metrics = ", ".join(dict.fromkeys(self.frame["metric"]))
        return f"HeadTable({len(self.frame)} rows; {metrics or 'no metrics'})"

    def _repr_html_(self) -> str:
        return str(self.frame._repr_html_())  # type: ignore[operator]

    def validate(self) -> Self:
        """Check every row.

        Returns:
            The table itself.

        Raises:
            DataError: names the first row in which a value is not finite or lies outside its interval, an interval
                or standard error is impossible, `n` is below 1, a layer, head or position is out of range, a name is
                missing or `path_taken` unknown; or the first two rows with one key (all of `KEY`).
        """
        check_rows(self.frame, n_layers=self._extent("n_layers"), n_heads=self._extent("n_heads"))
        return self

    def save(self, folder: str | Path) -> Path:
        """Write `table.csv`, `table.parquet` and `provenance.json`: all three, or nothing.

        The CSV holds the shortest decimals that read back as the same numbers.

        Args:
            folder: made if it is not there; an earlier table in it is replaced.

        Returns:
            The folder's absolute path.

        Raises:
            DataError: if the table is not valid.
            OutputError: if the folder cannot be written or the disk is full.
        """
        path = Path(folder).expanduser().absolute()
        write_table(path, self.validate().frame, self.provenance, schema_version=SCHEMA_VERSION)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read back what `save` wrote.

        Raises:
            DataError: if it is not there, damaged, of another schema version, or not valid.
        """
        path = Path(folder).expanduser().absolute()
        frame, source = read_table(path, schema_version=SCHEMA_VERSION)
        try:
            return cls(frame=frame, provenance=source).validate()
        except DataError as error:
            raise DataError(f"{path} does not hold a valid table: {error}") from error

    def to_json(self, path: str | Path) -> Path:
        """Write rows and provenance as one JSON file with a `schema_version`, column by column.

        Returns:
            The file's absolute path.

        Raises:
            DataError: if the table is not valid.
            OutputError: if the file cannot be written.
        """
        target = Path(path).expanduser().absolute()
        text = as_json(self.validate().frame, self.provenance, schema_version=SCHEMA_VERSION)
        return write_text(target, text)

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read back what `to_json` wrote.

        Raises:
            DataError: if it is not there, damaged, of another schema version, or not valid.
        """
        source = Path(path).expanduser().absolute()
        try:
            text = source.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {source}: {error}; give a file that HeadTable.to_json wrote") from error
        frame, record = from_json(text, str(source), schema_version=SCHEMA_VERSION)
        return cls(frame=frame, provenance=record).validate()

    def to_tsv(self, folder: str | Path) -> list[Path]:
        """Write every number of single heads as a layer by head matrix, one tab-separated file each.

        Returns:
            The files, such as `attention_sinks.alpha.natural.tsv`.

        Raises:
            DataError: if the table is not valid.
            OutputError: if the folder cannot be written.
        """
        home = Path(folder).expanduser().absolute()
        return [write_text(home / name, text) for name, text in matrices(self.validate()).items()]

    @classmethod
    def concat(cls, tables: Sequence[HeadTable]) -> Self:
        """All rows of several tables of one model.

        The provenance keeps what all agree on; the rest stands under `parts`, by table.

        Raises:
            DataError: if there are no tables, or they are of different models.
        """
        if not tables:
            raise DataError("tables is empty: give at least one table to concatenate")
        hashes = {str(_model(table)["hash"]): _model(table).get("name") for table in tables if "hash" in _model(table)}
        if len(hashes) > 1:
            raise DataError(
                f"the tables are of different models ({', '.join(f'{n} {h[:8]}' for h, n in hashes.items())}): "
                "rows do not name their model, so keep a table for each"
            )
        frame = pd.concat([table.frame for table in tables], ignore_index=True)
        return cls(frame=frame, provenance=_merge(tables))

    def select(self, metric: str | None = None, **where: Any) -> pd.DataFrame:
        """Rows by column.

        Args:
            metric: only this metric.
            where: only rows with this value in that column; None selects missing ones, a list admits several values.

        Raises:
            DataError: if a column does not exist or nothing is left; the message says what there is.
        """
        frame = self.frame
        for column, wanted in {**({} if metric is None else {"metric": metric}), **where}.items():
            if column not in COLUMNS:
                raise DataError(f"cannot select by {column!r}: the columns are {', '.join(COLUMNS)}")
            values = list(wanted) if isinstance(wanted, (list, tuple, set, frozenset)) else [wanted]
            named = [value for value in values if not pd.isna(value)]
            kept = frame[column].isin(named)
            if len(named) < len(values):
                kept |= frame[column].isna()
            if not kept.any():
                there = ", ".join(map(repr, frame[column].drop_duplicates().tolist()))
                raise DataError(f"no row has {column} = {wanted!r}; there are {there or 'no rows'}")
            frame = frame[kept]
        return frame

    def top(self, metric: str, k: int = 10, **where: Any) -> pd.DataFrame:
        """The `k` heads of largest value, largest first; of largest absolute value if any is negative.

        Args:
            metric: the metric.
            k: how many heads; fewer come back if there are fewer.
            where: as for `select`.

        Returns:
            Rows of the table. Ties stand by layer, then head.

        Raises:
            DataError: if no head has the metric, one has it twice, or `k` is below 1.
        """
        if k < 1:
            raise DataError(f"k is {k}: ask for at least one head")
        frame = self._heads(metric, where)
        size = frame["value"].abs() if (frame["value"] < 0).any() else frame["value"]
        order = np.lexsort((frame["head"].to_numpy(int), frame["layer"].to_numpy(int), -size.to_numpy()))
        return frame.iloc[order[:k]].reset_index(drop=True)

    def matrix(self, metric: str, **where: Any) -> np.ndarray:
        """The values of one metric by layer and head.

        Args:
            metric: the metric.
            where: as for `select`.

        Returns:
            float64 `[n_layers, n_heads]`, with the shape of the model where the provenance has it and that of the
            rows where not; NaN for heads without a row.

        Raises:
            DataError: if no head has the metric, or one has it twice: select further.
        """
        frame = self._heads(metric, where)
        layers, heads = frame["layer"].to_numpy(int), frame["head"].to_numpy(int)
        shape = (self._extent("n_layers") or layers.max() + 1, self._extent("n_heads") or heads.max() + 1)
        if min(layers.min(), heads.min()) < 0 or layers.max() >= shape[0] or heads.max() >= shape[1]:
            raise DataError(f"metric {metric!r} has rows outside the {shape[0]} x {shape[1]} heads of the model")
        values = np.full(shape, np.nan)
        values[layers, heads] = frame["value"].to_numpy()
        return values

    def plot(self, **options: Any) -> Any:
        """A plotly figure of the table; see `workbench.plots.plot` for the options."""
        from workbench.plots import plot

        return plot(self, **options)

    def _heads(self, metric: str, where: Mapping[str, Any]) -> pd.DataFrame:
        frame = self.select(metric, **where)
        frame = frame[frame["layer"].notna() & frame["head"].notna()]
        if frame.empty:
            raise DataError(f"metric {metric!r} has no row of a single head here: it is of whole layers or the model")
        twice = frame.duplicated(["layer", "head"])
        if twice.any():
            layer, head = frame.loc[twice, ["layer", "head"]].iloc[0]
            varying = [name for name in KEY if name not in ("layer", "head") and frame[name].nunique(dropna=False) > 1]
            choices = "; ".join(f"{name}: {frame[name].drop_duplicates().tolist()}" for name in varying)
            raise DataError(
                f"metric {metric!r} has several values for layer {layer}, head {head}: "
                f"select one by column ({choices or 'the rows are duplicates'})"
            )
        return frame

    def _extent(self, name: str) -> int | None:
        value: Any = self.provenance.get(name)
        return int(value) if is_whole(value) else None


def _model(table: HeadTable) -> Mapping[str, Any]:
    model = table.provenance.get("model")
    return model if isinstance(model, Mapping) else {}


def _merge(tables: Sequence[HeadTable]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for table in tables:
        whole = dict(table.provenance)
        inner = whole.pop("parts", None) or [{"analyses": list(dict.fromkeys(table.frame["analysis"]))}]
        parts += [{**whole, **part} for part in inner]
    first = parts[0]
    shared = {
        name: value for name, value in first.items() if all(name in part and part[name] == value for part in parts)
    }
    if len(parts) == 1:
        return {name: value for name, value in shared.items() if name != "analyses"}
    apart = [{name: value for name, value in part.items() if name not in shared} for part in parts]
    return {**shared, "parts": apart} if any(apart) else shared
