"""Ablations as editors of the forward pass."""

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from workbench.errors import PromptError
from workbench.interventions.ablation import Ablation, new_pattern
from workbench.interventions.measured import (
    GIB,
    Direction,
    Means,
    measure_means,
    patch_tokens,
    record,
)
from workbench.models.forward import Editor, visible
from workbench.models.model import Model
from workbench.models.spec import ModelSpec
from workbench.prompts import PromptPairs

Replacement = Callable[[int, Tensor], Tensor]
"""From a layer and the value that stands there to what takes its place."""

Where = Bool[Tensor, "n pos"] | None
"""At which positions of each prompt something is replaced; None: at all."""


def ablate(
    model: Model,
    heads: Sequence[str],
    ablation: Ablation | str = Ablation.ZERO,
    *,
    pairs: PromptPairs | None = None,
    reference: PromptPairs | Int[Tensor, "n pos"] | None = None,
    direction: Direction = "noising",
    budget_bytes: int = 2 * GIB,
) -> dict[str, Editor]:
    """Editors that ablate heads in any forward pass: `model.forward(tokens, edit=ablate(model, ["a3.h1"]))`.

    All the heads are ablated in one pass, so that what a later one does follows from the earlier ones' ablation.

    Args:
        model: the model, on either path.
        heads: names such as `a3.h1`; of an MLP, `m5`, where the ablation is defined for it.
        ablation: what takes the place of what they do.
        pairs: for `resample`, and for `mean` by template and position: the prompts that will be run, all of them, in
            this order (`pairs.clean`, or `pairs.corrupted` with `direction="denoising"`).
        reference: for `mean`, the prompts that the mean is over, of which the version that is not run counts; default:
            `pairs`. Without `pairs` the mean is one vector a head over all prompts and positions, and the editors fit
            any tokens; token ids without padding then do as well.
        direction: `noising`: the clean prompts are run, corrupted ones put in; `denoising`: the reverse.
        budget_bytes: bound on the memory of means.

    Returns:
        What `Model.forward` takes as `edit`, by site.

    Raises:
        PromptError: for a head that the model has not, a name twice, an ablation that is not defined for an MLP, or
            prompts that are missing or not needed; the editors raise it if run on other prompts than `pairs`.
    """
    ablation = Ablation.of(ablation)
    by_layer, mlps = parse_nodes(model.spec, heads)
    if mlps and not ablation.on_mlps:
        raise PromptError(
            f"ablation {ablation.value!r} speaks of attention and 'm{min(mlps)}' is an MLP: use zero, mean or resample"
        )
    if not ablation.needs_prompts and (pairs is not None or reference is not None):
        raise PromptError(f"ablation {ablation.value!r} puts in nothing measured: leave pairs and reference out")
    if not ablation.needs_prompts:
        return editors(model, ablation, by_layer, mlps)
    if ablation is Ablation.RESAMPLE:
        if pairs is None or reference is not None:
            raise PromptError("ablation 'resample' puts in the other version of each prompt: give pairs, no reference")
        z, mlp = record(model, patch_tokens(pairs, direction), set(by_layer), set(mlps))
        return editors(model, ablation, by_layer, mlps, z=_fixed(z), mlp=_fixed(mlp))
    if pairs is None and reference is None:
        raise PromptError("ablation 'mean' needs pairs= (means by template) or reference= (one mean for any tokens)")
    over = pairs if reference is None else reference
    if isinstance(over, PromptPairs):
        measured = patch_tokens(over, direction), over.lengths, over.templates
    else:
        assert over is not None
        measured = over, torch.full((len(over),), over.shape[1]), None
    tokens, lengths, templates = measured
    means = measure_means(model, tokens, lengths, templates if pairs is not None else None, budget_bytes)
    if pairs is None:
        z_all, mlp_all = means.everywhere_z, means.everywhere_mlp
        return editors(
            model,
            ablation,
            by_layer,
            mlps,
            z=lambda layer, value: z_all[layer].expand_as(value),
            mlp=lambda layer, value: mlp_all[layer].expand_as(value),
        )
    keyed = keyed_means(means, pairs)
    return editors(model, ablation, by_layer, mlps, z=keyed[0], mlp=keyed[1])


def parse_nodes(spec: ModelSpec, names: Sequence[str]) -> tuple[dict[int, list[int]], list[int]]:
    """Heads by layer and layers of MLPs, from names.

    Raises:
        PromptError: for a name that the model has not, or one that stands twice.
    """
    if isinstance(names, str) or not len(names):
        raise PromptError(f"heads={names!r}: give a list of names such as ['a3.h1']")
    by_layer: dict[int, list[int]] = defaultdict(list)
    mlps: list[int] = []
    known = [f"a{layer}.h{h}" for layer in range(spec.n_layers) for h in range(spec.n_heads)]
    known += [f"m{layer}" for layer in range(spec.n_layers if spec.d_mlp else 0)]
    for name in names:
        head, mlp = re.fullmatch(r"a(\d+)\.h(\d+)", name), re.fullmatch(r"m(\d+)", name)
        if name not in known:
            near = ", ".join(difflib.get_close_matches(name, known, n=3))
            raise PromptError(
                f"{name!r} is no head or MLP of this model of {spec.n_layers} layers x {spec.n_heads} heads: "
                f"write a3.h1 or m5{f'; near it: {near}' if near else ''}"
            )
        if head:
            layer, h = int(head[1]), int(head[2])
            if h in by_layer[layer]:
                raise PromptError(f"{name!r} stands twice in heads: name it once")
            by_layer[layer].append(h)
        elif mlp:
            if int(mlp[1]) in mlps:
                raise PromptError(f"{name!r} stands twice in heads: name it once")
            mlps.append(int(mlp[1]))
    return dict(by_layer), mlps


