"""The folder that a table is saved in: `table.csv`, `table.parquet` and `provenance.json`.

All three are written under other names before any is moved into place, and `provenance.json`, which is moved last,
holds the hashes of the other two: a folder that a crash left half old and half new is told from a whole one.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from workbench.errors import DataError, OutputError

KIND = "workbench table"
CSV, PARQUET, PROVENANCE = "table.csv", "table.parquet", "provenance.json"


def write_table(folder: Path, frame: pd.DataFrame, provenance: Mapping[str, Any], *, schema_version: int) -> None:
    """Write the three files; what was there before stays as it was if anything fails.

    Args:
        folder: where; made with its parents.
        frame: the tidy rows.
        provenance: JSON values by name.
        schema_version: version of the columns.

    Raises:
        OutputError: if the folder cannot be made or written, or the disk is full.
        DataError: if the provenance holds what JSON cannot.
    """
    stream = io.BytesIO()
    frame.to_parquet(stream, index=False)
    contents = {CSV: _csv(frame).encode(), PARQUET: stream.getvalue()}
    record = {
        "kind": KIND,
        "schema_version": schema_version,
        "rows": len(frame),
        "provenance": dict(provenance),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    try:
        contents[PROVENANCE] = (json.dumps(record, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise DataError(
            f"provenance cannot be written as JSON ({error}): give strings, finite numbers, lists"
        ) from error
    staged = {name: folder / f".{name}.{os.getpid()}.part" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in contents.items():
            with staged[name].open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        for name, path in staged.items():
            path.replace(folder / name)
    except OSError as error:
        raise _refused(folder, error, sum(map(len, contents.values()))) from error
    finally:
        for path in staged.values():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def read_table(folder: Path, *, schema_version: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows and the provenance that `write_table` wrote.

    Args:
        folder: where they are.
        schema_version: version of the columns that this program understands.

    Raises:
        DataError: if a file is missing, damaged, of another table or of another version.
    """
    record = _read_record(folder / PROVENANCE)
    if record["schema_version"] != schema_version:
        raise DataError(
            f"{folder} holds a table of schema version {record['schema_version']!r} and this program reads "
            f"{schema_version}: use the mi-workbench that wrote it, or make the table again"
        )
    path = folder / PARQUET
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    found = hashlib.sha256(data).hexdigest()
    expected = record["files"].get(PARQUET)
    if found != expected:
        raise DataError(
            f"{path} has sha256 {found} and {PROVENANCE} beside it says {expected}: the file was cut short or changed, "
            "or a save was interrupted; make the table again"
        )
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except Exception as error:  # pyarrow raises OSError, ValueError, KeyError and its own, by where the fault lies
        raise DataError(f"{path} is not a Parquet file that can be read ({error}): make the table again") from error
    return frame, record["provenance"]


def _csv(frame: pd.DataFrame) -> str:
    """The rows as CSV that any reader splits where we did: a lone carriage return is not quoted unless all text is."""
    texts = frame.select_dtypes(exclude="number")
    returns = any(texts[name].str.contains("\r", regex=False).any() for name in texts)
    quoting: Literal[0, 2] = csv.QUOTE_NONNUMERIC if returns else csv.QUOTE_MINIMAL
    return str(frame.to_csv(index=False, lineterminator="\n", quoting=quoting))


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}): it was cut short or changed; make the table again") from error
    fitting = (
        isinstance(record, dict)
        and record.get("kind") == KIND
        and "schema_version" in record
        and isinstance(record.get("files"), dict)
        and isinstance(record.get("provenance"), dict)
    )
    if not fitting:
        raise DataError(f"{path} is not the record of a workbench table: give a folder that HeadTable.save wrote")
    return dict(record)


def _unreadable(path: Path, error: OSError) -> DataError:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        return DataError(f"there is no {path}: give a folder that HeadTable.save wrote")
    return DataError(f"cannot read {path}: {error.strerror or error}")


def _refused(folder: Path, error: OSError, size: int) -> OutputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"no room for a table of {size:,} bytes in {folder}: {error.strerror}; free some space or choose "
            "another folder"
        )
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return OutputError(f"cannot save a table in {folder}: a file is in the way; choose another folder")
    return OutputError(
        f"cannot save a table in {folder}: {error.strerror or error}; choose a folder that you may write to"
    )
