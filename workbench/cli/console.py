"""What the verbs say while they work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from workbench.errors import ModelError

if TYPE_CHECKING:
    import torch

    from workbench.models import Model


def progress() -> Callable[[str], None]:
    """A function that prints a line with the elapsed time to stderr, or nothing if stderr is no terminal."""
    begun = time.monotonic()
    talkative = sys.stderr.isatty()

    def say(message: str) -> None:
        if talkative:
            print(f"[{time.monotonic() - begun:6.1f} s] {message}", file=sys.stderr, flush=True)

    return say


def open_model(
    source: str | None, *, device: str | None, dtype: str | None, say: Callable[[str], None], ungroup: bool = False
) -> Model:
    """Load the model that a command line names, and say so.

    Args:
        source: what `load_model` takes; None is the default model.
        device: torch's name of the device, or None.
        dtype: torch's name of the element type, or None.
        say: told when it begins and when it is done.
        ungroup: give every query head a key/value head of its own.

    Raises:
        ModelError: if there is no such element type, or the model cannot be loaded.
    """
    say(f"loading {source or 'the default model'} ...")
    from workbench import load_model

    element = None if dtype is None else element_type(dtype, "--dtype")
    wanted = {"device": device, "dtype": element}
    options: dict[str, Any] = {name: value for name, value in wanted.items() if value is not None}
    if ungroup:
        options["ungroup"] = True
    model = load_model(**options) if source is None else load_model(source, **options)
    say(f"loaded {model.name} ({model.path} path)")
    return model


def element_type(name: str, option: str) -> torch.dtype:
    """The floating element type that a command line names.

    Raises:
        ModelError: if there is none of that name.
    """
    import torch

    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"unknown {option} {name!r}: use float32, bfloat16, float16 or float64")
    return found
