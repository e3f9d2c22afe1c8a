"""Discovery, evaluation and comparison of circuits: tasks, published circuits, overlap.

    import workbench_circuits as wc

    pairs = wc.load_task("ioi").pairs(model, n=32, seed=0)

Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench_circuits._competence import Competence, Survey, competence, survey
    from workbench_circuits._overlap import Overlap, overlap
    from workbench_circuits._roc import edge_roc, head_roc, roc
    from workbench_circuits.circuit import Circuit
    from workbench_circuits.criteria import completeness, minimality
    from workbench_circuits.discovery import acdc, discover, find, refine, stability
    from workbench_circuits.evaluation import curves, evaluate, random_circuits
    from workbench_circuits.figure import circuit_figure, faithfulness_figure
    from workbench_circuits.roles import HeadRoles, head_roles
    from workbench_circuits.run import CircuitRun, CircuitRunner, run_circuit, run_circuits
    from workbench_circuits.tasks import Task, load_task

_HOME = {
    "Circuit": "workbench_circuits.circuit:Circuit",
    "completeness": "workbench_circuits.criteria:completeness",
    "minimality": "workbench_circuits.criteria:minimality",
    "acdc": "workbench_circuits.discovery:acdc",
    "discover": "workbench_circuits.discovery:discover",
    "find": "workbench_circuits.discovery:find",
    "refine": "workbench_circuits.discovery:refine",
    "stability": "workbench_circuits.discovery:stability",
    "curves": "workbench_circuits.evaluation:curves",
    "edge_roc": "workbench_circuits._roc:edge_roc",
    "evaluate": "workbench_circuits.evaluation:evaluate",
    "head_roc": "workbench_circuits._roc:head_roc",
    "random_circuits": "workbench_circuits.evaluation:random_circuits",
    "roc": "workbench_circuits._roc:roc",
    "circuit_figure": "workbench_circuits.figure:circuit_figure",
    "faithfulness_figure": "workbench_circuits.figure:faithfulness_figure",
    "HeadRoles": "workbench_circuits.roles:HeadRoles",
    "head_roles": "workbench_circuits.roles:head_roles",
    "Overlap": "workbench_circuits._overlap:Overlap",
    "overlap": "workbench_circuits._overlap:overlap",
    "CircuitRun": "workbench_circuits.run:CircuitRun",
    "CircuitRunner": "workbench_circuits.run:CircuitRunner",
    "run_circuit": "workbench_circuits.run:run_circuit",
    "run_circuits": "workbench_circuits.run:run_circuits",
    "Competence": "workbench_circuits._competence:Competence",
    "Task": "workbench_circuits.tasks:Task",
    "Survey": "workbench_circuits._competence:Survey",
    "competence": "workbench_circuits._competence:competence",
    "load_task": "workbench_circuits.tasks:load_task",
    "survey": "workbench_circuits._competence:survey",
}

__all__ = [
    "Circuit",
    "CircuitRun",
    "CircuitRunner",
    "Competence",
    "HeadRoles",
    "Overlap",
    "Survey",
    "Task",
    "acdc",
    "circuit_figure",
    "competence",
    "completeness",
    "curves",
    "discover",
    "edge_roc",
    "evaluate",
    "faithfulness_figure",
    "find",
    "head_roc",
    "head_roles",
    "load_task",
    "minimality",
    "overlap",
    "random_circuits",
    "refine",
    "roc",
    "run_circuit",
    "run_circuits",
    "stability",
    "survey",
]


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
