"""Effects of all edges as a search needs them: of every prompt, kept from call to call, in one direction or in both."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import DataError, PromptError
from workbench.patching.graph import Graph
from workbench_circuits.discovery.select import Ranking
from workbench_circuits.run import Progress

if TYPE_CHECKING:
    from workbench.models import Model
    from workbench.patching import EdgeEffects
    from workbench.prompts import PromptPairs


def measured_effects(
    model: Model,
    pairs: PromptPairs,
    *,
    direction: str = "noising",
    resume: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> EdgeEffects:
    """Effects of all edges with those of every prompt, kept in the folder `resume` if one is given.

    A later call with the same model, prompts and options reads them from there; one that was broken off goes on.

    Args:
        model: a model on the fast path.
        pairs: prompts.
        direction: `noising`, `denoising` or `both`; see `two_sided`.
        resume: folder.
        progress: called with a line about once a second.
        options: further arguments of `workbench.edge_effects`.
    """
    from workbench.patching import EdgeEffects, edge_effects

    if direction == "both":
        parts = [
            measured_effects(model, pairs, direction=one, resume=resume, progress=progress, **options)
            for one in ("noising", "denoising")
        ]
        return two_sided(Graph(model.spec), parts[0], parts[1])
    options |= {"direction": direction}
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


def two_sided(graph: Graph, noising: EdgeEffects, denoising: EdgeEffects) -> EdgeEffects:
    """Mean of what an edge takes away from the clean run and what it gives to the corrupted run.

    An edge that others can stand in for does nothing to the clean run, one that needs others nothing to the corrupted
    run; the mean sees both, and is positive where an edge helps (negative for KL).

    Args:
        graph: of the model.
        noising: effects with the clean run as base, of each prompt.
        denoising: effects of the same edges with the corrupted run as base.

    Raises:
        PromptError: if the effects of each prompt are missing, or they are of different edges or prompts.
    """
    from workbench.patching.effects import EdgeEffects, effects_frame

    edges = Ranking.of(graph, noising).edges
    a, b = noising.per_prompt, denoising.per_prompt
    if a is None or b is None or a.shape != b.shape or edges.names != Ranking.of(graph, denoising).edges.names:
        raise PromptError("two_sided needs effects of each prompt (per_prompt=True), of the same edges and prompts")
    first = noising.frame.iloc[0]
    values = (b - a) / 2
    floor = max(noising.noise_floor, denoising.noise_floor)
    methods = np.array(
        [x if x == y else f"{x}/{y}" for x, y in zip(noising.frame["method"], denoising.frame["method"], strict=True)],
        dtype=object,
    )
    constant = {name: first[name] for name in ("ablation", "metric", "base", "path_taken")}
    return EdgeEffects(
        frame=effects_frame(edges, values, methods, floor, {**constant, "direction": "both"}),
        noise_floor=floor,
        provenance={**noising.provenance, "denoising": dict(denoising.provenance)},
        per_prompt=values,
    )
