"""`head_effects`: what every head and every MLP does to a metric, in total and directly.

The total effect of a component is activation patching (Vig et al. 2020; Meng et al. 2022): its write is replaced, all
that follows is recomputed, and the metric is compared with the base run's. Its direct effect replaces the write only in
what the unembedding reads. What lies between them is the indirect effect; where it has the opposite sign, later
components make up for the loss (McGrath et al. 2023; Rushing & Nanda 2024).
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import torch

from workbench.errors import PromptError
from workbench.interventions.ablation import Ablation
from workbench.metrics import METRICS
from workbench.models.model import Model
from workbench.patching.ablated import KINDS, Kind
from workbench.patching.batches import GIB
from workbench.patching.direct_effects import rows_of
from workbench.patching.head_sweep import Effects, Positions, Progress, Settings, sweep
from workbench.patching.runs import Direction
from workbench.prompts import PromptPairs
from workbench.tables import HeadTable, provenance

PREFIX = {"heads": "", "attention": "attention_", "mlps": "mlp_"}
"""What stands in front of a metric's name, by kind of component."""


def head_effects(
    model: Model,
    pairs: PromptPairs,
    *,
    direction: Direction = "noising",
    ablation: Ablation | str = Ablation.RESAMPLE,
    metric: str = "logit_diff",
    components: Sequence[Kind] | None = None,
    positions: Positions = "all",
    direct: bool = False,
    reference: PromptPairs | None = None,
    seed: int = 0,
    budget_bytes: int = 2 * GIB,
    resume: str | Path | None = None,
    progress: Progress | None = None,
) -> HeadTable:
    """What replacing the write of each head and each MLP does to a metric, one component at a time.

    An effect is `metric(base run with the write replaced) - metric(base run)`: noising a component that helps gives a
    negative number, denoising one that carries the answer a positive one. On the fast path many components walk
    through the rest of the model together, from their own layer on; on the hook path each takes a forward pass of its
    own. The numbers are the same up to rounding.

    Args:
        model: the model.
        pairs: clean and corrupted prompts with their answers.
        direction: `noising`: the clean run is the base; `denoising`: the corrupted one is.
        ablation: what takes the place of a write; see `Ablation`. `resample` puts in the other version's, `mean` the
            mean over the other versions of the reference prompts of the same template, position by position.
        metric: `logit_diff`, `answer_logprob` or `kl_to_clean`.
        components: any of `heads`, `attention` (all heads of a layer at once) and `mlps`; default: heads, and MLPs
            where the ablation is defined for them.
        positions: `all` positions at once; `each` position by itself (counted from the first token; prompts that are
            read before it do not count); or each of the prompts' named `spans`.
        direct: measure the direct effect too, and the indirect effect, their difference prompt by prompt.
        reference: the prompts that `mean` is over; default: `pairs`. With few prompts a template the mean is close to
            a resample: the provenance says over how many the means were taken.
        seed: seed of the roundings by which the noise floor is measured.
        budget_bytes: bound on the memory beside the weights.
        resume: a folder in which unfinished work is kept; a later call with the same arguments goes on from there
            (fast path).
        progress: called with a line about once a second.

    Returns:
        A table in units of the metric, mean over prompts with standard error and 95 % Student t interval. Metrics
        `total_effect`, and with `direct` `direct_effect` (the norm recomputed: the edge from the component to the
        logits), `indirect_effect`, and for the logit difference on the fast path `direct_effect_frozen_norm`; of MLPs
        with `mlp_` in front, of whole layers with `attention_`. `base_value` and `patch_value` are the metric of the
        two runs. `input` names the span. An interval does not hold the error of the means of mean ablation.

    Raises:
        PromptError: if arguments do not fit the model or each other; says which and what to use.
        BudgetError: if not even one prompt fits the budget.
        ModelError: on the hook path, if the bridge does not show a site.
    """
    began = time.perf_counter()
    settings = settings_of(
        model,
        pairs,
        direction=direction,
        ablation=ablation,
        metric=metric,
        components=components,
        positions=positions,
        direct=direct,
        reference=reference,
        seed=seed,
    )
    found, means = sweep(
        model, pairs, settings, reference=reference, budget_bytes=budget_bytes, resume=resume, progress=progress
    )
    extra: dict[str, Any] = {}
    if means is not None:
        sizes = means.counts[:, 0]
        extra["reference_prompts"] = int(sizes.sum())
        extra["reference_prompts_per_template"] = {"min": int(sizes.min()), "max": int(sizes.max())}
        extra["reference_hash"] = (reference or pairs).data_hash
    record = provenance(
        model,
        data_hash=pairs.data_hash,
        seed=seed,
        task=pairs.task,
        corruption=pairs.corruption,
        n=len(pairs),
        prompt_seed=pairs.seed,
        settings={**settings.__dict__, "budget_bytes": budget_bytes},
        noise_floor=None if math.isnan(found.noise_floor) else found.noise_floor,
        seconds=round(time.perf_counter() - began, 3),
        **extra,
    )
    return table_of(found, settings, pairs, record)


