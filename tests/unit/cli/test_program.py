import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest
import typer
from typer.testing import CliRunner

from workbench import cli
from workbench.errors import DataError


def program(monkeypatch, **verbs):
    """The program with verbs made of functions."""
    points = []
    for name, body in verbs.items():
        point = EntryPoint(name=name, group="workbench.verbs", value="somewhere:register")
        monkeypatch.setitem(point.__dict__, "load", lambda name=name, body=body: lambda app: app.command(name)(body))
        points.append(point)
    monkeypatch.setattr(cli, "entry_points", lambda group: points)
    return cli.make_app()


def bad():
    raise DataError("first line\n   second line")


def other():
    """Do nothing."""


def test_error_is_one_line_and_exit_code_2(monkeypatch):
    result = CliRunner().invoke(program(monkeypatch, bad=bad, other=other), ["bad"])
    assert result.exit_code == 2
    assert result.stderr == "error: first line second line\n"
    assert result.stdout == ""


def test_debug_shows_the_traceback(monkeypatch):
    result = CliRunner().invoke(program(monkeypatch, bad=bad, other=other), ["--debug", "bad"])
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "error: first line second line" in result.stderr


def test_interrupt_is_130(monkeypatch):
    def stop():
        raise KeyboardInterrupt

    assert CliRunner().invoke(program(monkeypatch, stop=stop, other=other), ["stop"]).exit_code == 130


def test_unforeseen_error_is_not_hidden(monkeypatch):
    def bug():
        raise ZeroDivisionError

    result = CliRunner().invoke(program(monkeypatch, bug=bug, other=other), ["bug"])
    assert isinstance(result.exception, ZeroDivisionError)


def test_verb_that_cannot_be_imported_does_not_break_the_others(monkeypatch):
    points = [
        EntryPoint(name="lost", group="workbench.verbs", value="no_such_module:register"),
        EntryPoint(name="report", group="workbench.verbs", value="workbench.cli.report:register"),
    ]
    monkeypatch.setattr(cli, "entry_points", lambda group: points)
    app = cli.make_app()
    assert CliRunner().invoke(app, ["--help"]).exit_code == 0
    result = CliRunner().invoke(app, ["lost", "--some", "thing"])
    assert result.exit_code == 2
    assert "verb 'lost'" in result.stderr
    assert "no_such_module" in result.stderr


def test_report_refuses_a_file_as_folder_before_loading_a_model(tmp_path):
    (tmp_path / "taken").write_text("")
    result = CliRunner().invoke(
        cli.make_app(), ["report", "--out", str(tmp_path / "taken"), "--model", "no such model"]
    )
    assert result.exit_code == 2
    assert "a file is in the way" in result.stderr


def test_unknown_analysis_names_those_there_are(tmp_path):
    result = CliRunner().invoke(cli.make_app(), ["analyze", "nope", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert "unknown analysis 'nope'" in result.stderr
    assert "attention_sinks" in result.stderr


def test_version():
    from workbench import __version__

    result = CliRunner().invoke(cli.make_app(), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"workbench {__version__}\n")


@pytest.mark.parametrize("arguments", [["--help"], ["report", "--help"], ["analyze", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom workbench.cli import make_app\n"
        f"try:\n    make_app()({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas', 'plotly', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_progress_is_silent_without_a_terminal(capsys):
    from workbench.cli.console import progress

    progress()("something")
    assert capsys.readouterr() == ("", "")


def test_unknown_dtype_is_refused_before_loading():
    from workbench.cli.console import open_model
    from workbench.errors import ModelError

    with pytest.raises(ModelError, match="unknown --dtype 'int8'"):
        open_model("no such model", device=None, dtype="int8", say=lambda message: None)


def test_app_has_the_group_that_reports_errors():
    assert isinstance(typer.main.get_command(cli.make_app()), cli._Group)
