"""The report's section on what the model can do."""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from workbench.models import Model
from workbench.report.section import ReportContext, Section
from workbench.tables import HeadTable, provenance
from workbench_circuits._competence import RULE, Competence, competence
from workbench_circuits.tasks import load_task

_TASKS = ("ioi", "colored_objects")
_N, _N_QUICK = 100, 32


def competence_section(context: ReportContext) -> Section:
    """Competence on IOI, with both corruptions, and on Colored Objects."""
    n = _N_QUICK if context.quick else _N
    tasks = [load_task(name) for name in _TASKS]
    results: list[tuple[str, Competence]] = []
    for task in tasks:
        for corruption in task.corruptions:
            pairs = task.pairs(context.model, n, seed=context.seed, corruption=corruption)
            results.append((task.title, competence(context.model, pairs)))
            context.progress(results[-1][1].sentence)
    return Section(
        name="competence",
        title="What the model can do",
        order=0,
        sentence=finding(context.model.name, results),
        method=_method(n, context.seed, [f"{task.title}: {task.source}" for task in tasks], results),
        limits=(
            f"{n} prompts a task, all of one form and in English: another wording, more examples in the prompt or "
            "another way to count (the whole vocabulary instead of the candidates) can change the verdict. Intervals "
            "are over prompts drawn like these."
        ),
        figures=(competence_figure(results),),
        tables=(competence_table(context.model, context.seed, results),),
        html_tables=(_table(results),),
        warnings=tuple(
            f"{title} is not solved by this model: heads and circuits found with it would explain no skill."
            for title in dict.fromkeys(title for title, result in results if not result.solved)
        ),
    )


def finding(model: str, results: Sequence[tuple[str, Competence]]) -> str:
    """Which tasks the model can do and which not, in words that follow from the numbers.

    Args:
        model: its name.
        results: title of the task and competence; a task may occur with several corruptions of the same clean prompts.
    """
    doing = {
        "solved": "can do",
        "above chance": "does better than chance on, but does not solve,",
        "not solved": "cannot do",
    }
    parts = []
    for title in dict.fromkeys(title for title, _ in results):
        mine = [result for other, result in results if other == title]
        first = mine[0]
        falls = ", ".join(f"{_short(each.metric_corrupted.value)} with {each.corruption}" for each in mine)
        parts.append(
            f"{model} {doing[first.verdict]} {title}: accuracy {_share(first)} among the candidates, chance "
            f"{100 * first.chance:.0f} %, logit difference {_short(first.metric_clean.value)} on clean prompts "
            f"(corrupted: {falls})."
        )
    return " ".join(parts)


def competence_table(model: Model, seed: int, results: Sequence[tuple[str, Competence]]) -> HeadTable:
    """The numbers as tidy rows of the whole model; `input` is `task, corruption`.

    Args:
        model: the model.
        seed: seed that the prompts were drawn with.
        results: title of the task and competence.
    """
    rows = [
        {
            "metric": row["quantity"],
            **{name: row[name] for name in ("value", "stderr", "ci_low", "ci_high", "n", "unit", "path_taken")},
            "input": f"{row['task']}, {row['corruption']}",
        }
        for _, result in results
        for row in result.frame.to_dict("records")
    ]
    inputs = {f"{result.task}, {result.corruption}": result for _, result in results}
    return HeadTable.from_rows(
        rows,
        provenance(
            model,
            data_hash=sha256("".join(result.data_hash for result in inputs.values()).encode()).hexdigest(),
            seed=seed,
            chance={name: result.chance for name, result in inputs.items()},
            verdict={name: result.verdict for name, result in inputs.items()},
            prompts={name: result.data_hash for name, result in inputs.items()},
        ),
        analysis="competence",
        method="at the answer position",
    )


