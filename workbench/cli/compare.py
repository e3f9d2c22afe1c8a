"""`workbench compare`: two runs beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("compare")
    def compare(
        a: Annotated[Path, typer.Argument(help="A folder of `report`, `analyze` or `patch`, or a heads.json.")],
        b: Annotated[Path, typer.Argument(help="Another of the same kind.")],
        out: Annotated[
            Path | None, typer.Option(help="Folder for index.html, comparison.csv and .parquet, differences.json.")
        ] = None,
        names: Annotated[
            tuple[str, str] | None, typer.Option(help="What to call the two; default: the names of their folders.")
        ] = None,
    ) -> None:
        """Compare two runs: every number that both have, its difference, and whether that is more than noise."""
        if (a / "effects.json").exists() and (b / "effects.json").exists():
            print(_edges(a, b))
            return
        from workbench.report.compare import compare_runs, load_run
        from workbench.report.compare_page import model_table, sentence, summary_table, write_comparison
        from workbench.report.output import prepare

        if out is not None:
            prepare(out)
        tables = load_run(a), load_run(b)
        found = compare_runs(*tables, names=names or _names(a, b))
        print(sentence(found))
        for note in found.notes:
            print(f"note: {note}")
        for frame in (summary_table(found), model_table(found)):
            if len(frame):
                print(f"\n{frame.to_string(index=False, max_colwidth=60)}")
        if out is not None:
            print(write_comparison(found, out, *tables) / "index.html")


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The folders' names where they differ."""
    one, other = a.absolute(), b.absolute()
    first, second = ((path.parent if path.is_file() else path).name for path in (one, other))
    return (first, second) if first != second else (f"{first} (A)", f"{second} (B)")


def _edges(a: Path, b: Path) -> str:
    """How well the edge effects of one stand for those of the other."""
    from workbench.patching import EdgeEffects
    from workbench.patching import compare as compare_effects

    return str(compare_effects(EdgeEffects.load(a), EdgeEffects.load(b)).to_string(index=False))
