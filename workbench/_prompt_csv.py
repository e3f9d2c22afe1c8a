"""Prompt pairs in a CSV file."""

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import DataError, PromptError


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """The columns of a CSV file of prompt pairs; answers are ids or words."""

    clean: list[str]
    corrupted: list[str]
    correct: list[list[Any]]
    incorrect: list[list[Any]]
    as_ids: bool
    templates: list[str] | None


def read_csv(path: Path) -> PairTable:
    """Read the columns that `PromptPairs.from_csv` describes.

    Raises:
        DataError: if the file cannot be read as UTF-8 text.
        PromptError: if columns or cells are missing or wrong.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows = [(reader.line_num, row) for row in reader]
            header = list(reader.fieldnames or [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a CSV file ({error}): give a UTF-8 file with a header") from error
    as_ids = {"correct_idx", "incorrect_idx"} <= set(header)
    needed = ["clean", "corrupted", *(("correct_idx", "incorrect_idx") if as_ids else ("correct", "incorrect"))]
    if missing := [name for name in needed if name not in header]:
        raise PromptError(
            f"{path} lacks the columns {missing} (it has {header}): the header must name clean, corrupted and either "
            "correct_idx, incorrect_idx (token ids) or correct, incorrect (words)"
        )
    if not rows:
        raise PromptError(f"{path} has a header and no rows: give at least one prompt")
    for line, row in rows:
        if empty := [name for name in needed if not row[name]]:
            raise PromptError(f"{path}, line {line}: {empty[0]} is empty: every row needs {', '.join(needed)}")
    read = _read_ids if as_ids else _read_words
    return PairTable(
        clean=[row["clean"] for _, row in rows],
        corrupted=[row["corrupted"] for _, row in rows],
        correct=[read(path, line, needed[2], row[needed[2]]) for line, row in rows],
        incorrect=[read(path, line, needed[3], row[needed[3]]) for line, row in rows],
        as_ids=as_ids,
        templates=[row["template"] or "" for _, row in rows] if "template" in header else None,
    )


def _read_ids(path: Path, line: int, column: str, cell: str) -> list[int]:
    try:
        value = json.loads(cell)
    except json.JSONDecodeError:
        value = None
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(member, bool) or not isinstance(member, int) for member in ids):
        raise PromptError(f"{path}, line {line}: {column} is {cell!r}, expected a token id or a JSON list of ids")
    return ids


def _read_words(path: Path, line: int, column: str, cell: str) -> list[str]:
    if not cell.startswith("["):
        return [cell]
    try:
        words = json.loads(cell)
    except json.JSONDecodeError:
        return [cell]
    if not words or not all(isinstance(word, str) for word in words):
        raise PromptError(f"{path}, line {line}: {column} is {cell!r}, expected a word or a JSON list of words")
    return words
