"""Checkpoints from the Hugging Face hub: from its local cache if they are complete there, else one quick question."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.errors import ModelError, OutputError
from workbench.models.store import is_full, say

_TIMEOUT_S = 10.0
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
_UNWANTED = ("*/*", "consolidated*", "*.index.fp16.json")


@dataclass(frozen=True, kw_only=True)
class FetchedCheckpoint:
    """A local folder with a checkpoint, and the commit that it is."""

    folder: Path
    revision: str


def fetch_from_hub(hub_id: str, *, with_code: bool = False, endpoint: str | None = None) -> FetchedCheckpoint:
    """The checkpoint of a Hugging Face id in a local folder.

    A complete copy in the hub's cache is used as it is, without network.

    Args:
        hub_id: "gpt2" or "owner/name".
        with_code: fetch Python files too.
        endpoint: address of the hub; None for the configured one.

    Raises:
        ModelError: if the id is unknown, gated, without safetensors, or the hub cannot be reached.
        OutputError: if the disk of the hub's cache is full.
    """
    from huggingface_hub import HfApi, snapshot_download

    wanted = [*_WANTED, *(("*.py",) if with_code else ())]
    arguments: dict[str, Any] = {"allow_patterns": wanted, "ignore_patterns": list(_UNWANTED), "endpoint": endpoint}
    cached = _in_cache(hub_id, arguments)
    if cached is not None:
        return cached
    with _explained(hub_id):
        info = HfApi(endpoint=endpoint).model_info(hub_id, timeout=_TIMEOUT_S)
        files = [sibling.rfilename for sibling in info.siblings or []]
        _check_files(hub_id, files)
        say(f"fetching {hub_id} from the Hugging Face hub")
        with _no_bars():
            folder = snapshot_download(hub_id, revision=info.sha, etag_timeout=_TIMEOUT_S, **arguments)
            # The same again by branch name, so that the next run finds it without asking.
            snapshot_download(hub_id, etag_timeout=_TIMEOUT_S, **arguments)
    return FetchedCheckpoint(folder=Path(folder), revision=str(info.sha))


def _in_cache(hub_id: str, arguments: dict[str, Any]) -> FetchedCheckpoint | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, local_files_only=True, **arguments))
    except (OSError, ValueError):  # LocalEntryNotFoundError is an OSError
        return None
    complete = (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
    if complete and (index := folder / "model.safetensors.index.json").is_file():
        import json

        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        complete = all((folder / name).is_file() for name in names)
    return FetchedCheckpoint(folder=folder, revision=folder.name) if complete else None


def _check_files(hub_id: str, files: list[str]) -> None:
    if "config.json" not in files:
        ggufs = [file for file in files if file.endswith(".gguf")]
        hint = f"it holds GGUF files: download one ({ggufs[0]}) and give its path" if ggufs else "is it a model?"
        raise ModelError(f"{hub_id} on the Hugging Face hub has no config.json: {hint}")
    if not any(file.endswith(".safetensors") and "/" not in file for file in files):
        raise ModelError(
            f"{hub_id} on the Hugging Face hub has no safetensors weights; pickled ones (.bin, .pt) can run code when "
            "they are opened and are not read. If you trust them, load them with transformers, call "
            "save_pretrained(folder), and give that folder"
        )


@contextmanager
def _explained(hub_id: str) -> Iterator[None]:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    from workbench.models.default import DEFAULT

    default = f"The default model {DEFAULT!r} does not need the hub"
    try:
        yield
    except ModelError:
        raise
    except GatedRepoError as error:
        raise ModelError(
            f"{hub_id} is gated: accept its terms on its Hugging Face page, then set HF_TOKEN to a token of that "
            "account"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelError(
            f"the Hugging Face hub knows no model {hub_id!r}: check the spelling of owner and name; for a private or "
            f"gated model set HF_TOKEN. {default}"
        ) from error
    except OfflineModeIsEnabled as error:
        raise ModelError(
            f"{hub_id} is not in the local Hugging Face cache, and HF_HUB_OFFLINE forbids asking the hub: unset it, or "
            f"give a local folder. {default}"
        ) from error
    except HfHubHTTPError as error:
        raise ModelError(f"the Hugging Face hub refused {hub_id!r}: {error}. Try again later. {default}") from error
    except Exception as error:
        if is_full(error):
            from huggingface_hub.constants import HF_HUB_CACHE

            raise OutputError(
                f"the disk of the Hugging Face cache {HF_HUB_CACHE} is full, {hub_id} does not fit: free some space, "
                "or set HF_HOME to a folder on another disk"
            ) from error
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise ModelError(f"fetching {hub_id} failed: {type(error).__name__}: {error}. {default}") from error
        raise ModelError(
            f"{hub_id} is not in the local Hugging Face cache, and the hub cannot be reached "
            f"({type(error).__name__}: {error}): check the spelling and the network, or give a local folder. {default}"
        ) from error


@contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            enable_progress_bars()
