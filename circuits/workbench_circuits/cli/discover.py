"""`workbench discover`: from a task to a circuit that was judged on other prompts than it was found on."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench_circuits.circuit import Circuit
    from workbench_circuits.discovery import Discovery
    from workbench_circuits.evaluation import Curves

GIB = 1 << 30
COMPARED = ("verified", "eap", "eap_ig")
"""Methods whose rankings are compared."""

OWN = "this circuit's"
"""What the ranking is called that the circuit was taken from."""


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("discover")
    def discover(
        task: Annotated[
            str, typer.Option(help="A task (see `workbench task list`), a CSV file, or package.module:function.")
        ],
        out: Annotated[Path, typer.Option(help="File for the circuit (JSON); tables and figures go beside it.")],
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        algorithm: Annotated[str, typer.Option(help="threshold, greedy, refine or acdc.")] = "threshold",
        method: Annotated[
            str | None,
            typer.Option(
                help="Effects: verified, exact, receiver_exact, eap or eap_ig; default: eap_ig, both ways, signed."
            ),
        ] = None,
        target: Annotated[float, typer.Option(help="Faithfulness to reach.")] = 0.8,
        n_edges: Annotated[int | None, typer.Option(min=1, help="A number of edges instead of a target.")] = None,
        n: Annotated[
            int, typer.Option("--n", min=2, help="Prompts to score edges on; half as many choose the size.")
        ] = 32,
        n_held_out: Annotated[int, typer.Option(min=1, help="Prompts to judge the circuit on.")] = 32,
        corruption: Annotated[
            str | None, typer.Option(help="How prompts are corrupted; default: the first way.")
        ] = None,
        signed: Annotated[
            bool | None,
            typer.Option("--signed/--absolute", help="Rank by how much edges help, or by the size of their effect."),
        ] = None,
        direction: Annotated[str | None, typer.Option(help="Of the effects: noising, denoising or both.")] = None,
        ablation: Annotated[str, typer.Option(help="What edges outside carry: resample, mean or zero.")] = "resample",
        metric: Annotated[str, typer.Option(help="logit_diff, answer_logprob or kl_to_clean.")] = "logit_diff",
        top: Annotated[int, typer.Option(min=1, help="Edges that acdc starts from.")] = 3000,
        tau: Annotated[float | None, typer.Option(help="Threshold of acdc, in units of the metric.")] = None,
        compare: Annotated[
            str, typer.Option(help="Rankings to compare by CPR and CMD, separated by commas; empty for none.")
        ] = ",".join(COMPARED),
        random: Annotated[int, typer.Option(min=0, help="Random rankings and random circuits to compare with.")] = 5,
        figures: Annotated[bool, typer.Option(help="Draw the circuit and the curves.")] = True,
        roles: Annotated[bool, typer.Option(help="Say what the heads of the circuit do.")] = True,
        seed: Annotated[int, typer.Option(help="Seed of prompts, samples and resamples.")] = 0,
        budget_gib: Annotated[float, typer.Option(min=0.01, help="Memory beside the weights.")] = 2.0,
        resume: Annotated[bool, typer.Option(help="Go on from unfinished work beside the file.")] = True,
        ungroup: Annotated[
            bool, typer.Option("--ungroup", help="Give every query head its own key and value.")
        ] = False,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
    ) -> None:
        """Find a circuit for a task, judge it on other prompts, and compare it with other rankings and with chance."""
        from workbench.cli.console import open_model, progress
        from workbench.report.output import prepare
        from workbench_circuits.discovery import find

        rankings = tuple(name.strip() for name in compare.split(",") if name.strip())
        _check_methods(rankings)
        out = out.expanduser()
        prepare(out.parent)
        unfinished = out.with_name(out.stem + ".unfinished")
        if not resume and unfinished.exists():
            shutil.rmtree(unfinished)
        say = progress()
        loaded = open_model(model, device=device, dtype=dtype, say=say, ungroup=ungroup)
        options: dict[str, Any] = {"metric": metric, "seed": seed}
        options["budget_bytes"] = int(budget_gib * GIB)
        try:
            found = find(
                loaded,
                task,
                algorithm=algorithm,  # type: ignore[arg-type]
                method=method,
                target=None if n_edges is not None else target,
                n_edges=n_edges,
                n=n,
                n_held_out=n_held_out,
                corruption=corruption,
                signed=signed,
                direction=direction,
                ablation=ablation,  # type: ignore[arg-type]
                top=top,
                tau=tau,
                resume=unfinished,
                progress=say,
                **options,
            )
            found.circuit.save(out)
            print(circuit_text(found.circuit))
            curves = None
            if rankings or random:
                curves = _compared(
                    loaded,
                    found,
                    rankings,
                    random,
                    bool(signed),
                    unfinished,
                    say,
                    options | {"direction": direction or "noising"},
                )
                print()
                print(curves_text(curves))
                _tables(curves, out)
            if random and len(found.circuit):
                print()
                print(_random_text(found, random, seed))
        except KeyboardInterrupt:
            print(f"unfinished work is in {unfinished}; the same command goes on from there", file=sys.stderr)
            raise
        labels = _roles(loaded, found, out, say) if roles else {}
        if figures:
            _figures(loaded, found.circuit, curves, labels, out)
        shutil.rmtree(unfinished, ignore_errors=True)
        print(f"saved {out} and what belongs to it in {out.parent}", file=sys.stderr)


def _check_methods(names: tuple[str, ...]) -> None:
    from workbench.errors import PromptError

    allowed = ("verified", "exact", "receiver_exact", "eap", "eap_ig")
    for name in names:
        if name not in allowed:
            raise PromptError(f"--compare {name!r} is not one of {', '.join(allowed)}")


def _compared(
    model: Model,
    found: Discovery,
    methods: tuple[str, ...],
    random: int,
    signed: bool,
    unfinished: Path,
    say: Callable[[str], None],
    options: dict[str, Any],
) -> Curves:
    """Rankings by several methods, measured on the prompts of the search, judged on the held-out ones."""
    from workbench_circuits.discovery.scores import measured_effects
    from workbench_circuits.discovery.select import Ranking
    from workbench_circuits.evaluation import curves_of

    graph = found.runner.wiring.graph
    rankings: dict[str, Any] = {}
    refined = found.refined
    if refined is not None:
        rankings[OWN] = lambda n: refined.at(found.runner, n)
    else:
        rankings[OWN] = Ranking.of(graph, found.effects, signed=found.circuit.signed)
    for method in methods:
        effects = measured_effects(
            model, found.prompts.train, method=method, steps=5, resume=unfinished, progress=say, **options
        )
        rankings[method] = Ranking.of(graph, effects, signed=signed)
    say("running circuits of ten sizes")
    return curves_of(found.judge, rankings, random=random, seed=options["seed"])


def _tables(curves: Curves, out: Path) -> None:
    from workbench.report.output import write_atomic

    for name, table in (("curves", curves.frame), ("areas", curves.areas), ("differences", curves.differences)):
        write_atomic(out.with_name(f"{out.stem}.{name}.csv"), table.to_csv(index=False))


def _random_text(found: Discovery, count: int, seed: int) -> str:
    from workbench_circuits.evaluation import random_circuits

    lines = [f"random circuits of {len(found.circuit):,} edges, held out ({count} each, mean and range):"]
    for connected, what in ((True, "connected"), (False, "any edges")):
        drawn = random_circuits(found.judge, len(found.circuit), count=count, connected=connected, seed=seed)
        f = drawn.faithfulness
        lines.append(f"  {what:<10} f {f.mean():+.3f} [{f.min():+.3f}, {f.max():+.3f}]")
    return "\n".join(lines)


def _roles(model: Model, found: Discovery, out: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Print what the heads of the circuit do; their labels by node."""
    from workbench.errors import WorkbenchError
    from workbench_circuits.roles import head_roles

    heads = found.circuit.heads
    if not heads:
        return {}
    try:
        roles = head_roles(model, found.prompts.held_out, list(heads), progress=say)
    except WorkbenchError as error:
        print(f"no roles of heads: {error}", file=sys.stderr)
        return {}
    from workbench.report.output import write_atomic

    write_atomic(out.with_name(f"{out.stem}.roles.csv"), roles.frame.to_csv(index=False))
    named = roles.frame[roles.frame["label"] != ""]
    print()
    print(f"roles of heads on held-out prompts: {len(named)} of {len(heads)} have one by the rules")
    if found.circuit.warning:
        print(f"  warning: {found.circuit.warning}")
    for row in named.to_dict("records"):
        print(f"  {row['node']:<9} {row['label']:<22} {row['rule']}")
    return roles.labels


