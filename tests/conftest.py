"""What every test shares: no hub, threads shared out among workers, the default model loaded once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

import workbench

if TYPE_CHECKING:
    from workbench.models import Model

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything here imports huggingface_hub, which reads it once

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_THREADS = max(1, (os.cpu_count() or 1) // _WORKERS)
os.environ.setdefault("OMP_NUM_THREADS", str(_THREADS))  # for the processes that tests start
torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session")
def default_model() -> Model:
    """SmolLM2-135M-Instruct on the CPU in float32; fetched and converted on first use, from the cache afterwards."""
    return workbench.load_model(device="cpu")
