"""`workbench overlap`: what two circuits of one model share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from workbench_circuits._overlap import Overlap


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("overlap")
    def overlap(
        a: Annotated[Path, typer.Argument(help="A circuit, as `workbench discover` wrote it.")],
        b: Annotated[Path, typer.Argument(help="Another one, of the same model.")],
        out: Annotated[Path | None, typer.Option(help="Folder for overlap.csv and heads.csv.")] = None,
        top: Annotated[int, typer.Option(min=0, help="How many heads to print.")] = 20,
    ) -> None:
        """Compare two circuits: shared edges, heads and nodes, against what chance would share."""
        from workbench_circuits._overlap import overlap as compare
        from workbench_circuits.circuit import Circuit

        first, second = Circuit.load(a.expanduser()), Circuit.load(b.expanduser())
        found = compare(first, second, names=(a.stem, b.stem))
        print(f"A  {first!r}")
        print(f"B  {second!r}")
        print()
        print(overlap_text(found, top))
        if out is not None:
            from workbench.report.output import prepare

            folder = prepare(out)
            found.summary.to_csv(folder / "overlap.csv", index=False)
            found.heads.to_csv(folder / "heads.csv", index=False)


def overlap_text(found: Overlap, top: int) -> str:
    """The overlap as text."""
    lines = [f"warning: {text}" for text in found.warnings]
    lines.append(f"{'':<6}{'A':>7}{'B':>7}{'shared':>8}{'chance':>8}{'Jaccard':>9}{'chance':>8}{'of smaller':>12}  p")
    for row in found.summary.to_dict("records"):
        rank = f"  Spearman {row['spearman']:+.2f} ({row['spearman_n']})" if row["spearman"] == row["spearman"] else ""
        chance = f"{row['expected_jaccard']:>8.3f}{row['of_smaller']:>12.2f}  {row['p_value']:.1e}{rank}"
        lines.append(
            f"{row['what']:<6}{row['n_a']:>7,}{row['n_b']:>7,}{row['shared']:>8,}{row['expected']:>8.1f}"
            f"{row['jaccard']:>9.3f}{chance}"
        )
    lines.append("chance: circuits of these sizes drawn at random from all edges (heads, nodes); p: of sharing as many")
    if top and len(found.heads):
        heads = found.heads.assign(both=found.heads["in_a"] & found.heads["in_b"])
        heads["score"] = heads["score_a"] + heads["score_b"]
        heads = heads.sort_values(["both", "score"], ascending=False, kind="stable").head(top)
        lines += ["", f"{'head':<10}{'A':>4}{'B':>4}{'effect A':>11}{'effect B':>11}  edges out of it, A and B"]
        for row in heads.to_dict("records"):
            marks = [("yes" if row[name] else "-") for name in ("in_a", "in_b")]
            lines.append(
                f"a{row['layer']}.h{row['head']:<7}{marks[0]:>4}{marks[1]:>4}{row['score_a']:>11.3f}"
                f"{row['score_b']:>11.3f}  {row['edges_a']}, {row['edges_b']}"
            )
    return "\n".join(lines)
