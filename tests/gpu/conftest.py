"""Tests that need a CUDA device: skipped without one, unless `--gpu-required` says that they must run."""

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-required", action="store_true", help="fail if no GPU test ran")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available() or config.getoption("gpu_required", False):
        return
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def cuda() -> torch.device:
    """The CUDA device."""
    assert torch.cuda.is_available(), "this test needs a CUDA device, and torch sees none"
    return torch.device("cuda")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests measured, beside whether they passed."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, value in getattr(report, "user_properties", []):
                terminalreporter.write_line(f"{report.nodeid.split('::')[-1]}: {name} {value}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if session.config.getoption("gpu_required", False):
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        if exitstatus == 0 and not reporter.stats.get("passed"):
            session.exitstatus = 1
