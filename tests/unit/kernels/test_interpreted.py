"""Run the tests of `interpreted/`, each file in a process of its own in which Triton interprets kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workbench_kernels import has_triton

FILES = sorted((Path(__file__).parent / "interpreted").glob("test_*.py"))
ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(not has_triton(), reason="triton is not installed")
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_in_the_interpreter(path: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "WORKBENCH_"))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
        str(path),
    ]
    done = subprocess.run(
        [*command, str(path)],
        cwd=ROOT,
        env={**kept, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert passed is not None, done.stdout
    assert int(passed[1]) > 0
