"""A `.gguf` file as a folder in Hugging Face form: dequantised once, float32, safetensors and tokenizer."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from workbench.errors import ModelError
from workbench.models.gguf_file import GGUFHeader, read_gguf_header
from workbench.models.store import CacheEntry, ensure_entry, file_sha256, models_folder, new_folder, read_entry, say

_NAME_HASH_DIGITS = 12
_UNQUANTISED = ("F64", "F32", "F16", "BF16")
_TOKENIZER_BYTES = 16_000_000
# Fields that change the numbers a model computes. One that the conversion has no place for means a refusal.
_NUMERIC_FIELDS = (
    "rope.scaling.type",
    "rope.scaling.factor",
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
)
_HARMLESS = (0, 0.0, "none", None)


def float32_bytes(header: GGUFHeader) -> int:
    """Disk space that the converted model takes, in bytes."""
    return 4 * header.n_elements + _TOKENIZER_BYTES


def cached_gguf(path: Path) -> CacheEntry:
    """The cache entry of a `.gguf` file, keyed by its SHA-256; converted when it is not there yet.

    Raises:
        ModelError: if the file is missing, damaged, or of a kind that cannot be converted faithfully.
        OutputError: if the cache cannot be written or the disk is too full.
    """
    header = read_gguf_header(path)
    sha256 = file_sha256(path)
    name = f"{path.stem.lower()}-{sha256[:_NAME_HASH_DIGITS]}"

    def build(folder: Path) -> dict[str, Any]:
        say(f"converting {path.name} into {models_folder() / name}")
        return write_converted(header, folder, sha256=sha256)

    if not isinstance(read_entry(name), CacheEntry):
        check_convertible(header)
    return ensure_entry(name, bytes_needed=float32_bytes(header), build=build)


def convert_gguf(path: Path, out: Path) -> Path:
    """Convert a `.gguf` file into a new folder that `load_model` and transformers read.

    Args:
        path: the file.
        out: the folder to make; absent or empty.

    Returns:
        `out`.

    Raises:
        ModelError: if the file is missing, damaged, or of a kind that cannot be converted faithfully.
        OutputError: if `out` is taken or cannot be written, or the disk is too full; nothing is left behind.
    """
    header = read_gguf_header(path)
    check_convertible(header)
    with new_folder(out, bytes_needed=float32_bytes(header)) as folder:
        write_converted(header, folder, sha256=file_sha256(path))
    return out


def check_convertible(header: GGUFHeader) -> None:
    """Refuse a file whose architecture or numerics the conversion would drop.

    Raises:
        ModelError: names the file and what has no counterpart.
    """
    from transformers.integrations import GGUF_CONFIG_MAPPING

    architecture = header.architecture
    mapping = GGUF_CONFIG_MAPPING.get(architecture) or GGUF_CONFIG_MAPPING.get(architecture.replace("-", "_"))
    remedy = "Use the model's original checkpoint (a Hugging Face id or folder) instead"
    if mapping is None:
        known = ", ".join(sorted(set(GGUF_CONFIG_MAPPING) - {"general", "tokenizer"}))
        raise ModelError(
            f"{header.path} holds the architecture {architecture!r}; the installed transformers converts {known}. "
            f"{remedy}"
        )
    lost = [
        f"{field} = {header.metadata[f'{architecture}.{field}']}"
        for field in _NUMERIC_FIELDS
        if header.metadata.get(f"{architecture}.{field}") not in _HARMLESS and not mapping.get(field)
    ]
    if "rope_freqs.weight" in header.tensors:
        lost.append("the tensor rope_freqs.weight (scaled rotary frequencies)")
    if lost:
        raise ModelError(f"{header.path} cannot be converted faithfully: {'; '.join(lost)} would be lost. {remedy}")


def write_converted(header: GGUFHeader, folder: Path, *, sha256: str) -> dict[str, Any]:
    """Dequantise a GGUF file and save model and tokenizer into a folder.

    Args:
        header: of the file, as checked by `read_gguf_header`.
        folder: where to write; exists.
        sha256: of the GGUF file, for the provenance.

    Returns:
        Provenance: file, SHA-256, quantisation, licence.

    Raises:
        ModelError: if transformers cannot read the file, or its tensors and the model's parameters do not match.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = header.path
    # One of the progress bars has no switch, hence the redirection.
    with _alone(path, folder) as place, quiet_transformers(), redirect_stderr(io.StringIO()):
        try:
            model, report = AutoModelForCausalLM.from_pretrained(
                place, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=path.name)
        except Exception as error:
            raise ModelError(f"transformers cannot convert {path}: {type(error).__name__}: {error}") from error
    _check_complete(header, model, report["missing_keys"])
    # A model that was read from GGUF refuses to be saved, so its weights move into a fresh one without that mark.
    config = type(model.config)(
        **{key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    with torch.device("meta"):
        clean = type(model)(config)
    clean.load_state_dict(model.state_dict(), assign=True)
    clean.tie_weights()
    clean.generation_config = model.generation_config
    context = getattr(config, "max_position_embeddings", None)
    if context:
        tokenizer.model_max_length = context
    with quiet_transformers():
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {
        "source": path.name,
        "note": f"{'converted from' if header.quantisation in _UNQUANTISED else 'dequantised'} {header.quantisation}",
        "gguf_sha256": sha256,
        "licence": header.metadata.get("general.license"),
        "converted_dtype": "float32",
    }


def _check_complete(header: GGUFHeader, model: Any, missing: Any) -> None:
    if missing:
        raise ModelError(
            f"{header.path} lacks {len(missing)} tensors of a {model.config.model_type} model "
            f"({', '.join(sorted(missing)[:3])} ...), which would be random numbers. Get a complete file"
        )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    if n_parameters != header.n_elements:
        raise ModelError(
            f"{header.path} holds {header.n_elements:,} numbers and the converted {model.config.model_type} model "
            f"{n_parameters:,}: some tensors have no counterpart. Use the model's original checkpoint instead"
        )
    d_head = header.metadata.get(f"{header.architecture}.attention.key_length")
    ours = getattr(model.config, "head_dim", None)
    if d_head and ours and d_head != ours:
        raise ModelError(
            f"{header.path} has heads of {d_head} dimensions and the conversion makes them {ours}. "
            "Use the model's original checkpoint instead"
        )


@contextmanager
def _alone(path: Path, scratch: Path) -> Iterator[Path]:
    """A folder in which the file has no neighbours that transformers could read along with it."""
    place = scratch / "source"
    place.mkdir()
    try:
        try:
            (place / path.name).symlink_to(path.resolve())
        except OSError:  # no links on this file system
            shutil.copyfile(path, place / path.name)
        yield place
    finally:
        shutil.rmtree(place)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
