"""The report's section on what heads and MLPs do to a task: total, direct and indirect effects on IOI."""

from __future__ import annotations

from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

from workbench.models import Model
from workbench.patching.ablated import Kind
from workbench.patching.direct_effects import direct_effects
from workbench.patching.head_effects import head_effects
from workbench.plots.labels import head_name, interval, is_missing, number
from workbench.report.section import ReportContext, Section
from workbench.tables import HeadTable
from workbench_circuits._competence import Competence, competence
from workbench_circuits.tasks import load_task

if TYPE_CHECKING:
    import pandas as pd

    from workbench.prompts import PromptPairs

TASK, CORRUPTION = "ioi", "s2_flip"
_N, _N_QUICK = 16, 6
_COMPETENCE_PROMPTS = 100
_STRONGEST = 5
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
        ()
        if able.solved
        else (f"{able.verdict}: {able.sentence} These are the heads behind whatever the model does here instead.",)
    )
    return Section(
        name="head_effects",
        title="Which heads and MLPs matter for IOI",
        order=5,
        sentence=sentence(effects, able),
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
        tables=tuple(table for table in (effects, spans, attribution) if table is not None),
        html_tables=(strongest_table(effects),),
        warnings=unsolved,
        main=tuple({"analysis": "head_effects", "metric": metric} for metric in ("total_effect", "direct_effect")),
    )


def sentence(effects: HeadTable, able: Competence) -> str:
    """Which heads matter in total and directly, and whether later layers make up for them, from the numbers."""
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
        f"On {TASK.upper()}{can[able.verdict]} putting one head's output of the other prompt in place moves the logit "
        f"difference of {_words(base)} (other prompt: {_words(patch)}) by more than chance would for {clear} of "
        f"{len(total)} heads; the strongest in total are {_named(_strongest(total, _STRONGEST))}.",
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
            f"Later layers make up for part of it in {len(repaired)} of the {of} heads with the largest direct "
            f"effects: {names}."
        )
    else:
        lines.append(
            f"In none of the {of} heads with the largest direct effects do later layers clearly make up for it."
        )
    mlps = effects.frame[effects.frame["metric"] == "mlp_total_effect"]
    if len(mlps):
        row = _strongest(mlps, 1).iloc[0]
        lines.append(f"The MLP with the largest total effect is m{int(row['layer'])}: {_words(row)}.")
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


def total_against_direct(effects: HeadTable) -> Any:
    """Scatter of total against direct effects; on the dashed line the total effect is the direct one."""
    from workbench.plots import metric_scatter
    from workbench.plots.style import MUTED

    figure = metric_scatter(
        effects,
        "direct_effect",
        "total_effect",
        label=12,
        title="Total against direct effect: off the dashed line, later components add to it or make up for it",
    )
    values = _heads(effects, "direct_effect")["value"]
    low, high = float(min(values.min(), 0)), float(max(values.max(), 0))
    figure.add_shape(
        type="line", x0=low, y0=low, x1=high, y1=high, line={"color": MUTED, "width": 1, "dash": "dash"}, layer="below"
    )
    return figure


def mlp_bars(effects: HeadTable) -> Any:
    """Total and direct effect of every MLP, with 95 % intervals."""
    import plotly.graph_objects as go

    from workbench.plots.style import INK, SERIES, dress

    figure = go.Figure()
    for name, colour in (("total", SERIES[0]), ("direct", SERIES[1])):
        rows = effects.frame[effects.frame["metric"] == f"mlp_{name}_effect"]
        figure.add_trace(
            go.Bar(
                name=name,
                x=[f"m{layer}" for layer in rows["layer"]],
                y=rows["value"].tolist(),
                error_y={
                    "type": "data",
                    "symmetric": False,
                    "array": (rows["ci_high"] - rows["value"]).fillna(0).tolist(),
                    "arrayminus": (rows["value"] - rows["ci_low"]).fillna(0).tolist(),
                    "color": INK,
                    "thickness": 1,
                    "width": 2,
                },
                marker={"color": colour},
                hovertext=[
                    f"<b>m{row['layer']}</b>, {name}: {number(row['value'])} {interval(row['ci_low'], row['ci_high'])}"
                    for row in rows.to_dict("records")
                ],
                hoverinfo="text",
            )
        )
    dress(figure, height=340, title="Effect of each MLP on the logit difference, with 95 % CI", top=32)
    figure.update_layout(
        barmode="group",
        bargap=0.25,
        showlegend=True,
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )
    figure.update_xaxes(type="category", tickangle=0)
    figure.update_yaxes(title_text=escape(str(effects.frame["unit"].iloc[0])), zeroline=True)
    return figure


def span_heatmap(spans: HeadTable) -> Any:
    """Layer by named position: total effects of whole attention layers and of MLPs, on one scale."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from workbench.plots.style import DIVERGING, dress

    frame = spans.frame[spans.frame["metric"].isin(["attention_total_effect", "mlp_total_effect"])]
    kinds = {"attention_total_effect": "attention layers", "mlp_total_effect": "MLPs"}
    kinds = {metric: words for metric, words in kinds.items() if (frame["metric"] == metric).any()}
    figure = make_subplots(
        rows=1, cols=len(kinds), subplot_titles=[f"<b>{words}</b>" for words in kinds.values()], horizontal_spacing=0.08
    )
    bound = float(frame["value"].abs().max()) or 1.0
    names = {each: each.split(", ")[-1] for each in dict.fromkeys(frame["input"])}
    layers = sorted({int(layer) for layer in frame["layer"]})
    for column, metric in enumerate(kinds, start=1):
        rows = {(row["input"], int(row["layer"])): row for row in frame[frame["metric"] == metric].to_dict("records")}
        figure.add_trace(
            go.Heatmap(
                x=[escape(name) for name in names.values()],
                y=layers,
                z=[[rows[each, layer]["value"] for each in names] for layer in layers],
                hovertext=[
                    [
                        f"layer {layer} at {escape(name)}: {number(rows[each, layer]['value'])} "
                        f"{interval(rows[each, layer]['ci_low'], rows[each, layer]['ci_high'])}"
                        for each, name in names.items()
                    ]
                    for layer in layers
                ],
                hoverinfo="text",
                coloraxis="coloraxis",
                xgap=2,
                ygap=1,
            ),
            row=1,
            col=column,
        )
    dress(figure, height=150 + 13 * len(layers), title="Total effect by layer and position")
    step = 1 if len(layers) <= 16 else 2 if len(layers) <= 34 else 5
    figure.update_yaxes(range=[len(layers) - 0.5, -0.5], dtick=step, showgrid=False, zeroline=False)
    figure.update_yaxes(title_text="layer", col=1)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_layout(
        margin={"r": 90},
        coloraxis={
            "colorscale": [list(stop) for stop in DIVERGING],
            "cmin": -bound,
            "cmax": bound,
            "colorbar": {
                "title": {"text": escape(str(frame["unit"].iloc[0])), "side": "right"},
                "thickness": 12,
                "outlinewidth": 0,
            },
        },
    )
    return figure


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
