"""`workbench heads`: what every head and MLP does to a task, in total and directly."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from workbench.tables import HeadTable

COMPETENCE_PROMPTS = 100
"""Prompts of a task on which competence is measured, at least."""

GIB = 1 << 30
UNFINISHED = "unfinished"


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("heads")
    def heads(
        out: Annotated[Path, typer.Option(help="Folder for table.csv, table.parquet, provenance.json.")],
        task: Annotated[str, typer.Option(help="The task; see `workbench task list`.")] = "ioi",
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        n: Annotated[int, typer.Option("--n", min=1, help="How many prompts of the task.")] = 32,
        corruption: Annotated[
            str | None, typer.Option(help="How prompts are corrupted; default: the first way.")
        ] = None,
        ablation: Annotated[
            str,
            typer.Option(help="resample, mean, zero, pattern_to_first, uniform_pattern, query_zero or value_zero."),
        ] = "resample",
        reference: Annotated[
            int, typer.Option(min=1, help="Further prompts that the means of --ablation mean are over.")
        ] = 256,
        direction: Annotated[str, typer.Option(help="noising or denoising.")] = "noising",
        metric: Annotated[str, typer.Option(help="logit_diff, answer_logprob or kl_to_clean.")] = "logit_diff",
        positions: Annotated[str, typer.Option(help="all, each or spans.")] = "all",
        top: Annotated[int, typer.Option(min=1, help="How many of the strongest heads to print.")] = 10,
        seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
        budget_gib: Annotated[float, typer.Option(min=0.01, help="Memory beside the weights.")] = 2.0,
        resume: Annotated[bool, typer.Option(help="Go on from unfinished work in the folder.")] = True,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
    ) -> None:
        """Measure what ablating each head and each MLP does to a task: total, direct and indirect effect."""
        import time

        from workbench.cli.console import open_model, progress
        from workbench.cli.patch import peak_bytes
        from workbench.errors import DataError
        from workbench.interventions import Ablation
        from workbench.patching.head_effects import head_effects
        from workbench.patching.partial import PartialResult
        from workbench.report.output import prepare
        from workbench_circuits import competence, load_task

        drawer, chosen = load_task(task), Ablation.of(ablation)
        folder = prepare(out)
        say = progress()
        loaded = open_model(model, device=device, dtype=dtype, say=say)
        options: dict[str, Any] = {"direction": direction, "ablation": chosen, "metric": metric, "seed": seed}
        options |= {"positions": positions, "direct": positions == "all", "budget_bytes": int(budget_gib * GIB)}
        if chosen is Ablation.MEAN:
            options["reference"] = drawer.pairs(loaded, reference, seed=seed + 1, corruption=corruption)
        pairs = drawer.pairs(loaded, n, seed=seed, corruption=corruption)
        enough = (
            pairs
            if n >= COMPETENCE_PROMPTS
            else drawer.pairs(loaded, COMPETENCE_PROMPTS, seed=seed, corruption=corruption)
        )
        able = competence(loaded, enough)
        print(able.sentence)
        if able.verdict != "solved":
            print(
                f"warning: {able.verdict}; these are the heads behind whatever the model does here instead",
                file=sys.stderr,
            )
        unfinished = folder / UNFINISHED
        if not resume and unfinished.exists():
            PartialResult(unfinished, "").discard()
        began = time.monotonic()
        try:
            table = head_effects(loaded, pairs, resume=unfinished, progress=say, **options)
        except DataError as error:
            raise DataError(f"{error}; or pass --no-resume to begin anew") from error
        seconds = time.monotonic() - began
        record = {
            **table.provenance,
            "competence": {"verdict": able.verdict, "sentence": able.sentence, "data_hash": able.data_hash},
            "wall_seconds": round(seconds, 2),
            "peak_resident_bytes": peak_bytes(),
        }
        saved = type(table)(frame=table.frame, provenance=record).save(folder)
        print()
        print(heads_text(table, top, verdict=able.verdict))
        print()
        print(f"{seconds:.1f} s, peak memory {peak_bytes() / GIB:.2f} GiB")
        print(f"saved in {saved}", file=sys.stderr)


def heads_text(table: HeadTable, k: int, *, verdict: str = "solved") -> str:
    """The strongest heads by total and by direct effect, with their intervals, aligned.

    Args:
        table: as from `head_effects`.
        k: how many of each.
        verdict: of the model's competence; said beside the numbers unless the task is solved.
    """
    frame, source = table.frame, table.provenance
    settings = source["settings"]
    mark = "" if verdict == "solved" else f" [{verdict} by this model]"
    unit = frame["unit"].iloc[0]
    base, patch = (frame.loc[frame["metric"] == f"{which}_value", "value"].item() for which in ("base", "patch"))
    lines = [
        f"{source.get('task') or 'prompts'}{mark}: {settings['direction']}, {settings['ablation']} ablation, "
        f"{settings['metric']} in {unit}, {source['n']} prompts; base run {base:+.3f}, other version {patch:+.3f}"
    ]
    effects = frame[frame["head"].notna()]
    for metric in ("total_effect", "direct_effect"):
        found = effects[effects["metric"] == metric]
        if len(found):
            lines += ["", f"strongest heads by {metric.replace('_', ' ')}, of {len(found):,}:"]
            lines += [_line(row, effects) for row in _strongest(found, k).to_dict("records")]
    mlps = frame[frame["metric"] == "mlp_total_effect"]
    if len(mlps):
        lines += ["", "strongest MLPs by total effect:"]
        lines += [_line(row, None) for row in _strongest(mlps, min(k, 5)).to_dict("records")]
    floor = source.get("noise_floor")
    if floor is not None:
        lines += ["", f"rounding alone makes effects of {floor:.1e}"]
    return "\n".join(lines)


def _strongest(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order[:k]]


def _line(row: dict[Any, Any], effects: pd.DataFrame | None) -> str:
    import pandas as pd

    name = f"m{row['layer']}" if pd.isna(row["head"]) else f"a{row['layer']}.h{row['head']}"
    if not pd.isna(row["position"]):
        name += f" at {row['position']}"
    elif ", " in row["input"]:
        name += f" at {row['input'].split(', ')[-1]}"
    text = f"  {name:<14}{row['value']:+9.3f}  {_interval(row):<20}"
    if effects is not None:
        same = effects[(effects["layer"] == row["layer"]) & (effects["head"] == row["head"])]
        for metric in ("total_effect", "direct_effect", "indirect_effect"):
            other = same[same["metric"] == metric]
            if metric != row["metric"] and len(other) == 1:
                each = other.to_dict("records")[0]
                text += f"  {metric.split('_')[0]} {each['value']:+.3f} {_interval(each)}"
    return text.rstrip()


def _interval(row: dict[Any, Any]) -> str:
    return f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]" if row["ci_low"] == row["ci_low"] else ""
