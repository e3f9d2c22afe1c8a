"""The sweep behind `head_effects`: components and places, on the fast path or by edits of the forward pass."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.interventions.ablation import Ablation
from workbench.interventions.measured import Means, batches, measure_means, patch_tokens
from workbench.models.model import Model
from workbench.models.weights import at_least_float32
from workbench.patching.ablated import (
    Component,
    Kind,
    ablated_runs,
    components_of,
    components_per_batch,
    direct_effects_of,
    narrowed,
    total_effects,
)
from workbench.patching.batches import GIB, Meter, prompt_batches
from workbench.patching.direct_effects import FrozenNorm
from workbench.patching.head_hooks import HookRuns
from workbench.patching.noise import noise_floor
from workbench.patching.partial import PartialResult
from workbench.patching.runs import Direction, Runs, run_bytes
from workbench.prompts import ABSENT, PromptPairs

Positions = Literal["all", "each", "spans"]
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How effects are measured; all but the memory decides on the numbers."""

    direction: Direction
    ablation: Ablation
    metric: str
    positions: Positions
    components: tuple[Kind, ...]
    direct: bool
    seed: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which positions of each prompt are patched.

    Attributes:
        name: of the span, or "".
        position: the position, the same in all prompts, or None.
        at: the position of each prompt, `ABSENT` where it has none; None: all positions.
    """

    name: str = ""
    position: int | None = None
    at: Int[Tensor, "n"] | None = None

    def exists(self, n: int) -> Bool[np.ndarray, "n"]:
        """Which prompts have the place."""
        return np.ones(n, dtype=bool) if self.at is None else (self.at != ABSENT).cpu().numpy()


@dataclass(frozen=True, kw_only=True)
class Effects:
    """Effects per prompt; NaN where a prompt has not the place.

    Attributes:
        components: what was replaced.
        places: where.
        total: total effects `[places, components, n]`, in units of the metric.
        direct: direct effects, the final norm recomputed; None if not asked for.
        frozen: direct effects with the scale of the final norm held at the base run's; None if not asked for, on the
            hook path, or if the metric is not the logit difference.
        base: the metric of the base run `[n]`.
        patch: the metric of the other version `[n]`.
        noise_floor: size of the effect that rounding alone produces; NaN on the hook path.
    """

    components: list[Component]
    places: list[Place]
    total: Float[np.ndarray, "places components n"]
    direct: Float[np.ndarray, "places components n"] | None
    frozen: Float[np.ndarray, "places components n"] | None
    base: Float[np.ndarray, "n"]
    patch: Float[np.ndarray, "n"]
    noise_floor: float


def places_of(pairs: PromptPairs, positions: Positions, *, causal: bool = True) -> list[Place]:
    """The places that are patched one after another; of a causal model those up to the answer, which alone matter."""
    if positions == "all":
        return [Place()]
    last = pairs.answer_positions if causal else pairs.lengths - 1
    if positions == "spans":
        return [
            Place(name=name, at=torch.where(at.to(last.device) <= last, at.to(last.device), ABSENT))
            for name, at in pairs.spans.items()
        ]
    absent = torch.full_like(last, ABSENT)
    return [
        Place(position=p, at=torch.where(last >= p, torch.full_like(last, p), absent))
        for p in range(int(last.max()) + 1)
    ]


def sweep(
    model: Model,
    pairs: PromptPairs,
    settings: Settings,
    *,
    reference: PromptPairs | None = None,
    budget_bytes: int = 2 * GIB,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> tuple[Effects, Means | None]:
    """Effects prompt by prompt, and the means that `mean` put in; arguments and errors as for `head_effects`."""
    pairs.check_vocabulary(model.spec.d_vocab)
    pairs = pairs.to(model.device)
    means = None
    if settings.ablation is Ablation.MEAN:
        over = (reference or pairs).to(model.device)
        over.check_vocabulary(model.spec.d_vocab)
        tokens = patch_tokens(over, settings.direction)
        means = measure_means(model, tokens, over.lengths, over.templates, budget_bytes // 4)
        means.places(pairs)
    work = _Work(model, pairs, settings, means, budget_bytes, progress or (lambda _: None))
    if model.weights is None:
        return work.by_hooks(), means
    kept = None
    if resume is not None:
        key = _key(model, pairs, settings, reference)
        kept = PartialResult.open(resume, key)
    found = work.fast(kept)
    if kept is not None:
        kept.discard()
    return found, means


class _Work:
    """One call: the components, the places and the arrays that fill up."""

    def __init__(
        self,
        model: Model,
        pairs: PromptPairs,
        settings: Settings,
        means: Means | None,
        budget_bytes: int,
        say: Progress,
    ) -> None:
        self.model, self.pairs, self.settings, self.means, self.say = model, pairs, settings, means, say
        self.budget_bytes = budget_bytes
        self.components = components_of(model.spec, settings.components)
        self.places = places_of(pairs, settings.positions, causal=model.spec.causal)
        dtype = np.float64 if at_least_float32(model.dtype) == torch.float64 else np.float32
        self.shape = (len(self.places), len(self.components), len(pairs))
        self.total = np.full(self.shape, np.nan, dtype=dtype)
        frozen = settings.direct and settings.metric == "logit_diff" and model.weights is not None
        self.direct = np.full(self.shape, np.nan, dtype=dtype) if settings.direct else None
        self.frozen = np.full(self.shape, np.nan, dtype=dtype) if frozen else None
        self.base, self.patch = (np.full(len(pairs), np.nan, dtype=dtype) for _ in range(2))
        self.floor = float("nan")
        self.meter = Meter(say, f"{settings.ablation} ablation", int(np.prod(self.shape)), "effects")

    def _result(self) -> Effects:
        for index, place in enumerate(self.places):
            missing = ~place.exists(len(self.pairs))
            for values in filter(lambda values: values is not None, (self.total, self.direct, self.frozen)):
                assert values is not None
                values[index][:, missing] = np.nan
        return Effects(
            components=self.components,
            places=self.places,
            total=self.total,
            direct=self.direct,
            frozen=self.frozen,
            base=self.base,
            patch=self.patch,
            noise_floor=self.floor,
        )

    def fast(self, kept: PartialResult | None) -> Effects:
        """Many components at a time, on the canonical weights."""
        flat = self.total.reshape(-1, len(self.pairs))
        if kept is not None:
            kept.restore("total", flat)
        for batch in self._batches():
            columns = batch.cpu().numpy()
            runs = ablated_runs(
                self.model.fast_weights,
                self.pairs.subset(batch),
                ablation=self.settings.ablation,
                direction=self.settings.direction,
                metric=self.settings.metric,
                means=self.means,
            )
            self.base[columns] = runs.base_value.cpu().numpy()
            self.patch[columns] = runs.patch_value.cpu().numpy()
            if np.isnan(self.floor):
                self.floor = noise_floor(runs, self.settings.seed)
            for index, place in enumerate(self.places):
                for part, effects in self._walks(runs, place, batch, self.total[index][:, columns]):
                    self.total[index][np.ix_(part, columns)] = effects
                    self.meter.add(effects.size)
                    if kept is not None:
                        kept.store("total", flat)
            if self.direct is not None:
                self._direct(runs, columns)
            del runs
        return self._result()

    def _batches(self) -> list[Tensor]:
        weights = self.model.fast_weights
        resample = self.settings.ablation is Ablation.RESAMPLE
        first = self.pairs.first_difference if resample else torch.zeros_like(self.pairs.answer_positions)
        spec, size = weights.spec, weights.embed.element_size()

        def needed(n: int, width: int, length: int) -> int:
            changes = n * width * spec.n_layers * (2 * spec.n_heads * spec.d_head + spec.d_model) * size
            return run_bytes(weights, n, width, length) + (0 if resample else changes)

        return prompt_batches(
            self.pairs,
            first,
            causal=spec.causal,
            needed=needed,
            available=self.budget_bytes // 2,
            budget_bytes=self.budget_bytes,
        )

    def _walks(
        self, runs: Runs, place: Place, batch: Tensor, known: Float[np.ndarray, "components n"]
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Total effects of the components that are not known, some at a time."""
        todo = np.flatnonzero(np.isnan(known).any(1))
        self.meter.add((len(self.components) - len(todo)) * len(batch), counts=False)
        if not len(todo):
            return
        where, patched = None, np.ones(len(batch), dtype=bool)
        if place.at is not None:
            at = place.at[batch.to(place.at.device)].to(runs.final.device)
            inside = (runs.window.positions == at[:, None]).any(1)
            if self.settings.ablation is Ablation.RESAMPLE and runs.window.causal:  # before it the versions agree
                inside &= at >= runs.pairs.first_difference
            if not inside.any():
                yield todo, np.zeros((len(todo), len(batch)), dtype=self.total.dtype)
                return
            runs = narrowed(runs, torch.where(inside, at, runs.window.answer))
            where = runs.window.positions == at[:, None]
            patched = inside.cpu().numpy()
        size = components_per_batch(runs, self.budget_bytes // 4)
        for first in range(0, len(todo), size):
            part = todo[first : first + size]
            effects = total_effects(runs, [self.components[i] for i in part], where).cpu().numpy()
            yield part, np.where(patched, effects, 0)

    def _direct(self, runs: Runs, columns: np.ndarray) -> None:
        assert self.direct is not None
        map_of = FrozenNorm.of(runs.weights, runs.pairs, runs.final) if self.frozen is not None else None
        size = components_per_batch(runs, self.budget_bytes // 4)
        for first in range(0, len(self.components), size):
            part = np.arange(first, min(first + size, len(self.components)))
            effects, change = direct_effects_of(runs, [self.components[i] for i in part], None)
            self.direct[0][np.ix_(part, columns)] = effects.cpu().numpy()
            if map_of is not None and self.frozen is not None:
                self.frozen[0][np.ix_(part, columns)] = map_of.read(change).cpu().numpy()

    def by_hooks(self) -> Effects:
        """One forward a component, by edits of the forward pass."""
        for batch in batches(self.pairs.lengths):
            columns = batch.cpu().numpy()
            part = self.pairs.subset(batch)
            runs = HookRuns.make(
                self.model,
                part,
                ablation=self.settings.ablation,
                direction=self.settings.direction,
                metric=self.settings.metric,
                means=self.means,
                direct=self.settings.direct,
            )
            self.base[columns] = runs.base_value.cpu().numpy()
            self.patch[columns] = runs.patch_value.cpu().numpy()
            positions = torch.arange(part.clean.shape[1], device=part.clean.device)
            for index, place in enumerate(self.places):
                where = None if place.at is None else positions == place.at[batch][:, None]
                for row, component in enumerate(self.components):
                    total, direct = runs.effects(component, where, direct=self.settings.direct)
                    self.total[index][row, columns] = total.cpu().numpy()
                    if direct is not None and self.direct is not None:
                        self.direct[index][row, columns] = direct.cpu().numpy()
                    self.meter.add(len(columns))
        return self._result()


def _key(model: Model, pairs: PromptPairs, settings: Settings, reference: PromptPairs | None) -> str:
    """What has to be the same for unfinished work to be taken up."""
    parts = [
        "head_effects",
        model.model_hash,
        str(model.dtype),
        pairs.data_hash,
        [(name, at.tolist()) for name, at in sorted(pairs.spans.items())],
        pairs.templates,
        None if reference is None else [reference.data_hash, reference.templates],
        settings.__dict__,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
