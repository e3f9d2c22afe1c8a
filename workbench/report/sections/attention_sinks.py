"""Attention sinks in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.plots import head_heatmap, rates, top_heads
from workbench.plots.labels import interval, percent
from workbench.plots.panels import head_panels
from workbench.plots.ranking import strongest
from workbench.report.section import ReportContext, Section
from workbench.report.sections._words import enumerate_heads, strongest_table

if TYPE_CHECKING:
    from workbench.tables import HeadTable

_KINDS = {"natural": "on natural text", "random": "on random tokens", "repeated": "on one token repeated"}
_N, _N_QUICK = 100, 24
_LENGTH = 64
_STRONGEST = 5


def section(context: ReportContext) -> Section:
    """Sink rates for the kinds of input, and every head's attention to the first position."""
    from workbench.analyzers.attention_sinks import run

    model = context.model
    warnings = []
    inputs = tuple(_KINDS)
    if model.tokenizer is None:
        inputs = inputs[1:]
        warnings.append("The model has no tokenizer, so natural text was left out.")
    length = min(_LENGTH, model.spec.n_ctx)
    if length < _LENGTH:
        warnings.append(f"The context holds {length} tokens, so the samples are shorter than the usual {_LENGTH}.")
    n = _N_QUICK if context.quick else _N
    table = run(model, inputs=inputs, length=length, n=n, seed=context.seed, progress=context.progress)
    return describe(table, warnings=tuple(warnings))


def describe(table: HeadTable, *, warnings: tuple[str, ...] = ()) -> Section:
    """The section that a table of `attention_sinks` makes.

    Args:
        table: what the analyzer returned, for one key position.
        warnings: what happened on the way.
    """
    source = table.provenance
    inputs = [name for name in _KINDS if name in set(table.frame["input"])]
    panels = head_panels(table, "alpha", input=inputs)
    return Section(
        name="attention_sinks",
        title="Attention sinks",
        order=10,
        sentence=sentence(table),
        method=(
            f"alpha of a head is the attention that the token at the first position (0) gets, averaged over all "
            f"queries; the head is a sink on a sample if alpha exceeds {source['eps']:g}. The sink rate is the mean of "
            f"that indicator over samples and heads, taken on each sample first. {_samples(source)} of "
            f"{source['length']} tokens: the beginnings of built-in documents of several domains (natural), "
            "independent uniform draws from the vocabulary (random), one drawn token repeated (repeated). "
            f"{_bos(source)} Source: Gu et al., When Attention Sink Emerges in Language Models, ICLR 2025."
        ),
        limits=(
            "Only the first position is scored here: a sink at a later token, such as a full stop, does not count, and "
            "a rate near zero on repeated tokens means that attention is spread over equal tokens, not that sinks are "
            "gone. The rate depends on the threshold, on the length and on whether a BOS token stands in front; the "
            "intervals cover the choice of samples alone."
        ),
        figures=(
            rates(table, "sink_rate", title="Share of heads that are sinks, by kind of input"),
            head_heatmap(table, "alpha", input=inputs, title="Mean attention to the first position (alpha)"),
            top_heads(table, "alpha", input=inputs, k=_STRONGEST, title="The strongest sinks, with 95 % CI"),
        ),
        tables=(table,),
        html_tables=(strongest_table(panels, _STRONGEST, "The strongest sinks: alpha with its 95 % CI"),),
        warnings=warnings,
        main=({"metric": "alpha", "input": inputs}, {"metric": "sink_rate", "input": inputs}),
    )


def sentence(table: HeadTable) -> str:
    """Which share of the heads is a sink for each kind of input, and which heads are the strongest."""
    frame = table.select("sink_rate")
    whole = frame[frame["layer"].isna() & frame["head"].isna()].set_index("input")
    parts: list[str] = []
    for kind, words in _KINDS.items():
        if kind in whole.index:
            row = whole.loc[kind]
            span = interval(row["ci_low"], row["ci_high"], share=True)
            heads = "" if parts else "of the heads "
            parts.append(f"{percent(row['value'])} {span} {heads}{words}".replace("  ", " "))
    first = next(kind for kind in _KINDS if kind in whole.index)
    panel = head_panels(table, "alpha", input=first)[0]
    return (
        f"The first position is an attention sink for {_join(parts)}.\nThe strongest sinks {_KINDS[first]} are "
        f"{enumerate_heads(strongest(panel.frame, _STRONGEST))}."
    )


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _samples(source: Any) -> str:
    return "Samples: " + ", ".join(f"{n} {kind}" for kind, n in source["inputs"].items())


def _bos(source: Any) -> str:
    if source.get("prepends_bos"):
        return "The tokenizer puts a BOS token in front of natural text."
    return "No BOS token stands in front."