def settings_of(
    model: Model,
    pairs: PromptPairs,
    *,
    direction: Direction = "noising",
    ablation: Ablation | str = Ablation.RESAMPLE,
    metric: str = "logit_diff",
    components: Sequence[Kind] | None = None,
    positions: Positions = "all",
    direct: bool = False,
    reference: PromptPairs | None = None,
    seed: int = 0,
) -> Settings:
    """Checked settings of a sweep; arguments and errors as for `head_effects`."""
    chosen = Ablation.of(ablation)
    for name, value, allowed in (
        ("direction", direction, get_args(Direction)),
        ("metric", metric, tuple(METRICS)),
        ("positions", positions, get_args(Positions)),
    ):
        if value not in allowed:
            raise PromptError(f"{name} {value!r} is not one of {', '.join(allowed)}")
    if positions == "spans" and not pairs.spans:
        raise PromptError(
            "positions='spans' and these prompts name none: give spans= to PromptPairs, or use positions='each'"
        )
    if direct and positions != "all":
        raise PromptError(
            f"direct=True goes with positions='all', not {positions!r}: a direct effect comes from the answer position "
            "alone"
        )
    if reference is not None and chosen is not Ablation.MEAN:
        raise PromptError(f"reference is for ablation 'mean'; {chosen.value!r} has no use for it")
    return Settings(
        direction=direction,
        ablation=chosen,
        metric=metric,
        positions=positions,
        components=_kinds(model, chosen, components),
        direct=direct,
        seed=seed,
    )


def table_of(found: Effects, settings: Settings, pairs: PromptPairs, record: dict[str, Any]) -> HeadTable:
    """The tidy table of effects."""
    task = pairs.task or ""
    rows: list[dict[str, Any]] = []
    measures = {"total_effect": found.total}
    if found.direct is not None:
        measures |= {"direct_effect": found.direct, "indirect_effect": found.total - found.direct}
    if found.frozen is not None:
        measures["direct_effect_frozen_norm"] = found.frozen
    for index, place in enumerate(found.places):
        having = place.exists(len(pairs))
        if not having.any():
            continue
        where = {"input": ", ".join(filter(None, (task, place.name))), "position": place.position}
        for measure_name, values in measures.items():
            flat = rows_of(torch.from_numpy(values[index][:, having]), measure_name, **where)
            for row, component in zip(flat, found.components, strict=True):
                row |= {
                    "metric": PREFIX[component.kind] + measure_name,
                    "layer": component.layer,
                    "head": component.head,
                }
            rows += flat
    for name, values in (("base_value", found.base), ("patch_value", found.patch)):
        rows += rows_of(torch.from_numpy(values), name, input=task)
    return HeadTable.from_rows(
        rows,
        record,
        analysis="head_effects",
        unit=METRICS[settings.metric].unit,
        method=f"{settings.direction}, {settings.ablation} ablation, {settings.metric}",
    )


def _kinds(model: Model, ablation: Ablation, components: Sequence[Kind] | None) -> tuple[Kind, ...]:
    if components is None:
        return ("heads", "mlps") if ablation.on_mlps and model.spec.d_mlp else ("heads",)
    if isinstance(components, str) or not components or set(components) - set(KINDS):
        raise PromptError(f"components={components!r}: give a list of {', '.join(KINDS)}")
    if "mlps" in components and not ablation.on_mlps:
        raise PromptError(
            f"ablation {ablation.value!r} speaks of attention and components has 'mlps': leave them out, or use zero, "
            "mean or resample"
        )
    if "mlps" in components and not model.spec.d_mlp:
        raise PromptError(f"components has 'mlps' and {model.name} has none: leave them out")
    return tuple(kind for kind in KINDS if kind in components)
