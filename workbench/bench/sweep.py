"""Time whole sweeps of edge effects on one device: `python -m workbench.bench.sweep --device cuda`.

Random weights of GPT-2 small's shape, no download, and neither TransformerLens nor plotly: this also runs where only
torch and transformers are installed.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from workbench.bench.shapes import SHAPES, random_model, random_pairs
from workbench.models import wrap_model
from workbench.patching.attribution import attribution_effects
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Graph
from workbench.patching.receiver_exact import receiver_exact_effects
from workbench.patching.runs import make_runs

BUDGET_BYTES = 4 << 30


def sweep(shape: str, *, device: str, prompts: int, tokens: int, exact_edges: int, seed: int = 0) -> dict[str, object]:
    """Seconds and peak memory of each method.

    Args:
        shape: name of one of `SHAPES`.
        device: for example `cuda`.
        prompts: number of prompts.
        tokens: length of each; clean and corrupted differ everywhere.
        exact_edges: uniform sample of head edges that `exact` is timed on; the whole sweep is extrapolated.
        seed: of weights, prompts and sample.
    """
    where = torch.device(device)
    cpu_model = random_model(SHAPES[shape], seed=seed)
    assert cpu_model.module is not None
    model = wrap_model(cpu_model.module.to(where), name=cpu_model.name)
    pairs = random_pairs(SHAPES[shape], n=prompts, tokens=tokens, first_difference=0, seed=seed)
    edges = Graph(model.spec).head_edges()
    drawn = np.random.default_rng(seed).choice(len(edges), min(exact_edges, len(edges)), replace=False)
    sample = edges[np.sort(drawn)]
    weights = model.fast_weights

    def timed(work: Callable[[], object]) -> dict[str, float | None]:
        work()
        if where.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        work()
        if where.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / (1 << 30) if where.type == "cuda" else None,
        }

    runs = make_runs(weights, pairs, direction="noising", metric="logit_diff")
    found = {
        "runs": timed(lambda: make_runs(weights, pairs, direction="noising", metric="logit_diff")),
        "exact": timed(lambda: list(exact_effects(runs, sample, budget_bytes=BUDGET_BYTES))),
        "receiver_exact": timed(lambda: list(receiver_exact_effects(runs, edges, budget_bytes=BUDGET_BYTES))),
        "eap": timed(lambda: list(attribution_effects(runs, edges))),
    }
    exact_seconds = found["exact"]["seconds"]
    assert exact_seconds is not None
    found["exact"]["seconds_extrapolated"] = exact_seconds * len(edges) / len(sample)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "shape": shape,
        "prompts": prompts,
        "tokens": tokens,
        "head_edges": len(edges),
        "exact_edges": len(sample),
        "methods": found,
    }


def main() -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="gpt2", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--exact-edges", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    result = sweep(
        given.shape, device=given.device, prompts=given.prompts, tokens=given.tokens, exact_edges=given.exact_edges
    )
    text = json.dumps(result, indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
