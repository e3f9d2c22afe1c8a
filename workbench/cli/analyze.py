"""`workbench analyze`: one analysis of one model."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.tables import HeadTable

_GROUP = "workbench.analyzers"
_ON_CACHES = ("attention_sinks", "head_patterns")


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("analyze", help=f"Run one analysis and save its table. NAME is one of: {', '.join(_names())}.")
    def analyze(
        name: Annotated[str, typer.Argument(help="The analysis.")],
        out: Annotated[Path, typer.Option(help="Folder for the table: CSV, Parquet and its provenance.")],
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        seed: Annotated[int, typer.Option(help="Seed of everything that is drawn at random.")] = 0,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
        cache: Annotated[
            Path | None, typer.Option(help="Analyze a folder that `workbench capture` wrote, without running a model.")
        ] = None,
        top: Annotated[int, typer.Option(min=0, help="How many of the strongest heads to print.")] = 5,
    ) -> None:
        from workbench.cli.console import open_model, progress
        from workbench.report.output import prepare

        run = _find(name)
        say = progress()
        folder = prepare(out)
        if cache is None:
            loaded = open_model(model, device=device, dtype=dtype, say=say)
            say(f"{name} ...")
            table: HeadTable = run(loaded, seed=seed)
        else:
            table = _from_cache(name, run, cache, model)
        say("saving")
        table.save(folder)
        if top:
            print(_summary(table, top))
        say(f"saved in {folder}")


def _from_cache(name: str, run: Any, folder: Path, model: str | None) -> HeadTable:
    from workbench.cache import open_cache

    if model is not None:
        raise DataError(f"--cache {folder} says which model it is of: leave --model {model!r} out")
    if name not in _ON_CACHES:
        raise DataError(
            f"{name} needs a model to run: leave --cache out (a cache will do for {' and '.join(_ON_CACHES)})"
        )
    table: HeadTable = run(open_cache(folder))
    return table


def _names() -> list[str]:
    return sorted(point.name for point in entry_points(group=_GROUP))


def _find(name: str) -> Any:
    found = [point for point in entry_points(group=_GROUP) if point.name == name]
    if not found:
        raise DataError(f"unknown analysis {name!r}: there are {', '.join(_names()) or 'none; reinstall mi-workbench'}")
    return found[0].load()


def _summary(table: HeadTable, k: int) -> str:
    """The strongest heads of every metric as aligned text."""
    from workbench.plots.labels import head_name, interval, number
    from workbench.plots.panels import head_panels
    from workbench.plots.ranking import strongest

    blocks = []
    for panel in head_panels(table):
        lines = [f"{panel.metric} · {panel.label}" if panel.label != panel.metric else panel.metric]
        for row in strongest(panel.frame, k).to_dict("records"):
            name = head_name(row["layer"], row["head"])
            lines.append(f"  {name:<9}{number(row['value']):>9}  {interval(row['ci_low'], row['ci_high'])}".rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)
