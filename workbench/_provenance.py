"""Where numbers come from: the model, the data, the seed, the versions and the command."""

from __future__ import annotations

import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from workbench.models import Model

_PACKAGES = (
    "mi-workbench",
    "torch",
    "transformers",
    "transformer-lens",
    "tokenizers",
    "triton",
    "numpy",
    "scipy",
    "pandas",
    "pyarrow",
    "safetensors",
    "gguf",
)
_ABSOLUTE = re.compile(r"""(?:(?<=^)|(?<=[\s='"(,:]))(?:file:/+|~?/(?!/)|[A-Za-z]:[\\/])[^\s'"),]*""")


def provenance(
    model: Model,
    *,
    data_hash: str,
    seed: int | None,
    command: Sequence[str] | str | None = None,
    **extra: Any,
) -> dict[str, Any]:
    """Everything needed to make a result again, as JSON values.

    Absolute paths are cut to their last part, so that a shared result does not tell of the machine it was made on.

    Args:
        model: the model that was looked at.
        data_hash: SHA-256 over the inputs.
        seed: seed of everything drawn at random; None if nothing was.
        command: the command line; None takes that of this process.
        extra: what the analysis adds, by name (window sizes, thresholds, numbers of prompts).

    Returns:
        A dictionary with the keys `model`, `tokenizer`, `prepends_bos`, `n_layers`, `n_heads`, `path_taken`,
        `refusal`, `data_hash`, `seed`, `versions`, `command`, `created` (UTC, ISO 8601) and those of `extra`.
    """
    record: dict[str, Any] = {
        "model": {
            **model.provenance,
            "name": model.name,
            "hash": model.model_hash,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
        },
        "tokenizer": _tokenizer_name(model.tokenizer),
        "prepends_bos": model.prepends_bos if model.tokenizer is not None else None,
        "n_layers": model.spec.n_layers,
        "n_heads": model.spec.n_heads,
        "path_taken": model.path,
        "refusal": model.refusal,
        "data_hash": data_hash,
        "seed": seed,
        "versions": versions(),
        "command": _command(command),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    taken = sorted(set(extra) & set(record))
    if taken:
        raise TypeError(f"provenance sets {', '.join(taken)} itself: name what the analysis adds otherwise")
    plain: dict[str, Any] = _plain({**record, **extra})
    return plain


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on, those that are installed; imports none."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def without_paths(text: str) -> str:
    """The text with every absolute path in it cut to its last part."""
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute():
        return _last_part(text)
    return _ABSOLUTE.sub(lambda match: _last_part(match[0]), text)


def _last_part(path: str) -> str:
    return PureWindowsPath(path).name or path


def _tokenizer_name(tokenizer: Any) -> str | None:
    if tokenizer is None:
        return None
    return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


def _command(command: Sequence[str] | str | None) -> str:
    if isinstance(command, str):
        return without_paths(command)
    program, *arguments = sys.argv if command is None else command
    return shlex.join([_last_part(program), *map(without_paths, arguments)])


def _plain(value: Any) -> Any:
    """The value as JSON has it; what JSON has not becomes text."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return without_paths(str(value))
