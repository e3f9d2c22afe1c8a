"""What replacing a head's or an MLP's write changes, for every ablation, and the streams that follow from it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.interventions.ablation import Ablation, new_z
from workbench.interventions.measured import Means
from workbench.models.spec import ModelSpec
from workbench.models.weights import ModelWeights
from workbench.patching.exact import Stage, base_stream, edges_per_batch, walk
from workbench.patching.graph import Sender
from workbench.patching.runs import Direction, Runs, make_runs
from workbench.patching.window import Window
from workbench.prompts import PromptPairs

Kind = Literal["heads", "attention", "mlps"]
KINDS: tuple[Kind, ...] = ("heads", "attention", "mlps")


@dataclass(frozen=True, kw_only=True)
class Component:
    """Something that writes into the stream: a head, all heads of a layer, or an MLP."""

    kind: Kind
    layer: int
    head: int | None = None


def components_of(spec: ModelSpec, kinds: Sequence[Kind]) -> list[Component]:
    """All components of some kinds, in the order in which they write."""
    found = []
    for layer in range(spec.n_layers):
        if "heads" in kinds:
            found += [Component(kind="heads", layer=layer, head=head) for head in range(spec.n_heads)]
        if "attention" in kinds:
            found.append(Component(kind="attention", layer=layer))
        if "mlps" in kinds and spec.d_mlp:
            found.append(Component(kind="mlps", layer=layer))
    return found


def ablated_runs(
    weights: ModelWeights,
    pairs: PromptPairs,
    *,
    ablation: Ablation,
    direction: Direction,
    metric: str,
    means: Means | None = None,
) -> Runs:
    """Caches of the base run, and what an ablation of each component would change.

    Only `resample` leaves the positions before the first difference as they are, so only its windows are short.
    """
    whole = ablation is not Ablation.RESAMPLE
    runs = make_runs(weights, pairs, direction=direction, metric=metric, whole_prompts=whole)
    if not whole:
        return runs
    spec = weights.spec
    if ablation is Ablation.MEAN:
        assert means is not None
        places = means.places(runs.pairs)
        new = [runs.window.take(means.at(means.z[layer], places, runs.length)) for layer in range(spec.n_layers)]
        mlp = [runs.window.take(means.at(part, places, runs.length)) for part in means.mlp]
    else:
        new = [runs.window.take(new_z(ablation, spec, values)) for values in runs.values]
        mlp = [torch.zeros_like(out) for out in runs.mlp_out] if ablation.on_mlps else []
    delta_z = torch.stack([(b - a).permute(2, 0, 1, 3) for a, b in zip(runs.z, new, strict=True)])
    delta_mlp = runs.delta_mlp
    if mlp:
        delta_mlp = torch.stack([b - a for a, b in zip(runs.mlp_out, mlp, strict=True)])
    return replace(runs, delta_z=delta_z, delta_mlp=delta_mlp)


def narrowed(runs: Runs, first: Int[Tensor, "n"]) -> Runs:
    """The same runs with windows that begin at `first` or before, where nothing before it is replaced.

    Args:
        runs: with windows that begin no later.
        first: first position of each prompt that a patch touches.
    """
    old = runs.window
    if not old.causal:
        return runs
    first = torch.minimum(first.to(old.answer.device), old.answer)
    window = Window.of(first, old.answer, length=runs.length, causal=True)
    if window.width >= old.width:
        return runs
    rows = torch.arange(len(old.start), device=old.start.device)[:, None]
    inside = window.positions - old.start[:, None]

    def cut(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(part[rows, inside] for part in parts)

    return replace(
        runs,
        window=window,
        resid_pre=cut(runs.resid_pre),
        resid_mid=cut(runs.resid_mid),
        queries=cut(runs.queries),
        z=cut(runs.z),
        mlp_out=cut(runs.mlp_out),
        delta_z=runs.delta_z[:, :, rows, inside],
        delta_mlp=runs.delta_mlp[:, rows, inside],
        delta_input=runs.delta_input[rows, inside],
        traced=None,
    )


def stage_of(spec: ModelSpec, component: Component) -> Stage:
    """Where in the walk a component's patched streams join."""
    return component.layer, 1 if component.kind == "mlps" or spec.parallel else 0


def changes(
    runs: Runs, components: Sequence[Component], where: Bool[Tensor, "n width"] | None
) -> Float[Tensor, "components n width d_model"]:
    """What replacing each component's write, at some positions, adds to the stream."""
    n, width, d_model = runs.delta_input.shape
    found = runs.delta_input.new_empty(len(components), n, width, d_model)
    senders = {
        index: Sender(kind="head", layer=each.layer, head=each.head)
        if each.head is not None
        else Sender(kind="mlp", layer=each.layer)
        for index, each in enumerate(components)
        if each.kind != "attention"
    }
    if senders:
        found[list(senders)] = runs.writes(list(senders.values()))
    for index, each in enumerate(components):
        if each.kind == "attention":
            merged = runs.delta_z[each.layer].permute(1, 2, 0, 3).flatten(-2)
            found[index] = merged @ runs.weights.layers[each.layer].out.matrix
    if where is not None:
        found *= where[..., None]
    return found


@torch.no_grad()
def total_effects(
    runs: Runs, components: Sequence[Component], where: Bool[Tensor, "n width"] | None
) -> Float[Tensor, "components n"]:
    """Change of the metric when each component's write is replaced and all that follows is recomputed.

    Args:
        runs: as from `ablated_runs`.
        components: in the order in which they write, few enough to be walked together.
        where: the positions of the windows at which they are replaced; None: all.
    """
    spec = runs.weights.spec
    joins: dict[Stage, list[Component]] = {}
    for component in components:
        joins.setdefault(stage_of(spec, component), []).append(component)
    # a parallel block's heads and MLP join at one stage, a sequential one's at two
    streams = {at: _Joining(runs, at, members, where) for at, members in sorted(joins.items())}
    return walk(runs, streams) - runs.base_value


@dataclass(frozen=True)
class _Joining:
    """Makes the streams that join a walk at a stage when the walk arrives there."""

    runs: Runs
    at: Stage
    members: list[Component]
    where: Tensor | None

    def __call__(self) -> list[Tensor]:
        change = changes(self.runs, self.members, self.where)
        if self.at[0] == self.runs.weights.spec.n_layers - 1:
            change = self.runs.window.at_answer(change)
        return [change.add_(base_stream(self.runs, self.at))]


@torch.no_grad()
def direct_effects_of(
    runs: Runs, components: Sequence[Component], where: Bool[Tensor, "n width"] | None
) -> tuple[Float[Tensor, "components n"], Float[Tensor, "components n d_model"]]:
    """Change of the metric when only the unembedding reads the replaced write, and that change of the final stream."""
    change = runs.window.at_answer(changes(runs, components, where)).squeeze(-2)
    return runs.metric.read(runs.final + change) - runs.base_value, change


def components_per_batch(runs: Runs, budget_bytes: int) -> int:
    """How many components are walked together."""
    return edges_per_batch(runs, budget_bytes)
