"""Tasks: generators of clean and corrupted prompts."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.errors import DataError, PromptError
from workbench_circuits.tasks.base import Task, one_of
from workbench_circuits.tasks.custom import CsvTask, FunctionTask, from_reference

__all__ = ["TASKS", "CsvTask", "FunctionTask", "Task", "load_task", "one_of"]

TASKS = {
    "ioi": "workbench_circuits.tasks.ioi:IndirectObject",
    "colored_objects": "workbench_circuits.tasks.colored_objects:ColoredObjects",
    "greater_than": "workbench_circuits.tasks.greater_than:GreaterThan",
    "induction": "workbench_circuits.tasks.induction:Induction",
    "capitals": "workbench_circuits.tasks.capitals:Capitals",
    "docstring": "workbench_circuits.tasks.docstring:Docstring",
    "gendered_pronoun": "workbench_circuits.tasks.gendered_pronoun:GenderedPronoun",
    "subject_verb": "workbench_circuits.tasks.subject_verb:SubjectVerb",
}
"""Where each task is, by name."""


def load_task(name: str | Path | Callable[..., Any], /, **options: Any) -> Task:
    """A task: by name, or one of your own.

    Args:
        name: one of `TASKS`; the path of a CSV file (see `PromptPairs.from_csv`); a function that draws one prompt, or
            where to import it from, "package.module:function" (see `FunctionTask`).
        **options: fields of the task, for example `n_objects=2` for `colored_objects`.

    Raises:
        PromptError: if there is no such task or option.
        DataError: if there is no such file.
    """
    if callable(name):
        return Task.from_function(name, **options)
    text = str(name)
    if isinstance(name, Path) or text.lower().endswith(".csv"):
        return _with_options(text, lambda: CsvTask(path=_existing(Path(text)), **options), options)
    if ":" in text:
        return _with_options(text, lambda: from_reference(text, **options), options)
    try:
        one_of("task", text, tuple(TASKS))
    except PromptError as error:
        raise PromptError(f"{error}; a task of your own is a .csv file or package.module:function") from None
    module, _, attribute = TASKS[text].partition(":")
    return _with_options(text, lambda: getattr(import_module(module), attribute)(**options), options)


def _with_options(name: str, make: Callable[[], Task], options: dict[str, Any]) -> Task:
    try:
        return make()
    except TypeError as error:
        if not options:
            raise
        raise PromptError(f"task {name!r} does not take the options {sorted(options)}: {error}") from None


def _existing(path: Path) -> Path:
    path = path.expanduser()
    if not path.is_file():
        raise DataError(f"{path} is no file: give the path of a CSV file, or one of the tasks {', '.join(TASKS)}")
    return path
