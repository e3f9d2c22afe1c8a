"""`discover`: from a model and a task to a circuit that was judged on other prompts than it was found on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from workbench.errors import OutputError, PromptError
from workbench_circuits._reference import Ablation
from workbench_circuits.circuit import Able, Circuit, Steadiness
from workbench_circuits.discovery.acdc import acdc
from workbench_circuits.discovery.prompts import Prompts, draw_prompts
from workbench_circuits.discovery.refine import Refined, contributions, contributions_by_prompt, refine
from workbench_circuits.discovery.scores import measured_effects
from workbench_circuits.discovery.select import ALGORITHMS, Ranking, order_of, select
from workbench_circuits.discovery.size import smallest
from workbench_circuits.discovery.stability import stability
from workbench_circuits.run import GIB, CircuitRunner, Progress
from workbench_circuits.wiring import Mask

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.patching import EdgeEffects
    from workbench.prompts import PromptPairs
    from workbench_circuits.tasks import Task

Algorithm = Literal["refine", "greedy", "threshold", "acdc"]
ACDC_TOP = 3000
SMALLEST = 0.0005
"""Share of the edges below which `refine` does not go."""

FIRST_TAU = 0.0005
"""Threshold that ACDC begins with if none is given, as a share of the gap between model and empty circuit."""


@dataclass(frozen=True, kw_only=True)
class Discovery:
    """A circuit with all that was made on the way.

    Attributes:
        circuit: the circuit.
        prompts: what it was found and judged on.
        effects: the effects that edges were ranked by.
        refined: the rounds of `refine`, if it was used.
        runner: runs circuits on the prompts that edges were scored on.
        judge: runs circuits on the held-out prompts.
    """

    circuit: Circuit
    prompts: Prompts
    effects: EdgeEffects
    refined: Refined | None
    runner: CircuitRunner
    judge: CircuitRunner


def discover(model: Model, task: str | Path | Task | PromptPairs, **options: Any) -> Circuit:
    """Find a circuit for a task, and judge it on prompts that had no part in finding it.

    Arguments are those of `find`, which also returns what was made on the way.
    """
    return find(model, task, **options).circuit


def find(
    model: Model,
    task: str | Path | Task | PromptPairs,
    *,
    algorithm: Algorithm = "threshold",
    method: str | None = None,
    target: float | None = 0.8,
    n_edges: int | None = None,
    n: int = 32,
    n_held_out: int = 32,
    corruption: str | None = None,
    held_out: PromptPairs | None = None,
    effects: EdgeEffects | None = None,
    signed: bool | None = None,
    direction: str | None = None,
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
) -> Discovery:
    """Find a circuit for a task, and judge it on prompts that had no part in finding it.

    1. Prompts are drawn: some to score edges on, some to choose the size on, others (of other templates where there
    are several) to judge the circuit. 2. Edges are scored and selected. 3. The smallest circuit tried is taken whose
    faithfulness is at least the target on the second prompts. 4. It is run on the third. 5. Where edges were ranked by
    effects of each prompt, the selection is repeated on resampled prompts.

    Args:
        model: a model on the fast path.
        task: a task, its name, the path of a CSV file, or prompts, which are then split in halves.
        algorithm: `threshold` (the default): the edges of strongest effect; `greedy`: from the logits down, always the
            strongest edge whose receiver is connected; `refine`: a fiftieth of the edges, by effects, is shrunk step by
            step by what edges contribute within what is left; `acdc`: the `top` edges by `greedy`, pruned one by one.
        method: of the effects: `verified`, `exact`, `receiver_exact`, `eap` or `eap_ig`. Without one: `eap_ig` in both
            directions, signed, which of the rankings tried on the default model gave the most faithful small circuits;
            with fewer than 16 prompts it is not reliable.
        target: faithfulness to reach.
        n_edges: a number of edges instead of a target.
        n: prompts of a task to score edges on; half as many more choose the size.
        n_held_out: prompts to judge it on.
        corruption: how a task's prompts are corrupted; default: its first way.
        held_out: prompts to judge it on, if `task` is prompts.
        effects: effects of all edges, if they are known already (then `method`, `direction` and `steps` do not count).
        signed: rank edges by how much they help instead of by the size of their effect; default: with `refine`, and
            where no method is named.
        direction: of the effects: `noising`, `denoising` or `both`, see `two_sided`; default: `both` with `refine` and
            where no method is named, else `noising`.
        ablation: what edges outside the circuit carry: `resample`, `mean` or `zero`.
        metric: of effects and faithfulness.
        steps: gradients of `eap_ig`.
        top: edges that `acdc` starts from.
        tau: threshold of `acdc` in units of the metric. Without one, it begins at 0.05 % of the gap between model and
            empty circuit and is doubled until the circuit would no longer reach the target (or is small enough).
        n_resamples: resamples of the prompts for stability, 0 for none. With `greedy` and `threshold` the whole
            selection is repeated, with `refine` that of its last round; `acdc` needs the model for every resample: run
            it with other seeds instead.
        seed: seed of every draw.
        budget_bytes: bound on the memory taken beside the weights.
        resume: a folder in which unfinished work is kept; a later call with the same arguments goes on from there.
        progress: called with a line about once a second.

    Returns:
        The circuit, with its faithfulness on all three sets of prompts, the model's competence, and its stability; and
        prompts, effects and runners.

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
    from workbench_circuits.evaluation import evaluation_of

    able = competence(model, prompts.competence)
    say(able.sentence)
    settings: dict[str, Any] = {"ablation": ablation, "metric": metric, "budget_bytes": budget_bytes}
    runner = CircuitRunner(model, prompts.train, **settings)
    sizing = runner if prompts.sizing is prompts.train else CircuitRunner(model, prompts.sizing, **settings)
    two_ways = algorithm == "refine" or (method is None and effects is None)
    signed = two_ways if signed is None else signed
    if effects is None:
        effects = measured_effects(
            model,
            prompts.train,
            method=method or "eap_ig",
            direction=direction or ("both" if two_ways else "noising"),
            metric=metric,
            steps=steps,
            seed=seed,
            budget_bytes=budget_bytes,
            resume=resume,
            progress=progress,
        )
    ranking = Ranking.of(runner.wiring.graph, effects, signed=signed)
    search = _Search(runner=runner, sizing=sizing, target=target, n_edges=n_edges, folder=_folder(resume), say=progress)
    refined = None
    if algorithm == "refine":
        found, refined = search.by_refining(ranking)
    elif algorithm == "acdc":
        found = search.by_acdc(ranking, top, tau)
    else:
        found = search.by_ranking(ranking, algorithm)
    steadiness, inclusion = None, None
    if refined is not None and n_resamples:
        steadiness, inclusion = _last_round(
            runner, refined, found, ranking, effects, n_resamples=n_resamples, seed=seed
        )
    elif n_resamples and algorithm in ALGORITHMS:
        steadiness, inclusion = _steadiness(
            ranking, effects, found, algorithm, from_input=ablation == "resample", n_resamples=n_resamples, seed=seed
        )
    if refined is None:
        by_name = dict(zip(ranking.edges.names, ranking.effect.tolist(), strict=True))
        shown, towards = ranking.method, str(effects.frame["direction"].iloc[0])
    else:  # what goes if the edge goes, at first order and within the circuit
        inner = -contributions(runner, found.mask)
        edges = runner.wiring.edges(found.mask)
        by_name = dict(zip(edges.names, inner[edges.receiver, edges.sender].tolist(), strict=True))
        shown, towards = "contribution within the circuit", "noising"
    judge = CircuitRunner(model, prompts.held_out, **settings)
    circuit = Circuit.of_mask(
        model,
        found.mask,
        effects=by_name,
        inclusion=inclusion,
        task=prompts.train.task,
        corruption=prompts.train.corruption,
        metric=metric,
        ablation=ablation,
        direction=towards,
        method=shown,
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
            sizing_hash=prompts.sizing.data_hash,
            held_out_hash=prompts.held_out.data_hash,
            held_out_seed=prompts.held_out.seed,
            split=prompts.split,
            search=found.record,
            effects=dict(effects.provenance),
            seconds=round(time.perf_counter() - began, 3),
        ),
    )
    return Discovery(circuit=circuit, prompts=prompts, effects=effects, refined=refined, runner=runner, judge=judge)


