"""From what a user names (the default model, a Hugging Face id, a folder, a `.gguf`) to a module in memory."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import ModelError
from workbench.models.convert import cached_gguf, quiet_transformers
from workbench.models.default import DEFAULT, default_entry
from workbench.models.store import CacheEntry, read_entry

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "merges.txt")
_INDEX = "model.safetensors.index.json"
_SIMILAR = 0.72


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model in memory, before it is wrapped: transformers module in eval mode, tokenizer or None, provenance."""

    name: str
    module: "nn.Module"
    tokenizer: "PreTrainedTokenizerBase | None"
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Element type of the parameters (None: the checkpoint's), and whether code that comes along may run."""

    dtype: "torch.dtype | None" = None
    trust_remote_code: bool = False


def resolve(
    source: str | Path = DEFAULT, *, dtype: "torch.dtype | None" = None, trust_remote_code: bool = False
) -> Source:
    """Find, fetch and load what `source` names.

    Args:
        source: "smollm2-135m-instruct" (the default), a path to a folder or a `.gguf` file, the name of a cached
            conversion, or a Hugging Face id. What looks like a path is never asked of the hub.
        dtype: of the parameters; None takes what the checkpoint says (float32 for the default and for `.gguf`).
        trust_remote_code: run Python code that comes with the checkpoint.

    Raises:
        ModelError: if the source is unknown, missing, damaged or unsafe to read; the message says what to do.
        OutputError: if a conversion cannot be stored.
    """
    load = LoadOptions(dtype=dtype, trust_remote_code=trust_remote_code)
    if isinstance(source, Path) or _looks_like_path(source):
        return _from_path(Path(source).expanduser(), load)
    if source.lower() == DEFAULT:
        return _from_entry(default_entry(), load)
    if not _HUB_ID.fullmatch(source):
        raise ModelError(
            f"source={source!r} is neither a path that exists nor a Hugging Face id (like 'gpt2' or "
            f"'EleutherAI/pythia-70m'); the default model is {DEFAULT!r}"
        )
    entry = read_entry(source)
    if isinstance(entry, CacheEntry):
        return _from_entry(entry, load)
    if "/" not in source and difflib.get_close_matches(source.lower(), [DEFAULT], cutoff=_SIMILAR):
        raise ModelError(f"source={source!r} is not a known model: did you mean {DEFAULT!r}?")
    from workbench.models.hub import fetch_from_hub

    fetched = fetch_from_hub(source, with_code=trust_remote_code)
    provenance = {"source": source, "revision": fetched.revision}
    return load_folder(fetched.folder, name=source, provenance=provenance, options=load)


def _looks_like_path(source: str) -> bool:
    return (
        source.startswith((os.sep, "/", ".", "~"))
        or "\\" in source
        or source.count("/") > 1
        or source.lower().endswith(_FILE_ENDINGS)
        or (source != "" and source.lower() != DEFAULT and Path(source).exists())
    )


def _from_path(path: Path, options: LoadOptions) -> Source:
    if not path.exists():
        raise ModelError(f"there is no file or folder {path}{_neighbours(path)}. Check the spelling")
    if path.is_dir():
        return load_folder(path, name=path.resolve().name, provenance={"source": str(path)}, options=options)
    if path.suffix.lower() != ".gguf" and not _is_gguf(path):
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) is a file of a kind that is not loaded by itself: give a .gguf "
            "file, or the folder that holds config.json and the .safetensors files"
        )
    return _from_entry(cached_gguf(path), options, name=path.stem)


