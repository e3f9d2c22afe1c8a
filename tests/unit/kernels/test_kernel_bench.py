"""The benchmark of the kernels runs, and counts what it says it counts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from workbench_kernels.bench.__main__ import main, markdown
from workbench_kernels.bench.cases import Problem, score_cases


def test_it_writes_json_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table = tmp_path / "bench.json", tmp_path / "bench.md"
    main(["--device", "cpu", "--quick", "--precision", "fp32", "bf16", "--repeats", "1",
          "--json", str(out), "--markdown", str(table)])  # fmt: skip
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(result["rows"]) == {"fp32", "bf16"}
    operations = {row["operation"] for row in result["rows"]["fp32"]}
    assert {
        "receiver_effects q factored",
        "receiver_effects k projected",
        "value_gradient",
        "suffix_attention",
    } < operations
    assert {"norm_delta", "inverse_sigma", "base_attention"} < operations
    for row in result["rows"]["fp32"]:
        assert "triton" not in row, "there is no kernel to time on a CPU"
        assert row["torch"]["seconds"] > 0
        assert row["torch"]["error"] < 1e-5
        assert row["floor_seconds"] == max(
            row["flops"] / result["ceilings"]["fp32"]["flops"], row["bytes"] / result["ceilings"]["fp32"]["bytes"]
        )
    assert {row["tokens"] for row in result["memory"]} == {16, 32}
    assert table.read_text(encoding="utf-8") == markdown(result)
    assert "| fp32 | norm_delta |" in capsys.readouterr().out


def test_operations_and_bytes_are_counted_by_hand() -> None:
    """2 prompts, 2 window tokens after 3, 5 senders, 4 query heads on 2 key heads of 8."""
    problem = Problem(n=2, tokens=2, senders=5, heads=4, kv_heads=2, d_head=8, prefix=3)
    cases = {case.operation: case for case in score_cases([problem], torch.float32, torch.device("cpu"))}
    pairs = 4 + 5  # the first window token sees 4 keys, the second 5
    scores = 2 * 5 * 4 * pairs * (2 * 8 + 2 * 8)  # two products of 8 a pair: score and worth
    assert cases["receiver_effects q projected"].flops == scores
    assert cases["receiver_effects k projected"].flops == scores
    assert cases["receiver_effects q factored"].flops == scores + 2 * 5 * 4 * 2 * (2 * 8 * 8)
    assert cases["receiver_effects k factored"].flops == scores + 2 * 5 * 2 * 2 * (2 * 8 * 8)
    queries, keys, moved = 2 * 2 * 4 * 8, 2 * 5 * 2 * 8, 2 * 2 * 5 * 4 * 8
    tables, base, inverse, out = 2 * 2 * 2 * 8, 2 * 2 * 4 * 8, 2 * 2 * 5, 2 * 5 * 4
    read = 2 * queries + 2 * keys + moved + base + inverse + tables + out
    assert cases["receiver_effects q projected"].bytes == 4 * read


def test_wrong_arguments_are_refused() -> None:
    for arguments, words in (
        (["--repeats", "0"], "--repeats 0: give at least 1"),
        (["--precision", "fp8"], "invalid choice: 'fp8'"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "workbench_kernels.bench", "--device", "cpu", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert words in done.stderr