def _figures(model: Model, circuit: Circuit, curves: Curves | None, labels: dict[str, str], out: Path) -> None:
    from workbench.report.output import write_atomic
    from workbench_circuits.figure import circuit_figure, faithfulness_figure

    mark = circuit.warning or ""
    drawn: dict[str, Any] = {}
    if len(circuit):
        f = None if circuit.held_out is None else circuit.held_out.faithfulness
        drawn["circuit"] = circuit_figure(
            as_patched(circuit),
            model.spec,
            title=f"{circuit.task or 'circuit'}, {circuit.model}",
            faithfulness=None if f is None else (f.value, f.ci_low, f.ci_high),
            n_all=circuit.graph.n_edges,
            mark=mark,
            metric=circuit.metric.replace("_", " "),
            roles=labels,
        )
    if curves is not None:
        drawn["curves"] = faithfulness_figure(
            curves.frame,
            title=f"{circuit.task or 'circuit'}, {circuit.model}",
            mark=mark,
            areas=curves.areas,
            target=circuit.target,
        )
    for name, figure in drawn.items():
        page = figure.to_html(include_plotlyjs=True, div_id=name)
        write_atomic(out.with_name(f"{out.stem}.{name}.html"), page)


def as_patched(circuit: Circuit) -> pd.DataFrame:
    """The circuit's edges with the sign of what patching each into the clean run does, as the figure is drawn."""
    from workbench_circuits.discovery.select import helping_sign

    turned = -helping_sign(circuit.direction, circuit.metric) * helping_sign("denoising", circuit.metric)
    return circuit.frame.assign(effect=turned * circuit.frame["effect"])


