"""`workbench task`: which tasks there are, what their prompts look like, and whether a model can do them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.errors import OutputError, PromptError

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptPairs
    from workbench_circuits.tasks import Task


def register(app: typer.Typer) -> None:
    """Add the verb."""
    verb = typer.Typer(invoke_without_command=True, help="List tasks, show their prompts, measure competence.")
    app.add_typer(verb, name="task")

    @verb.callback()
    def every(
        context: typer.Context,
        measure_all: Annotated[bool, typer.Option("--all", help="Measure how well the model does every task.")] = False,
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        n: Annotated[int, typer.Option("--n", min=1, help="Prompts a task.")] = 60,
        seed: Annotated[int, typer.Option(help="Seed the prompts are drawn with.")] = 0,
        out: Annotated[Path | None, typer.Option(help="Write the numbers to this CSV file too.")] = None,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
    ) -> None:
        """List tasks, show their prompts, measure competence."""
        if context.invoked_subcommand is not None:
            if measure_all:
                raise PromptError(f"--all belongs to `workbench task` alone, not to {context.invoked_subcommand}")
            return
        if not measure_all:
            print(context.get_help())
            return
        from workbench.cli.console import open_model, progress
        from workbench_circuits._competence import survey

        if out is not None and not out.expanduser().absolute().parent.is_dir():
            raise OutputError(f"--out {out}: there is no folder {out.parent}; make it first")
        say = progress()
        found = survey(open_model(model, device=device, dtype=dtype, say=say), n=n, seed=seed, progress=say)
        print(found.text)
        if out is not None:
            try:
                found.frame.to_csv(out.expanduser(), index=False)
            except OSError as error:
                raise OutputError(
                    f"--out {out} cannot be written ({error}): give a file in an existing folder"
                ) from None

    @verb.command("list")
    def list_tasks() -> None:
        """List the tasks with their corruptions and chance level."""
        from workbench_circuits.tasks import TASKS, load_task

        for name in TASKS:
            task = load_task(name)
            print(f"{name:<18} chance {task.chance:4.0%}  corruptions: {', '.join(task.corruptions)}")
            print(f"{'':<18} {task.description} ({task.source})")

    @verb.command("show")
    def show(
        name: Annotated[
            str, typer.Argument(help="A task, see `workbench task list`, a .csv file, or package.module:function.")
        ],
        n: Annotated[int, typer.Option("--n", min=1, help="How many prompts to print.")] = 3,
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        corruption: Annotated[str | None, typer.Option(help="How to corrupt; default: all ways.")] = None,
        seed: Annotated[int, typer.Option(help="Seed the prompts are drawn with.")] = 0,
        measure: Annotated[bool, typer.Option("--competence", help="Measure how well the model does it.")] = False,
        prompts: Annotated[int, typer.Option(min=1, help="Prompts that --competence measures.")] = 100,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
    ) -> None:
        """Print prompts, clean and corrupted, with the tokens that differ marked [[so]], and their answers."""
        from workbench.cli.console import open_model, progress
        from workbench_circuits.tasks import load_task, one_of

        task = load_task(name)
        if corruption is not None:
            one_of(f"--corruption of {name}", corruption, task.corruptions)
        say = progress()
        loaded = open_model(model, device=device, dtype=dtype, say=say)
        corruptions = task.corruptions if corruption is None else (corruption,)
        print(describe(task, loaded, n=_at_most(task, loaded, n), seed=seed, corruptions=corruptions))
        if not measure:
            return
        from workbench_circuits._competence import RULE, competence

        for each in corruptions:
            count = _at_most(task, loaded, prompts)
            say(f"{count} prompts of {name} ({each}) ...")
            print(competence(loaded, task.pairs(loaded, count, seed=seed, corruption=each)).sentence)
        print(RULE)


def _at_most(task: Task, model: Model, n: int) -> int:
    """`n`, or as many prompts as a file has."""
    from workbench_circuits.tasks import CsvTask

    return min(n, len(task.pairs(model))) if isinstance(task, CsvTask) else n


def describe(task: Task, model: Model, *, n: int, seed: int, corruptions: tuple[str, ...]) -> str:
    """What `workbench task show` prints: the task, and `n` prompts with every corruption."""
    versions = {name: task.pairs(model, n, seed=seed, corruption=name) for name in corruptions}
    bos = "with BOS" if next(iter(versions.values())).prepends_bos else "no BOS"
    blocks = [f"{task.name}: {task.description}\n{task.source}. Tokens of {model.name}, {bos}, seed {seed}."]
    blocks += [_prompt(model, versions, row) for row in range(n)]
    return "\n\n".join(blocks)


def _prompt(model: Model, versions: dict[str, PromptPairs], row: int) -> str:
    first = next(iter(versions.values()))
    template = f" (template {first.templates[row]})" if first.templates else ""
    lines = [f"prompt {row}{template}, {int(first.lengths[row])} tokens"]
    for name, pairs in versions.items():
        length = int(pairs.lengths[row])
        clean, corrupted = pairs.clean[row, :length], pairs.corrupted[row, :length]
        differs = (clean != corrupted).tolist()
        for label, ids in (("clean", clean), (name, corrupted)):
            text = "".join(
                _marked(word) if odd else word for word, odd in zip(_words(model, ids), differs, strict=True)
            )
            lines += [
                f"  {label:<10} {line}" if not place else f"  {'':<10} {line}"
                for place, line in enumerate(text.split("\n"))
            ]
        right, wrong = (
            ", ".join(_words(model, ids[row][ids[row] >= 0])) for ids in (pairs.answers, pairs.wrong_answers)
        )
        lines.append(f"  {'answer':<10}{right}   (not{wrong})")
    return "\n".join(lines)


def _words(model: Model, ids: object) -> list[str]:
    return model.to_str_tokens(ids)  # type: ignore[arg-type]


def _marked(word: str) -> str:
    bare = word.lstrip(" ")
    return f"{word[: len(word) - len(bare)]}[[{bare}]]"