@dataclass(frozen=True, kw_only=True)
class _Found:
    mask: Mask
    taken: int
    record: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Search:
    """The ways to a circuit; `sizing` decides how many edges it has."""

    runner: CircuitRunner
    sizing: CircuitRunner
    target: float | None
    n_edges: int | None
    folder: Path | None
    say: Progress | None

    def _size(self, take: Ranking | Callable[[int], Mask], algorithm: str, sizes: list[int] | None) -> _Found:
        assert self.target is not None
        sized = smallest(self.sizing, take, target=self.target, algorithm=algorithm, sizes=sizes)
        record = {"target": self.target, "reached": sized.reached, "tried": sized.tried.to_dict("records")}
        return _Found(mask=sized.mask, taken=sized.taken, record=record)

    def by_ranking(self, ranking: Ranking, algorithm: str) -> _Found:
        """The first edges by an algorithm."""
        if self.n_edges is None:
            return self._size(ranking, algorithm, None)
        order = order_of(ranking, algorithm)
        if not 1 <= self.n_edges <= len(order):
            raise PromptError(f"n_edges={self.n_edges}: expected 1 to {len(order):,}, the edges that can be taken")
        resample = self.runner.ablation == "resample"
        mask = select(ranking, self.n_edges, algorithm=algorithm, from_input=resample, order=order)
        return _Found(mask=mask, taken=self.n_edges, record={"n_edges": self.n_edges})

    def by_refining(self, ranking: Ranking) -> tuple[_Found, Refined]:
        """Shrink the circuit of a ranking until it is small enough, or no longer faithful enough."""
        state = None if self.folder is None else self.folder / "refine.safetensors"
        if self.n_edges is not None:
            refined = refine(self.runner, ranking, self.n_edges, judge=self.sizing, resume=state, progress=self.say)
            record = {"n_edges": self.n_edges, "rounds": refined.frame.to_dict("records")}
            return _Found(mask=refined.masks[-1], taken=self.n_edges, record=record), refined
        goal = float(self.target or 0)

        reached = [False]

        def failed(mask: Mask) -> bool:
            f = float(self.sizing.f(self.sizing.run([mask]))[0])
            reached[0] |= f >= goal
            return reached[0] and f < goal / 2

        def at(n: int) -> Mask:
            return refined.at(self.runner, n)

        floor = max(4, int(SMALLEST * self.runner.n_edges))
        refined = refine(self.runner, ranking, floor, judge=self.sizing, stop=failed, resume=state, progress=self.say)
        sizes = [int(m.sum()) for m in refined.masks]
        found = self._size(
            at, "refine", [*sizes, *(int(x * self.runner.n_edges) for x in (0.03, 0.05, 0.1, 0.2, 0.5, 1))]
        )
        return replace(found, record={**found.record, "rounds": refined.frame.to_dict("records")}), refined

    def by_acdc(self, ranking: Ranking, top: int, tau: float | None) -> _Found:
        """Prune the strongest edges, once with a threshold or with growing ones as far as the target allows."""
        order = order_of(ranking, "greedy", top)
        resample = self.runner.ablation == "resample"
        start = select(ranking, len(order), algorithm="greedy", from_input=resample, order=order)
        rounds: list[dict[str, Any]] = []
        state = None if self.folder is None else self.folder / "acdc.json"

        def prune(mask: Mask, at: float) -> Mask:
            file = None if state is None else state.with_name(f"acdc-{len(rounds)}.json")
            done = acdc(self.runner, mask, tau=at, resume=file, progress=self.say)
            f = float(self.sizing.f(self.sizing.run([done.mask]))[0])
            rounds.append(
                {"tau": at, "n_edges": int(done.mask.sum()), "faithfulness": f, "tried": done.tried, "runs": done.runs}
            )
            return done.mask

        if tau is not None:
            mask = prune(start, tau)
        else:
            mask = start
            gap = abs(float(self.runner.clean.mean(dtype=np.float64) - self.runner.none.mean(dtype=np.float64)))
            at = FIRST_TAU * gap
            while at < gap:
                smaller = prune(mask, at)
                if self.n_edges is None and self.target is not None and rounds[-1]["faithfulness"] < self.target:
                    break
                mask = smaller
                if self.n_edges is not None and mask.sum() <= self.n_edges:
                    break
                at *= 2
        return _Found(mask=mask, taken=len(order), record={"top": top, "start": int(start.sum()), "rounds": rounds})


