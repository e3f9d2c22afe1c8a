"""Two runs beside each other: every number that both have, its difference, and whether that is more than noise."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench._table_checks import KEY
from workbench.errors import DataError
from workbench.tables import HeadTable

if TYPE_CHECKING:
    from jaxtyping import Float

GROUP = ("analysis", "metric", "input", "position", "method", "unit")
"""Rows that agree in these are one number over heads."""

LEVEL = 0.05
"""Share of false discoveries admitted among the differences that are called real."""

TOP = 10
"""How many of the strongest heads of either run the overlap is counted over."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two runs, A and B.

    Attributes:
        rows: one row a number that both have: the columns of `KEY`, `unit`, `value_a`, `value_b`, `difference` (B minus
            A), `stderr`, `ci_low`, `ci_high`, `p`, `q`.
        summary: one row a number over heads: how many heads, their correlations, overlap and differences.
        notes: in what the two runs differ besides the numbers, and what that means for the intervals.
        names: what A and B are called.
        shapes: layers and heads of A and of B; single heads are compared only if they agree.
        provenance: of A and B, under these names.
    """

    rows: pd.DataFrame
    summary: pd.DataFrame
    notes: tuple[str, ...]
    names: tuple[str, str]
    shapes: tuple[tuple[int | None, int | None], tuple[int | None, int | None]]
    provenance: Mapping[str, Any]

    def differences(self) -> HeadTable:
        """The differences as a table of heads; its metrics keep their names."""
        frame = self.rows.assign(value=self.rows["difference"], n=self.rows["n_a"])
        columns = [*KEY, "value", "stderr", "ci_low", "ci_high", "n", "unit", "path_taken"]
        layers, heads = self.shapes[0]
        record = {"compared": dict(self.provenance), "n_layers": layers, "n_heads": heads}
        return HeadTable(frame=frame[columns], provenance={k: v for k, v in record.items() if v is not None})


def load_run(path: str | Path) -> HeadTable:
    """The table of a run: a report's folder, a folder that `HeadTable.save` wrote, or a file of `HeadTable.to_json`.

    Raises:
        DataError: if there is none of these, or it is damaged or unfinished.
    """
    place = Path(path).expanduser().absolute()
    if place.is_file():
        return HeadTable.from_json(place)
    if (place / "provenance.json").exists():
        return HeadTable.load(place)
    manifest = place / "manifest.json"
    if not manifest.exists():
        raise DataError(
            f"{place} holds no run: give a folder that `workbench report` or `workbench analyze` wrote, or a heads.json"
        )
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        status, files = record["status"], {each["path"]: each for each in record.get("files", [])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{manifest} cannot be read ({error}): make the report again") from error
    if status not in ("complete", "incomplete"):
        raise DataError(
            f"the report in {place} is {status!r}, not finished: run `workbench report --out {place}` again"
        )
    data = place / "heads.json"
    if "heads.json" in files and data.exists():
        found = hashlib.sha256(data.read_bytes()).hexdigest()
        if found != files["heads.json"].get("sha256"):
            raise DataError(
                f"{data} has sha256 {found} and the manifest says {files['heads.json'].get('sha256')}: "
                "it was changed or cut short; make the report again"
            )
    return HeadTable.from_json(data)


def compare_runs(a: HeadTable, b: HeadTable, *, names: tuple[str, str] = ("A", "B")) -> Comparison:
    """Set two runs beside each other.

    The standard error of a difference is that of independent samples, the root of the sum of squares, and its interval
    is Welch's. Where both runs saw the same inputs their numbers go together, so the intervals are then wider than they
    need to be. `q` is the p value after Benjamini and Hochberg, over the heads of one number.

    Args:
        a: the first run.
        b: the second.
        names: what to call them.

    Raises:
        DataError: if they have no number in common.
    """
    shapes = (_shape(a), _shape(b))
    same_shape = shapes[0] == shapes[1]
    left, right = (table.frame if same_shape else table.frame[table.frame["layer"].isna()] for table in (a, b))
    both = left.merge(right, on=[*KEY, "unit"], suffixes=("_a", "_b"), validate="one_to_one")
    if both.empty:
        why = ": the models are of {} and {}, so no head of one is a head of the other".format(*map(_words, shapes))
        raise DataError(f"{names[0]} and {names[1]} have no number in common{'' if same_shape else why}")
    rows = _differences(both)
    summary = pd.DataFrame([_summary(group, a, b) for group in _groups(rows)])
    return Comparison(
        rows=rows,
        summary=summary,
        notes=tuple(_notes(a, b, names, shapes, len(left) - len(both), len(right) - len(both))),
        names=names,
        shapes=shapes,
        provenance={names[0]: dict(a.provenance), names[1]: dict(b.provenance)},
    )


def _differences(both: pd.DataFrame) -> pd.DataFrame:
    from scipy import stats

    value_a, value_b = both["value_a"].to_numpy(float), both["value_b"].to_numpy(float)
    error_a, error_b = both["stderr_a"].to_numpy(float), both["stderr_b"].to_numpy(float)
    n_a, n_b = (both[name].to_numpy(float, na_value=np.nan) for name in ("n_a", "n_b"))
    difference, variance = value_b - value_a, error_a**2 + error_b**2
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = error_a**4 / (n_a - 1) + error_b**4 / (n_b - 1)
        degrees = np.where(parts > 0, variance**2 / parts, np.nan)
        stderr = np.sqrt(variance)
        reach = stats.t.ppf(0.975, degrees) * stderr
        p = 2 * stats.t.sf(np.abs(difference) / stderr, degrees)
    rows = both[[*KEY, "unit", "value_a", "value_b", "n_a", "n_b"]].copy()
    rows["difference"], rows["stderr"] = difference, stderr
    rows["ci_low"], rows["ci_high"], rows["p"] = difference - reach, difference + reach, p
    rows["path_taken"] = np.where(both["path_taken_a"] == both["path_taken_b"], both["path_taken_a"], "hooks")
    rows["q"] = np.nan
    for group in _groups(rows):
        known = group.index[group["p"].notna()]
        if len(known):
            rows.loc[known, "q"] = stats.false_discovery_control(group.loc[known, "p"].to_numpy(float))
    return rows


def _groups(rows: pd.DataFrame) -> Iterator[pd.DataFrame]:
    keys = [rows[name].astype(object).where(rows[name].notna(), "") for name in GROUP]
    keys += [rows["layer"].notna(), rows["head"].notna()]
    for _, group in rows.groupby(keys, sort=False):
        yield group


def _summary(group: pd.DataFrame, a: HeadTable, b: HeadTable) -> dict[str, Any]:
    first = group.iloc[0]
    value_a, value_b = group["value_a"].to_numpy(float), group["value_b"].to_numpy(float)
    gap = np.abs(value_b - value_a)
    where = group.iloc[int(gap.argmax())]
    level = "head" if pd.notna(first["head"]) else "layer" if pd.notna(first["layer"]) else "model"
    return {
        **{name: first[name] for name in GROUP},
        "level": level,
        "n": len(group),
        "mean_a": value_a.mean(),
        "mean_b": value_b.mean(),
        "pearson": _correlation(value_a, value_b),
        "spearman": _correlation(_ranks(value_a), _ranks(value_b)),
        "mean_abs_difference": gap.mean(),
        "largest_difference": float(where["difference"]),
        "largest_layer": where["layer"],
        "largest_head": where["head"],
        "top_overlap": _overlap(value_a, value_b) if level == "head" else None,
        "n_tested": int(group["q"].notna().sum()),
        "n_different": int((group["q"] < LEVEL).sum()),
    }


def _ranks(values: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    return pd.Series(values).rank().to_numpy()


def _correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float | None:
    if len(a) < 3 or not a.std() or not b.std():
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _overlap(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float | None:
    """Share of the `TOP` largest (by size, if any is negative) of one among those of the other; None if ties decide."""
    if len(a) < 2 * TOP:
        return None
    signed = bool((a < 0).any() or (b < 0).any())
    best = []
    for values in (a, b):
        size = np.abs(values) if signed else values
        order = np.argsort(-size, kind="stable")
        if size[order[TOP - 1]] == size[order[TOP]]:
            return None
        best.append(set(order[:TOP].tolist()))
    return len(best[0] & best[1]) / TOP


def _notes(
    a: HeadTable,
    b: HeadTable,
    names: tuple[str, str],
    shapes: Sequence[tuple[int | None, int | None]],
    only_a: int,
    only_b: int,
) -> Iterator[str]:
    model_a, model_b = (_model(table) for table in (a, b))
    if model_a.get("hash") and model_a.get("hash") == model_b.get("hash"):
        yield f"Both runs are of the same weights ({model_a.get('name')})."
    else:
        yield f"The weights differ: {names[0]} is {model_a.get('name')}, {names[1]} is {model_b.get('name')}."
    if shapes[0] != shapes[1]:
        yield (
            f"{names[0]} has {_words(shapes[0])} and {names[1]} {_words(shapes[1])}: no head of one is a head of the "
            "other, so only numbers of the whole models are compared."
        )
    data = [_data(table) for table in (a, b)]
    if data[0] and data[0] == data[1]:
        yield (
            "Both runs saw the same inputs, so their numbers rise and fall together: the intervals, which take the "
            "samples as independent, are wider than they need to be."
        )
    else:
        yield "The inputs differ or are not recorded as the same: part of a difference may be theirs."
    for name in ("seed", "versions", "device", "dtype", "prepends_bos", "tokenizer"):
        one, other = _value(a, name), _value(b, name)
        if one != other:
            yield f"{name} differs: {_short(one, other)} in {names[0]}, {_short(other, one)} in {names[1]}."
    if only_a or only_b:
        yield f"{only_a} numbers are in {names[0]} alone, {only_b} in {names[1]} alone."


def _short(value: Any, other: Any) -> str:
    """A value as text; of two mappings only what differs."""
    if isinstance(value, Mapping) and isinstance(other, Mapping):
        return ", ".join(f"{name} {each}" for name, each in value.items() if other.get(name) != each) or "nothing more"
    return "none" if value is None else str(value)


def _data(table: HeadTable) -> set[str]:
    """Hashes of all inputs of a table, those of its parts too."""
    sources = [table.provenance, *table.provenance.get("parts", [])]
    return {str(source["data_hash"]) for source in sources if source.get("data_hash")}


def _value(table: HeadTable, name: str) -> Any:
    source = table.provenance
    return source[name] if name in source else _model(table).get(name)


def _model(table: HeadTable) -> Mapping[str, Any]:
    model = table.provenance.get("model")
    return model if isinstance(model, Mapping) else {}


def _shape(table: HeadTable) -> tuple[int | None, int | None]:
    layers, heads = table.provenance.get("n_layers"), table.provenance.get("n_heads")
    return (None if layers is None else int(layers), None if heads is None else int(heads))


def _words(shape: tuple[int | None, int | None]) -> str:
    return f"{shape[0] or 'unknown'} layers x {shape[1] or 'unknown'} heads"
