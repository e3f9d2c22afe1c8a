"""Kernels compile for an H100 or H200 on a machine without one, within its registers and shared memory."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench_kernels import has_triton
from workbench_kernels.bench.resources import (
    SHARED_LIMIT,
    Resources,
    attend_variants,
    norm_variants,
    score_variants,
)

pytestmark = [
    pytest.mark.skipif(not has_triton(), reason="triton is not installed"),
    pytest.mark.skipif(
        platform.machine() not in {"x86_64", "aarch64"}, reason="triton brings no ptxas for this machine"
    ),
]


def compiled(found: Iterator[Resources]) -> list[Resources]:
    """Compile a list of variants; none may spill, or need more shared memory than a block can have."""
    made = list(found)
    for one in made:
        assert one.stack == 0, one
        assert one.registers <= 255, one
        assert one.shared <= SHARED_LIMIT, one
    return made


def test_float32_is_multiplied_in_float32() -> None:
    """Not rounded to TF32: no product of these kernels runs on the matrix units."""
    made = compiled(score_variants("float32", "ieee", 64, 1024))
    made += compiled(attend_variants("float32", "ieee", 64, 1024))
    assert len(made) == 7
    assert all(one.matrix_instructions == 0 for one in made)


def test_bfloat16_is_multiplied_on_the_matrix_units() -> None:
    made = compiled(score_variants("bfloat16", "ieee", 128, 1024))
    made += compiled(attend_variants("bfloat16", "ieee", 128, 1024))
    assert all(one.matrix_instructions > 0 for one in made)


def test_tf32_is_multiplied_on_the_matrix_units() -> None:
    made = compiled(attend_variants("float32", "tf32", 64, 16))
    assert made[0].matrix_instructions > 0


def test_norms() -> None:
    assert len(compiled(norm_variants("float32", 768))) == 4


@pytest.mark.parametrize("statement", ["import workbench_kernels", "from workbench_kernels.bench import resources"])
def test_nothing_imports_triton_before_a_kernel_runs(statement: str) -> None:
    code = f"import sys; {statement}; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_without_triton_the_references_serve() -> None:
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "sys.modules['triton'] = None\n"
        "import torch, workbench_kernels as wk\n"
        "x = torch.ones(1, 1, 1, 2)\n"
        "print(wk.suffix_attention(x[None], x[None], x[None], x, x, torch.tensor([1]), scale=1.0).tolist())\n"
        "try:\n"
        "    wk.norm_delta('rmsnorm', x[0], x, torch.ones(2), eps=0.0, backend='triton')\n"
        "except wk.KernelError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "[[[[[1.0, 1.0]]]]]"
    assert "triton is not installed" in done.stdout


def test_the_kernels_know_no_model() -> None:
    sources = list((Path(__file__).parents[3] / "kernels" / "workbench_kernels").rglob("*.py"))
    assert len(sources) > 10
    for path in sources:
        text = path.read_text(encoding="utf-8")
        assert "import workbench\n" not in text, path
        assert "from workbench." not in text, path
        assert "transformers" not in text, path
