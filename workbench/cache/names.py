"""From what a user calls an activation to the sites and layers that show it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from workbench.cache.reductions import Reduction, reduction
from workbench.errors import PromptError
from workbench.models.bridge import HOOKS
from workbench.models.forward import SITES

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.models.spec import ModelSpec

_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_ELSEWHERE = {
    "hook_result": "capture 'z' and multiply by W_O of the head",
    "hook_attn_scores": "capture 'pattern', or 'q' and 'k'",
    "hook_q_input": "capture 'resid_pre'",
    "hook_k_input": "capture 'resid_pre'",
    "hook_v_input": "capture 'resid_pre'",
    "hook_embed": "capture 'resid_pre' of layer 0",
}


def hook_of(spec: ModelSpec, site: str) -> str:
    """TransformerLens' name, within a block, of the hook that shows a site."""
    hooks = HOOKS[site]
    return hooks[0] if spec.positions == "rotary" or not hooks[0].startswith("attn.hook_rot") else hooks[-1]


def available_sites(model: Model) -> tuple[str, ...]:
    """The sites that a model has."""
    missing = {"resid_mid"} if model.spec.parallel else set()
    if model.weights is not None and all(layer.mlp is None for layer in model.weights.layers):
        missing.add("mlp_out")
    return tuple(site for site in SITES if site not in missing)


def select(
    model: Model, names: str | Iterable[str], layers: int | Iterable[int] | None = None
) -> dict[str, tuple[int, ...]]:
    """Sites and layers that names stand for.

    Args:
        model: whose sites they are.
        names: sites (`z`), TransformerLens hooks (`blocks.3.attn.hook_z`, `attn.hook_z`, `hook_z`), or either with
            wildcards (`resid_*`, `blocks.*.hook_resid_post`).
        layers: only these; None is all.

    Returns:
        The layers of each site, both in the order of the forward pass.

    Raises:
        PromptError: if a name stands for nothing here (the message has near ones), a layer does not exist, or names
            and layers have nothing in common.
    """
    spec = model.spec
    every = tuple(range(spec.n_layers))
    kept = _layers(layers, spec.n_layers)
    names = [names] if isinstance(names, str) else list(names)
    if not names:
        raise PromptError(f"names is empty: name at least one of {', '.join(available_sites(model))}")
    found: dict[str, set[int]] = {}
    for name in names:
        matched = _match(model, name, every)
        within = {site: set(of) & set(kept) for site, of in matched.items()}
        if not any(within.values()):
            raise PromptError(
                f"name {name!r} and layers {list(kept)} have no layer in common: nothing would be captured. "
                "Widen layers, or name another block"
            )
        for site, of in within.items():
            found.setdefault(site, set()).update(of)
    return {site: tuple(sorted(found[site])) for site in SITES if found.get(site)}


def _layers(layers: int | Iterable[int] | None, n_layers: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(n_layers))
    chosen = [layers] if isinstance(layers, int) else list(layers)
    wrong = [layer for layer in chosen if not isinstance(layer, int) or not 0 <= layer < n_layers]
    if wrong or not chosen:
        raise PromptError(
            f"layers is {chosen}: expected at least one layer from 0 to {n_layers - 1}, or None for all of them"
        )
    return tuple(sorted(set(chosen)))


