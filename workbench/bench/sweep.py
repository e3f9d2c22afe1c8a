"""Time whole sweeps of edge effects on one device: `python -m workbench.bench.sweep --device cuda`.

Random weights of GPT-2 small's shape, no download, and neither TransformerLens nor plotly: this also runs where only
torch and transformers are installed. Beside each exact sweep stands what the device would need for its products alone
at the rate of a large product, and beside TF32 its error, over all edges that were swept.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import workbench_kernels
from workbench.bench.shapes import SHAPES, random_model, random_pairs
from workbench.models import ModelSpec, wrap_model
from workbench.patching.attribution import attribution_effects
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Edges, Graph
from workbench.patching.precision import Precision, precision_error, products
from workbench.patching.receiver_exact import receiver_exact_effects
from workbench.patching.runs import make_runs

BUDGET_BYTES = 4 << 30
Found = Iterator[tuple[Tensor, Tensor]]


def walk_flops(spec: ModelSpec, layer: int, *, prompts: int, tokens: int) -> float:
    """Operations of the products that an edge into a head of `layer` takes after its receiver has written.

    The block's MLP, then whole blocks; of the last block everything but the cheapest way to keys and values happens at
    the answer position alone. Norms, softmax and the receiver itself are not counted.
    """
    heads, kv = spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head
    mlp = 2.0 * spec.d_model * spec.d_mlp * (3 if spec.gated else 2)
    projections = 2.0 * spec.d_model * (2 * heads + 2 * kv)
    scores = 2.0 * heads * (tokens + 1)  # two products, half of the pairs
    last = spec.n_layers - 1
    if layer == last:
        return prompts * mlp
    whole = prompts * tokens * (mlp + projections + scores)
    formed = tokens * 4.0 * spec.d_model * kv
    unformed = 4.0 * spec.d_model * (heads + spec.n_heads * tokens)
    at_answer = prompts * (mlp + 4.0 * spec.d_model * heads + min(formed, unformed))
    return prompts * tokens * mlp + (last - layer - 1) * whole + at_answer


def sweep(
    shape: str, *, device: str, prompts: int, tokens: int, exact_edges: int, seed: int = 0, say: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds, peak memory, rates and errors of each method.

    Args:
        shape: name of one of `SHAPES`.
        device: for example `cuda`.
        prompts: number of prompts.
        tokens: length of each; clean and corrupted differ everywhere.
        exact_edges: how many head edges, drawn uniformly, `exact` sweeps; 0 for all.
        seed: of weights, prompts and sample.
        say: called with a line before each measurement.
    """
    where = torch.device(device)
    cpu_model = random_model(SHAPES[shape], seed=seed)
    assert cpu_model.module is not None
    model = wrap_model(cpu_model.module.to(where), name=cpu_model.name)
    pairs = random_pairs(SHAPES[shape], n=prompts, tokens=tokens, first_difference=0, seed=seed)
    edges = Graph(model.spec).head_edges()
    count = min(exact_edges or len(edges), len(edges))
    sample = edges[np.sort(np.random.default_rng(seed).choice(len(edges), count, replace=False))]
    weights = model.fast_weights
    runs = make_runs(weights, pairs, direction="noising", metric="logit_diff")
    receivers = sample.graph.receivers
    flops = sum(
        walk_flops(weights.spec, receivers[number].layer, prompts=prompts, tokens=tokens) for number in sample.receiver
    )
    precisions: tuple[Precision, ...] = ("fp32", "tf32") if where.type == "cuda" else ("fp32",)
    found: dict[str, dict[str, Any]] = {}
    values: dict[str, np.ndarray] = {}

    def measured(name: str, of: Edges, work: Callable[[Edges], Found], precision: Precision, warm: int) -> None:
        say(f"{name}, {precision}: {len(of)} edges")
        with products(precision, where):
            list(work(of[np.unique(np.linspace(0, len(of) - 1, min(warm, len(of))).round().astype(int))]))
            _wait(where, reset=True)
            began = time.perf_counter()
            parts = list(work(of))
            _wait(where)
            seconds = time.perf_counter() - began
        effects = np.empty((len(of), prompts))
        for index, part in parts:
            effects[index.numpy()] = part.double().cpu().numpy()
        key = f"{name} {precision}"
        values[key] = effects
        found[key] = {"edges": len(of), "seconds": seconds, "peak_gib": _peak(where)}
        if precision != "fp32":
            found[key]["error"] = precision_error(effects, values[f"{name} fp32"])

    ceilings = {}
    for precision in precisions:
        ceilings[precision] = _product_rate(where, precision)
        measured("exact", sample, lambda e: exact_effects(runs, e, budget_bytes=BUDGET_BYTES), precision, 256)
        rate = flops / found[f"exact {precision}"]["seconds"]
        found[f"exact {precision}"] |= {
            "flops": flops,
            "tflops": rate / 1e12,
            "share_of_ceiling": rate / ceilings[precision],
            "seconds_all_edges": found[f"exact {precision}"]["seconds"] * len(edges) / len(sample),
        }
        measured(
            "receiver_exact",
            edges,
            lambda e, p=precision: receiver_exact_effects(runs, e, budget_bytes=BUDGET_BYTES, precision=p),  # type: ignore[misc]
            precision,
            len(edges),
        )
        measured("eap", edges, lambda e: attribution_effects(runs, e), precision, len(edges))
    if where.type == "cuda":
        with _backend("torch"):
            measured(
                "receiver_exact in torch",
                edges,
                lambda e: receiver_exact_effects(runs, e, budget_bytes=BUDGET_BYTES),
                "fp32",
                len(edges),
            )
        found["receiver_exact fp32"] |= {
            "times_torch": found["receiver_exact in torch fp32"]["seconds"] / found["receiver_exact fp32"]["seconds"],
            "difference_from_torch": precision_error(
                values["receiver_exact fp32"], values["receiver_exact in torch fp32"]
            ),
        }
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "shape": shape,
        "prompts": prompts,
        "tokens": tokens,
        "head_edges": len(edges),
        "exact_edges": len(sample),
        "ceilings_tflops": {precision: rate / 1e12 for precision, rate in ceilings.items()},
        "methods": found,
    }


