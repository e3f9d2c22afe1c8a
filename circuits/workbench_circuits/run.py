"""Run circuits: every edge outside carries its corrupted, mean or zero value, every edge inside what is computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import torch
from jaxtyping import Float

from workbench.errors import BudgetError, PromptError
from workbench.metrics import METRICS
from workbench.models.weights import at_least_float32
from workbench.patching.graph import Edges, Graph
from workbench.stats import Estimate, bootstrap, mean_estimate
from workbench_circuits._gradients import gradient_bytes
from workbench_circuits._reference import (
    ABLATIONS,
    Ablation,
    Reference,
    Values,
    corrupted_values,
    reference_bytes,
    reference_from,
    resample_reference,
    window_of,
    zero_values,
)
from workbench_circuits._walk import Plan, walk, walk_bytes
from workbench_circuits.wiring import Mask, Wiring

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptPairs
    from workbench_circuits.circuit import Circuit

GIB = 1 << 30
CPU_TOKENS = 1024
"""Circuits x prompts x positions run together on a CPU."""

GPU_TOKENS = 1 << 16
Progress = Callable[[str], None]
EdgeSet = Union["Circuit", Edges, Mask, Iterable[str]]
"""A circuit: the object, edges of the graph, a mask `[receivers, senders]`, or names of edges."""


@dataclass(frozen=True, kw_only=True)
class CircuitRun:
    """What a circuit does on some prompts.

    Attributes:
        values: the metric of the circuit, a number a prompt.
        clean: the metric of the whole model.
        none: the metric of the empty circuit; with resample ablation that is the corrupted run.
        n_edges: edges of the circuit.
        metric: name of the metric; `values`, `clean` and `none` are in its unit.
        ablation: what edges outside the circuit carried.
        path_taken: which forward pass was used.
    """

    values: Float[np.ndarray, " n"]
    clean: Float[np.ndarray, " n"]
    none: Float[np.ndarray, " n"]
    n_edges: int
    metric: str
    ablation: str
    path_taken: str

    @property
    def estimate(self) -> Estimate:
        """Mean of the metric over prompts, with its interval."""
        return mean_estimate(self.values)

    def faithfulness(self, seed: int = 0) -> Estimate:
        """`(m(C) - m(none)) / (m(M) - m(none))` of the means, with a bootstrap interval over prompts."""
        return faithfulness_estimate(self.values, self.clean, self.none, seed=seed)


def faithfulness_estimate(values: np.ndarray, clean: np.ndarray, none: np.ndarray, *, seed: int = 0) -> Estimate:
    """Faithfulness as a ratio of means over prompts, with a bootstrap interval.

    Args:
        values: metric of the circuit `[n]`.
        clean: metric of the model `[n]`.
        none: metric of the empty circuit `[n]`.
        seed: seed of the bootstrap.

    Raises:
        PromptError: if model and empty circuit have the same mean, so that nothing can be recovered.
    """
    check_gap(clean, none)
    return bootstrap(np.stack((values, clean, none), axis=1), _ratio, seed=seed)[()]


def check_gap(clean: np.ndarray, none: np.ndarray) -> None:
    """Refuse prompts on which ablating everything changes nothing."""
    means = float(np.mean(clean, dtype=np.float64)), float(np.mean(none, dtype=np.float64))
    if not abs(means[0] - means[1]) > 1e-6 * max(abs(means[0]), abs(means[1])):
        raise PromptError(
            f"the whole model and the empty circuit both score {float(np.mean(clean)):.4g}, so no circuit can be "
            "judged on these prompts: use a corruption that changes the answer"
        )


def _ratio(samples: np.ndarray, axis: int) -> np.ndarray:
    means = samples.mean(axis)
    gap = means[..., 1] - means[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (means[..., 0] - means[..., 2]) / gap
    return np.asarray(np.where(gap == 0, 0.0, found))


@dataclass
class _Batch:
    """Prompts that are run together."""

    rows: np.ndarray
    width: int
    reference: Reference | None = field(default=None)


class CircuitRunner:
    """Runs circuits of one model on one set of prompts; what they share is computed once.

    The base is the clean prompt: the circuit's edges carry what is computed from it, all others carry the reference.

    Args:
        model: a model on the fast path.
        pairs: clean and corrupted prompts with their answers.
        ablation: what an edge outside the circuit carries. `resample`: what its sender writes in the corrupted run of
            the same prompt; `mean`: the mean of that over the prompts of the same template, length and answer
            position, at each position; `zero`: nothing (biases of the attention output, which belong to no head, stay).
        metric: name of a metric of `workbench.metrics`.
        budget_bytes: bound on the memory taken beside the weights.
        progress: called with a line about once a second.
        differentiable: make batches of prompts small enough for gradients.

    Attributes:
        wiring: the graph and its masks.
        clean: the metric of the whole model, a number a prompt.
        none: the metric of the empty circuit.

    Raises:
        UnsupportedModelError: if the model is not on the fast path.
        PromptError: for an unknown ablation or metric, or tokens that are not the model's.
        BudgetError: if one circuit on one prompt does not fit the budget.
    """

    def __init__(
        self,
        model: Model,
        pairs: PromptPairs,
        *,
        ablation: Ablation = "resample",
        metric: str = "logit_diff",
        budget_bytes: int = 2 * GIB,
        progress: Progress | None = None,
        differentiable: bool = False,
    ) -> None:
        self.weights = model.fast_weights
        self.differentiable = differentiable
        for name, value, allowed in (("ablation", ablation, ABLATIONS), ("metric", metric, tuple(METRICS))):
            if value not in allowed:
                raise PromptError(f"{name} {value!r} is not one of {', '.join(allowed)}")
        pairs.check_vocabulary(self.weights.spec.d_vocab)
        self.model, self.pairs = model, pairs.to(self.weights.device)
        self.ablation, self.metric, self.budget = ablation, metric, budget_bytes
        self.say = progress or (lambda _: None)
        self.wiring = Wiring(Graph(self.weights.spec))
        self._batches = self._parts()
        self._keep = self._held() <= budget_bytes // 3
        self._means: dict[tuple[Any, ...], Values] = {}
        wide = torch.promote_types(at_least_float32(self.weights.dtype), torch.float32)
        dtype = np.float64 if wide == torch.float64 else np.float32
        self.clean, self.none = np.empty(len(pairs), dtype), np.empty(len(pairs), dtype)
        if ablation == "mean":
            self._means = self._template_means()
        for batch in self._batches:
            reference = self._reference(batch)
            self.clean[batch.rows] = reference.clean.cpu().numpy()
            self.none[batch.rows] = reference.none.cpu().numpy()

    @property
    def n_edges(self) -> int:
        """Edges of the whole graph."""
        return self.wiring.graph.n_edges

    def mask(self, circuit: EdgeSet) -> Mask:
        """A circuit as a mask.

        Raises:
            PromptError: if it is of another graph or names an edge that this model has not.
        """
        edges: Any = circuit.edges if hasattr(circuit, "edges") and hasattr(circuit, "model_hash") else circuit
        if isinstance(edges, np.ndarray) and edges.dtype == bool:
            if edges.shape != self.wiring.shape:
                raise PromptError(
                    f"a mask has shape {edges.shape} and this model's graph {self.wiring.shape} (receivers, senders)"
                )
            return edges & self.wiring.everything
        if isinstance(edges, str):
            raise PromptError(f"edges={edges!r} is one string: pass a list of edges, such as [{edges!r}]")
        return self.wiring.mask(edges)

    def run(self, circuits: Sequence[EdgeSet]) -> Float[np.ndarray, "circuits n"]:
        """The metric of every circuit on every prompt.

        Raises:
            PromptError: for a circuit of another model.
        """
        masks = [self.mask(circuit) for circuit in circuits]
        values = np.full((len(masks), len(self.pairs)), np.nan, dtype=self.clean.dtype)
        if not masks:
            return values
        order = self._order(masks)
        meter = _Meter(self.say, len(masks) * len(self.pairs))
        for batch in self._batches:
            reference = self._reference(batch)
            for chunk in self._chunks(masks, order, batch):
                plan = Plan.of(self.wiring, np.stack([masks[i] for i in chunk]), resample=self.ablation == "resample")
                final = walk(reference, self.wiring, plan)
                read = reference.metric.read(final.to(self.weights.dtype))
                values[np.ix_(np.array(chunk), batch.rows)] = read.cpu().numpy()
                meter.add(len(chunk) * len(batch.rows))
        return values

    @cached_property
    def for_gradients(self) -> CircuitRunner:
        """The same with batches of prompts that are small enough for gradients."""
        if self.differentiable:
            return self
        return CircuitRunner(
            self.model,
            self.pairs,
            ablation=self.ablation,
            metric=self.metric,
            budget_bytes=self.budget,
            differentiable=True,
        )

    def references(self) -> Iterator[tuple[np.ndarray, Reference]]:
        """Batches of prompts, and the values of ablated edges on them."""
        for batch in self._batches:
            yield batch.rows, self._reference(batch)

    def result(self, circuit: EdgeSet) -> CircuitRun:
        """Run one circuit."""
        mask = self.mask(circuit)
        return CircuitRun(
            values=self.run([mask])[0],
            clean=self.clean,
            none=self.none,
            n_edges=int(mask.sum()),
            metric=self.metric,
            ablation=self.ablation,
            path_taken=self.model.path,
        )

    def f(self, values: Float[np.ndarray, "circuits n"]) -> Float[np.ndarray, " circuits"]:
        """Faithfulness of circuits from their values."""
        check_gap(self.clean, self.none)
        none = float(self.none.mean(dtype=np.float64))
        return np.asarray(
            (values.mean(-1, dtype=np.float64) - none) / (float(self.clean.mean(dtype=np.float64)) - none)
        )

    def _parts(self) -> list[_Batch]:
        """Prompts with windows of like width; with mean ablation, of one length and answer position."""
        pairs, weights = self.pairs, self.weights
        answers, lengths = pairs.answer_positions.cpu().numpy(), pairs.lengths.cpu().numpy()
        first = pairs.first_difference.cpu().numpy() if self.ablation == "resample" else np.zeros_like(answers)
        widths = np.maximum(answers - first + 1, 1) if weights.spec.causal else np.full_like(answers, lengths.max())
        by: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row in np.lexsort((answers, widths)):
            by[(int(lengths[row]), int(answers[row])) if self.ablation == "mean" else (0, 0)].append(int(row))
        largest = GPU_TOKENS if weights.device.type == "cuda" else CPU_TOKENS
        found = []
        for rows in by.values():
            current: list[int] = []
            for row in rows:
                tokens = (len(current) + 1) * int(widths[row])
                fits = self._fits(tokens) and (tokens <= largest or not current)
                if current and not fits:
                    found.append(_Batch(rows=np.array(current), width=int(widths[current].max())))
                    current, fits = [], self._fits(int(widths[row]))
                if not fits:
                    raise BudgetError(
                        f"one circuit on one prompt of {int(widths[row])} tokens needs "
                        f"{self._needed(int(widths[row])) / GIB:.2f} GiB beside the weights and the "
                        f"budget is {self.budget / GIB:.2f} GiB: raise budget_bytes, or shorten the prompts"
                    )
                current.append(row)
            found.append(_Batch(rows=np.array(current), width=int(widths[current].max())))
        return found

    def _fits(self, tokens: int) -> bool:
        return self._needed(tokens) <= self.budget

    def _needed(self, tokens: int) -> int:
        """Budget that one circuit on so many tokens needs."""
        itemsize = self.weights.embed.element_size()
        needed = [walk_bytes(self.wiring, tokens, 1, itemsize=itemsize), reference_bytes(self.weights, tokens)]
        if self.differentiable:
            needed.append(gradient_bytes(self.wiring, tokens, itemsize))
        return 3 * max(needed)

    def _held(self) -> int:
        return sum(reference_bytes(self.weights, batch.width) * len(batch.rows) for batch in self._batches)

    def _reference(self, batch: _Batch) -> Reference:
        if batch.reference is not None:
            return batch.reference
        part = self.pairs.subset(batch.rows)
        if self.ablation == "resample":
            made = resample_reference(self.weights, part, self.metric)
        else:
            width = window_of(self.weights, part, self.ablation).width
            if self.ablation == "zero":
                values = zero_values(self.weights, len(part), width)
            else:
                groups = [self._means[self._group(int(row))] for row in batch.rows]
                values = Values.unmap(
                    [torch.stack(each) for each in groups[0].map(*groups[1:])], self.weights.spec.n_layers
                )
            made = reference_from(self.weights, part, self.metric, values)
        if self._keep:
            batch.reference = made
        return made

    def _group(self, row: int) -> tuple[Any, ...]:
        pairs = self.pairs
        template = None if pairs.templates is None else pairs.templates[row]
        return template, int(pairs.lengths[row]), int(pairs.answer_positions[row])

    def _template_means(self) -> dict[tuple[Any, ...], Values]:
        """Mean corrupted values of every template, length and answer position."""
        sums: dict[tuple[Any, ...], list[torch.Tensor]] = {}
        counts: dict[tuple[Any, ...], int] = defaultdict(int)
        for batch in self._batches:
            values = corrupted_values(self.weights, self.pairs.subset(batch.rows))
            flat = [each[0] for each in values.map()]
            for place, row in enumerate(batch.rows):
                key = self._group(int(row))
                counts[key] += 1
                one = [tensor[place].to(at_least_float32(tensor.dtype)) for tensor in flat]
                sums[key] = [a + b for a, b in zip(sums[key], one, strict=True)] if key in sums else one
        return {
            key: Values.unmap([(t / counts[key]).to(self.weights.dtype) for t in total], self.weights.spec.n_layers)
            for key, total in sums.items()
        }

    def _order(self, masks: Sequence[Mask]) -> list[int]:
        """Circuits of like size, or that depart from what most are at like depth, stand together: they share more."""
        sizes = np.array([int(mask.sum()) for mask in masks])
        if len(masks) < 3 or sizes.max() > 1.2 * sizes.min() + 8:
            return [int(i) for i in np.argsort(sizes, kind="stable")]
        votes = np.zeros(self.wiring.shape, dtype=np.int32)
        for mask in masks:
            votes += mask
        usual = 2 * votes > len(masks)
        departs = [int(np.argmax((mask != usual).any(1))) if (mask != usual).any() else len(usual) for mask in masks]
        return [int(i) for i in np.argsort(departs, kind="stable")[::-1]]

    def _chunks(self, masks: Sequence[Mask], order: Sequence[int], batch: _Batch) -> Iterable[list[int]]:
        """Circuits that are run together."""
        tokens = batch.width * len(batch.rows)
        largest = GPU_TOKENS if self.weights.device.type == "cuda" else 4 * CPU_TOKENS
        itemsize = self.weights.embed.element_size()
        current: list[int] = []
        union = self.wiring.empty()
        for index in order:
            grown = union | masks[index]
            many = len(current) + 1
            share = float(grown.any(0).mean()) if self.ablation == "resample" else 1.0
            needed = walk_bytes(self.wiring, tokens, many, share=share, itemsize=itemsize)
            if current and (many * tokens > largest or needed > self.budget // 2):
                yield current
                current, grown = [], masks[index]
            current.append(index)
            union = grown
        if current:
            yield current


def run_circuit(
    model: Model,
    pairs: PromptPairs,
    edges: EdgeSet,
    *,
    ablation: Ablation = "resample",
    metric: str = "logit_diff",
    budget_bytes: int = 2 * GIB,
) -> CircuitRun:
    """Run a circuit: one pass in which every edge outside it is ablated.

    The input of a receiver is the sum over the senders that it can read of what the sender writes in this run, where
    the edge belongs to the circuit, and of the sender's ablated value where it does not. With resample ablation the
    whole graph gives the clean run and the empty circuit the corrupted run.

    Args:
        model: a model on the fast path.
        pairs: clean and corrupted prompts with their answers.
        edges: names such as `a9.h3->a10.h0<q>`, a `Circuit`, or a mask.
        ablation: `resample`, `mean` or `zero`; see `CircuitRunner`.
        metric: name of a metric of `workbench.metrics`.
        budget_bytes: bound on the memory taken beside the weights.

    Raises:
        UnsupportedModelError: if the model is not on the fast path.
        PromptError: if arguments do not fit the model.
        BudgetError: if not even one prompt fits the budget.
    """
    return CircuitRunner(model, pairs, ablation=ablation, metric=metric, budget_bytes=budget_bytes).result(edges)


def run_circuits(
    model: Model,
    pairs: PromptPairs,
    circuits: Sequence[EdgeSet],
    *,
    ablation: Ablation = "resample",
    metric: str = "logit_diff",
    budget_bytes: int = 2 * GIB,
    progress: Progress | None = None,
) -> Float[np.ndarray, "circuits n"]:
    """The metric of many circuits, a number a circuit and prompt; arguments as for `run_circuit`."""
    runner = CircuitRunner(model, pairs, ablation=ablation, metric=metric, budget_bytes=budget_bytes, progress=progress)
    return runner.run(circuits)


class _Meter:
    """Says how far the work is, about once a second."""

    def __init__(self, say: Progress, total: int) -> None:
        import time

        self.clock = time.monotonic
        self.say, self.total, self.done = say, total, 0
        self.began = self.last = self.clock()

    def add(self, n: int) -> None:
        self.done += n
        now = self.clock()
        if now - self.last < 1:
            return
        self.last = now
        rate = self.done / max(now - self.began, 1e-9)
        self.say(f"circuits: {self.done:,} of {self.total:,} runs, {(self.total - self.done) / rate:,.0f} s left")
