"""Edge effects: our methods beside TransformerLens' direct path patching, on the same edges in the same run."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.bench.clock import Clock, product_seconds
from workbench.bench.direct_path import DirectPath
from workbench.bench.shapes import SHAPES, Shape, random_model, random_pairs
from workbench.errors import PromptError
from workbench.models import Model
from workbench.models.forward import forward
from workbench.patching.attribution import attribution_effects
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Edges, Graph
from workbench.patching.receiver_exact import receiver_exact_effects
from workbench.patching.runs import Runs, make_runs
from workbench.prompts import PromptPairs

BUDGET_BYTES = 1 << 30
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Attributes:
        shape: name of one of `SHAPES`.
        edges: number of edges for exact effects, uniform over all from a head to a head's q, k or v.
        shared: number of those that TransformerLens computes too, spread evenly over the receivers.
        prompts: number of prompts.
        tokens: length of each.
        first_difference: position from which clean and corrupted differ.
        threads: of torch.
        repeats: how often everything is measured; medians are reported.
        double: also compare with TransformerLens in float64.
        seed: of weights, prompts and edges.
    """

    shape: str = "gpt2"
    edges: int = 240
    shared: int = 12
    prompts: int = 4
    tokens: int = 16
    first_difference: int = 0
    threads: int = 1
    repeats: int = 5
    double: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise PromptError(f"shape {self.shape!r} is not one of {', '.join(SHAPES)}")
        for name in ("edges", "shared", "prompts", "tokens", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise PromptError(f"{name}={getattr(self, name)} must be at least 1")


def sample_edges(graph: Graph, plan: Plan) -> tuple[Edges, np.ndarray]:
    """A uniform sample of head edges, and the indices of those that the other library computes too.

    Raises:
        PromptError: if there are not so many edges.
    """
    every = graph.head_edges()
    if plan.edges > len(every):
        raise PromptError(f"edges={plan.edges}: this shape has {len(every)} edges from head to head")
    drawn = np.random.default_rng(plan.seed).choice(len(every), plan.edges, replace=False)
    edges = every[np.sort(drawn)]
    shared = np.unique(np.linspace(0, len(edges) - 1, min(plan.shared, len(edges))).round().astype(int))
    return edges, shared


@contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(plan: Plan, say: Say = lambda _: None) -> dict[str, Any]:
    """Measure everything that a plan asks for.

    Returns:
        Plan, versions, `seconds` by what was timed (medians), all single `times`, `ratios` to TransformerLens, and
        `agreement`: largest difference from TransformerLens on the shared edges beside the largest effect.
    """
    shape = SHAPES[plan.shape]
    with _threads(plan.threads):
        say("making the model")
        model = random_model(shape, seed=plan.seed)
        pairs = _pairs(shape, plan)
        edges, shared = sample_edges(Graph(model.spec), plan)
        theirs = DirectPath(model, pairs)
        clock = Clock(threads=plan.threads)
        rates = []
        _round(Clock(), model, pairs, theirs, edges[:8], shared[:1] * 0, shape)  # warm up
        agreement: dict[str, dict[str, float]] = {}
        for repeat in range(plan.repeats):
            say(f"repeat {repeat + 1} of {plan.repeats}")
            rate, ours, others = _round(clock, model, pairs, theirs, edges, shared, shape)
            rates.append(rate)
            agreement["float32"] = _agreement(ours[shared], others)
        del theirs, model
        if plan.double:
            say("comparing in float64")
            agreement["float64"] = _double(shape, plan, pairs, edges[shared])
    return _summary(plan, clock, rates, agreement, len(edges.graph.head_edges()), len(shared))


def _pairs(shape: Shape, plan: Plan) -> PromptPairs:
    return random_pairs(
        shape, n=plan.prompts, tokens=plan.tokens, first_difference=plan.first_difference, seed=plan.seed
    )


def _runs(model: Model, pairs: PromptPairs, *, trace: bool) -> Runs:
    return make_runs(model.fast_weights, pairs, direction="denoising", metric="logit_diff", trace=trace)


def _collect(found: Iterator[tuple[Tensor, Tensor]], n_edges: int) -> np.ndarray:
    """Mean effects of edges that come batch by batch."""
    values = np.full(n_edges, np.nan)
    for index, effects in found:
        values[index.numpy()] = effects.double().mean(1).numpy()
    return values


def _with_runs(
    model: Model, pairs: PromptPairs, method: Callable[[Runs], Iterator[tuple[Tensor, Tensor]]], n_edges: int
) -> np.ndarray:
    return _collect(method(_runs(model, pairs, trace=True)), n_edges)


def _round(
    clock: Clock,
    model: Model,
    pairs: PromptPairs,
    theirs: DirectPath,
    edges: Edges,
    shared: np.ndarray,
    shape: Shape,
) -> tuple[float, np.ndarray, np.ndarray]:
    """Measure everything once, theirs half before and half after ours; returns GFLOP/s, our and their effects."""
    weights, every = model.fast_weights, edges.graph.head_edges()
    half = len(shared) // 2
    rate = product_seconds(clock, shape.product)
    with torch.no_grad():
        clock.time("forward", lambda: forward(weights, pairs.clean))
    began = clock.now()
    first = theirs.effects(edges[shared[:half]])
    between = clock.now()
    runs = clock.time("runs", lambda: _runs(model, pairs, trace=False))
    ours = clock.time("exact", lambda: _collect(exact_effects(runs, edges, budget_bytes=BUDGET_BYTES), len(edges)))
    resumed = clock.now()
    second = theirs.effects(edges[shared[half:]])
    clock.seconds["transformer_lens"].append(between - began + clock.now() - resumed)
    methods: dict[str, Callable[[Runs], Iterator[tuple[Tensor, Tensor]]]] = {
        "receiver_exact": lambda runs: receiver_exact_effects(runs, every, budget_bytes=BUDGET_BYTES),
        "eap": lambda runs: attribution_effects(runs, every),
        "eap_ig": lambda runs: attribution_effects(runs, every, steps=5),
    }
    for name, method in methods.items():
        clock.time(name, partial(_with_runs, model, pairs, method, len(every)))
    return rate, ours, np.array(first + second)


def _agreement(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    return {
        "largest_difference": float(np.abs(ours - theirs).max()),
        "largest_effect": float(np.abs(theirs).max()),
        "median_effect": float(np.median(np.abs(theirs))),
    }


def _double(shape: Shape, plan: Plan, pairs: PromptPairs, edges: Edges) -> dict[str, float]:
    model = random_model(shape, dtype=torch.float64, seed=plan.seed)
    theirs = np.array(DirectPath(model, pairs).effects(edges))
    runs = _runs(model, pairs, trace=False)
    return _agreement(_collect(exact_effects(runs, edges, budget_bytes=BUDGET_BYTES), len(edges)), theirs)


def _summary(
    plan: Plan, clock: Clock, rates: list[float], agreement: dict[str, Any], n_head_edges: int, n_shared: int
) -> dict[str, Any]:
    each = {"exact": plan.edges, "transformer_lens": n_shared}
    scaled = Clock(threads=clock.threads)
    for name, times in clock.seconds.items():
        scaled.seconds[name] = [t / each.get(name, 1) for t in times]
    return {
        "plan": plan.__dict__,
        "clock": clock.kind,
        "versions": {name: version(name) for name in ("torch", "transformers", "transformer-lens")},
        "gflops": float(np.median(rates)),
        "head_edges": n_head_edges,
        "shared_edges": n_shared,
        "seconds": {name: scaled.median(name) for name in scaled.seconds},
        "times": dict(scaled.seconds),
        "ratios": {"transformer_lens / exact": scaled.median_ratio("transformer_lens", "exact")},
        "agreement": agreement,
        "not_compared": _missing(),
    }


def _missing() -> list[str]:
    if importlib.util.find_spec("auto_circuit") is None:
        return ["auto-circuit is not installed"]
    return ["auto-circuit is installed, but needs transformer_lens' HookedTransformer, which version 4 has not"]
