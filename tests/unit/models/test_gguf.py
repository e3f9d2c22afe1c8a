from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

import gguf_files
from workbench.errors import ModelError, OutputError
from workbench.models.convert import convert_gguf
from workbench.models.gguf_file import read_gguf_header
from workbench.models.sources import resolve


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.mark.parametrize("q8", [(), ("attn_", "token_embd")])
def test_header_agrees_with_the_gguf_package(tmp_path: Path, q8: tuple[str, ...]) -> None:
    path = gguf_files.write_gguf(tmp_path / "x.gguf", q8=q8)
    header, reader = read_gguf_header(path), GGUFReader(path)
    assert {name: (t.type_name, t.n_elements, t.start, t.n_bytes) for name, t in header.tensors.items()} == {
        t.name: (t.tensor_type.name, t.n_elements, t.data_offset, t.n_bytes) for t in reader.tensors
    }
    for name, value in header.metadata.items():
        theirs = reader.fields[name].contents()
        assert value == (len(theirs) if isinstance(theirs, list) else theirs), name
    assert header.architecture == "llama"
    assert header.quantisation == ("Q8_0" if q8 else "F32")


def test_every_cut_is_noticed_and_says_how_much_is_missing(whole: Path, tmp_path: Path) -> None:
    content = whole.read_bytes()
    end = max(t.start + t.n_bytes for t in read_gguf_header(whole).tensors.values())
    cut_file = tmp_path / "cut.gguf"
    for kept in [4, 7, 8, 23, 24, 60, 1000, 3000, 5000, 20_000, end // 2, end - 1]:
        cut_file.write_bytes(content[:kept])
        with pytest.raises(ModelError, match=rf"cut\.gguf \({kept:,} bytes\) is truncated") as caught:
            read_gguf_header(cut_file)
        assert "get the file again" in str(caught.value)
    assert "1 bytes are missing" in str(caught.value)
    cut_file.write_bytes(content[:end])
    read_gguf_header(cut_file)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", r"\(0 bytes\) is not a GGUF file: it is empty"),
        (b"<!DOCTYPE html><html>", r"\(21 bytes\) is not a GGUF file: it starts with b'<!DO'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "damaged GGUF header: version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "damaged GGUF header: version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "does not name its architecture"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 1 << 60), "ends within its own header"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77), "field 'k' has the unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 5, 1 << 60), "ends within its own header"),
    ],
)
def test_what_is_no_sound_gguf_file_is_refused_by_name(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=why) as caught:
        resolve(path)
    assert "bad.gguf" in str(caught.value)


