"""Unfinished work, kept on disk so that a later call can go on from it."""

import json
import os
import time
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from workbench.errors import DataError, OutputError

SECONDS_BETWEEN_WRITES = 10.0


class PartialResult:
    """Per-prompt effects that are already known, by method, in a folder of their own.

    Args:
        folder: where.
        key: hash of all that the effects depend on.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self._written = time.monotonic()

    @classmethod
    def open(cls, folder: str | Path, key: str) -> "PartialResult":
        """Open a folder of unfinished work, or begin one.

        Raises:
            DataError: if it holds unfinished work of another model, other prompts, edges or settings.
            OutputError: if it cannot be written.
        """
        folder = Path(folder)
        manifest = folder / "partial.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if manifest.exists():
                found = json.loads(manifest.read_text(encoding="utf-8"))["key"]
                if found != key:
                    raise DataError(
                        f"{folder} holds unfinished work of another model, other prompts, edges or settings "
                        f"(key {str(found)[:12]}, this call has {key[:12]}): choose another folder, or delete it"
                    )
            else:
                manifest.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{manifest} is damaged: {error}. Delete {folder} and begin again") from error
        except OSError as error:
            raise OutputError(f"cannot keep unfinished work in {folder}: {error.strerror or error}") from error
        return cls(folder, key)

    def _file(self, method: str, n_edges: int) -> Path:
        return self.folder / f"partial-{method}-{n_edges}.safetensors"

    def restore(self, method: str, values: np.ndarray) -> None:
        """Fill in what is known of `values [edges, n]`; a damaged file is set aside and computed again."""
        path = self._file(method, len(values))
        if not path.exists():
            return
        try:
            known = load_file(path)["effects"]
        except (SafetensorError, OSError, KeyError, ValueError):
            path.unlink(missing_ok=True)
            return
        if known.shape == values.shape and known.dtype == values.dtype:
            values[:] = known

    def store(self, method: str, values: np.ndarray, *, now: bool = False) -> None:
        """Write what is known, unless that was done a moment ago.

        Raises:
            OutputError: if it cannot be written; what was written before stays.
        """
        if not now and time.monotonic() - self._written < SECONDS_BETWEEN_WRITES:
            return
        path = self._file(method, len(values))
        fresh = path.with_suffix(".new")
        try:
            save_file({"effects": np.ascontiguousarray(values)}, fresh)
            os.replace(fresh, path)
        except (OSError, SafetensorError) as error:
            fresh.unlink(missing_ok=True)
            raise OutputError(f"cannot keep unfinished work in {self.folder}: {error}") from error
        self._written = time.monotonic()

    def discard(self) -> None:
        """Remove the unfinished work: the result is complete."""
        for path in [*self.folder.glob("partial-*.safetensors"), self.folder / "partial.json"]:
            path.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
