"""`workbench capture`, and a capture of the default model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import workbench as wb
from families import tiny_module
from tiny_text import tiny_text_model
from workbench.cli import make_app
from workbench.cli.capture import bytes_of, layers_of
from workbench.errors import PromptError


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_module("llama", n_layers=2).save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(make_app(), ["capture", *map(str, arguments)])


def test_token_ids_from_a_file_are_captured_and_gone_on_with(model_folder, tmp_path):
    ids = torch.randint(101, (6, 8), generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "ids.npy", ids.numpy())
    options = ["--tokens", tmp_path / "ids.npy", "--model", model_folder, "--out", tmp_path / "out", "--batch-size", 4]
    options += ["--names", "z,blocks.1.attn.hook_pattern", "--reduce", "pattern.key_mean,pattern.diagonals(1,2)"]
    result = run(
        *options, "--reduce", "z.norm,z.raw", "--layers", "0-1", "--budget", "10MB", "--store-dtype", "float16"
    )
    assert result.exit_code == 0, result.stderr
    assert "6 prompts x 8 tokens, pattern.key_mean layer 1; pattern.diagonals(1,2) layer 1; z.norm" in result.stdout
    assert "48 tokens in" in result.stdout
    assert result.stdout.startswith("estimate: 6 prompts x 8 tokens in 2 batches of 4: ")
    held = wb.open_cache(tmp_path / "out")
    assert torch.equal(held.tokens, ids)
    model = wb.load_model(str(model_folder))
    again = wb.capture(model, ids, ["z", "pattern"], batch_size=4, dtype=torch.float16)
    assert torch.equal(held["z", 1], again["z", 1])
    refused = run(*options)
    assert refused.exit_code == 2
    assert "holds a capture already: add --resume" in refused.stderr
    other = run(*options, "--resume")
    assert other.exit_code == 2
    assert "holds another capture: names" in other.stderr


def test_ids_in_lines_of_text_are_padded(model_folder, tmp_path):
    (tmp_path / "ids.txt").write_text("5 6 7\n\n8\n1 2 3 4\n")
    result = run("--tokens", tmp_path / "ids.txt", "--names", "z", "--model", model_folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    held = wb.open_cache(tmp_path / "out")
    assert held.lengths.tolist() == [3, 1, 4]
    assert held.tokens.tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [1, 2, 3, 4]]


def test_a_text_is_cut_into_windows(tmp_path):
    model = tiny_text_model()
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("Then Mary and John went to the store")
    options = [
        "--text",
        tmp_path / "a.txt",
        "--text",
        tmp_path / "a.txt",
        "--names",
        "z",
        "--model",
        tmp_path / "model",
    ]
    result = run(*options, "--out", tmp_path / "out", "--length", 5)
    assert result.exit_code == 0, result.stderr
    held = wb.open_cache(tmp_path / "out")
    assert held.lengths.tolist() == [5, 3, 5, 3]
    assert torch.equal(held.tokens[0], held.tokens[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--names", "z"], "give either --text FILE or --tokens FILE"),
        (["--names", "z", "--tokens", "{tmp}/none.npy"], "cannot read --tokens"),
        (["--names", "z", "--tokens", "{tmp}/words.txt"], "ids separated by spaces"),
        (["--names", "z", "--tokens", "{tmp}/ids.txt", "--budget", "lots"], "--budget 'lots' is not a size"),
        (["--names", "z", "--tokens", "{tmp}/ids.txt", "--budget", "1kB"], "budget_bytes is 1,000"),
        (["--names", "zz", "--tokens", "{tmp}/ids.txt"], "unknown name 'zz'"),
        (["--names", "z", "--tokens", "{tmp}/ids.txt", "--layers", "3-1"], "--layers '3-1' does not parse"),
        (["--names", "z", "--tokens", "{tmp}/ids.txt", "--store-dtype", "int8"], "unknown --store-dtype 'int8'"),
        (["--names", "z", "--text", "{tmp}/ids.txt"], "needs a tokenizer"),
    ],
)
def test_what_a_user_gets_wrong_costs_one_line(model_folder, tmp_path, arguments, message):
    (tmp_path / "ids.txt").write_text("1 2 3\n")
    (tmp_path / "words.txt").write_text("one two\n")
    filled = [each.format(tmp=tmp_path) for each in arguments]
    result = run(*filled, "--model", model_folder, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr


@pytest.mark.parametrize(
    ("text", "value"),
    [("1GB", 10**9), ("512MiB", 512 * 2**20), ("1.5 kb", 1500), ("100000", 100_000), ("2G", 2 * 10**9)],
)
def test_sizes(text, value):
    assert bytes_of(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "0"])
def test_no_sizes(text):
    with pytest.raises(PromptError, match="is not a size"):
        bytes_of(text)


def test_layers():
    assert layers_of("0,3, 8-11") == [0, 3, 8, 9, 10, 11]


@pytest.mark.model
def test_the_default_model_is_captured_as_transformers_runs_it(default_model, tmp_path):
    texts = ["The capital of France is Paris, and that of Italy is Rome.", "One, two, three"]
    held = wb.capture(default_model, texts, ["resid_post", "pattern"], layers=[0, 14, 29], reduce={"pattern": "last"})
    stored = wb.capture(default_model, texts, ["z"], layers=[14], store=tmp_path, dtype=torch.float16)
    tokens, lengths = default_model.to_tokens(texts)
    heads = default_model.spec.n_heads
    with torch.no_grad():
        found = default_model.module(tokens, output_hidden_states=True)
    for prompt, length in enumerate(lengths.tolist()):
        ours, theirs = held["resid_post", 14][prompt, :length], found.hidden_states[15][prompt, :length]
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
        last = held["pattern.last", 29][prompt]
        assert last.shape == (heads, tokens.shape[1])
        torch.testing.assert_close(last[:, :length].sum(-1), torch.ones(heads))
        assert last[:, length:].eq(0).all()
    opened = wb.open_cache(tmp_path)
    assert torch.equal(opened["z", 14, 3], stored["z", 14][:, :, 3])
    assert held["resid_post", 29].isfinite().all()