def _last_round(
    runner: CircuitRunner,
    refined: Refined,
    found: _Found,
    ranking: Ranking,
    effects: EdgeEffects,
    *,
    n_resamples: int,
    seed: int,
) -> tuple[Steadiness | None, tuple[float, ...] | None]:
    """Stability of the last selection of `refine`, given the circuit that it was made in."""
    last, from_input = refined.round_of(found.taken), runner.ablation == "resample"
    if len(runner.pairs) < 2:
        return None, None
    if refined.frame["rule"].iloc[last] == "ranking":
        return _steadiness(
            ranking, effects, found, "threshold", from_input=from_input, n_resamples=n_resamples, seed=seed
        )
    edges = runner.wiring.graph.all_edges()
    values = contributions_by_prompt(runner, refined.masks[last - 1])[:, edges.receiver, edges.sender].T
    up = float(runner.clean.mean() - runner.none.mean()) > 0
    within = Ranking(edges=edges, effect=values.mean(1), signed=True, helps=1 if up else -1)
    return _spread(within, values, found, "threshold", from_input=from_input, n_resamples=n_resamples, seed=seed)


def _steadiness(
    ranking: Ranking,
    effects: EdgeEffects,
    found: _Found,
    algorithm: str,
    *,
    from_input: bool,
    n_resamples: int,
    seed: int,
) -> tuple[Steadiness | None, tuple[float, ...] | None]:
    if effects.per_prompt is None or effects.per_prompt.shape[1] < 2:
        return None, None
    return _spread(
        ranking, effects.per_prompt, found, algorithm, from_input=from_input, n_resamples=n_resamples, seed=seed
    )


