"""`edge_effects`: the one entrance to the patching engine."""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from workbench.errors import PromptError
from workbench.metrics import METRICS
from workbench.models.model import Model
from workbench.models.weights import ModelWeights, at_least_float32
from workbench.patching.attribution import attribution_effects
from workbench.patching.batches import GIB, Meter, prompt_batches
from workbench.patching.deltas import deltas_bytes
from workbench.patching.effects import EdgeEffects, effects_frame
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Edges, Graph
from workbench.patching.noise import noise_floor
from workbench.patching.partial import PartialResult
from workbench.patching.precision import Precision, check_precision, precision_error, products
from workbench.patching.receiver_exact import receiver_exact_effects
from workbench.patching.runs import Direction, Runs, make_runs, run_bytes
from workbench.patching.verified import calibrate, select
from workbench.prompts import PromptPairs

Method = Literal["exact", "receiver_exact", "eap", "eap_ig", "verified"]
Progress = Callable[[str], None]

NOISE_PROMPTS = 4
"""Prompts on which the noise floor is measured."""

ERROR_EDGES = 64
"""Edges on which the error of rounded products is measured."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How effects are computed; the part of a call that is not model, prompts or edges."""

    method: Method
    direction: Direction
    metric: str
    steps: int
    budget_bytes: int
    seed: int
    precision: Precision = "fp32"


