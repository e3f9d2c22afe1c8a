"""`workbench bench`: speed beside other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def register(app: typer.Typer) -> None:
    """Add the verb."""
    verb = typer.Typer(no_args_is_help=True, help="Measure speed beside other libraries, in the same run.")
    app.add_typer(verb, name="bench")

    @verb.callback()
    def bench() -> None:
        """Measure speed beside other libraries, in the same run."""

    @verb.command("patching")
    def patching(
        shape: Annotated[str, typer.Option(help="gpt2 (GPT-2 small) or tiny; random weights.")] = "gpt2",
        edges: Annotated[int, typer.Option(min=1, help="Edges for exact effects, uniform over all head edges.")] = 240,
        shared: Annotated[int, typer.Option(min=1, help="Those of them that TransformerLens computes too.")] = 12,
        prompts: Annotated[int, typer.Option(min=1, help="How many prompts.")] = 4,
        tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 16,
        first_difference: Annotated[
            int, typer.Option(min=0, help="Position from which clean and corrupted differ.")
        ] = 0,
        threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
        repeats: Annotated[int, typer.Option(min=1, help="Everything is measured so often; medians are shown.")] = 5,
        double: Annotated[bool, typer.Option(help="Compare the effects in float64 too.")] = True,
        seed: Annotated[int, typer.Option(help="Seed of weights, prompts and edges.")] = 0,
        json_file: Annotated[Path | None, typer.Option("--json", help="File for all numbers.")] = None,
    ) -> None:
        """Time edge effects beside TransformerLens' direct path patching, on the same edges."""
        import json

        from workbench.bench.patching import Plan, run
        from workbench.cli.console import progress
        from workbench.report.output import refused, write_atomic

        plan = Plan(
            shape=shape,
            edges=edges,
            shared=shared,
            prompts=prompts,
            tokens=tokens,
            first_difference=first_difference,
            threads=threads,
            repeats=repeats,
            double=double,
            seed=seed,
        )
        if json_file is not None:
            try:
                json_file.expanduser().absolute().parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise refused(json_file, error) from error
        found = run(plan, progress())
        print(table(found))
        if json_file is not None:
            write_atomic(json_file.expanduser().absolute(), json.dumps(found, indent=1) + "\n")


def table(found: dict[str, Any]) -> str:
    """What `workbench bench patching` prints."""
    plan, seconds = found["plan"], found["seconds"]
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    every = f"all {found['head_edges']:,} head edges, with their runs"
    rows = [
        ("plain forward", seconds["forward"], ""),
        ("runs of both prompts, with caches", seconds["runs"], ""),
        ("TransformerLens direct path, per edge", seconds["transformer_lens"], f"{found['shared_edges']} edges"),
        (
            "exact, per edge",
            seconds["exact"],
            f"{plan['edges']} edges; {found['ratios']['transformer_lens / exact']:.1f} times faster",
        ),
        ("receiver_exact", seconds["receiver_exact"], every),
        ("eap", seconds["eap"], every),
        ("eap_ig, 5 steps", seconds["eap_ig"], every),
    ]
    lines = [
        f"{plan['shape']} shape, {plan['prompts']} x {plan['tokens']} tokens that differ from position "
        f"{plan['first_difference']} on, {plan['threads']} thread(s); {versions}",
        f"median {found['clock']} of {plan['repeats']} repeats; matrix product {found['gflops']:.0f} GFLOP/s",
        "",
    ]
    lines += [f"{what:<40}{1000 * time:>10.1f} ms  {note}".rstrip() for what, time, note in rows]
    lines += ["", "largest difference from TransformerLens on the shared edges, of effects up to:"]
    for dtype, values in found["agreement"].items():
        lines.append(f"  {dtype:<8} {values['largest_difference']:.1e} of {values['largest_effect']:.3f}")
    return "\n".join([*lines, *(f"not compared: {why}" for why in found["not_compared"])])
