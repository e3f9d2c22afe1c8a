"""The program as a user starts it: a process of its own, its output piped."""

from __future__ import annotations

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from families import tiny_module
from workbench.cli import make_app
from workbench.tables import HeadTable

MODULE = [sys.executable, "-c", "from workbench.cli import main; main()"]


def workbench(*arguments, timeout=300):
    return subprocess.run([*MODULE, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder without a tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny_module("llama", n_layers=2).save_pretrained(path)
    return path


def test_analyze_saves_the_table_and_prints_the_strongest_heads(folder, tmp_path):
    result = workbench("analyze", "head_patterns", "--model", folder, "--out", tmp_path, "--seed", 3, "--top", 2)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    table = HeadTable.load(tmp_path)
    assert table.provenance["seed"] == 3
    best = table.top("induction", 2)
    block = next(block for block in result.stdout.split("\n\n") if block.startswith("induction"))
    names = [f"a{layer}.h{head}" for layer, head in zip(best["layer"], best["head"], strict=True)]
    assert [line.split()[0] for line in block.splitlines()[1:]] == names


def test_report_of_a_model_without_tokenizer_is_incomplete_and_says_so(folder, tmp_path):
    result = workbench("report", "--model", folder, "--out", tmp_path / "report", "--quick")
    assert result.returncode == 1
    errors = result.stderr.strip().splitlines()
    for line, section in zip(errors, ("competence", "head_effects"), strict=True):
        assert line.startswith(f"error: section {section} failed: ")
        assert "tokenizer" in line
    assert result.stdout.strip() == str(tmp_path / "report" / "index.html")
    manifest = json.loads((tmp_path / "report" / "manifest.json").read_text())
    assert manifest["status"] == "incomplete"
    statuses = {each["name"]: each["status"] for each in manifest["sections"]}
    assert {name for name, status in statuses.items() if status == "failed"} == {"competence", "head_effects"}
    assert {name for name, status in statuses.items() if status == "complete"} >= {"attention_sinks", "head_patterns"}
    assert "natural text was left out" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_same_seed_writes_the_same_numbers(folder, tmp_path):
    for name in ("first", "second"):
        arguments = ["analyze", "head_patterns", "--model", str(folder), "--out", str(tmp_path / name), "--seed", "5"]
        assert CliRunner().invoke(make_app(), arguments).exit_code == 0
    assert (tmp_path / "first" / "table.csv").read_bytes() == (tmp_path / "second" / "table.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "--out", "{tmp}/taken/below"], "a file is in the way"),
        (["report", "--out", "/proc/nowhere"], "cannot write /proc/nowhere"),
        (["report", "--out", "{tmp}/new", "--model", "{tmp}/no-such-folder"], "no-such-folder"),
        (["report", "--out", "{tmp}/new", "--dtype", "int8"], "unknown --dtype 'int8'"),
        (["analyze", "nope", "--out", "{tmp}/new"], "unknown analysis 'nope'"),
    ],
)
def test_what_a_user_gets_wrong_costs_one_line(tmp_path, arguments, message):
    (tmp_path / "taken").write_text("")
    result = workbench(*(each.format(tmp=tmp_path) for each in arguments))
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr


def test_debug_adds_the_traceback(tmp_path):
    result = workbench("--debug", "analyze", "nope", "--out", tmp_path)
    assert result.returncode == 2
    assert "Traceback" in result.stderr


def test_full_disk_is_told_before_the_model_is_loaded(tmp_path):
    """A tmpfs of 4 MB, in a mount namespace of its own."""
    script = (
        f"mount -t tmpfs -o size=4m none {tmp_path} && exec {sys.executable} -c "
        f"'from workbench.cli import main; main()' report --out {tmp_path}/report --model no-such-model"
    )
    allowed = subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode == 0
    if not allowed:
        pytest.skip("no mount namespaces here")
    result = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert "no room to write" in result.stderr
    assert "no-such-model" not in result.stderr


@pytest.mark.model
def test_quick_report_of_the_default_model(default_model, tmp_path):
    result = workbench("report", "--out", tmp_path, "--quick", timeout=900)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["provenance"]["model"]["hash"] == default_model.model_hash
    heads = pd.read_parquet(tmp_path / "heads.parquet")
    in_heads = heads.dropna(subset=["layer", "head"])
    spec = default_model.spec
    for metric in ("alpha", "sink_rate", "induction", "previous_token", "duplicate_token"):
        rows = in_heads[in_heads["metric"] == metric]
        assert len(rows[["layer", "head"]].drop_duplicates()) == spec.n_layers * spec.n_heads
        assert rows["value"].between(0, 1).all()
    torch.testing.assert_close(
        torch.tensor(heads["value"].to_numpy()), torch.tensor(pd.read_csv(tmp_path / "heads.csv")["value"].to_numpy())
    )
