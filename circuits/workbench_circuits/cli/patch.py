"""`workbench patch`: what every edge of a model contributes to a task."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from workbench.errors import DataError, PromptError

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptPairs
    from workbench_circuits import Competence

COMPETENCE_PROMPTS = 100
"""Prompts of a task on which competence is measured, at least."""

UNFINISHED = "unfinished"
GIB = 1 << 30


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("patch")
    def patch(
        out: Annotated[Path, typer.Option(help="Folder for edges.csv, edges.parquet, effects.json, calibration.csv.")],
        task: Annotated[str | None, typer.Option(help="The task; see `workbench task list`.")] = None,
        csv: Annotated[
            Path | None, typer.Option(help="Prompts of your own: columns clean, corrupted, correct, incorrect.")
        ] = None,
        method: Annotated[str, typer.Option(help="verified, exact, receiver_exact, eap or eap_ig.")] = "verified",
        n: Annotated[int, typer.Option("--n", min=1, help="How many prompts of the task.")] = 32,
        corruption: Annotated[
            str | None, typer.Option(help="How prompts are corrupted; default: the first way.")
        ] = None,
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        ungroup: Annotated[
            bool, typer.Option("--ungroup", help="Give every query head its own key and value.")
        ] = False,
        direction: Annotated[str, typer.Option(help="noising or denoising.")] = "noising",
        metric: Annotated[str, typer.Option(help="logit_diff, answer_logprob or kl_to_clean.")] = "logit_diff",
        edges: Annotated[str, typer.Option(help="all, heads, or a file with one edge a line.")] = "all",
        steps: Annotated[int, typer.Option(min=1, help="Gradients of eap_ig.")] = 5,
        seed: Annotated[int, typer.Option(help="Seed of the prompts and of the random sample of edges.")] = 0,
        budget_gib: Annotated[float, typer.Option(min=0.01, help="Memory beside the weights.")] = 2.0,
        per_prompt: Annotated[bool, typer.Option("--per-prompt", help="Save the effects of each prompt too.")] = False,
        resume: Annotated[bool, typer.Option(help="Go on from unfinished work in the folder.")] = True,
        top: Annotated[int, typer.Option(min=0, help="How many of the strongest edges to print.")] = 20,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
    ) -> None:
        """Measure what every edge of a model contributes to a task, with intervals and the error of shortcuts."""
        from workbench.cli.console import open_model, progress
        from workbench.cli.patch import edges_argument
        from workbench.report.output import prepare

        if (task is None) == (csv is None):
            raise PromptError("give either --task or --csv: the prompts that the metric is measured on")
        chosen = edges_argument(edges)
        folder = prepare(out)
        say = progress()
        loaded = open_model(model, device=device, dtype=dtype, say=say, ungroup=ungroup)
        pairs, able = _prompts(loaded, task, csv, n=n, corruption=corruption, seed=seed)
        options = {"edges": chosen, "direction": direction, "metric": metric, "steps": steps, "seed": seed}
        options |= {"method": method, "budget_bytes": int(budget_gib * GIB), "per_prompt": per_prompt}
        _run(loaded, pairs, able, folder, options, resume=resume, top=top, say=say)


def _prompts(
    model: Model, task: str | None, csv: Path | None, *, n: int, corruption: str | None, seed: int
) -> tuple[PromptPairs, Competence]:
    """The prompts, and how well the model does them (for a task on at least `COMPETENCE_PROMPTS`)."""
    from workbench.prompts import PromptPairs
    from workbench_circuits import competence, load_task

    if task is None:
        if corruption is not None:
            raise PromptError(f"--corruption {corruption!r} belongs to --task: a CSV holds its own corrupted prompts")
        assert csv is not None
        pairs = PromptPairs.from_csv(model, csv.expanduser())
        return pairs, competence(model, pairs)
    drawer = load_task(task)
    pairs = drawer.pairs(model, n, seed=seed, corruption=corruption)
    if n >= COMPETENCE_PROMPTS:
        return pairs, competence(model, pairs)
    return pairs, competence(model, drawer.pairs(model, COMPETENCE_PROMPTS, seed=seed, corruption=corruption))


def _run(
    model: Model,
    pairs: PromptPairs,
    able: Competence,
    folder: Path,
    options: dict[str, Any],
    *,
    resume: bool,
    top: int,
    say: Any,
) -> None:
    import time
    from dataclasses import replace

    from workbench.cli.patch import calibration_text, peak_bytes, top_text
    from workbench.patching import edge_effects, estimate_cost
    from workbench.patching.partial import PartialResult

    print(able.sentence)
    if able.verdict != "solved":
        print(f"warning: {able.verdict}; effects describe whatever the model does here instead", file=sys.stderr)
    unfinished = folder / UNFINISHED
    if not resume and unfinished.exists():
        PartialResult(unfinished, "").discard()
    began = time.monotonic()
    if options["method"] == "exact":
        cost = estimate_cost(model, pairs, options["edges"])
        print(
            f"estimate: {cost['edges']:,} edges, {1000 * cost['seconds_per_edge']:.1f} ms each over {len(pairs)} "
            f"prompts: {_duration(cost['seconds'])}",
            file=sys.stderr,
        )
    try:
        effects = edge_effects(model, pairs, resume=unfinished, progress=say, **options)
    except DataError as error:
        raise DataError(f"{error}; or pass --no-resume to begin anew") from error
    except KeyboardInterrupt:
        print(f"unfinished work is in {unfinished}; the same command goes on from there", file=sys.stderr)
        raise
    seconds, peak = time.monotonic() - began, peak_bytes()
    record = {
        **effects.provenance,
        "command": ["workbench", *sys.argv[1:]],
        "competence": able.frame.astype(object).where(able.frame.notna(), None).to_dict("records"),
        "wall_seconds": round(seconds, 2),
        "peak_resident_bytes": peak,
    }
    effects = replace(effects, provenance=record)
    effects.save(folder)
    if top:
        print()
        print(top_text(effects, top))
    if effects.calibration is not None:
        print()
        print(calibration_text(effects.calibration))
    print()
    print(f"{_duration(seconds)}, peak memory {peak / GIB:.2f} GiB")
    print(f"saved in {folder}", file=sys.stderr)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
