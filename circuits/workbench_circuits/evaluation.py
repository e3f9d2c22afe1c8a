"""Judging circuits and rankings of edges: faithfulness at many sizes, areas, random baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from workbench.errors import PromptError
from workbench.patching.effects import EdgeEffects
from workbench.stats import Estimate, Estimates, bootstrap
from workbench_circuits._reference import Ablation
from workbench_circuits.discovery.select import Ranking, order_of, select
from workbench_circuits.run import GIB, CircuitRunner, EdgeSet, Progress, check_gap, faithfulness_estimate
from workbench_circuits.wiring import Mask

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.prompts import PromptPairs

MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Sizes at which the MIB benchmark compares circuits, as shares of all edges (Mueller et al. 2025)."""

RANDOM = "random"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How good a circuit is on some prompts.

    Attributes:
        faithfulness: `(m(C) - m(none)) / (m(M) - m(none))`, means over prompts, with a bootstrap interval.
        circuit: mean metric of the circuit, with its t interval.
        model: mean metric of the whole model.
        none: mean metric of the empty circuit.
        metric: name of the metric.
        ablation: what edges outside carried.
        n_prompts: prompts it was judged on.
        n_edges: edges of the circuit.
        n_templates: template families of the prompts, if they are known.
        data_hash: hash of the prompts.
    """

    faithfulness: Estimate
    circuit: Estimate
    model: Estimate
    none: Estimate
    metric: str
    ablation: str
    n_prompts: int
    n_edges: int
    n_templates: int | None
    data_hash: str

    def __str__(self) -> str:
        f = self.faithfulness
        interval = f" [{f.ci_low:.2f}, {f.ci_high:.2f}]" if np.isfinite(f.ci_low) else ""
        return (
            f"faithfulness {f.value:.2f}{interval} on {self.n_prompts} prompts ({self.metric}: circuit "
            f"{self.circuit.value:.2f}, model {self.model.value:.2f}, nothing {self.none.value:.2f}; {self.ablation})"
        )


def evaluate(
    model: Model,
    pairs: PromptPairs,
    circuit: EdgeSet,
    *,
    ablation: Ablation = "resample",
    metric: str = "logit_diff",
    seed: int = 0,
    budget_bytes: int = 2 * GIB,
) -> Evaluation:
    """How faithful a circuit is.

    Args:
        model: a model on the fast path.
        pairs: prompts, best others than those that the circuit was found on.
        circuit: edges, a `Circuit` or a mask.
        ablation: what edges outside carry.
        metric: name of a metric of `workbench.metrics`.
        seed: seed of the bootstrap.
        budget_bytes: bound on memory.

    Raises:
        PromptError: if the arguments do not fit the model, or model and empty circuit score the same.
    """
    runner = CircuitRunner(model, pairs, ablation=ablation, metric=metric, budget_bytes=budget_bytes)
    return evaluation_of(runner, circuit, seed=seed)


def evaluation_of(runner: CircuitRunner, circuit: EdgeSet, *, seed: int = 0) -> Evaluation:
    """`evaluate` with a runner at hand."""
    from workbench.stats import mean_estimate

    mask = runner.mask(circuit)
    values = runner.run([mask])[0]
    pairs = runner.pairs
    families = None if pairs.templates is None else len({name.split("/")[0] for name in pairs.templates})
    return Evaluation(
        faithfulness=faithfulness_estimate(values, runner.clean, runner.none, seed=seed),
        circuit=mean_estimate(values),
        model=mean_estimate(runner.clean),
        none=mean_estimate(runner.none),
        metric=runner.metric,
        ablation=runner.ablation,
        n_prompts=len(pairs),
        n_edges=int(mask.sum()),
        n_templates=families,
        data_hash=pairs.data_hash,
    )


def trapezoid(x: Sequence[float], y: Float[np.ndarray, "*batch sizes"]) -> Float[np.ndarray, "*batch"]:
    """Area under a curve between its first and last point, by trapezoids, `x` as it is (not its logarithm)."""
    widths = np.diff(np.asarray(x, dtype=np.float64))
    return np.asarray((widths * (y[..., 1:] + y[..., :-1]) / 2).sum(-1))


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Faithfulness by size of circuits that rankings give, under one evaluator.

    Attributes:
        frame: one row a ranking and size: `method`, `fraction` of all edges that were taken, `taken`, `n_edges` that
            were left after dropping unconnected ones, `faithfulness`, `stderr`, `ci_low`, `ci_high`, `n_prompts`,
            `metric`, `ablation`, `algorithm`, `path_taken`. `random` is the mean over random rankings; its interval
            holds 95 % of them.
        areas: one row a ranking: `cpr`, the area under faithfulness (higher is better), and `cmd`, the area under
            |1 - faithfulness| (lower is better), with bootstrap intervals over prompts (for `random`, 95 % of the
            random rankings); both by trapezoids over the share of edges taken, as MIB has them.
        differences: one row a pair of rankings: `cpr` and `cmd` of the first minus the second, with bootstrap
            intervals over the prompts, which both share.
        values: the metric of every ranking and size on every prompt, `[methods, sizes, n]`, in the order of `areas`.
    """

    frame: pd.DataFrame
    areas: pd.DataFrame
    differences: pd.DataFrame
    values: Float[np.ndarray, "methods sizes n"] = field(repr=False)


