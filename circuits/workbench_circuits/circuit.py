"""A circuit: the edges of a model that do a task, how they were found, and how good they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import DataError, PromptError
from workbench.models.spec import ModelSpec
from workbench.patching.graph import Graph
from workbench_circuits.wiring import Mask, Wiring, head_of

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench.prompts import PromptPairs
    from workbench_circuits._competence import Competence
    from workbench_circuits._reference import Ablation
    from workbench_circuits.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class GraphShape:
    """As much of a model as says which nodes and edges it has."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    has_mlp: bool
    parallel: bool

    @classmethod
    def of(cls, spec: ModelSpec) -> GraphShape:
        """The shape of a model."""
        return cls(
            n_layers=spec.n_layers,
            n_heads=spec.n_heads,
            n_kv_heads=spec.n_kv_heads,
            d_model=spec.d_model,
            has_mlp=bool(spec.d_mlp),
            parallel=spec.parallel,
        )

    @property
    def graph(self) -> Graph:
        """Nodes and edges of such a model."""
        return Graph(
            ModelSpec(
                architecture="",
                n_layers=self.n_layers,
                n_heads=self.n_heads,
                n_kv_heads=self.n_kv_heads,
                d_model=self.d_model,
                d_head=1,
                d_mlp=int(self.has_mlp),
                d_vocab=1,
                n_ctx=1,
                norm="none",
                positions="none",
                parallel=self.parallel,
                attn_scale=1.0,
            )
        )


