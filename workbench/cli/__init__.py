"""The `workbench` program, one module a verb.

A verb is an entry point of the group `workbench.verbs` that names a function
`register(app: typer.Typer) -> None`. Whatever a verb needs beyond typer it imports when it runs, so that
`workbench --help` stays quick.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer
from typer.core import TyperGroup

from workbench.errors import WorkbenchError

_INTERRUPTED = 130
_USER_ERROR = 2


def _wants_traceback(context: Any) -> bool:
    return bool(context.find_root().params.get("debug")) or bool(os.environ.get("WORKBENCH_DEBUG"))


class _Group(TyperGroup):
    """The group of verbs; turns the errors a user can mend into one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except WorkbenchError as error:
            if _wants_traceback(ctx):
                traceback.print_exc()
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
            raise typer.Exit(_USER_ERROR) from error
        except KeyboardInterrupt as error:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(_INTERRUPTED) from error


def _show_version(value: bool) -> None:
    if value:
        from workbench import __version__

        print(f"workbench {__version__}")
        raise typer.Exit


def _options(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """Take a language model apart head by head."""


def _add(app: typer.Typer, verb: EntryPoint) -> None:
    """Register a verb; one that cannot be imported fails when it is called, not the whole program."""
    try:
        verb.load()(app)
    except Exception as error:
        message = (
            f"the verb {verb.name!r} ({verb.value}) cannot be loaded: {type(error).__name__}: {error}; "
            "reinstall the package behind it"
        )
        cause = error

        @app.command(
            verb.name,
            help="(cannot be loaded; call it to see why)",
            context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        )
        def unavailable() -> None:
            raise WorkbenchError(message) from cause


def make_app() -> typer.Typer:
    """The program with every verb that is installed, in alphabetical order."""
    app = typer.Typer(
        name="workbench",
        cls=_Group,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    app.callback()(_options)
    for verb in sorted(entry_points(group="workbench.verbs"), key=lambda point: point.name):
        _add(app, verb)
    return app


def main() -> None:
    """Run the program; exits 0, 1 (an incomplete result), 2 (an error the user can mend) or 130."""
    make_app()()