def competence_figure(results: Sequence[tuple[str, Competence]]) -> Any:
    """Bars of accuracy and top-1 with chance lines, and of the logit difference clean and corrupted; 95 % intervals.

    Args:
        results: title of the task and competence.

    Returns:
        A plotly `Figure` of two panels.
    """
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    from workbench.plots.style import INK, MISSING, SEQUENTIAL, SERIES, dress

    figure = make_subplots(
        rows=1,
        cols=2,
        column_widths=[0.45, 0.55],
        horizontal_spacing=0.12,
        subplot_titles=["<b>share of prompts that are right</b>", "<b>logit difference, right minus wrong</b>"],
    )
    firsts = dict(reversed(results))
    by_task = {title: firsts[title] for title in dict.fromkeys(title for title, _ in results)}
    labels = {title: f"{title}<br>n = {result.n}" for title, result in by_task.items()}
    shares = (("among the candidates", "accuracy", SERIES[3]), ("in the whole vocabulary", "top1", SEQUENTIAL[1][1]))
    for name, field, colour in shares:
        estimates = [getattr(result, field) for result in by_task.values()]
        figure.add_trace(_bars(go, name, list(labels.values()), estimates, colour, "share"), row=1, col=1)
    for place, result in enumerate(by_task.values()):
        figure.add_shape(
            type="line",
            x0=place - 0.42,
            x1=place + 0.42,
            y0=result.chance,
            y1=result.chance,
            line={"color": INK, "width": 2, "dash": "dash"},
            name="chance among the candidates",
            showlegend=place == 0,
            row=1,
            col=1,
        )
    versions = [f"{title}<br>{result.corruption}" for title, result in results]
    for name, field, colour in (
        ("clean prompts", "metric_clean", SERIES[1]),
        ("corrupted prompts", "metric_corrupted", MISSING),
    ):
        estimates = [getattr(result, field) for _, result in results]
        bars = _bars(go, name, versions, estimates, colour, "logits")
        figure.add_trace(bars.update(legend="legend2"), row=1, col=2)
    dress(figure, height=400, top=40)
    figure.update_layout(
        barmode="group",
        bargap=0.3,
        showlegend=True,
        legend={"y": -0.17, "yanchor": "top", "x": 0, "xanchor": "left"},
        legend2={"y": -0.17, "yanchor": "top", "x": 0.5, "xanchor": "left"},
        margin_b=125,
    )
    figure.update_annotations(font_size=13)
    figure.update_yaxes(range=[0, 1.08], tickformat=".0%", row=1, col=1)
    figure.update_yaxes(title_text="logits", row=1, col=2)
    figure.add_hline(y=0, line_color=INK, line_width=1, row=1, col=2)
    return figure


def _bars(go: Any, name: str, labels: Sequence[str], estimates: Sequence[Any], colour: str, unit: str) -> Any:
    from workbench.plots.style import INK

    form = ".1%" if unit == "share" else ".2f"
    return go.Bar(
        name=name,
        x=labels,
        y=[each.value for each in estimates],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [each.ci_high - each.value for each in estimates],
            "arrayminus": [each.value - each.ci_low for each in estimates],
            "color": INK,
            "thickness": 1.5,
            "width": 5,
        },
        customdata=[(each.ci_low, each.ci_high) for each in estimates],
        marker={"color": colour, "line": {"color": INK, "width": 0.5}},
        hovertemplate=f"{name}: %{{y:{form}}} [%{{customdata[0]:{form}}}, %{{customdata[1]:{form}}}]<extra></extra>",
    )


def _table(results: Sequence[tuple[str, Competence]]) -> Any:
    import pandas as pd

    from workbench.plots.labels import interval, number, percent

    rows = [
        {
            "task": title,
            "corruption": result.corruption,
            "prompts": result.n,
            "accuracy": f"{percent(result.accuracy.value)} {_bounds(result.accuracy)}",
            "chance": percent(result.chance),
            "top-1": f"{percent(result.top1.value)} {_bounds(result.top1)}",
            **{
                f"logit difference, {version}": f"{number(each.value)} {interval(each.ci_low, each.ci_high)}".strip()
                for version, each in (("clean", result.metric_clean), ("corrupted", result.metric_corrupted))
            },
            "verdict": result.verdict,
        }
        for title, result in results
    ]
    frame = pd.DataFrame(rows)
    frame.attrs["caption"] = "Competence by task and corruption, with 95 % intervals"
    return frame


def _method(n: int, seed: int, sources: Sequence[str], results: Sequence[tuple[str, Competence]]) -> str:
    bos = {result.prepends_bos for _, result in results}
    policy = "with a BOS in front" if bos == {True} else "without BOS" if bos == {False} else "with mixed BOS"
    return (
        f"{n} prompts a task, drawn with seed {seed} from words that are single tokens of this tokenizer, {policy}. "
        f"{'; '.join(sources)}. Accuracy: an answer has a strictly higher logit than every other candidate (the two "
        "names; the colours in the list); top-1: than every other token. Logit difference: right minus wrong answer of "
        "the clean prompt at its last token. Intervals: Wilson for shares, Student t for means. " + RULE
    )


def _bounds(estimate: Any) -> str:
    return f"[{100 * estimate.ci_low:.1f}, {100 * estimate.ci_high:.1f}]"


def _share(result: Competence) -> str:
    each = result.accuracy
    return f"{100 * each.value:.0f} % [{100 * each.ci_low:.0f}, {100 * each.ci_high:.0f}]"


def _short(value: float) -> str:
    from workbench.plots.labels import number

    return number(value)
