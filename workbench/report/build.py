"""Building a report: run the sections, keep what each one yields at once, write the page and the manifest."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError, OutputError
from workbench.report.heads import columns_of, main_rows
from workbench.report.html import Page
from workbench.report.output import describe_file, prepare, refused, write_atomic
from workbench.report.run import MakeSection, Outcome, installed_sections, run_sections
from workbench.report.section import ReportContext

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.tables import HeadTable

_TABLES = ("heads.csv", "heads.parquet", "heads.json")
_FILES = (*_TABLES, "matrices/", "manifest.json")


@dataclass(frozen=True, kw_only=True)
class Report:
    """A written report.

    Attributes:
        folder: where it is.
        outcomes: what came of each section, in reading order.
    """

    folder: Path
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the sections that failed."""
        return tuple(outcome.name for outcome in self.outcomes if outcome.failed)


def write_report(
    model: Model,
    out: str | Path,
    *,
    seed: int = 0,
    quick: bool = False,
    command: Sequence[str] | str | None = None,
    progress: Callable[[str], None] | None = None,
    sections: Mapping[str, MakeSection] | None = None,
) -> Report:
    """Write the page and the tables about a model into a folder.

    These are `index.html`, all numbers as `heads.csv`, `heads.parquet` and `heads.json`, a layer by head matrix of each
    number in `matrices/`, and `manifest.json`.

    The tables of a section are saved below `sections/` as soon as it is done, and the manifest tells the state of
    the whole at any time: "running", "complete", "incomplete" (a section failed) or "interrupted".

    Args:
        model: the model.
        out: the folder; files of an earlier report in it are replaced.
        seed: seed of everything drawn at random.
        quick: smaller samples.
        command: the command line, for the provenance.
        progress: called with one line when something has been done.
        sections: the sections by name; None takes all that are installed.

    Returns:
        Where it is, and what came of each section.

    Raises:
        OutputError: if the folder cannot be written; before any work wherever that can be known.
        DataError: if there are no sections.
    """
    folder = prepare(out)
    makers = installed_sections() if sections is None else dict(sections)
    if not makers:
        raise DataError("no report sections are installed: reinstall mi-workbench, its entry points are missing")
    begun = time.monotonic()
    earlier = _earlier_sections(folder)
    manifest: dict[str, Any] = {"kind": "workbench report", "status": "running", "seed": seed, "quick": quick}
    _write_manifest(folder, manifest)
    said = progress or (lambda message: None)
    context = ReportContext(model=model, seed=seed, quick=quick, progress=said)
    kept: dict[str, list[Path]] = {}
    try:
        outcomes = run_sections(context, makers, done=lambda outcome: kept.update(_keep(folder, outcome)))
        said("writing the report")
        files = _write_results(folder, model, outcomes, seed=seed, command=command, manifest=manifest)
    except BaseException:
        manifest["status"] = "interrupted"
        _write_manifest(folder, manifest, strict=False)
        raise
    for name in earlier - set(makers):
        shutil.rmtree(folder / "sections" / name, ignore_errors=True)
    files += [path for paths in kept.values() for each in paths for path in sorted(each.iterdir())]
    manifest |= {
        "status": "incomplete" if any(outcome.failed for outcome in outcomes) else "complete",
        "sections": [_describe(outcome, folder, kept.get(outcome.name, [])) for outcome in outcomes],
        "timings": {
            "total_seconds": round(time.monotonic() - begun, 3),
            "section_seconds": {outcome.name: round(outcome.seconds, 3) for outcome in outcomes},
            "peak_memory_bytes": peak_memory_bytes(),
        },
        "files": [describe_file(path, folder) for path in files],
    }
    _write_manifest(folder, manifest)
    return Report(folder=folder, outcomes=outcomes)


def peak_memory_bytes() -> int | None:
    """Largest resident size of this process so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _keep(folder: Path, outcome: Outcome) -> dict[str, list[Path]]:
    """Save the tables of a section below `sections/`, one folder each."""
    home = folder / "sections" / outcome.name
    try:
        if home.exists():
            shutil.rmtree(home)
        if outcome.section is None:
            return {}
        paths = []
        for place, table in enumerate(outcome.section.tables):
            paths.append(Path(table.save(home / f"table-{place + 1}")))
    except OSError as error:
        raise refused(home, error) from error
    return {outcome.name: paths}


def _write_results(
    folder: Path,
    model: Model,
    outcomes: Sequence[Outcome],
    *,
    seed: int,
    command: Sequence[str] | str | None,
    manifest: dict[str, Any],
) -> list[Path]:
    from workbench.tables import SCHEMA_VERSION, HeadTable, provenance

    tables = [table for outcome in outcomes if outcome.section for table in outcome.section.tables]
    source = provenance(model, data_hash=_data_hash(tables), seed=seed, command=command)
    manifest |= {"schema_version": SCHEMA_VERSION, "provenance": source}
    columns: tuple[Any, ...] = ()
    written = [folder / "index.html"]
    for name in _TABLES:
        (folder / name).unlink(missing_ok=True)
    for stale in (folder / "matrices").glob("*.tsv"):
        stale.unlink()
    if tables:
        whole = HeadTable.concat(tables).validate()
        shown = [table for outcome in outcomes if outcome.section for table in main_rows(outcome.section)]
        columns = columns_of(HeadTable.concat(shown))
        write_atomic(folder / "heads.csv", whole.frame.to_csv(index=False))
        write_atomic(folder / "heads.parquet", whole.frame.to_parquet(index=False))
        whole.to_json(folder / "heads.json")
        written += [folder / name for name in _TABLES]
        written += whole.to_tsv(folder / "matrices")
    page = Page(
        title=f"The attention heads of {model.name}",
        byline=f"{model.spec.n_layers} layers of {model.spec.n_heads} heads · seed {seed}",
        created=str(source.get("created", "")),
        outcomes=outcomes,
        columns=columns,
        provenance=source,
        files=_FILES if tables else _FILES[-1:],
    )
    write_atomic(folder / "index.html", page.render())
    return written


def _data_hash(tables: Sequence[HeadTable]) -> str:
    hashes = sorted({str(table.provenance.get("data_hash")) for table in tables})
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _describe(outcome: Outcome, folder: Path, tables: Sequence[Path]) -> dict[str, Any]:
    section = outcome.section
    return {
        "name": outcome.name,
        "status": "failed" if section is None else "complete",
        "title": section.title if section else None,
        "sentence": section.sentence if section else None,
        "warnings": list(section.warnings) if section else [],
        "tables": [path.relative_to(folder).as_posix() for path in tables],
        "error": outcome.error,
        "traceback": outcome.details,
    }


def _earlier_sections(folder: Path) -> set[str]:
    """Names of the section folders that an earlier report in this place says it made."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        names = [str(section["name"]) for section in manifest["sections"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {name for name in names if re.fullmatch(r"[A-Za-z0-9_-]+", name)}


def _write_manifest(folder: Path, manifest: Mapping[str, Any], *, strict: bool = True) -> None:
    try:
        write_atomic(folder / "manifest.json", json.dumps(manifest, indent=2, default=str) + "\n")
    except OutputError:
        if strict:
            raise