def circuit_text(circuit: Circuit) -> str:
    """A circuit in a few lines."""
    lines = []
    if circuit.competence is not None:
        lines.append(circuit.competence.sentence)
    if circuit.warning:
        lines.append(f"warning: {circuit.warning}")
    aim = f"for f >= {circuit.target:g}" if circuit.target is not None else "as asked"
    how = f"{circuit.algorithm}, {circuit.method}"
    lines += [
        "",
        f"circuit for {circuit.task or 'these prompts'} ({how}, {aim}, {circuit.ablation} ablation):",
        f"  {len(circuit):,} of {circuit.graph.n_edges:,} edges ({100 * circuit.share:.2f} %), {len(circuit.heads)} of "
        f"{circuit.shape.n_layers * circuit.shape.n_heads} heads, "
        f"{sum(node.startswith('m') for node in circuit.nodes)} of {circuit.shape.n_layers} MLPs",
    ]
    split = circuit.provenance.get("split")
    for name, what in (("held_out", f"held out ({split})"), ("train", "where it was found")):
        judged = getattr(circuit, name)
        if judged is not None:
            lines.append(f"  {what}: {judged}")
    if circuit.provenance.get("search", {}).get("reached") is False:
        lines.append("  warning: no size reached the target on the prompts that choose the size")
    if circuit.stability is not None:
        s = circuit.stability
        core = sum(x >= 0.95 for x in circuit.inclusion or ())
        lines.append(
            f"  stability over {s.n_resamples} resamples of {s.n_prompts} prompts: Jaccard {s.jaccard:.2f} "
            f"[{s.jaccard_low:.2f}, {s.jaccard_high:.2f}] of edges, {s.head_jaccard:.2f} of heads; {core:,} edges "
            "are in 95 % of them"
        )
    return "\n".join(lines)


def curves_text(curves: Curves) -> str:
    """CPR and CMD of the rankings, and their faithfulness at each size."""
    first = curves.frame.iloc[0]
    lines = [
        f"rankings on {first['n_prompts']} held-out prompts ({first['metric']}, {first['ablation']} ablation, "
        f"{first['algorithm']}); CPR: area under f, CMD: under |1 - f|, over the share of edges taken:",
        f"  {'ranking':<16}{'CPR':>7}{'95 %':>18}{'CMD':>8}{'95 %':>18}",
    ]
    for row in curves.areas.to_dict("records"):
        spans = [f"[{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" for name in ("cpr", "cmd")]
        lines.append(f"  {row['method']:<16}{row['cpr']:>7.3f}{spans[0]:>18}{row['cmd']:>8.3f}{spans[1]:>18}")
    table = curves.frame.pivot(index="method", columns="fraction", values="faithfulness")
    table = table.loc[list(curves.areas["method"])]
    lines.append("")
    lines.append(f"  {'f at % of edges':<16}" + "".join(f"{100 * share:>8g}" for share in table.columns))
    lines += [
        f"  {name:<16}" + "".join(f"{f:>8.2f}" for f in row)
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    ]
    if len(curves.differences):
        lines += ["", "  differences, over the same prompts:"]
        for row in curves.differences.to_dict("records"):
            span = f"[{row['cmd_low']:+.3f}, {row['cmd_high']:+.3f}]"
            lines.append(f"  CMD {row['method']} - {row['minus']}: {row['cmd']:+.3f} {span}")
    return "\n".join(lines)