def curves(
    model: Model,
    pairs: PromptPairs,
    rankings: Mapping[str, EdgeEffects],
    *,
    sizes: Sequence[float] = MIB_SIZES,
    algorithm: str = "threshold",
    signed: bool = False,
    ablation: Ablation = "resample",
    metric: str = "logit_diff",
    random: int = 5,
    seed: int = 0,
    budget_bytes: int = 2 * GIB,
    progress: Progress | None = None,
) -> Curves:
    """Compare rankings of edges by how faithful the circuits are that they give at ten sizes.

    Args:
        model: a model on the fast path.
        pairs: prompts, best others than those that the effects were measured on.
        rankings: effects of all edges, by the name that the result calls them.
        sizes: shares of all edges, ascending; by default those of MIB.
        algorithm: `threshold` takes the edges of highest score (as MIB does by default), `greedy` those connected to
            the logits; both drop what is on no path from input to logits.
        signed: rank by how much an edge helps instead of by the size of its effect.
        ablation: what edges outside carry.
        metric: name of a metric.
        random: how many random rankings to compare with.
        seed: seed of those and of the bootstrap.
        budget_bytes: bound on memory.
        progress: called with a line about once a second.

    Raises:
        PromptError: if arguments do not fit, or the effects are not of all edges.
    """
    runner = CircuitRunner(model, pairs, ablation=ablation, metric=metric, budget_bytes=budget_bytes, progress=progress)
    graph = runner.wiring.graph
    made = {name: Ranking.of(graph, effects, signed=signed) for name, effects in rankings.items()}
    return curves_of(runner, made, sizes=sizes, algorithm=algorithm, random=random, seed=seed)


def curves_of(
    runner: CircuitRunner,
    rankings: Mapping[str, Ranking | Callable[[int], Mask]],
    *,
    sizes: Sequence[float] = MIB_SIZES,
    algorithm: str = "threshold",
    random: int = 5,
    seed: int = 0,
) -> Curves:
    """`curves` with a runner at hand, and rankings or functions from a number of edges to a circuit."""
    _check_sizes(sizes)
    check_gap(runner.clean, runner.none)
    if not rankings and not random:
        raise PromptError("rankings is empty and random=0: give effects to compare, or random rankings")
    if RANDOM in rankings:
        raise PromptError(f"rankings has one called {RANDOM!r}: that name is taken by the random baseline")
    graph = runner.wiring.graph
    everything = graph.all_edges()
    for name, ranking in rankings.items():
        if isinstance(ranking, Ranking) and len(ranking.edges) != len(everything):
            raise PromptError(
                f"ranking {name!r} has {len(ranking.edges):,} of {len(everything):,} edges: sizes are shares of all "
                "edges, so compute the effects with edges='all'"
            )
    draw = np.random.default_rng(seed)
    shuffled = {
        f"{RANDOM} {i}": Ranking(edges=everything, effect=draw.random(len(everything)), method=RANDOM)
        for i in range(random)
    }
    taken = [int(share * len(everything)) for share in sizes]
    both: dict[str, Ranking | Callable[[int], Mask]] = {**rankings, **shuffled}
    from_input = runner.ablation == "resample"
    masks: list[Mask] = []
    for ranking in both.values():
        if not isinstance(ranking, Ranking):
            masks += [ranking(n) for n in taken]
            continue
        order = order_of(ranking, algorithm)
        counts = [min(n, len(order)) for n in taken]
        masks += [select(ranking, n, algorithm=algorithm, from_input=from_input, order=order) for n in counts]
    distinct = {mask.tobytes(): mask for mask in masks}
    found = dict(zip(distinct, runner.run(list(distinct.values())), strict=True))
    shape = (len(both), len(sizes), len(runner.pairs))
    values = np.stack([found[mask.tobytes()] for mask in masks]).reshape(shape)
    kept = np.array([int(mask.sum()) for mask in masks]).reshape(shape[:2])
    return _curves(runner, list(rankings), values, kept, taken, sizes, algorithm, seed)


