"""Prompt pairs in a CSV file."""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Int
from torch import Tensor

from workbench._prompt_checks import ABSENT
from workbench._prompt_inputs import TextModel, token_at
from workbench.errors import DataError, PromptError

SPAN = "span:"
"""Begins the name of a column that names a word of each prompt."""


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """The columns of a CSV file of prompt pairs; answers are ids or words.

    `where` says for every prompt which line of which file it ends on; `spans` has, by name, a word of each prompt and
    which of its occurrences, counted from 1, or None.
    """

    where: list[str]
    clean: list[str]
    corrupted: list[str]
    correct: list[list[Any]]
    incorrect: list[list[Any]]
    as_ids: bool
    templates: list[str] | None
    spans: dict[str, list[tuple[str, int] | None]]


def read_csv(path: Path) -> PairTable:
    """Read the columns that `PromptPairs.from_csv` describes.

    Raises:
        DataError: if the file cannot be read as UTF-8 text.
        PromptError: if columns or cells are missing or wrong.
    """
    text = _text(path)
    if not text.strip():
        raise PromptError(
            f"{path} is empty: its first line must name the columns, as in clean,corrupted,correct,incorrect"
        )
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
        header = list(reader.fieldnames or [])
    except csv.Error as error:
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
    for where, row in rows:
        _check_row(where, row, header, needed)
    read = _read_ids if as_ids else _read_words
    correct, incorrect = ([read(where, name, row[name]) for where, row in rows] for name in needed[2:])
    for (where, _), right, wrong in zip(rows, correct, incorrect, strict=True):
        if both := [member for member in right if member in wrong]:
            raise PromptError(
                f"{where}: {both[0]!r} is in {needed[2]} and in {needed[3]}: the metric would be zero by construction; "
                "choose another wrong answer"
            )
    return PairTable(
        where=[where for where, _ in rows],
        clean=[row["clean"] for _, row in rows],
        corrupted=[row["corrupted"] for _, row in rows],
        correct=correct,
        incorrect=incorrect,
        as_ids=as_ids,
        templates=[row["template"] or "" for _, row in rows] if "template" in header else None,
        spans={
            name.removeprefix(SPAN): [_read_span(where, name, row[name] or "") for where, row in rows]
            for name in header
            if name.startswith(SPAN)
        },
    )


def check_ids(table: PairTable, d_vocab: int) -> None:
    """Make sure that every answer id exists in a vocabulary of `d_vocab` tokens.

    Raises:
        PromptError: naming the line and the id that does not.
    """
    for name, column in (("correct_idx", table.correct), ("incorrect_idx", table.incorrect)):
        for where, ids in zip(table.where, column, strict=True):
            if bad := [token for token in ids if not 0 <= token < d_vocab]:
                raise PromptError(
                    f"{where}: {name} is {bad[0]}, but the model's vocabulary is 0 to {d_vocab - 1}: "
                    "these ids are of another tokenizer; write correct, incorrect as words instead"
                )


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error}): give a UTF-8 file with a header") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = "UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "perhaps Latin-1 or Windows-1252"
        raise DataError(
            f"{path}, line {line}: byte {data[error.start]:#04x} is no UTF-8 text, so the file is in another encoding "
            f"({guess}): save it as UTF-8"
        ) from error


def _check_row(where: str, row: dict[str, Any], header: list[str], needed: list[str]) -> None:
    if None in row:
        raise PromptError(
            f"{where}: {len(header) + len(row[None])} cells for {len(header)} columns {header}: put a text that has a "  # type: ignore[index]
            "comma in it between double quotes"
        )
    if empty := [name for name in needed if not row[name]]:
        raise PromptError(f"{where}: {empty[0]} is empty: every row needs {', '.join(needed)}")
    if row["clean"] == row["corrupted"]:
        raise PromptError(
            f"{where}: clean and corrupted are both {row['clean']!r}: nothing could be patched; change what the answer "
            "hangs on in corrupted"
        )


def span_positions(
    table: PairTable, model: TextModel, tokens: Int[Tensor, "n t"], lengths: Int[Tensor, " n"], bos: bool | None
) -> dict[str, list[int]]:
    """Positions of the words that the span columns name, `ABSENT` where a cell is empty.

    Raises:
        PromptError: if a word is not in its prompt, or no token begins with it.
    """
    rows = [row[:length] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    found: dict[str, list[int]] = {}
    for name, cells in table.spans.items():
        found[name] = [
            ABSENT if cell is None else _position(where, f"{SPAN}{name}", cell, model, text, row, bos)
            for where, cell, text, row in zip(table.where, cells, table.clean, rows, strict=True)
        ]
    return found


def _position(
    where: str, column: str, cell: tuple[str, int], model: TextModel, text: str, row: list[int], bos: bool | None
) -> int:
    word, occurrence = cell
    places = [match.start() for match in re.finditer(rf"(?<!\w){re.escape(word)}(?!\w)", text)]
    if len(places) < occurrence:
        raise PromptError(
            f"{where}: {column} is {word!r}, occurrence {occurrence}, and clean has it {len(places)} times: {text!r}; "
            "name a word of the clean prompt, with #2 for its second occurrence"
        )
    place = places[occurrence - 1]
    begins = place - 1 if place and text[place - 1] == " " else place
    for start in (begins, place):
        at = token_at(model, text, start, row, bos)
        if at is not None:
            return at
    raise PromptError(
        f"{where}: {column} is {word!r}, and no token of this tokenizer begins with it in {text!r}: use from_tokens"
    )


def _read_span(where: str, column: str, cell: str) -> tuple[str, int] | None:
    match = re.fullmatch(r"(.+?)(?:#([1-9]\d*))?", cell.strip())
    if match is None:
        if cell.strip():
            raise PromptError(
                f"{where}: {column} is {cell!r}, expected a word of clean, or word#2 for its second place"
            )
        return None
    return match[1], int(match[2] or 1)


def _read_ids(where: str, column: str, cell: str) -> list[int]:
    try:
        value = json.loads(cell)
    except json.JSONDecodeError:
        value = None
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(member, bool) or not isinstance(member, int) for member in ids):
        raise PromptError(f"{where}: {column} is {cell!r}, expected a token id or a JSON list of ids")
    return ids


def _read_words(where: str, column: str, cell: str) -> list[str]:
    if not cell.startswith("["):
        return [cell]
    try:
        words = json.loads(cell)
    except json.JSONDecodeError:
        return [cell]
    if not words or not all(isinstance(word, str) for word in words):
        raise PromptError(f"{where}: {column} is {cell!r}, expected a word or a JSON list of words")
    return words
