"""Tasks: generators of clean and corrupted prompts."""

from importlib import import_module
from typing import Any

from workbench.errors import PromptError
from workbench_circuits.tasks.base import Task, one_of

__all__ = ["TASKS", "Task", "load_task", "one_of"]

TASKS = {
    "ioi": "workbench_circuits.tasks.ioi:IndirectObject",
    "colored_objects": "workbench_circuits.tasks.colored_objects:ColoredObjects",
}
"""Where each task is, by name."""


def load_task(name: str, **options: Any) -> Task:
    """A task by name.

    Args:
        name: one of `TASKS`.
        **options: fields of the task, for example `n_objects=2` for `colored_objects`.

    Raises:
        PromptError: if there is no such task or option.
    """
    one_of("task", name, tuple(TASKS))
    module, _, attribute = TASKS[name].partition(":")
    try:
        task: Task = getattr(import_module(module), attribute)(**options)
    except TypeError as error:
        raise PromptError(f"task {name!r} does not take the options {sorted(options)}: {error}") from None
    return task