def _wait(device: torch.device, *, reset: bool = False) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        if reset:
            torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / (1 << 30) if device.type == "cuda" else None


def _product_rate(device: torch.device, precision: Precision) -> float:
    """Operations a second of a large square product of random float32 matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    seconds = []
    with products(precision, device):
        for _ in range(6):
            _wait(device)
            began = time.perf_counter()
            torch.mm(a, b)
            _wait(device)
            seconds.append(time.perf_counter() - began)
    return 2 * size**3 / float(np.median(seconds[1:]))


@contextmanager
def _backend(name: str) -> Iterator[None]:
    """Run the engine on one implementation of the kernels."""
    before = os.environ.get(workbench_kernels.VARIABLE)
    os.environ[workbench_kernels.VARIABLE] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[workbench_kernels.VARIABLE]
        else:
            os.environ[workbench_kernels.VARIABLE] = before


def main(arguments: list[str] | None = None) -> None:
    """Parse arguments, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2", choices=sorted(SHAPES))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--exact-edges", type=int, help="edges that exact sweeps, 0 for all; 2048 on a CPU")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    for name in ("prompts", "tokens"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: give at least 1")
    exact_edges = given.exact_edges
    if exact_edges is None:
        exact_edges = 0 if given.device.startswith("cuda") else 2048
    result = sweep(
        given.shape,
        device=given.device,
        prompts=given.prompts,
        tokens=given.tokens,
        exact_edges=exact_edges,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    text = json.dumps(result, indent=2)
    print(text)
    if given.json is not None:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
