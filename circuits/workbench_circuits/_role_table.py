"""The scores of heads as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from workbench.plots.labels import head_name
from workbench_circuits._role_rules import Thresholds
from workbench_circuits._role_scores import Head

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench.prompts import PromptPairs
    from workbench.tables import HeadTable


class Scores:
    """Numbers of the chosen heads, collected metric by metric."""

    def __init__(self, *, model: Model, chosen: Sequence[Head]) -> None:
        self.model, self.chosen = model, list(chosen)
        self.rows: list[dict[str, Any]] = []
        self.all_direct: Any = None
        self.attention: dict[str, np.ndarray] = {}

    def add_table(self, table: HeadTable) -> None:
        """Rows of another analysis."""
        frame = table.frame
        where = frame["metric"].isin(("previous_token", "duplicate_token", "induction"))
        known = set(self.chosen)
        for row in frame[where].to_dict("records"):
            if (int(row["layer"]), int(row["head"])) in known:
                self.rows.append({str(key): value for key, value in row.items() if key != "analysis"})

    def add_means(self, metric: str, sample: Tensor, *, unit: str) -> None:
        """Mean over prompts of `[n, layers, heads]`."""
        from workbench.analyzers._rows import mean_shares
        from workbench.stats import mean_estimates

        estimates = (mean_shares if unit == "probability" else mean_estimates)(sample.double().cpu())
        if metric == "direct_effect":
            self.all_direct = estimates
        else:
            self.attention[metric] = estimates.value
        for layer, head in self.chosen:
            self._add(metric, layer, head, estimates[layer, head], unit, "clean prompts")

    def add_shares(self, metric: str, hits: Tensor) -> None:
        """Share of cases `[heads, cases]` of the chosen heads, with Wilson intervals."""
        from workbench.stats import proportion

        for (layer, head), row in zip(self.chosen, hits, strict=True):
            self._add(metric, layer, head, proportion(int(row.sum()), len(row)), "share", "words of the prompts")

    def add_changes(self, changes: Tensor) -> None:
        """Mean over prompts of `[heads, n]`, without heads that no mover stands behind."""
        from workbench.stats import mean_estimate

        for (layer, head), row in zip(self.chosen, changes, strict=True):
            if not bool(row.isnan().any()):
                estimate = mean_estimate(row)
                self._add("mover_attention_change", layer, head, estimate, "probability", "noising, path to queries")

    def _add(self, metric: str, layer: int, head: int, estimate: Any, unit: str, method: str) -> None:
        numbers = {name: getattr(estimate, name) for name in ("value", "stderr", "ci_low", "ci_high", "n")}
        self.rows.append({"metric": metric, "layer": layer, "head": head, **numbers, "unit": unit, "method": method})

    def movers(self, rules: Thresholds, logit_diff: float, against: Callable[[list[Head]], list[Head]]) -> list[Head]:
        """Heads of the whole model that the rules call movers, the strongest first.

        Args:
            rules: the thresholds.
            logit_diff: mean logit difference on the clean prompts.
            against: which of some heads write against what they see.
        """
        if not self.attention:
            return []
        value, low = self.all_direct.value, self.all_direct.ci_low
        enough = (value >= rules.direct_share * abs(logit_diff)) & (low > 0)
        enough &= np.maximum.reduce(list(self.attention.values())) >= rules.attention
        nothing = np.zeros_like(value)
        right, wrong = (self.attention.get(f"attention_to_{name}", nothing) for name in ("answer", "wrong_answer"))
        order = sorted(zip(*np.nonzero(enough), strict=True), key=lambda head: -value[head])
        found = [(int(layer), int(head)) for layer, head in order]
        away = against([head for head in found if wrong[head] > right[head]])
        return [head for head in found if head not in away][: rules.most_movers]

    def frame(self) -> pd.DataFrame:
        """One row a head; a metric's interval ends in `<metric>_low` and `<metric>_high` where rules need it."""
        import pandas as pd

        wide: dict[Head, dict[str, Any]] = {
            head: {"node": head_name(*head), "layer": head[0], "head": head[1]} for head in self.chosen
        }
        for row in self.rows:
            own = wide[int(row["layer"]), int(row["head"])]
            own[row["metric"]] = float(row["value"])
            if row["metric"] in ("direct_effect", "mover_attention_change"):
                own[f"{row['metric']}_low"] = float(row["ci_low"])
                own[f"{row['metric']}_high"] = float(row["ci_high"])
        return pd.DataFrame(list(wide.values()))

    def table(self, pairs: PromptPairs, **record: Any) -> HeadTable:
        """The tidy table."""
        from workbench.tables import HeadTable, provenance

        source = provenance(
            self.model, data_hash=pairs.data_hash, task=pairs.task, corruption=pairs.corruption, n=len(pairs), **record
        )
        rows = [{**row, "analysis": "head_roles", "input": row.get("input") or pairs.task or ""} for row in self.rows]
        return HeadTable.from_rows(rows, source).validate()