@dataclass(frozen=True, kw_only=True)
class Able:
    """Whether the model can do the task that a circuit is of, by `workbench_circuits.competence`.

    Attributes:
        verdict: `solved`, `above chance` or `not solved`.
        sentence: the verdict with its numbers.
        accuracy: share of prompts answered right among the candidates.
        chance: that of a guess.
        n: prompts.
    """

    verdict: str
    sentence: str
    accuracy: float
    chance: float
    n: int

    @classmethod
    def of(cls, found: Competence) -> Able:
        """What a circuit carries of a competence."""
        return cls(
            verdict=found.verdict,
            sentence=found.sentence,
            accuracy=found.accuracy.value,
            chance=found.chance,
            n=found.n,
        )


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """How much of the circuit comes back when its prompts are resampled; see `Stability`.

    Attributes:
        jaccard: mean Jaccard similarity of the circuit's edges and those selected from resampled prompts.
        jaccard_low: 2.5 % of the resamples lie below.
        jaccard_high: 2.5 % lie above.
        head_jaccard: mean similarity of the sets of heads.
        pairwise: mean similarity of two resampled circuits.
        n_resamples: how many.
        n_prompts: prompts that are resampled.
    """

    jaccard: float
    jaccard_low: float
    jaccard_high: float
    head_jaccard: float
    pairwise: float
    n_resamples: int
    n_prompts: int


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """Edges of one model, with where they come from and how good they are.

    Attributes:
        edges: names, receiver by receiver in the order of the forward pass.
        effects: effect of each edge in units of the metric, as it was ranked by; NaN where none is known.
        inclusion: share of bootstrap resamples of the prompts that select each edge, if that was measured.
        shape: which nodes and edges the model has.
        model: name of the model.
        model_hash: hash of its weights; empty where it is not known (files of other tools).
        task: name of the task.
        corruption: how its corrupted prompts are made.
        metric: metric of effects and faithfulness.
        ablation: what edges outside carry.
        direction: of the effects, `noising` or `denoising`.
        method: how the effects were computed.
        algorithm: how edges were selected from them.
        signed: whether they were ranked by how much they help instead of by size.
        target: faithfulness asked for; None if the number of edges was.
        taken: edges selected before unconnected ones were dropped.
        held_out: faithfulness on prompts that had no part in finding it.
        train: faithfulness on the prompts it was found on.
        competence: whether the model can do the task.
        stability: whether other prompts would have given the same circuit.
        provenance: model, data, seeds, versions, command, timings.
    """

    edges: tuple[str, ...]
    shape: GraphShape
    model: str
    model_hash: str
    effects: tuple[float, ...] = ()
    inclusion: tuple[float, ...] | None = None
    task: str | None = None
    corruption: str | None = None
    metric: str = "logit_diff"
    ablation: str = "resample"
    direction: str = "noising"
    method: str = ""
    algorithm: str = ""
    signed: bool = False
    target: float | None = None
    taken: int | None = None
    held_out: Evaluation | None = None
    train: Evaluation | None = None
    competence: Able | None = None
    stability: Steadiness | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        effects = self.effects or (math.nan,) * len(self.edges)
        object.__setattr__(self, "effects", tuple(float(x) for x in effects))
        for name, values in (("effects", self.effects), ("inclusion", self.inclusion)):
            if values is not None and len(values) != len(self.edges):
                raise DataError(f"{name} has {len(values)} numbers for {len(self.edges)} edges: give one for each")
        mask = self.mask
        if int(mask.sum()) != len(self.edges):
            raise DataError(f"edges names {len(self.edges) - int(mask.sum())} edges twice")

    @classmethod
    def of_mask(cls, model: Model, mask: Mask, *, effects: Mapping[str, float] | None = None, **fields: Any) -> Circuit:
        """A circuit of a model from its mask.

        Args:
            model: the model.
            mask: the edges.
            effects: effect by name of edge.
            fields: further attributes.
        """
        names = tuple(Wiring(Graph(model.spec)).edges(mask).names)
        known = effects or {}
        return cls(
            edges=names,
            effects=tuple(known.get(name, math.nan) for name in names),
            shape=GraphShape.of(model.spec),
            model=model.name,
            model_hash=model.model_hash,
            **fields,
        )

    def __len__(self) -> int:
        return len(self.edges)

    def __repr__(self) -> str:
        parts = [
            f"{len(self):,} of {self.graph.n_edges:,} edges ({100 * self.share:.2f} %)",
            f"{len(self.heads)} heads",
            self.model,
        ]
        if self.task:
            parts.append(self.task)
        if self.held_out is not None:
            parts.append(f"f {self.held_out.faithfulness.value:.2f} held out")
        if self.warning:
            parts.append("WARNING: " + self.warning)
        return f"Circuit({', '.join(parts)})"

    @cached_property
    def graph(self) -> Graph:
        """The graph that the edges are of."""
        return self.shape.graph

    @cached_property
    def mask(self) -> Mask:
        """The edges as a mask `[receivers, senders]`.

        Raises:
            DataError: if one is no edge of the graph.
        """
        try:
            return Wiring(self.graph).mask(self.edges)
        except PromptError as error:
            raise DataError(f"the circuit does not fit its model: {error}") from error

    @property
    def share(self) -> float:
        """Share of all edges of the model."""
        return len(self) / self.graph.n_edges

    @cached_property
    def nodes(self) -> tuple[str, ...]:
        """Nodes of the edges in writing order, `logits` last."""
        return Wiring(self.graph).nodes(self.mask)

    @cached_property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """(layer, head) of every head that is a node."""
        return tuple(head for head in map(head_of, self.nodes) if head is not None)

    @property
    def warning(self) -> str | None:
        """What must be said beside every result of this circuit, or None."""
        if self.competence is None or self.competence.verdict == "solved":
            return None
        doing = "is only above chance on" if self.competence.verdict == "above chance" else "does not solve"
        return f"{self.model} {doing} {self.task or 'these prompts'}, so this may be no circuit for it"

    @property
    def frame(self) -> pd.DataFrame:
        """One row an edge: `sender`, `receiver`, `effect`, `inclusion`, `edge_class`, `competence` and more."""
        import pandas as pd

        edges = Wiring(self.graph).edges(self.mask)
        place = {name: i for i, name in enumerate(self.edges)}
        order = [place[name] for name in edges.names]
        ends = [name.split("->") for name in edges.names]
        inclusion = self.inclusion or (math.nan,) * len(self.edges)
        return pd.DataFrame(
            {
                "sender": [sender for sender, _ in ends],
                "receiver": [receiver for _, receiver in ends],
                "edge_class": edges.classes,
                "effect": [self.effects[i] for i in order],
                "inclusion": [inclusion[i] for i in order],
                "method": self.method,
                "metric": self.metric,
                "task": self.task,
                "competence": None if self.competence is None else self.competence.verdict,
                "model": self.model,
            }
        )

    def evaluate(
        self,
        model: Model,
        pairs: PromptPairs,
        *,
        ablation: Ablation | None = None,
        metric: str | None = None,
        seed: int = 0,
    ) -> Evaluation:
        """How faithful the circuit is on some prompts; ablation and metric are its own unless given.

        Raises:
            PromptError: if the model is another than that of the circuit, or arguments do not fit.
        """
        from workbench_circuits.evaluation import evaluate

        self.check_model(model)
        return evaluate(
            model,
            pairs,
            self,
            ablation=ablation or self.ablation,  # type: ignore[arg-type]
            metric=metric or self.metric,
            seed=seed,
        )

    def check_model(self, model: Model) -> None:
        """Refuse a model that the circuit is not of.

        Raises:
            PromptError: if it has other weights, or (where the circuit does not know its weights) other nodes.
        """
        if self.shape != GraphShape.of(model.spec):
            raise PromptError(f"the circuit is of {self.model} ({self.shape}); {model.name} has other nodes")
        if self.model_hash and self.model_hash != model.model_hash:
            raise PromptError(
                f"the circuit is of {self.model} with weights {self.model_hash[:12]}; {model.name} has weights "
                f"{model.model_hash[:12]}: load the model it was found in, or run its edges with run_circuit"
            )

    def save(self, path: str | Path) -> Path:
        """Write the circuit as JSON.

        Raises:
            OutputError: if it cannot be written.
        """
        from workbench_circuits.formats import write_circuit

        return write_circuit(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Read what `save` wrote.

        Raises:
            DataError: if the file is missing, damaged, no circuit, or of another version.
        """
        from workbench_circuits.formats import read_circuit

        return read_circuit(path)

    def save_eap_ig(self, path: str | Path, *, ungroup: bool = False) -> Path:
        """Write the circuit as EAP-IG does (`Graph.to_json`); see `workbench_circuits.formats.write_eap_ig`."""
        from workbench_circuits.formats import write_eap_ig

        return write_eap_ig(self, path, ungroup=ungroup)

    @classmethod
    def load_eap_ig(cls, path: str | Path, *, model: Model | None = None, name: str = "") -> Circuit:
        """Read a graph of EAP-IG; see `workbench_circuits.formats.read_eap_ig`."""
        from workbench_circuits.formats import read_eap_ig

        return read_eap_ig(path, model=model, name=name)


def edge_names(circuit: Circuit | Sequence[str]) -> tuple[str, ...]:
    """The edges of a circuit or list of edges."""
    return circuit.edges if isinstance(circuit, Circuit) else tuple(circuit)