def _match(model: Model, name: str, every: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    spec = model.spec
    sites = available_sites(model)
    if name in sites:
        return {name: every}
    hooks = {site: hook_of(spec, site) for site in sites}
    spelled = {site: {hook, hook.rpartition(".")[2]} for site, hook in hooks.items()}
    if any(mark in name for mark in "*?["):
        found = {site: every for site in sites if any(fnmatchcase(each, name) for each in {site, *spelled[site]})}
        for site in sites:
            of = tuple(layer for layer in every if fnmatchcase(f"blocks.{layer}.{hooks[site]}", name))
            if of and site not in found:
                found[site] = of
        if found:
            return found
        raise PromptError(
            f"name {name!r} matches nothing: there are {', '.join(sites)} and blocks.<layer>.{hooks['z']}"
        )
    block = _BLOCK.fullmatch(name)
    tail = block[2] if block else name
    for site, spellings in spelled.items():
        if tail in spellings or (block and tail == site):
            if block and int(block[1]) not in every:
                raise PromptError(f"name {name!r}: {model.name} has the layers 0 to {len(every) - 1}")
            return {site: (int(block[1]),) if block else every}
    raise PromptError(_unknown(model, name, tail, hooks))


def _unknown(model: Model, name: str, tail: str, hooks: Mapping[str, str]) -> str:
    spec = model.spec
    bare = tail.rpartition(".")[2]
    if bare in {"hook_q", "hook_k"} and spec.positions == "rotary":
        return (
            f"name {name!r}: in TransformerLens that is before the rotation, and what is captured here comes after it: "
            f"use {bare[-1]!r} (blocks.<layer>.attn.hook_rot_{bare[-1]})"
        )
    if bare in _ELSEWHERE:
        return f"name {name!r} is not captured: {_ELSEWHERE[bare]}"
    if tail in SITES or bare.removeprefix("hook_") in SITES:
        why = "its attention and MLP run side by side" if spec.parallel else "its blocks have no MLP"
        return f"name {name!r}: {model.name} has no such site ({why}); it has {', '.join(hooks)}"
    known = [*hooks, *hooks.values(), *(hook.rpartition(".")[2] for hook in hooks.values())]
    near = list(dict.fromkeys(get_close_matches(tail, known, n=3, cutoff=0.5)))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    there = f"{', '.join(hooks)}, or TransformerLens names such as blocks.3.attn.hook_z"
    return f"unknown name {name!r}: {hint}there are {there}"


def reductions_of(sites: Sequence[str], reduce: Any) -> dict[str, list[Reduction | None]]:
    """What is kept of each site; None stands for the activation itself.

    Args:
        sites: the captured ones.
        reduce: by site one reduction or several (`raw` or None among them keeps the activation too), or reductions
            for every site that they fit, or `site.reduction`. Sites without one are kept whole.

    Raises:
        PromptError: if a reduction is unknown, names a site that is not captured, or does not fit.
    """
    kept: dict[str, list[Reduction | None]] = {site: [] for site in sites}
    for site, each in _requests(sites, reduce):
        if site not in kept:
            raise PromptError(f"reduce names site {site!r}, which is not among the captured ones: {', '.join(sites)}")
        chosen = None if each is None or each == "raw" else reduction(each)
        if chosen is not None and not chosen.fits(site):
            raise PromptError(f"reduction {chosen.label!r} is not for {site!r}: it is for {', '.join(chosen.on)}")
        labels = [None if other is None else other.label for other in kept[site]]
        if (None if chosen is None else chosen.label) in labels:
            raise PromptError(f"reduce asks twice for {each!r} of {site!r}: name each reduction once")
        kept[site].append(chosen)
    return {site: chosen or [None] for site, chosen in kept.items()}


def _requests(sites: Sequence[str], reduce: Any) -> Iterable[tuple[str, Any]]:
    if reduce is None:
        return
    if isinstance(reduce, Mapping):
        for site, wanted in reduce.items():
            several = isinstance(wanted, Iterable) and not isinstance(wanted, str)
            for each in wanted if several else [wanted]:
                yield site, each
        return
    for each in [reduce] if isinstance(reduce, (str, Reduction)) else list(reduce):
        site, dot, rest = each.partition(".") if isinstance(each, str) else ("", "", "")
        if dot:
            yield site, rest
            continue
        chosen = reduction(each)
        fitting = [site for site in sites if chosen.fits(site)]
        if not fitting:
            raise PromptError(
                f"reduction {chosen.label!r} is for {', '.join(chosen.on)}, and captured are {', '.join(sites)}"
            )
        yield from ((site, chosen) for site in fitting)
