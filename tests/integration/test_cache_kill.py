"""Captures killed with SIGKILL at random moments end, when resumed, bit for bit as if nobody had killed them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are forked")
def test_twenty_kills_and_resumes(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(
        [sys.executable, str(HERE / "cache_killer.py"), str(tmp_path), str(KILLS), "0"],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    moments = report["moments"]
    assert report["resumes"] == KILLS <= len(moments)
    assert all(1 <= moment["committed"] < report["shards"] for moment in moments)
    assert len({moment["committed"] for moment in moments}) > 4  # not always at the same place