def test_conversion_gives_the_stored_numbers_in_hugging_face_order(whole: Path) -> None:
    source = resolve(whole)
    state = source.module.state_dict()
    stored = gguf_files.weights()
    names = {
        "attn_norm": "input_layernorm",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(gguf_files.N_LAYERS):
        for theirs, ours in names.items():
            expected = stored[f"blk.{layer}.{theirs}.weight"]
            np.testing.assert_array_equal(state[f"model.layers.{layer}.{ours}.weight"].numpy(), expected)
        # GGUF interleaves the two halves that rotary embeddings pair up; transformers keeps them apart.
        for letter, heads in (("q", gguf_files.N_HEADS), ("k", gguf_files.N_KV_HEADS)):
            interleaved = stored[f"blk.{layer}.attn_{letter}.weight"]
            halves = interleaved.reshape(heads, gguf_files.D_HEAD // 2, 2, -1).swapaxes(1, 2)
            ours = state[f"model.layers.{layer}.self_attn.{letter}_proj.weight"].numpy()
            np.testing.assert_array_equal(ours.reshape(halves.shape), halves)
    np.testing.assert_array_equal(state["model.embed_tokens.weight"].numpy(), stored["token_embd.weight"])
    np.testing.assert_array_equal(state["lm_head.weight"].numpy(), stored["token_embd.weight"])
    assert source.name == "tiny"
    assert source.module.dtype == torch.float32
    assert not source.module.training
    assert source.module.config._attn_implementation == "sdpa"
    assert not hasattr(source.module.config, "quantization_config")
    assert source.provenance["note"] == "converted from F32"
    assert source.provenance["licence"] == "apache-2.0"


def test_quantised_tensors_are_dequantised_exactly(tmp_path: Path) -> None:
    path = gguf_files.write_gguf(tmp_path / "q.gguf", q8=("attn_v", "attn_q", "attn_k", "token_embd"))
    source = resolve(path)
    (packed,) = [tensor for tensor in GGUFReader(path).tensors if tensor.name == "blk.1.attn_v.weight"]
    assert packed.tensor_type == GGMLQuantizationType.Q8_0
    ours = source.module.state_dict()["model.layers.1.self_attn.v_proj.weight"].numpy()
    np.testing.assert_array_equal(ours, dequantize(packed.data, packed.tensor_type))
    assert not np.array_equal(ours, gguf_files.weights()["blk.1.attn_v.weight"])
    assert source.provenance["note"] == "dequantised Q8_0"


def test_the_tokenizer_comes_along(whole: Path) -> None:
    tokenizer = resolve(whole).tokenizer
    assert tokenizer is not None
    vocabulary = gguf_files.vocabulary()
    assert len(tokenizer) == len(vocabulary)
    assert tokenizer("a the")["input_ids"] == [vocabulary.index("a"), vocabulary.index("Ġthe")]
    text = "naïve the an\n\n then 12 中"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.model_max_length == 64


def test_a_file_is_converted_once_and_known_by_its_content(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = resolve(whole)
    output = capfd.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        f"workbench: converting tiny.gguf into {next((tmp_path / 'cache' / 'models').glob('tiny-*'))}"
    ]
    again = resolve(str(whole))
    (entry,) = (tmp_path / "cache" / "models").glob("tiny-*")
    by_entry = resolve(entry.name)
    assert capfd.readouterr() == ("", "")
    assert again.provenance == first.provenance == by_entry.provenance
    other = gguf_files.write_gguf(tmp_path / "tiny.gguf", tensors=gguf_files.weights(seed=1))
    assert resolve(other).provenance["gguf_sha256"] != first.provenance["gguf_sha256"]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"architecture": "rwkv6"}, "architecture 'rwkv6'.*original checkpoint"),
        ({"extra": {"rope.scaling.type": "yarn"}}, "rope.scaling.type = yarn would be lost"),
        ({"extra": {"attention.sliding_window": 16}}, "attention.sliding_window = 16 would be lost"),
        ({"extra": {"attention.key_length": 16}}, "heads of 16 dimensions and the conversion makes them 8"),
        ({"tensors": gguf_files.weights() | {"rope_freqs.weight": np.ones(4, np.float32)}}, "rope_freqs.weight"),
        ({"tensors": gguf_files.weights() | {"stray": np.ones(4, np.float32)}}, "some tensors have no counterpart"),
        (
            {"tensors": {k: v for k, v in gguf_files.weights().items() if k != "blk.1.attn_k.weight"}},
            r"lacks 1 tensors .*layers\.1\.self_attn\.k_proj\.weight.*random numbers",
        ),
    ],
)
def test_what_the_conversion_would_change_is_refused(tmp_path: Path, options: dict, why: str) -> None:
    path = gguf_files.write_gguf(tmp_path / "odd.gguf", **options)
    with pytest.raises(ModelError, match=why):
        resolve(path)
    assert not list((tmp_path / "cache").glob("models/odd-*"))
    assert not list((tmp_path / "cache").glob("models/.odd*partial*"))


def test_rope_scaling_of_kind_none_is_no_obstacle(tmp_path: Path) -> None:
    resolve(gguf_files.write_gguf(tmp_path / "plain.gguf", extra={"rope.scaling.type": "none"}))


def test_convert_writes_a_folder_that_loads_and_refuses_a_taken_one(whole: Path, tmp_path: Path) -> None:
    folder = convert_gguf(whole, tmp_path / "made" / "tiny")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        ours, cached = resolve(folder).module(tokens).logits, resolve(whole).module(tokens).logits
    assert torch.equal(ours, cached)
    assert not (folder / "source").exists()
    with pytest.raises(OutputError, match="is not an empty folder"):
        convert_gguf(whole, folder)
