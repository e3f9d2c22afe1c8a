"""Edge effects as a result: the table, its uncertainty and calibration, and what can be asked of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from workbench.errors import DataError, OutputError
from workbench.patching.graph import Edges

COLUMNS = (
    "sender",
    "receiver",
    "edge_class",
    "effect",
    "stderr",
    "ci_low",
    "ci_high",
    "below_noise",
    "n_prompts",
    "method",
    "direction",
    "ablation",
    "metric",
    "base",
    "path_taken",
)
"""Columns of `EdgeEffects.frame`; `effect` to `ci_high` and `base` are in units of the metric."""

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EdgeEffects:
    """Effects of edges, in units of the metric.

    Attributes:
        frame: one row an edge, see `COLUMNS`. `effect` is the mean over prompts, with its standard error and a 95 %
            Student t interval over prompts (none with a single prompt); `method` says how this row was computed.
        noise_floor: size of the effect that rounding alone produces in this run; smaller effects are flagged.
        provenance: model, data, seed, versions, command, timings.
        calibration: how far the first-order methods are from exact, by class of edge; only of `method="verified"`.
        per_prompt: effects of each prompt `[edges, n]`, if they were asked for.
    """

    frame: pd.DataFrame
    noise_floor: float
    provenance: Mapping[str, Any] = field(default_factory=dict)
    calibration: pd.DataFrame | None = None
    per_prompt: Float[np.ndarray, "edges n"] | None = None

    def __len__(self) -> int:
        return len(self.frame)

    def __repr__(self) -> str:
        if not len(self.frame):
            return "EdgeEffects(no edges)"
        row = self.frame.iloc[0]
        methods = ", ".join(f"{n} {m}" for m, n in self.frame["method"].value_counts().items())
        return f"EdgeEffects({methods} edges, {row['n_prompts']} prompts, {row['direction']}, {row['metric']})"

    def top(self, k: int = 20) -> pd.DataFrame:
        """The `k` edges with the largest absolute effect, largest first."""
        order = self.frame["effect"].abs().sort_values(ascending=False, kind="stable").index
        return self.frame.loc[order[:k]].reset_index(drop=True)

    def node_sums(self) -> pd.DataFrame:
        """Sums of effects and of absolute effects over the edges out of each sender and into each receiver."""
        frame = self.frame.assign(absolute=self.frame["effect"].abs())
        parts = []
        for role in ("sender", "receiver"):
            sums = frame.groupby(role, sort=False)[["effect", "absolute"]].sum()
            parts.append(
                sums.rename_axis("node")
                .reset_index()
                .assign(role=role, n_edges=frame.groupby(role).size().reindex(sums.index).to_numpy())
            )
        return pd.concat(parts, ignore_index=True)[["node", "role", "n_edges", "effect", "absolute"]]

    def save(self, folder: str | Path) -> Path:
        """Write `edges.csv`, `edges.parquet`, `effects.json` and, where they exist, calibration and per-prompt effects.

        Raises:
            OutputError: if the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.frame.to_parquet(folder / "edges.parquet", index=False)
            self.frame.to_csv(folder / "edges.csv", index=False)
            for stale in ("calibration.csv", "per_prompt.safetensors"):
                (folder / stale).unlink(missing_ok=True)
            if self.calibration is not None:
                self.calibration.to_csv(folder / "calibration.csv", index=False)
            if self.per_prompt is not None:
                save_file({"effects": np.ascontiguousarray(self.per_prompt)}, folder / "per_prompt.safetensors")
            record = {
                "schema_version": SCHEMA_VERSION,
                "kind": "edge_effects",
                "noise_floor": self.noise_floor,
                "provenance": dict(self.provenance),
            }
            (folder / "effects.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(
                f"cannot write edge effects to {folder}: {error.strerror or error}. Choose another --out, or make room"
            ) from error
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "EdgeEffects":
        """Read what `save` wrote.

        Raises:
            DataError: if the folder holds no edge effects, or they are damaged or of another version.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / "effects.json").read_text(encoding="utf-8"))
            if not isinstance(record, dict):
                raise DataError(f"{folder / 'effects.json'} holds no JSON object; compute the effects again")
            if record.get("kind") != "edge_effects" or record.get("schema_version") != SCHEMA_VERSION:
                raise DataError(
                    f"{folder / 'effects.json'} is of kind {record.get('kind')!r}, version "
                    f"{record.get('schema_version')!r}; expected edge_effects, version {SCHEMA_VERSION}"
                )
            frame = pd.read_parquet(folder / "edges.parquet")
            missing = set(COLUMNS) - set(frame.columns)
            if missing:
                raise DataError(f"{folder / 'edges.parquet'} lacks the columns {', '.join(sorted(missing))}")
            calibration = folder / "calibration.csv"
            per_prompt = folder / "per_prompt.safetensors"
            return cls(
                frame=frame,
                noise_floor=float(record["noise_floor"]),
                provenance=record["provenance"],
                calibration=pd.read_csv(calibration) if calibration.exists() else None,
                per_prompt=load_file(per_prompt)["effects"] if per_prompt.exists() else None,
            )
        except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
            raise DataError(f"{folder} does not hold readable edge effects: {error}. Compute them again") from error


def agreement(estimate: np.ndarray, exact: np.ndarray, k: int = 50) -> dict[str, float]:
    """How well estimated effects stand for exact ones.

    Args:
        estimate: estimated effects.
        exact: exact effects of the same edges.
        k: size of the top that should be recalled; at most half of the edges.

    Returns:
        `n`; Pearson `r`; `relative_error`, the norm of the difference over the norm of the exact effects; `recall`,
        the share of the `k` edges with the largest exact effects that are among the `k` with the largest estimates.
    """
    n = len(exact)
    k = min(k, max(1, n // 2))
    norm = float(np.linalg.norm(exact))
    spread = float(estimate.std() * exact.std()) if n > 1 else 0.0
    best, guessed = (set(np.argsort(-np.abs(x), kind="stable")[:k].tolist()) for x in (exact, estimate))
    return {
        "n": n,
        "r": float(((estimate - estimate.mean()) * (exact - exact.mean())).mean() / spread) if spread else float("nan"),
        "relative_error": float(np.linalg.norm(estimate - exact)) / norm if norm else float("nan"),
        "k": k,
        "recall": len(best & guessed) / k if n else float("nan"),
    }


def agreement_by_class(estimate: np.ndarray, exact: np.ndarray, classes: np.ndarray, k: int = 50) -> pd.DataFrame:
    """`agreement` over all edges and per class of edge, with and without the edge of the largest exact effect."""
    rows = []
    for name in ("all", *sorted(set(classes.tolist()))):
        chosen = np.ones(len(exact), dtype=bool) if name == "all" else classes == name
        if not chosen.any():
            continue
        a, b = estimate[chosen], exact[chosen]
        rows.append({"edge_class": name, "largest_edge": "with", **agreement(a, b, k)})
        if len(b) > 1:
            rest = np.arange(len(b)) != np.argmax(np.abs(b))
            rows.append({"edge_class": name, "largest_edge": "without", **agreement(a[rest], b[rest], k)})
    return pd.DataFrame(rows)


def compare(a: EdgeEffects, b: EdgeEffects, k: int = 50) -> pd.DataFrame:
    """How well the effects of `a` stand for those of `b`, over the edges that both have, per class of edge.

    Raises:
        DataError: if they share no edge or are in different units.
    """
    if set(a.frame["metric"]) != set(b.frame["metric"]):
        raise DataError(f"cannot compare effects on {set(a.frame['metric'])} with effects on {set(b.frame['metric'])}")
    both = a.frame.merge(b.frame, on=["sender", "receiver"], suffixes=("_a", "_b"), validate="one_to_one")
    if both.empty:
        raise DataError("the two results have no edge in common")
    return agreement_by_class(
        both["effect_a"].to_numpy(), both["effect_b"].to_numpy(), both["edge_class_a"].to_numpy(), k
    )


def effects_frame(
    edges: Edges,
    values: Float[np.ndarray, "edges n"],
    methods: np.ndarray | str,
    noise_floor: float,
    constants: Mapping[str, object],
) -> pd.DataFrame:
    """The tidy table of effects from their per-prompt values.

    Args:
        edges: the edges.
        values: per-prompt effects.
        methods: how each was computed.
        noise_floor: effects smaller than this are flagged.
        constants: the columns that are the same in every row.
    """
    from workbench.stats import mean_estimates

    estimate = mean_estimates(values.T.astype(np.float64))
    graph = edges.graph
    frame = pd.DataFrame(
        {
            "sender": np.array(graph.sender_names, dtype=object)[edges.sender],
            "receiver": np.array(graph.receiver_names, dtype=object)[edges.receiver],
            "edge_class": edges.classes,
            "effect": estimate.value,
            "stderr": estimate.stderr,
            "ci_low": estimate.ci_low,
            "ci_high": estimate.ci_high,
            "below_noise": np.abs(estimate.value) < noise_floor,
            "n_prompts": values.shape[1],
            "method": methods,
            **constants,
        }
    )
    return frame[list(COLUMNS)]
