"""Extreme tokens: massive activations, value drains, residual peaks and what they are worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.analyzers.extreme_tokens import activations
from workbench.plots.heatmap import head_heatmap
from workbench.plots.labels import head_name, interval, is_missing, number, percent
from workbench.plots.layers import layer_lines
from workbench.report.section import ReportContext, Section

if TYPE_CHECKING:
    from workbench.tables import HeadTable

_LENGTH = 128
_N, _N_QUICK = 16, 6
_DRAINED = 0.5
_CHANGES = {
    "": "as it is",
    "_set_zero": "massive activations set to zero",
    "_set_mean": "set to their mean over other documents",
    "_control": "as many other dimensions of the same tokens set to zero",
}
_SIZES = {"largest_1": "largest |x|", "largest_2": "second", "largest_3": "third", "median_abs": "median |x|"}
_NORMS = {"resid_norm_first": "first token", "resid_norm_rest": "mean of the others"}


def section(context: ReportContext) -> Section:
    """Massive activations by layer, drained values by head, and the loss without the first."""
    from workbench.analyzers.extreme_tokens import run

    model = context.model
    length = min(_LENGTH, model.spec.n_ctx)
    n = _N_QUICK if context.quick else _N
    table = run(model, length=length, n=n, n_loss=n, seed=context.seed, progress=context.progress)
    warnings = []
    if length < _LENGTH:
        warnings.append(f"The context holds {length} tokens, so the documents are cut shorter than {_LENGTH}.")
    if model.tokenizer is None:
        warnings.append("The model has no tokenizer: the documents are random tokens, and the loss means little.")
    return describe(table, warnings=tuple(warnings))


def describe(table: HeadTable, *, warnings: tuple[str, ...] = ()) -> Section:
    """The section that a table of `extreme_tokens` makes.

    Args:
        table: what the analyzer returned.
        warnings: what happened on the way.
    """
    source = table.provenance
    figures = [
        layer_lines(
            table,
            [_SIZES, _NORMS],
            titles=["Sizes in the residual stream", "Norm of the residual stream"],
            log=True,
            title="The residual stream after each block: mean over documents, 95 % CI",
        )
    ]
    if "value_ratio" in set(table.frame["metric"]):
        figures.append(
            head_heatmap(table, "value_ratio", title="Value norm at the first token over that at others (|v W_O|)")
        )
    shown = [each for each in (massive_table(table), loss_table(table)) if each is not None]
    return Section(
        name="extreme_tokens",
        title="Extreme tokens",
        order=15,
        sentence=sentence(table),
        method=(
            f"An activation x of the raw residual stream after a block is massive if |x| > {source['absolute']:g} and "
            f"|x| >= {source['ratio']:g} times the median |x| of that layer and document. {source['n']} documents of "
            f"{source['length']} tokens were looked at. At the first layer at which at least half of them have massive "
            f"activations, these are overwritten and the rest of the model runs on; the loss is the mean over "
            f"{source['n_loss']} other documents, the differences are paired by document. The value ratio of a head is "
            "|v W_O| at the first token over its mean at other tokens. Sources: Sun et al., Massive Activations in "
            "Large Language Models, COLM 2024; Guo et al., Active-Dormant Attention Heads, 2024."
        ),
        limits=(
            "The thresholds are the source's and were chosen for larger models: a layer just below them shows none. "
            "Only the first layer is overwritten, and only elements that fulfil the definition in that document. The "
            "mean is taken over other documents of the same kinds; text of other kinds may have another. Small values "
            "at the first token belong to tokens that draw attention, they do not by themselves show that a head is "
            "dormant."
        ),
        figures=tuple(figures),
        tables=(table,),
        html_tables=tuple(shown),
        warnings=warnings,
        main=({"metric": "value_ratio"},) if "value_ratio" in set(table.frame["metric"]) else (),
    )


def sentence(table: HeadTable) -> str:
    """Whether there are massive activations, where, what they are worth, and how many heads drain values."""
    source, first = table.provenance, table.provenance["first_layer"]
    lines = []
    if first is None:
        lines.append(
            f"No layer has massive activations in most documents; the largest activation is "
            f"{number(source['largest_ratio'])} times the median of its layer."
        )
    else:
        share = _layer(table, "massive_share", first)
        here = activations(table)
        here = here[here["layer"] == first]
        dims = ", ".join(f"{dim} ({number(mean)})" for dim, mean in zip(here["dim"][:3], here["mean"][:3], strict=True))
        at = "the first token" if set(here["token"]) == {"first"} else "the first and later tokens"
        found = table.frame[(table.frame["metric"] == "massive_share") & (table.frame["value"] > 0)]["layer"]
        lines.append(
            f"Massive activations appear at layer {first} ({percent(share['value'])} of the documents; last seen at "
            f"layer {int(found.max())}), at {at}, in dimension {dims}."
        )
        zero, mean, control = (_model(table, f"delta_loss_{name}") for name in ("set_zero", "set_mean", "control"))
        lines.append(
            f"Setting them to zero there changes the loss from {number(_model(table, 'loss')['value'])} by "
            f"{_signed(zero)} nats per token; setting them to their mean, by {_signed(mean)}; zeroing other "
            f"dimensions, by {_signed(control)}."
        )
    if "value_ratio" in set(table.frame["metric"]):
        ratios = table.select("value_ratio").sort_values("value")
        drained = int((ratios["ci_high"].fillna(ratios["value"]) < _DRAINED).sum())
        names = ", ".join(
            f"{head_name(row['layer'], row['head'])} {number(row['value'])}"
            for row in ratios.head(3).to_dict("records")
        )
        lines.append(
            f"{drained} of {len(ratios)} heads have values at the first token of less than half the size of those at "
            f"other tokens; the smallest: {names}."
        )
    return "\n".join(lines)


def massive_table(table: HeadTable) -> pd.DataFrame | None:
    """One row a dimension and kind of token: in which layers it is massive, how large and how constant."""
    found = activations(table)
    if found.empty:
        return None
    rows: list[dict[str, Any]] = []
    for (dim, token), some in found.groupby(["dim", "token"], sort=False):
        most = some.iloc[int(some["mean"].abs().to_numpy().argmax())]
        rows.append(
            {
                "dimension": dim,
                "at token": token,
                "layers": f"{int(some['layer'].min())} to {int(some['layer'].max())}",
                "documents": percent(float(some["share"].max())),
                "largest mean": f"{number(most['mean'])} (layer {int(most['layer'])})",
                "std over documents": number(most["std"]),
                "times the median": number(most["ratio"]),
                "tokens": "  ".join(repr(each) for each in most["tokens"]),
            }
        )
    rows.sort(key=lambda row: row["layers"].split()[0].zfill(4))
    frame = pd.DataFrame(rows[:12])
    left = len(rows) - len(frame)
    frame.attrs["caption"] = "Massive activations" + (f"; {left} more in the files" if left else "")
    return frame


def loss_table(table: HeadTable) -> pd.DataFrame | None:
    """Loss and attention to the first token under every change, with paired differences."""
    if table.provenance["first_layer"] is None:
        return None
    rows = []
    for suffix, words in _CHANGES.items():
        row = {"change": words, "loss, nats per token": _with_interval(_model(table, f"loss{suffix}"))}
        row["difference"] = _with_interval(_model(table, f"delta_loss{suffix}")) if suffix else ""
        if "first_token_attention" in set(table.frame["metric"]):
            row["attention to the first token behind"] = _with_interval(_model(table, f"first_token_attention{suffix}"))
        rows.append(row)
    frame = pd.DataFrame(rows)
    frame.attrs["caption"] = f"What the change at layer {table.provenance['first_layer']} does, with 95 % CI"
    return frame


def _model(table: HeadTable, metric: str) -> Any:
    return table.select(metric, layer=None, head=None).iloc[0]


def _layer(table: HeadTable, metric: str, layer: int) -> Any:
    return table.select(metric, layer=layer, head=None).iloc[0]


def _with_interval(row: Any) -> str:
    return f"{number(row['value'])} {interval(row['ci_low'], row['ci_high'])}".strip()


def _signed(row: Any) -> str:
    sign = "+" if not is_missing(row["value"]) and row["value"] >= 0 else ""
    return f"{sign}{_with_interval(row)}"