def _neighbours(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (and no folder {path.parent})"
    close = difflib.get_close_matches(path.name, [neighbour.name for neighbour in path.parent.iterdir()], n=1)
    return f"; {path.parent} has {close[0]!r}" if close else ""


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _from_entry(entry: CacheEntry, options: LoadOptions, *, name: str | None = None) -> Source:
    weights = {file: about["sha256"] for file, about in entry.files.items() if file.endswith(".safetensors")}
    provenance = {**entry.provenance, "safetensors_sha256": weights}
    return load_folder(entry.folder, name=name or entry.name, provenance=provenance, options=options)


def load_folder(folder: Path, *, name: str, provenance: Mapping[str, Any], options: LoadOptions) -> Source:
    """Load a checkpoint folder: `config.json`, safetensors, and a tokenizer if there is one.

    Args:
        folder: in Hugging Face form.
        name: what results will call the model.
        provenance: where it came from; facts about the loading are added.
        options: element type, and whether Python code that lies in the folder may run.

    Raises:
        ModelError: if files are missing or damaged, weights are pickled, or the class is no causal language model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_folder(folder, name)
    common = {"trust_remote_code": options.trust_remote_code, "local_files_only": True}
    weights: dict[str, Any] = {
        **common,
        "dtype": options.dtype or "auto",
        "use_safetensors": True,
        "output_loading_info": True,
    }
    with quiet_transformers():
        attention = "sdpa"
        try:
            try:
                module, report = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa", **weights)
            except ValueError as error:
                if "attention implementation" not in str(error):
                    raise
                attention = "eager"
                module, report = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **weights)
            tokenizer = None
            if any((folder / file).exists() for file in _TOKENIZER_FILES):
                tokenizer = AutoTokenizer.from_pretrained(folder, **common)
        except Exception as error:
            raise ModelError(_why_not(name, folder, error)) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"the checkpoint of {name} in {folder} lacks {len(missing)} tensors of {type(module).__name__} "
            f"({', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}), which would be random numbers. "
            "Is it a causal language model, and complete?"
        )
    facts: dict[str, Any] = {"attention": attention}
    if report["unexpected_keys"]:
        facts["ignored_tensors"] = sorted(report["unexpected_keys"])
    return Source(name=name, module=module.eval(), tokenizer=tokenizer, provenance={**provenance, **facts})


def _check_folder(folder: Path, name: str) -> None:
    """What transformers would report late, vaguely or not at all."""
    from safetensors import SafetensorError, safe_open

    held = sorted(path.name for path in folder.iterdir())
    if not (folder / "config.json").is_file():
        ggufs = [file for file in held if file.endswith(".gguf")]
        if ggufs:
            hint = f"it holds {', '.join(ggufs)}: give the path of the .gguf file itself"
        elif "adapter_config.json" in held:
            hint = "it holds an adapter: merge it into its base model first"
        else:
            hint = f"it holds {', '.join(held[:6]) or 'nothing'}; a checkpoint has config.json and .safetensors files"
        raise ModelError(f"{folder} has no config.json, so {name} cannot be loaded: {hint}")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} is damaged: {error}. Get the checkpoint again") from error
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickled = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickled:
            raise ModelError(
                f"{name} has its weights only as {', '.join(pickled)}: such files can run code when they are opened, "
                "so only safetensors are read. If you trust them, convert them once: load them with transformers and "
                "call save_pretrained(folder), which writes safetensors"
            )
        raise ModelError(f"{folder} has config.json but no .safetensors weights. Get the checkpoint again")
    if (folder / _INDEX).is_file():
        try:
            wanted = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{folder / _INDEX} is damaged: {error}. Get the checkpoint again") from error
        absent = sorted(wanted - {shard.name for shard in shards})
        if absent:
            raise ModelError(f"{folder} lacks {', '.join(absent)}, which {_INDEX} lists. Get the checkpoint again")
    for shard in shards:
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ModelError(
                f"{shard} ({shard.stat().st_size:,} bytes) is truncated or no safetensors file: {error}. Get it again"
            ) from error


def _why_not(name: str, folder: Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return (
            f"{name} comes with Python code of its own, which is not run unless you ask: read the code in {folder}, "
            "then pass trust_remote_code=True"
        )
    if "Unrecognized configuration class" in text:
        return f"{name} is not a causal language model: {text.split('Model type should be')[0].strip()}"
    return f"transformers cannot load {name} from {folder}: {type(error).__name__}: {text}"
