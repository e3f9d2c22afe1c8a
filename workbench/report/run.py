"""Finding the sections of a report and running them, each for itself."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points

from workbench.errors import DataError, OutputError
from workbench.report.section import ReportContext, Section

GROUP = "workbench.report_sections"
MakeSection = Callable[[ReportContext], Section]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one section.

    Attributes:
        name: that of the entry point.
        section: the section, or None if it failed.
        error: kind and message of the error, or None.
        details: the traceback, or None.
        seconds: wall-clock time it took.
    """

    name: str
    section: Section | None
    error: str | None = None
    details: str | None = None
    seconds: float

    @property
    def failed(self) -> bool:
        """Whether there is no section to show."""
        return self.section is None


def installed_sections() -> dict[str, MakeSection]:
    """Every section that an installed package supplies, by name; it is imported when it is called."""

    def late(load: Callable[[], MakeSection]) -> MakeSection:
        def make(context: ReportContext) -> Section:
            return load()(context)

        return make

    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return {point.name: late(point.load) for point in points}


def run_sections(
    context: ReportContext,
    sections: Mapping[str, MakeSection],
    *,
    done: Callable[[Outcome], None],
) -> tuple[Outcome, ...]:
    """Run sections one after another; one that fails does not stop the others.

    Args:
        context: what each is given.
        sections: the functions, by name.
        done: called with each outcome as soon as it is there, to keep it.

    Returns:
        Outcomes in reading order: by the sections' `order`, the failed ones last.

    Raises:
        OutputError: if a result could not be kept; all else is caught and told in the outcome.
    """
    outcomes = []
    for name, make in sections.items():
        context.progress(f"section {name} ...")
        outcome = _run(name, make, context)
        context.progress(f"section {name}: {outcome.error or 'done'} ({outcome.seconds:.1f} s)")
        done(outcome)
        outcomes.append(outcome)
    return tuple(sorted(outcomes, key=_reading_order))


def _run(name: str, make: MakeSection, context: ReportContext) -> Outcome:
    begun = time.monotonic()
    try:
        section = make(context)
        if not isinstance(section, Section):
            raise DataError(f"report section {name!r} returned a {type(section).__name__}, not a Section")
        if section.name != name:
            raise DataError(f"report section {name!r} calls itself {section.name!r}: give it the entry point's name")
        for table in section.tables:
            table.validate()
    except OutputError:
        raise
    except Exception as error:
        return Outcome(
            name=name,
            section=None,
            error=f"{type(error).__name__}: {error}",
            details=traceback.format_exc(),
            seconds=time.monotonic() - begun,
        )
    return Outcome(name=name, section=section, seconds=time.monotonic() - begun)


def _reading_order(outcome: Outcome) -> tuple[bool, int, str]:
    return outcome.section is None, outcome.section.order if outcome.section else 0, outcome.name