def _spread(
    ranking: Ranking,
    values: np.ndarray,
    found: _Found,
    algorithm: str,
    *,
    from_input: bool,
    n_resamples: int,
    seed: int,
) -> tuple[Steadiness, tuple[float, ...]]:
    again = stability(
        ranking,
        values,
        found.mask,
        taken=found.taken,
        algorithm=algorithm,
        from_input=from_input,
        n_resamples=n_resamples,
        seed=seed,
    )
    steadiness = Steadiness(
        jaccard=again.jaccard.value,
        jaccard_low=again.jaccard.ci_low,
        jaccard_high=again.jaccard.ci_high,
        head_jaccard=again.head_jaccard.value,
        pairwise=again.pairwise,
        n_resamples=n_resamples,
        n_prompts=values.shape[1],
    )
    return steadiness, tuple(float(x) for x in again.inclusion)


def _check(algorithm: str, target: float | None, n_edges: int | None) -> None:
    if algorithm not in get_args(Algorithm):
        raise PromptError(f"algorithm {algorithm!r} is not one of {', '.join(get_args(Algorithm))}")
    if target is None and n_edges is None:
        raise PromptError("target=None and n_edges=None: give the faithfulness to reach, or a number of edges")
    if n_edges is None and target is not None and not target > 0:
        raise PromptError(f"target={target!r}: the faithfulness to reach must be above 0, such as 0.8")


def _folder(resume: str | Path | None) -> Path | None:
    if resume is None:
        return None
    folder = Path(resume)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot keep unfinished work in {folder}: {error.strerror or error}") from error
    return folder
