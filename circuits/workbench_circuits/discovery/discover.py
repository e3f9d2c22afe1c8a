"""`discover`: from a model and a task to a circuit that was judged on other prompts than it was found on."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from workbench.errors import DataError, PromptError
from workbench_circuits._reference import Ablation
from workbench_circuits.circuit import Able, Circuit, Steadiness
from workbench_circuits.discovery.acdc import acdc
from workbench_circuits.discovery.select import ALGORITHMS, Ranking, order_of, select
from workbench_circuits.discovery.size import smallest
from workbench_circuits.discovery.stability import stability
from workbench_circuits.evaluation import evaluation_of
from workbench_circuits.run import GIB, CircuitRunner, Progress
from workbench_circuits.wiring import Mask

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.patching import EdgeEffects
    from workbench.prompts import PromptPairs
    from workbench_circuits.tasks import Task

Algorithm = Literal["greedy", "threshold", "acdc"]
ACDC_TOP = 3000
COMPETENCE_PROMPTS = 100
FIRST_TAU = 0.0005
"""Threshold that ACDC begins with if none is given, as a share of the gap between model and empty circuit."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Prompts of one discovery.

    Attributes:
        train: prompts that effects are measured and sizes chosen on.
        held_out: prompts that the result is judged on.
        competence: prompts that say whether the model can do the task.
        split: how the first two were kept apart.
    """

    train: PromptPairs
    held_out: PromptPairs
    competence: PromptPairs
    split: str


def draw_prompts(
    model: Model,
    task: str | Path | Task | PromptPairs,
    *,
    n: int = 32,
    n_held_out: int = 32,
    corruption: str | None = None,
    seed: int = 0,
    held_out: PromptPairs | None = None,
) -> Prompts:
    """Prompts to find a circuit on and prompts to judge it on, with templates of their own where there are several.

    Args:
        model: whose tokenizer is used.
        task: a task, its name, a CSV file, or prompts.
        n: prompts of a task to find the circuit on.
        n_held_out: prompts to judge it on.
        corruption: of a task; default: its first.
        seed: seed of all draws.
        held_out: prompts to judge it on, if `task` is prompts.

    Raises:
        PromptError: if there are not enough prompts.
    """
    from workbench.prompts import PromptPairs
    from workbench_circuits.tasks import load_task
    from workbench_circuits.tasks.base import Task
    from workbench_circuits.tasks.custom import CsvTask

    if isinstance(task, PromptPairs):
        if held_out is not None:
            return Prompts(train=task, held_out=held_out, competence=task, split="given")
        return _halves(task)
    drawer = task if isinstance(task, Task) else load_task(task)
    if isinstance(drawer, CsvTask):
        everything = drawer.pairs(model, corruption=corruption)
        found = _halves(everything, seed=seed)
        return replace(found, train=_at_most(found.train, n, seed), held_out=_at_most(found.held_out, n_held_out, seed))
    try:
        train = drawer.pairs(model, n, seed=seed, corruption=corruption, split="train")
        judged = drawer.pairs(model, n_held_out, seed=seed + 1, corruption=corruption, split="held_out")
        split = "templates of their own"
    except PromptError:
        everything = drawer.pairs(model, n + n_held_out, seed=seed, corruption=corruption)
        train, judged = everything.split(n / (n + n_held_out), seed)
        split = "prompts of the same templates"
    try:
        able = drawer.pairs(model, COMPETENCE_PROMPTS, seed=seed, corruption=corruption)
    except PromptError:
        able = PromptPairs.concat([train, judged])
    return Prompts(train=train, held_out=judged, competence=able, split=split)


def _halves(pairs: PromptPairs, seed: int = 0) -> Prompts:
    families = set() if pairs.templates is None else {name.split("/")[0] for name in pairs.templates}
    several = len(families) > 1
    train, judged = pairs.split(0.5, seed, by_template=several)
    split = "templates of their own" if several else "prompts of the same templates"
    return Prompts(train=train, held_out=judged, competence=pairs, split=split)


def _at_most(pairs: PromptPairs, n: int, seed: int) -> PromptPairs:
    if len(pairs) <= n:
        return pairs
    return pairs.subset(np.sort(np.random.default_rng(seed).permutation(len(pairs))[:n]))


def discover(
    model: Model,
    task: str | Path | Task | PromptPairs,
    *,
    method: str = "verified",
    algorithm: Algorithm = "greedy",
    target: float | None = 0.8,
    n_edges: int | None = None,
    n: int = 32,
    n_held_out: int = 32,
    corruption: str | None = None,
    held_out: PromptPairs | None = None,
    effects: EdgeEffects | None = None,
    signed: bool = False,
    direction: str = "noising",
    ablation: Ablation = "resample",
    metric: str = "logit_diff",
    steps: int = 5,
    top: int = ACDC_TOP,
    tau: float | None = None,
    n_resamples: int = 50,
    seed: int = 0,
    budget_bytes: int = 2 * GIB,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> Circuit:
    """Find a circuit for a task, and judge it on prompts that had no part in finding it.

    1. Prompts are drawn: some to find the circuit on, others, of other templates where there are several, to judge it.
    2. The effect of every edge is measured on the first. 3. Edges are selected by these, as many as the target asks
    for. 4. The circuit is run on the others. 5. The selection is repeated on resampled prompts.

    Args:
        model: a model on the fast path.
        task: a task, its name, the path of a CSV file, or prompts, which are then split in halves.
        method: of the effects: `verified`, `exact`, `receiver_exact`, `eap` or `eap_ig`.
        algorithm: `greedy`: from the logits down, always the edge of highest score whose receiver is connected;
            `threshold`: the edges of highest score; `acdc`: the `top` edges by `greedy`, pruned one by one.
        target: faithfulness to reach on the prompts that it is found on; the smallest circuit tried that does is taken.
        n_edges: a number of edges instead of a target.
        n: prompts to find it on.
        n_held_out: prompts to judge it on.
        corruption: how a task's prompts are corrupted; default: its first way.
        held_out: prompts to judge it on, if `task` is prompts.
        effects: effects of all edges, if they are known already (then `method`, `direction` and `steps` do not count).
        signed: rank edges by how much they help instead of by the size of their effect.
        direction: of the effects, `noising` or `denoising`.
        ablation: what edges outside the circuit carry: `resample`, `mean` or `zero`.
        metric: of effects and faithfulness.
        steps: gradients of `eap_ig`.
        top: edges that `acdc` starts from.
        tau: threshold of `acdc` in units of the metric. Without one, it begins at 0.05 % of the gap between model and
            empty circuit and is doubled until the circuit would no longer reach the target (or is small enough).
        n_resamples: resamples of the prompts for stability; 0 for none. Not measured with `acdc`, whose selection
            needs the model.
        seed: seed of every draw.
        budget_bytes: bound on the memory taken beside the weights.
        resume: a folder in which unfinished work is kept; a later call with the same arguments goes on from there.
        progress: called with a line about once a second.

    Returns:
        The circuit, with its faithfulness on both sets of prompts, the model's competence, and its stability.

    Raises:
        UnsupportedModelError: if the model is not on the fast path.
        PromptError: if arguments do not fit the model or each other.
    """
    _check(algorithm, target, n_edges)
    say = progress or (lambda _: None)
    began = time.perf_counter()
    prompts = draw_prompts(model, task, n=n, n_held_out=n_held_out, corruption=corruption, seed=seed, held_out=held_out)
    from workbench.tables import provenance
    from workbench_circuits._competence import competence

    able = competence(model, prompts.competence)
    say(able.sentence)
    if effects is None:
        effects = measured_effects(
            model,
            prompts.train,
            method=method,
            direction=direction,
            metric=metric,
            steps=steps,
            seed=seed,
            budget_bytes=budget_bytes,
            resume=resume,
            progress=progress,
        )
    settings: dict[str, Any] = {"ablation": ablation, "metric": metric, "budget_bytes": budget_bytes}
    runner = CircuitRunner(model, prompts.train, progress=progress, **settings)
    ranking = Ranking.of(runner.wiring.graph, effects, signed=signed)
    found = _search(runner, ranking, algorithm, target, n_edges, top, tau, _state(resume), progress)
    steadiness, inclusion = None, None
    if n_resamples and algorithm != "acdc" and effects.per_prompt is not None and effects.per_prompt.shape[1] > 1:
        again = stability(
            ranking,
            effects.per_prompt,
            found.mask,
            taken=found.taken,
            algorithm=algorithm,
            from_input=ablation == "resample",
            n_resamples=n_resamples,
            seed=seed,
        )
        inclusion = tuple(float(x) for x in again.inclusion)
        steadiness = Steadiness(
            jaccard=again.jaccard.value,
            jaccard_low=again.jaccard.ci_low,
            jaccard_high=again.jaccard.ci_high,
            head_jaccard=again.head_jaccard.value,
            pairwise=again.pairwise,
            n_resamples=n_resamples,
            n_prompts=effects.per_prompt.shape[1],
        )
    judge = CircuitRunner(model, prompts.held_out, **settings)
    by_name = dict(zip(ranking.edges.names, ranking.effect.tolist(), strict=True))
    return Circuit.of_mask(
        model,
        found.mask,
        effects=by_name,
        inclusion=inclusion,
        task=prompts.train.task,
        corruption=prompts.train.corruption,
        metric=metric,
        ablation=ablation,
        direction=str(effects.frame["direction"].iloc[0]),
        method=ranking.method,
        algorithm=algorithm,
        signed=signed,
        target=target if n_edges is None else None,
        taken=found.taken,
        held_out=evaluation_of(judge, found.mask, seed=seed),
        train=evaluation_of(runner, found.mask, seed=seed),
        competence=Able.of(able),
        stability=steadiness,
        provenance=provenance(
            model,
            data_hash=prompts.train.data_hash,
            seed=seed,
            held_out_hash=prompts.held_out.data_hash,
            held_out_seed=prompts.held_out.seed,
            split=prompts.split,
            search=found.record,
            effects=dict(effects.provenance),
            seconds=round(time.perf_counter() - began, 3),
        ),
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    mask: Mask
    taken: int
    record: Mapping[str, Any]


def _search(
    runner: CircuitRunner,
    ranking: Ranking,
    algorithm: str,
    target: float | None,
    n_edges: int | None,
    top: int,
    tau: float | None,
    state: Path | None,
    progress: Progress | None,
) -> _Found:
    from_input = runner.ablation == "resample"
    if algorithm == "acdc":
        return _by_acdc(runner, ranking, target, n_edges, top, tau, state, progress)
    if n_edges is not None:
        order = order_of(ranking, algorithm)
        if not 1 <= n_edges <= len(order):
            raise PromptError(f"n_edges={n_edges}: expected 1 to {len(order):,}, the edges that can be taken")
        mask = select(ranking, n_edges, algorithm=algorithm, from_input=from_input, order=order)
        return _Found(mask=mask, taken=n_edges, record={"n_edges": n_edges})
    assert target is not None
    sized = smallest(runner, ranking, target=target, algorithm=algorithm)
    record = {"target": target, "reached": sized.reached, "tried": sized.tried.to_dict("records")}
    return _Found(mask=sized.mask, taken=sized.taken, record=record)


def _by_acdc(
    runner: CircuitRunner,
    ranking: Ranking,
    target: float | None,
    n_edges: int | None,
    top: int,
    tau: float | None,
    state: Path | None,
    progress: Progress | None,
) -> _Found:
    """Prune the strongest edges, once with a threshold or with growing ones as far as the target allows."""
    order = order_of(ranking, "greedy", top)
    start = select(ranking, len(order), algorithm="greedy", from_input=runner.ablation == "resample", order=order)
    rounds: list[dict[str, Any]] = []

    def prune(mask: Mask, at: float) -> Mask:
        done = acdc(runner, mask, tau=at, resume=state, progress=progress)
        f = float(runner.f(runner.run([done.mask]))[0])
        rounds.append(
            {"tau": at, "n_edges": int(done.mask.sum()), "faithfulness": f, "tried": done.tried, "runs": done.runs}
        )
        return done.mask

    if tau is not None:
        mask = prune(start, tau)
    else:
        mask = start
        gap = abs(float(runner.clean.mean(dtype=np.float64) - runner.none.mean(dtype=np.float64)))
        at = FIRST_TAU * gap
        while at < gap:
            smaller = prune(mask, at)
            if n_edges is None and target is not None and rounds[-1]["faithfulness"] < target:
                break
            mask = smaller
            if n_edges is not None and mask.sum() <= n_edges:
                break
            at *= 2
    return _Found(mask=mask, taken=len(order), record={"top": top, "start": int(start.sum()), "rounds": rounds})


def _check(algorithm: str, target: float | None, n_edges: int | None) -> None:
    allowed = (*ALGORITHMS, "acdc")
    if algorithm not in allowed:
        raise PromptError(f"algorithm {algorithm!r} is not one of {', '.join(get_args(Algorithm))}")
    if target is None and n_edges is None:
        raise PromptError("target=None and n_edges=None: give the faithfulness to reach, or a number of edges")
    if n_edges is None and target is not None and not target > 0:
        raise PromptError(f"target={target!r}: the faithfulness to reach must be above 0, such as 0.8")


def _state(resume: str | Path | None) -> Path | None:
    if resume is None:
        return None
    folder = Path(resume)
    folder.mkdir(parents=True, exist_ok=True)
    return folder / "acdc.json"


def measured_effects(
    model: Model,
    pairs: PromptPairs,
    *,
    resume: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> EdgeEffects:
    """Effects of all edges with those of every prompt, kept in the folder `resume` if one is given.

    A later call with the same model, prompts and options reads them from there; one that was broken off goes on.
    """
    from workbench.patching import EdgeEffects, edge_effects

    if resume is None:
        return edge_effects(model, pairs, per_prompt=True, progress=progress, **options)
    fixed = {name: value for name, value in options.items() if name != "budget_bytes"}
    key = json.dumps([model.model_hash, str(model.dtype), pairs.data_hash, fixed], sort_keys=True)
    folder = Path(resume) / f"effects-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    done = folder / "done"
    if (done / "effects.json").exists():
        try:
            return EdgeEffects.load(done)
        except DataError as error:
            raise DataError(f"{error}; delete {folder} and begin again") from error
    found = edge_effects(model, pairs, per_prompt=True, resume=folder / "unfinished", progress=progress, **options)
    found.save(done)
    return found