def editors(
    model: Model,
    ablation: Ablation,
    heads: Mapping[int, Sequence[int]],
    mlps: Sequence[int] = (),
    *,
    z: Replacement | None = None,
    mlp: Replacement | None = None,
    where: Where = None,
) -> dict[str, Editor]:
    """Editors of heads and MLPs, by site.

    Args:
        model: the model.
        ablation: what takes their place.
        heads: heads by layer.
        mlps: layers of MLPs.
        z: what `mean` and `resample` put in for a layer's `z`.
        mlp: what they put in for an MLP's output.
        where: the positions at which a head's write is replaced (of queries: what it mixes there), or None for all.
    """
    found: dict[str, Editor] = {}
    if heads:
        if ablation.site == "pattern":
            found["pattern"] = _pattern_editor(model, ablation, heads, where)
        else:
            new = z if ablation.site == "z" else None
            found[ablation.site] = _slice_editor(heads, new or _nothing, where)
    if mlps:
        found["mlp_out"] = _whole_editor(set(mlps), mlp or _nothing, where)
    return found


def keyed_means(means: Means, pairs: PromptPairs) -> tuple[Replacement, Replacement]:
    """Means by the template of each prompt and by position, for heads and for MLPs."""
    places = means.places(pairs)

    def of(stack: Tensor) -> Replacement:
        def replacement(layer: int, value: Tensor) -> Tensor:
            _same_prompts(len(places), value)
            return means.at(stack[layer], places, value.shape[1])

        return replacement

    return of(means.z), of(means.mlp)


def visible_keys(model: Model, layer: int, queries: int, keys: int, device: torch.device) -> Bool[Tensor, "q k"]:
    """Which keys the queries of a layer see: causal, and within the window of a layer that has one."""
    if not model.spec.causal:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)
    seen = visible(queries, keys, device)
    config = getattr(model.module, "config", None)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    local = kinds is None or kinds[layer] == "sliding_attention"
    if window is not None and local:
        seen &= ~visible(queries, keys, device).tril(keys - queries - int(window))
    return seen


def _nothing(layer: int, value: Tensor) -> Tensor:
    return torch.zeros_like(value)


def _fixed(values: Mapping[int, Tensor]) -> Replacement:
    def replacement(layer: int, value: Tensor) -> Tensor:
        _same_prompts(len(values[layer]), value)
        new = values[layer]
        if new.shape[1] < value.shape[1]:
            raise PromptError(
                f"pairs have {new.shape[1]} positions and {value.shape[1]} are run: run the tokens of pairs themselves"
            )
        return new[:, : value.shape[1]]

    return replacement


def _same_prompts(n: int, value: Tensor) -> None:
    if len(value) != n:
        raise PromptError(
            f"these editors put in values of {n} prompts and {len(value)} are run: run all prompts of pairs in one "
            "forward, in their order"
        )


def _slice_editor(heads: Mapping[int, Sequence[int]], new: Replacement, where: Where) -> Editor:
    """Replace heads in a tensor `[n, pos, heads, d_head]`."""

    def edit(layer: int, value: Tensor) -> Tensor:
        if layer not in heads:
            return value
        chosen = torch.zeros(value.shape[2], dtype=torch.bool, device=value.device)
        chosen[list(heads[layer])] = True
        mask = chosen[:, None] if where is None else where[:, : value.shape[1], None, None] & chosen[:, None]
        return torch.where(mask, new(layer, value).to(value), value)

    return edit


def _whole_editor(layers: set[int], new: Replacement, where: Where) -> Editor:
    """Replace a tensor `[n, pos, d]`."""

    def edit(layer: int, value: Tensor) -> Tensor:
        if layer not in layers:
            return value
        fresh = new(layer, value).to(value)
        return fresh if where is None else torch.where(where[:, : value.shape[1], None], fresh, value)

    return edit


def _pattern_editor(model: Model, ablation: Ablation, heads: Mapping[int, Sequence[int]], where: Where) -> Editor:
    """Replace heads in a pattern `[n, n_heads, q, k]`."""

    def edit(layer: int, value: Tensor) -> Tensor:
        if layer not in heads:
            return value
        queries, keys = value.shape[2:]
        seen = visible_keys(model, layer, queries, keys, value.device)
        new = new_pattern(ablation, seen, value.dtype)
        chosen = torch.zeros(value.shape[1], dtype=torch.bool, device=value.device)
        chosen[list(heads[layer])] = True
        mask = chosen[None, :, None, None]
        if where is not None:
            mask = mask & where[:, None, :queries, None]
        return torch.where(mask, new, value)

    return edit
