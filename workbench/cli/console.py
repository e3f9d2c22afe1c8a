"""What the verbs say while they work."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


def progress() -> Callable[[str], None]:
    """A function that prints a line with the elapsed time to stderr, or nothing if stderr is no terminal."""
    begun = time.monotonic()
    talkative = sys.stderr.isatty()

    def say(message: str) -> None:
        if talkative:
            print(f"[{time.monotonic() - begun:6.1f} s] {message}", file=sys.stderr, flush=True)

    return say