def _check_sizes(sizes: Sequence[float]) -> None:
    if len(sizes) < 2 or any(not 0 <= s <= 1 for s in sizes) or any(a >= b for a, b in pairwise(sizes)):
        raise PromptError(f"sizes={list(sizes)}: give at least two shares of the edges between 0 and 1, ascending")


def _curves(
    runner: CircuitRunner,
    names: list[str],
    values: np.ndarray,
    kept: np.ndarray,
    taken: list[int],
    sizes: Sequence[float],
    algorithm: str,
    seed: int,
) -> Curves:
    """The tables of the curves from the metric of every circuit; random rankings stand last."""
    n = values.shape[-1]
    stacked = np.concatenate([values.reshape(-1, n), runner.clean[None], runner.none[None]]).T
    shape = values.shape[:2]
    points: Estimates = bootstrap(stacked, lambda s, axis: _f(s.mean(axis)), seed=seed)

    def areas(sample: np.ndarray, axis: int) -> np.ndarray:
        f = _f(sample.mean(axis)).reshape(-1, *shape)
        return np.stack((trapezoid(sizes, f), trapezoid(sizes, np.abs(1 - f))), axis=-1)

    area: Estimates = bootstrap(stacked, areas, seed=seed)
    constants = {
        "n_prompts": n,
        "metric": runner.metric,
        "ablation": runner.ablation,
        "algorithm": algorithm,
        "path_taken": runner.model.path,
    }
    rows, area_rows = [], []
    fields = ("value", "stderr", "ci_low", "ci_high")
    for m, name in enumerate(names):
        for i, share in enumerate(sizes):
            numbers = {c: float(getattr(points, c).reshape(shape)[m, i]) for c in fields}
            numbers["faithfulness"] = numbers.pop("value")
            rows.append({"method": name, "fraction": share, "taken": taken[i], "n_edges": int(kept[m, i]), **numbers})
        area_rows.append({"method": name, **_area(area, m)})
    if len(values) > len(names):
        random_f = points.value.reshape(shape)[len(names) :]
        random_area = area.value[len(names) :]
        for i, share in enumerate(sizes):
            numbers = dict(zip(("faithfulness", "stderr", "ci_low", "ci_high"), _middle(random_f[:, i]), strict=True))
            mean_kept = float(kept[len(names) :, i].mean())
            rows.append({"method": RANDOM, "fraction": share, "taken": taken[i], "n_edges": mean_kept, **numbers})
        row: dict[str, Any] = {"method": RANDOM}
        for j, name in enumerate(("cpr", "cmd")):
            row |= dict(
                zip((name, f"{name}_stderr", f"{name}_low", f"{name}_high"), _middle(random_area[:, j]), strict=True)
            )
        area_rows.append(row)
    pairs_of = [(a, b) for a in range(len(names)) for b in range(a + 1, len(names))]
    differing = []
    if pairs_of:
        first, second = (np.array([p[i] for p in pairs_of]) for i in range(2))

        def apart(sample: np.ndarray, axis: int) -> np.ndarray:
            both = areas(sample, axis)
            return np.asarray(both[:, first] - both[:, second])

        gap = bootstrap(stacked, apart, seed=seed)
        for row_index, (a, b) in enumerate(pairs_of):
            differing.append({"method": names[a], "minus": names[b], **_area(gap, row_index)})
    frame = pd.DataFrame(rows).assign(**constants)
    frame["n_edges"] = frame["n_edges"].astype(float)
    return Curves(
        frame=frame,
        areas=pd.DataFrame(area_rows).assign(**constants),
        differences=pd.DataFrame(differing).assign(**constants) if differing else pd.DataFrame(),
        values=values,
    )