def edge_effects(
    model: Model,
    pairs: PromptPairs,
    *,
    method: Method = "exact",
    edges: Sequence[str] | Literal["all", "heads"] = "all",
    direction: Direction = "noising",
    metric: str = "logit_diff",
    ablation: Literal["resample"] = "resample",
    steps: int = 5,
    top_k: int = 300,
    sample: int = 300,
    seed: int = 0,
    precision: Precision = "fp32",
    budget_bytes: int = 2 * GIB,
    per_prompt: bool = False,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> EdgeEffects:
    """What each edge contributes to a metric.

    The effect of an edge is `metric(base with that one edge patched) - metric(base)`: its receiver reads its own copy
    of the residual stream in which that one sender's write is replaced by the one of the other run; every other reader
    sees the unpatched stream, and everything downstream of the receiver is recomputed.

    Args:
        model: a model on the fast path.
        pairs: clean and corrupted prompts with their answers.
        method: `exact`; `receiver_exact`: receiver exact, the rest first order; `eap` and `eap_ig`: first order, from
            one gradient or from `steps` along the path between the runs; `verified`: first order for all, exact for
            those that matter, with the error of the first by the second.
        edges: names such as `a9.h3->a10.h0<q>`; `heads` for all from head to head; `all`.
        direction: `noising`: base clean, corrupted writes patched in; `denoising`: the reverse.
        metric: `logit_diff`, `answer_logprob` or `kl_to_clean`.
        ablation: what replaces a write: `resample`, the write of the other run at the same position.
        steps: gradients of `eap_ig`.
        top_k: strongest edges of each first-order method that `verified` computes exactly.
        sample: random further edges that `verified` computes exactly.
        seed: seed of that sample.
        precision: how float32 operands of products are read: `fp32` as they are; `tf32`, `bf16` rounded, faster and
            only on CUDA. The error that this makes is measured on a sample and stated in the provenance.
        budget_bytes: bound on the memory that the engine takes beside the weights.
        per_prompt: keep the effects of each prompt.
        resume: a folder in which unfinished work is kept; a later call with the same arguments goes on from there.
        progress: called with a line about once a second.

    Returns:
        Effects in units of the metric, with standard error and 95 % interval over prompts.

    Raises:
        UnsupportedModelError: if the model is not on the fast path; says why.
        PromptError: if arguments do not fit the model or each other; says which and what to use.
        BudgetError: if not even one prompt fits the budget.
    """
    weights = model.fast_weights
    settings = Settings(
        method=method,
        direction=direction,
        metric=metric,
        steps=steps,
        budget_bytes=budget_bytes,
        seed=seed,
        precision=precision,
    )
    from workbench.tables import provenance

    _check(settings, ablation)
    check_precision(precision, weights.dtype, weights.device)
    for name, count in (("top_k", top_k), ("sample", sample)):
        if count < 0:
            raise PromptError(f"{name}={count} is negative: give a number of edges, 0 for none")
    pairs.check_vocabulary(weights.spec.d_vocab)
    chosen = _choose(Graph(weights.spec), edges)
    began = time.perf_counter()
    kept = None if resume is None else PartialResult.open(resume, _key(model, pairs, chosen, settings, top_k, sample))
    work = _Work(weights, pairs, settings, kept, progress or (lambda _: None))
    calibration, methods = None, np.full(len(chosen), method, dtype=object)
    if method == "verified":
        scores = {name: work.sweep(chosen, name) for name in ("receiver_exact", "eap_ig")}
        means = {name: found.mean(1) for name, found in scores.items()}
        selection = select(chosen, means, top_k=top_k, sample=sample, seed=seed)
        picked = np.flatnonzero(selection.chosen)
        values = scores["receiver_exact"]
        values[picked] = work.sweep(chosen[picked], "exact")
        methods[:] = np.where(selection.chosen, "exact", "receiver_exact")
        mean_exact = np.full(len(chosen), np.nan)
        mean_exact[picked] = values[picked].mean(1)
        calibration = calibrate(chosen, selection, means, mean_exact)
    else:
        values = work.sweep(chosen, method)
    base, floor = work.base()
    floor = max([floor, *(error["root_mean_square"] for error in work.errors.values())])
    frame = effects_frame(
        chosen,
        values,
        methods,
        floor,
        {
            "direction": direction,
            "ablation": ablation,
            "metric": metric,
            "base": base,
            "path_taken": model.path,
        },
    )
    record = provenance(
        model,
        data_hash=pairs.data_hash,
        seed=seed,
        task=pairs.task,
        corruption=pairs.corruption,
        settings={**settings.__dict__, "top_k": top_k, "sample": sample, "ablation": ablation},
        precision_error=work.errors or {"noise_floor": floor},
        seconds=round(time.perf_counter() - began, 3),
    )
    if kept is not None:
        kept.discard()
    return EdgeEffects(
        frame=frame,
        noise_floor=floor,
        provenance=record,
        calibration=calibration,
        per_prompt=values if per_prompt else None,
    )


def estimate_cost(
    model: Model, pairs: PromptPairs, edges: Sequence[str] | Literal["all", "heads"] = "all"
) -> dict[str, float]:
    """What an exact sweep would take, from timing a small uniform sample of its edges.

    Returns:
        `edges`, `sampled`, `seconds_per_edge` and `seconds`, the estimate for all.
    """
    weights = model.fast_weights
    chosen = _choose(Graph(weights.spec), edges)
    settings = Settings(method="exact", direction="noising", metric="logit_diff", steps=1, budget_bytes=2 * GIB, seed=0)
    rng = np.random.default_rng(0)
    sampled = chosen[np.sort(rng.choice(len(chosen), min(len(chosen), 64), replace=False))]
    work = _Work(weights, pairs, settings, None, lambda _: None)
    work.sweep(sampled[:1], "exact")
    began = time.perf_counter()
    work.sweep(sampled, "exact")
    each = (time.perf_counter() - began) / len(sampled)
    return {"edges": len(chosen), "sampled": len(sampled), "seconds_per_edge": each, "seconds": each * len(chosen)}


def _check(settings: Settings, ablation: str) -> None:
    for name, value, allowed in (
        ("method", settings.method, get_args(Method)),
        ("direction", settings.direction, get_args(Direction)),
        ("metric", settings.metric, tuple(METRICS)),
        ("ablation", ablation, ("resample",)),
    ):
        if value not in allowed:
            raise PromptError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    if (
        settings.metric == "kl_to_clean"
        and settings.direction == "noising"
        and settings.method not in {"exact", "eap_ig"}
    ):
        raise PromptError(
            f"metric 'kl_to_clean' with direction 'noising' has a zero gradient at its base, the clean run, so method "
            f"{settings.method!r} would return zeros: use method='exact' or 'eap_ig', direction='denoising', or "
            "metric='logit_diff'"
        )
    if settings.steps < 1:
        raise PromptError(f"steps={settings.steps}: eap_ig needs at least one gradient")


def _choose(graph: Graph, edges: Sequence[str] | str) -> Edges:
    if isinstance(edges, str):
        if edges == "all":
            return graph.all_edges()
        if edges == "heads":
            return graph.head_edges()
        raise PromptError(f"edges={edges!r} is neither 'all' nor 'heads'; pass a list to name edges")
    return graph.edges(edges)


def _batches(
    weights: ModelWeights, pairs: PromptPairs, settings: Settings, graph: Graph, *, sweeping: bool
) -> list[Tensor]:
    """Indices of prompts, grouped by like windows into batches whose caches fit half the budget.

    Raises:
        BudgetError: if one prompt alone does not fit.
    """
    size = weights.embed.element_size()

    def needed(n: int, width: int, length: int) -> int:
        base = run_bytes(weights, n, width, length)
        if not sweeping:
            return base
        graphs = settings.steps if settings.method in {"eap_ig", "verified"} else 1
        return base * (2 + graphs) + deltas_bytes(graph, n, width, size)

    return prompt_batches(
        pairs,
        pairs.first_difference,
        causal=weights.spec.causal,
        needed=needed,
        available=settings.budget_bytes // 2,
        budget_bytes=settings.budget_bytes,
    )


class _Work:
    """The sweeps of one call: batches of prompts, what is known of the base run, unfinished results."""

    def __init__(
        self, weights: ModelWeights, pairs: PromptPairs, settings: Settings, kept: PartialResult | None, say: Progress
    ) -> None:
        self.weights, self.pairs, self.settings, self.kept, self.say = weights, pairs, settings, kept, say
        self.base_values = np.full(len(pairs), np.nan)
        self.floor = float("nan")
        self.errors: dict[str, dict[str, float]] = {}

    def _runs(self, batch: Tensor, *, trace: bool) -> Runs:
        """Run a batch of prompts as precisely as can be, noting the base metric, and the noise floor with the first."""
        with products("fp32", self.weights.device):
            return self._precise_runs(batch, trace=trace)

    def _precise_runs(self, batch: Tensor, *, trace: bool) -> Runs:
        runs = make_runs(
            self.weights,
            self.pairs.subset(batch),
            direction=self.settings.direction,
            metric=self.settings.metric,
            trace=trace,
        )
        self.base_values[batch.numpy()] = runs.base_value.double().cpu().numpy()
        if np.isnan(self.floor):
            few = runs
            if len(batch) > NOISE_PROMPTS:
                few = make_runs(
                    self.weights,
                    self.pairs.subset(batch[:NOISE_PROMPTS]),
                    direction=self.settings.direction,
                    metric=self.settings.metric,
                )
            self.floor = noise_floor(few, self.settings.seed)
        return runs

    def sweep(self, edges: Edges, how: str) -> np.ndarray:
        """Per-prompt effects `[edges, n]` by one method, batch of prompts by batch of prompts."""
        sweeping = how != "exact"
        dtype = np.float64 if at_least_float32(self.weights.dtype) == torch.float64 else np.float32
        values = np.full((len(edges), len(self.pairs)), np.nan, dtype=dtype)
        if self.kept is not None:
            self.kept.restore(how, values)
        meter = Meter(self.say, how, values.size, "edge effects")
        for batch in _batches(self.weights, self.pairs, self.settings, edges.graph, sweeping=sweeping):
            columns = batch.numpy()
            todo = np.flatnonzero(np.isnan(values[:, columns]).any(1))
            meter.add((len(edges) - len(todo)) * len(batch), counts=False)
            if not len(todo):
                continue
            runs = self._runs(batch, trace=sweeping)
            with products(self.settings.precision, self.weights.device):
                for index, effects in _effects(runs, edges[todo], how, self.settings):
                    values[np.ix_(todo[index.numpy()], columns)] = effects.cpu().numpy()
                    meter.add(effects.numel())
                    if self.kept is not None:
                        self.kept.store(how, values)
            del runs
        if self.kept is not None:
            self.kept.store(how, values, now=True)
        if self.settings.precision != "fp32":
            self.errors[how] = self._error(edges, how, values)
        return values

    def _error(self, edges: Edges, how: str, values: np.ndarray) -> dict[str, float]:
        """What rounded products cost: the same effects in float32, for some edges and the first batch of prompts."""
        batch = _batches(self.weights, self.pairs, self.settings, edges.graph, sweeping=how != "exact")[0]
        drawn = np.random.default_rng(self.settings.seed).choice(
            len(edges), min(ERROR_EDGES, len(edges)), replace=False
        )
        runs = self._runs(batch, trace=how != "exact")
        precise = np.zeros((len(drawn), len(batch)))
        with products("fp32", self.weights.device):
            for index, effects in _effects(runs, edges[drawn], how, replace(self.settings, precision="fp32")):
                precise[index.numpy()] = effects.cpu().numpy()
        return precision_error(values[np.ix_(drawn, batch.numpy())], precise)

    def base(self) -> tuple[float, float]:
        """Mean metric of the base run, and the noise floor."""
        if np.isnan(self.base_values).any():
            for batch in _batches(self.weights, self.pairs, self.settings, Graph(self.weights.spec), sweeping=False):
                self._runs(batch, trace=False)
        return float(self.base_values.mean()), self.floor


def _effects(runs: Runs, edges: Edges, how: str, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    budget = settings.budget_bytes // 4
    if how == "exact":
        return exact_effects(runs, edges, budget_bytes=budget)
    if how == "receiver_exact":
        return receiver_exact_effects(runs, edges, budget_bytes=budget, precision=settings.precision)
    return attribution_effects(runs, edges, steps=settings.steps if how == "eap_ig" else 1)


def _key(model: Model, pairs: PromptPairs, edges: Edges, settings: Settings, top_k: int, sample: int) -> str:
    """What has to be the same for unfinished work to be taken up."""
    digest = hashlib.sha256()
    fixed = {k: v for k, v in settings.__dict__.items() if k != "budget_bytes"}
    if settings.method == "verified":
        fixed |= {"top_k": top_k, "sample": sample}
    digest.update(json.dumps([model.model_hash, str(model.dtype), pairs.data_hash, fixed], sort_keys=True).encode())
    digest.update(edges.keys.tobytes())
    return digest.hexdigest()
