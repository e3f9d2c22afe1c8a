"""The report's section on what heads and MLPs do to a task: total, direct and indirect effects on IOI."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench.models import Model
from workbench.patching.ablated import Kind
from workbench.patching.direct_effects import direct_effects
from workbench.patching.head_effects import head_effects
from workbench.plots.labels import head_name, interval, is_missing, number
from workbench.report.section import ReportContext, Section
from workbench.tables import HeadTable
from workbench_circuits._competence import Competence, competence
from workbench_circuits._head_figures import mlp_bars, span_heatmap, total_against_direct
from workbench_circuits.tasks import load_task

if TYPE_CHECKING:
    import pandas as pd

    from workbench.prompts import PromptPairs

TASK, CORRUPTION = "ioi", "s2_flip"
_N, _N_QUICK = 12, 6
_COMPETENCE_PROMPTS = 48
_STRONGEST = 3
_LISTED = 10


def head_effects_section(context: ReportContext) -> Section:
    """Total and direct effects of every head and MLP on IOI, and of every layer by named position."""
    model = context.model
    n = _N_QUICK if context.quick or model.weights is None else _N
    task = load_task(TASK)
    pairs = task.pairs(model, n, seed=context.seed, corruption=CORRUPTION)
    able = competence(model, task.pairs(model, max(n, _COMPETENCE_PROMPTS), seed=context.seed, corruption=CORRUPTION))
    effects = head_effects(model, pairs, direct=True, seed=context.seed, progress=context.progress)
    spans = by_span(model, pairs, seed=context.seed, progress=context.progress)
    attribution = direct_effects(model, pairs) if model.weights is not None else None
    return describe(model, able, effects, spans, attribution)


def by_span(model: Model, pairs: PromptPairs, **options: Any) -> HeadTable | None:
    """Effects of whole attention layers and of MLPs at each named position at which the two versions can differ.

    Returns:
        The table, or None if there is no such position; positions before the first difference are left out: a write
        there is the same in both versions.
    """
    late = {name: at for name, at in pairs.spans.items() if bool(((at >= pairs.first_difference) & (at >= 0)).any())}
    if not late:
        return None
    ordered = dict(sorted(late.items(), key=lambda item: float(item[1].double().mean())))
    kinds: list[Kind] = ["attention", "mlps"] if model.spec.d_mlp else ["attention"]
    table = head_effects(model, replace(pairs, spans=ordered), components=kinds, positions="spans", **options)
    of_layers = table.frame["layer"].notna()  # the metric of the two runs stands in the other table
    return HeadTable(frame=table.frame[of_layers].reset_index(drop=True), provenance=table.provenance)


def describe(
    model: Model,
    able: Competence,
    effects: HeadTable,
    spans: HeadTable | None,
    attribution: HeadTable | None,
) -> Section:
    """The section that the tables make."""
    from workbench.plots import head_heatmap

    source = effects.provenance
    figures = [
        head_heatmap(
            effects,
            ["total_effect", "direct_effect"],
            title="Effect of each head on the logit difference, total and direct",
        ),
        total_against_direct(effects),
    ]
    if (effects.frame["metric"] == "mlp_total_effect").any():
        figures.append(mlp_bars(effects))
    if spans is not None:
        figures.append(span_heatmap(spans))
    unsolved = (
        () if able.solved else (f"{able.sentence} These are the heads behind whatever the model does here instead.",)
    )
    return Section(
        name="head_effects",
        title="Which heads and MLPs matter for IOI",
        order=5,
        sentence=sentence(effects, able, spans),
        method=_method(effects, attribution),
        limits=(
            f"{source['n']} prompts of one task and one corruption: other corruptions, ablations or tasks give other "
            "heads (`workbench heads` measures them). Components are ablated one at a time: two that stand in for each "
            "other can each look unimportant, and effects do not add up. An indirect effect against the direct one "
            "shows that later components make up for it here, not that they do so for that purpose. Intervals are of "
            f"each number by itself: of {len(_heads(effects, 'total_effect'))} heads without any effect, one in twenty "
            "would have an interval that leaves 0 out."
        ),
        figures=tuple(figures),
        tables=(HeadTable.concat([table for table in (effects, spans, attribution) if table is not None]),),
        html_tables=(strongest_table(effects),),
        warnings=unsolved,
        main=tuple({"analysis": "head_effects", "metric": metric} for metric in ("total_effect", "direct_effect")),
    )


def sentence(effects: HeadTable, able: Competence, spans: HeadTable | None = None) -> str:
    """Which heads matter in total and directly, and whether later components make up for them, from the numbers."""
    total, direct = (_heads(effects, f"{kind}_effect") for kind in ("total", "direct"))
    base = effects.frame[effects.frame["metric"] == "base_value"].iloc[0]
    patch = effects.frame[effects.frame["metric"] == "patch_value"].iloc[0]
    clear = int(_clear(total).sum())
    can = {
        "solved": "",
        "above chance": ", which the model does not solve,",
        "not solved": ", which the model cannot do,",
    }
    lines = [
        f"On {TASK.upper()}{can[able.verdict]} putting in one head's output of the other prompt moves the logit "
        f"difference, {_words(base)} (other prompt: {_words(patch)}), clearly (95 % interval without 0) for {clear} of "
        f"{len(total)} heads; the "
        f"strongest in total are {_named(_strongest(total, _STRONGEST))}.",
        f"Directly, through the unembedding alone, the strongest are {_named(_strongest(direct, _STRONGEST))}.",
    ]
    repaired = made_up_for(effects)
    of = len(_strongest(direct, _LISTED))
    if repaired:
        names = ", ".join(
            f"{head_name(row['layer'], row['head'])} (direct {number(row['direct'])}, total {number(row['total'])})"
            for row in repaired
        )
        lines.append(
            f"Later components make up for part of that in {len(repaired)} of the {of} heads with the largest direct "
            f"effects: {names}."
        )
    else:
        lines.append(
            f"In none of the {of} heads with the largest direct effects do later components clearly make up for it."
        )
    mlps = effects.frame[effects.frame["metric"] == "mlp_total_effect"]
    if len(mlps):
        row = _strongest(mlps, 1).iloc[0]
        lines.append(f"The MLP with the largest total effect is m{int(row['layer'])}: {_words(row)}.")
    if spans is not None:
        places = [
            (str(where).split(", ")[-1], _strongest(rows, 1).iloc[0])
            for where, rows in spans.select("attention_total_effect").groupby("input", sort=False)
        ]
        words = " and ".join(f"layer {int(row['layer'])} at {name} ({_words(row)})" for name, row in places)
        lines.append(f"By position, the attention layers with the largest total effects are {words}.")
    return "\n".join(lines)


def made_up_for(effects: HeadTable, k: int = _LISTED) -> list[dict[str, Any]]:
    """Those of the `k` heads with the largest direct effects whose indirect effect is clearly of the other sign."""
    found = []
    for row in _strongest(_heads(effects, "direct_effect"), k).to_dict("records"):
        at = {"layer": row["layer"], "head": row["head"]}
        indirect = _heads(effects, "indirect_effect", **at)
        total = _heads(effects, "total_effect", **at).iloc[0]["value"]
        if bool(_clear(indirect).iloc[0]) and indirect.iloc[0]["value"] * row["value"] < 0:
            found.append({**at, "direct": row["value"], "total": total})
    return found


def strongest_table(effects: HeadTable, k: int = _LISTED) -> pd.DataFrame:
    """The `k` heads strongest in total and directly, side by side."""
    import pandas as pd

    columns: dict[str, list[str]] = {}
    for kind in ("total", "direct"):
        rows = _strongest(_heads(effects, f"{kind}_effect"), k).to_dict("records")
        other = "direct" if kind == "total" else "total"
        beside = [
            _heads(effects, f"{other}_effect", layer=row["layer"], head=row["head"]).iloc[0]["value"] for row in rows
        ]
        columns[f"by {kind} effect"] = [f"{head_name(row['layer'], row['head'])} {_words(row)}" for row in rows]
        columns[f"{other} effect"] = [number(value) for value in beside]
    frame = pd.DataFrame({"rank": [str(place + 1) for place in range(len(next(iter(columns.values()))))], **columns})
    frame.attrs["caption"] = "The strongest heads on IOI, in logits, with 95 % CI"
    return frame


def _method(effects: HeadTable, attribution: HeadTable | None) -> str:
    source = effects.provenance
    floor = source.get("noise_floor")
    route = "Many heads at a time through the functional forward" if source["path_taken"] == "fast" else "By hooks"
    text = (
        f"{source['n']} IOI prompts (seed {source['prompt_seed']}), corrupted by putting the indirect object's name in "
        "place of the second mention of the subject, so that the other name becomes right (Merullo et al. 2024). Total "
        "effect: the clean prompt runs with one head's output, at all positions, replaced by its output on the "
        "corrupted prompt; everything that follows is recomputed; effect = logit difference (right minus wrong name of "
        "the clean prompt) minus that of the plain clean run. A negative effect marks a head that supports the right "
        "name. Direct effect: only the final norm and the unembedding read the replaced output. Indirect effect: total "
        "minus direct, prompt by prompt; of the other sign than the direct one, it is self-repair (Rushing and Nanda "
        "2024). By position: whole attention layers and MLPs, patched at the named token alone. Intervals: Student's t "
        f"over prompts. {route}."
    )
    if floor is not None:
        text += f" Rounding alone makes effects of {floor:.0e} logits."
    if attribution is not None:
        text += (
            " heads.csv also has the direct logit attribution of the clean run (frozen norm, raw weights); its terms "
            f"add up to the logit difference within {attribution.provenance['largest_remainder']:.0e} logits."
        )
    return text


def _heads(table: HeadTable, metric: str, **where: Any) -> pd.DataFrame:
    return table.select(metric, **where)


def _strongest(frame: pd.DataFrame, k: int) -> pd.DataFrame:
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order[:k]]


def _clear(frame: pd.DataFrame) -> pd.Series[bool]:
    """Whether the interval leaves 0 out."""
    return (frame["ci_low"] > 0) | (frame["ci_high"] < 0)


def _named(frame: pd.DataFrame) -> str:
    return ", ".join(f"{head_name(row['layer'], row['head'])} {_words(row)}" for row in frame.to_dict("records"))


def _words(row: Any) -> str:
    span = interval(row["ci_low"], row["ci_high"])
    return number(row["value"]) if is_missing(row["ci_low"]) else f"{number(row['value'])} {span}"