def _f(means: np.ndarray) -> np.ndarray:
    """Faithfulness of all columns but the last two, which are model and nothing."""
    gap = means[..., -2:-1] - means[..., -1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        found = (means[..., :-2] - means[..., -1:]) / gap
    return np.asarray(np.where(gap == 0, 0.0, found))


def _area(area: Estimates, row: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for j, name in enumerate(("cpr", "cmd")):
        one = area[row, j]
        found |= {name: one.value, f"{name}_stderr": one.stderr, f"{name}_low": one.ci_low, f"{name}_high": one.ci_high}
    return found


def _middle(values: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, standard deviation and the range of 95 % of some values."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else float("nan")
    low, high = np.quantile(values, (0.025, 0.975)) if len(values) > 1 else (np.nan, np.nan)
    return float(values.mean()), spread, float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class RandomCircuits:
    """Faithfulness of random circuits of one size.

    Attributes:
        faithfulness: of each `[circuits]`.
        n_edges: edges of each.
        taken: edges that were drawn.
        connected: whether they were drawn so as to be connected to the logits.
    """

    faithfulness: Float[np.ndarray, " circuits"]
    n_edges: np.ndarray
    taken: int
    connected: bool

    @property
    def estimate(self) -> Estimate:
        """Mean over the random circuits and the range that holds 95 % of them; `stderr` is their deviation."""
        mean, spread, low, high = _middle(self.faithfulness)
        return Estimate(value=mean, stderr=spread, ci_low=low, ci_high=high, n=len(self.faithfulness))


def random_circuits(
    runner: CircuitRunner, n_edges: int, *, count: int = 20, connected: bool = True, seed: int = 0
) -> RandomCircuits:
    """Faithfulness of random circuits, the baseline for one of that size.

    Args:
        runner: model, prompts, ablation and metric.
        n_edges: edges of each.
        count: how many circuits.
        connected: every edge is drawn from those that lead to a node already connected to the logits, and edges that
            `input` does not reach are dropped and made up for as far as that goes; otherwise from all edges alike.
        seed: seed of the draws.

    Raises:
        PromptError: for more edges than there are, or fewer than one circuit.
    """
    if not 1 <= n_edges <= runner.n_edges or count < 1:
        raise PromptError(f"n_edges={n_edges} (expected 1 to {runner.n_edges:,}) and count={count} (at least 1)")
    draw = np.random.default_rng(seed)
    everything = runner.wiring.graph.all_edges()
    masks = []
    for _ in range(count):
        ranking = Ranking(edges=everything, effect=draw.random(len(everything)))
        if connected:
            masks.append(_of_size(ranking, n_edges, from_input=runner.ablation == "resample"))
        else:
            masks.append(runner.wiring.mask(everything[order_of(ranking, "threshold", n_edges)]))
    return RandomCircuits(
        faithfulness=runner.f(runner.run(masks)),
        n_edges=np.array([int(mask.sum()) for mask in masks]),
        taken=n_edges,
        connected=connected,
    )


def _of_size(ranking: Ranking, n_edges: int, *, from_input: bool) -> Mask:
    """The greedy circuit whose size after pruning is the largest that does not exceed `n_edges`."""
    order = order_of(ranking, "greedy")
    low, high = min(n_edges, len(order)), len(order)
    best = select(ranking, low, algorithm="greedy", from_input=from_input, order=order)
    while low < high:
        middle = (low + high + 1) // 2
        mask = select(ranking, middle, algorithm="greedy", from_input=from_input, order=order)
        if mask.sum() <= n_edges:
            low, best = middle, mask
        else:
            high = middle - 1
    return best
