"""Previous-token, duplicate-token and induction heads in the report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workbench.plots import head_heatmap, metric_scatter, top_heads
from workbench.plots.panels import Panel, head_panels
from workbench.plots.ranking import strongest
from workbench.report.section import ReportContext, Section
from workbench.report.sections._words import enumerate_heads, strongest_table

if TYPE_CHECKING:
    from workbench.tables import HeadTable

_KINDS = {"induction": "induction", "previous_token": "previous-token", "duplicate_token": "duplicate-token"}
_N, _N_QUICK = 24, 8
_STRONGEST = 5
_MARKED = 0.5


def section(context: ReportContext) -> Section:
    """The three scores of every head on repeated random tokens."""
    from workbench.analyzers.head_patterns import run

    n = _N_QUICK if context.quick else _N
    return describe(run(context.model, n=n, seed=context.seed, progress=context.progress))


def describe(table: HeadTable) -> Section:
    """The section that a table of `head_patterns` makes."""
    source = table.provenance
    metrics = list(_KINDS)
    panels = head_panels(table, metrics)
    front = "with a BOS token in front" if source.get("prepends_bos") else "without a BOS token"
    return Section(
        name="head_patterns",
        title="Induction, previous-token and duplicate-token heads",
        order=20,
        sentence=sentence(table),
        method=(
            f"{source['n']} sequences of {source['period']} tokens drawn uniformly from the vocabulary, each repeated "
            f"once, {front}. A score is the mean attention along one diagonal: to the token before (previous-token), "
            "to the same token the first time (duplicate-token), and to the token after that (induction), over "
            "every query that has such a key: all but the first, the second half, and the second half with the query "
            "before it. Intervals: Student's t over sequences. Source: Wang et al., Interpretability in the Wild, "
            "2022."
        ),
        limits=(
            "A score says where a head looks on random tokens, not what it writes, nor that it does the same in text, "
            "nor that the model needs it. A head that attends evenly to everything near has a small score on each "
            "diagonal; induction by another route than attention to the next token is not seen."
        ),
        figures=(
            head_heatmap(table, metrics, title="Mean attention along the diagonal"),
            top_heads(table, metrics, k=_STRONGEST, title="The strongest heads, with 95 % CI"),
            metric_scatter(table, "previous_token", "induction", title="Previous-token against induction score"),
        ),
        tables=(table,),
        html_tables=(strongest_table(panels, _STRONGEST, "The strongest heads: score with its 95 % CI"),),
        warnings=tuple(str(note) for note in source.get("notes") or ()),
    )


def sentence(table: HeadTable) -> str:
    """How many heads are marked, and which are the strongest, for each of the three patterns."""
    return "\n".join(_of_pattern(words, head_panels(table, metric)[0]) for metric, words in _KINDS.items())


def _of_pattern(words: str, panel: Panel) -> str:
    marked = int((panel.frame["value"] > _MARKED).sum())
    verb = "scores" if marked == 1 else "score"
    return (
        f"{marked} of {len(panel.frame)} heads {verb} above {_MARKED:g} as {words} heads; the strongest are "
        f"{enumerate_heads(strongest(panel.frame, _STRONGEST))}."
    )
