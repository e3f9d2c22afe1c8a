"""Small valid GGUF files of a random Llama model with a byte-level tokenizer, written with the `gguf` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

N_LAYERS, N_HEADS, N_KV_HEADS, D_MODEL, D_MLP, D_HEAD = 2, 4, 2, 32, 48, 8
Q8_0 = GGMLQuantizationType.Q8_0
MERGES = ("Ġ t", "h e", "Ġt he", "a n")


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins for the bytes: printable ones are themselves, the rest start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    stand_in = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [stand_in[byte] for byte in range(256)]


def vocabulary() -> list[str]:
    return ["<|endoftext|>", *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES)]


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Tensors by GGUF name, in GGUF's layout (Q and K rows interleaved for rotary pairs), tied unembedding."""
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(D_MODEL)).astype(np.float32)

    tensors = {"token_embd.weight": matrix(len(vocabulary()), D_MODEL), "output_norm.weight": norm()}
    for layer in range(N_LAYERS):
        tensors |= {
            f"blk.{layer}.{name}.weight": value
            for name, value in {
                "attn_norm": norm(),
                "attn_q": matrix(N_HEADS * D_HEAD, D_MODEL),
                "attn_k": matrix(N_KV_HEADS * D_HEAD, D_MODEL),
                "attn_v": matrix(N_KV_HEADS * D_HEAD, D_MODEL),
                "attn_output": matrix(D_MODEL, N_HEADS * D_HEAD),
                "ffn_norm": norm(),
                "ffn_gate": matrix(D_MLP, D_MODEL),
                "ffn_up": matrix(D_MLP, D_MODEL),
                "ffn_down": matrix(D_MODEL, D_MLP),
            }.items()
        }
    return tensors


def write_gguf(
    path: Path,
    *,
    tensors: Mapping[str, np.ndarray] | None = None,
    architecture: str = "llama",
    extra: Mapping[str, str | int | float] | None = None,
    q8: tuple[str, ...] = (),
) -> Path:
    """Write a file.

    Args:
        path: where.
        tensors: instead of `weights()`.
        architecture: what the file says it is.
        extra: metadata to add under the architecture's name, as `{"rope.scaling.type": "yarn"}`.
        q8: tensors whose name contains one of these are quantised to Q8_0.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(N_LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(D_MODEL)
    writer.add_feed_forward_length(D_MLP)
    writer.add_head_count(N_HEADS)
    writer.add_head_count_kv(N_KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(D_HEAD)
    writer.add_vocab_size(len(vocabulary()))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([TokenType.CONTROL] + [TokenType.NORMAL] * (len(vocabulary()) - 1))
    writer.add_token_merges(list(MERGES))
    for name in ("bos", "eos", "unk", "pad"):
        getattr(writer, f"add_{name}_token_id")(0)
    writer.add_add_bos_token(False)
    for key, value in (extra or {}).items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else None
        (add or writer.add_uint32)(f"{architecture}.{key}", value)
    for name, value in (weights() if tensors is None else tensors).items():
        if any(part in name for part in q8):
            writer.add_tensor(name, quantize(value, Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
