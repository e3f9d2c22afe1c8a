"""Discovery, evaluation and comparison of circuits: tasks, published circuits, overlap.

    import workbench_circuits as wc

    pairs = wc.load_task("ioi").pairs(model, n=32, seed=0)

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench_circuits._competence import Competence, competence
    from workbench_circuits.tasks import Task, load_task

_HOME = {
    "Competence": "workbench_circuits._competence:Competence",
    "Task": "workbench_circuits.tasks:Task",
    "competence": "workbench_circuits._competence:competence",
    "load_task": "workbench_circuits.tasks:load_task",
}

__all__ = ["Competence", "Task", "competence", "load_task"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(
            f"module 'workbench_circuits' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}"
        )
    module, _, attribute = _HOME[name].partition(":")
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
