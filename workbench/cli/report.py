"""`workbench report`: the report about the heads of a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("report")
    def report(
        out: Annotated[Path, typer.Option(help="Folder for index.html, heads.csv, heads.parquet, manifest.json.")],
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")] = 0,
        quick: Annotated[bool, typer.Option("--quick", help="Smaller samples, wider intervals.")] = False,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
    ) -> None:
        """Write a report about the heads of a model; exit code 1 if a section of it failed."""
        from workbench.cli.console import open_model, progress
        from workbench.report.output import prepare

        say = progress()
        prepare(out)
        loaded = open_model(model, device=device, dtype=dtype, say=say)
        from workbench.report.build import write_report

        written = write_report(loaded, out, seed=seed, quick=quick, command=["workbench", *sys.argv[1:]], progress=say)
        print(written.folder / "index.html")
        for outcome in written.outcomes:
            if outcome.failed:
                print(f"error: section {outcome.name} failed: {outcome.error}", file=sys.stderr)
        if written.failed:
            raise typer.Exit(1)
