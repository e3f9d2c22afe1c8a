"""Effects of heads and MLPs by edits of the forward pass, one forward a component: for any architecture."""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import PromptError
from workbench.interventions.ablation import Ablation
from workbench.interventions.editors import Replacement, editors, keyed_means
from workbench.interventions.measured import Direction, Means, base_tokens, patch_tokens, record
from workbench.metrics import METRICS
from workbench.models.forward import Editor
from workbench.models.model import Model
from workbench.models.weights import at_least_float32
from workbench.patching.ablated import Component
from workbench.prompts import PromptPairs


@dataclass(frozen=True, kw_only=True)
class HookRuns:
    """What one forward a component needs, for one batch of prompts.

    Attributes:
        base_value: the metric of the base run `[n]`.
        patch_value: the metric of the run that is patched in `[n]`.
    """

    model: Model
    pairs: PromptPairs
    ablation: Ablation
    direction: Direction
    metric: str
    z: Replacement | None
    mlp: Replacement | None
    clean_logits: Float[Tensor, "n d_vocab"]
    base_value: Float[Tensor, "n"]
    patch_value: Float[Tensor, "n"]
    written: Mapping[tuple[str, int], Tensor]

    @classmethod
    def make(
        cls,
        model: Model,
        pairs: PromptPairs,
        *,
        ablation: Ablation,
        direction: Direction,
        metric: str,
        means: Means | None,
        direct: bool,
    ) -> "HookRuns":
        """Run both versions of the prompts.

        Args:
            model: the model, on either path.
            pairs: the prompts.
            ablation: what takes the place of a component's write.
            direction: which version is the base.
            metric: a name of `workbench.metrics`.
            means: for mean ablation.
            direct: keep the base run's streams, which direct effects are told by.
        """
        pairs = pairs.to(model.device)
        layers = set(range(model.spec.n_layers))
        z: Replacement | None = None
        mlp: Replacement | None = None
        if ablation is Ablation.RESAMPLE:
            kept_z, kept_mlp = record(
                model, patch_tokens(pairs, direction), layers, layers if model.spec.d_mlp else set()
            )
            z, mlp = _from(kept_z), _from(kept_mlp)
        elif ablation is Ablation.MEAN:
            assert means is not None
            z, mlp = keyed_means(means, pairs)
        written: dict[tuple[str, int], Tensor] = {}
        if direct:
            sites = {_after(model, "heads"), _after(model, "mlps")}
            observe = {site: _Into(written, site) for site in sites}
        else:
            observe = {}
        answer = pairs.answer_positions
        base = model.forward(base_tokens(pairs, direction), observe=observe, unembed_positions=answer)
        patch = model.forward(patch_tokens(pairs, direction), unembed_positions=answer)
        clean = base if direction == "noising" else patch
        score = METRICS[metric].function
        dtype = at_least_float32(base.dtype)
        return cls(
            model=model,
            pairs=pairs,
            ablation=ablation,
            direction=direction,
            metric=metric,
            z=z,
            mlp=mlp,
            clean_logits=clean,
            base_value=score(base, pairs, clean).to(dtype),
            patch_value=score(patch, pairs, clean).to(dtype),
            written=written,
        )

    def effects(
        self, component: Component, where: Bool[Tensor, "n pos"] | None, *, direct: bool
    ) -> tuple[Float[Tensor, "n"], Float[Tensor, "n"] | None]:
        """Total effect of a component, and its direct effect if asked for.

        The direct effect takes a second forward, in which the last stream is moved by what the ablation changed in
        the stream right behind the component.
        """
        heads = {"heads": [component.head or 0], "attention": list(range(self.model.spec.n_heads)), "mlps": []}
        chosen = heads[component.kind]
        edit = editors(
            self.model,
            self.ablation,
            {component.layer: chosen} if chosen else {},
            () if chosen else (component.layer,),
            z=self.z,
            mlp=self.mlp,
            where=where,
        )
        site = _after(self.model, component.kind)
        seen: dict[tuple[str, int], Tensor] = {}
        total = self._value(edit, {site: _Into(seen, site)} if direct else {}) - self.base_value
        if not direct:
            return total, None
        at = site, component.layer
        change = seen[at] - self.written[at]
        last = self.model.spec.n_layers - 1
        only = self._value({"resid_post": lambda layer, value: value + change if layer == last else value}, {})
        return total, only - self.base_value

    def _value(self, edit: Mapping[str, Editor], observe: Mapping[str, "_Into"]) -> Tensor:
        logits = self.model.forward(
            base_tokens(self.pairs, self.direction),
            edit=edit,
            observe=observe,
            unembed_positions=self.pairs.answer_positions,
        )
        return METRICS[self.metric].function(logits, self.pairs, self.clean_logits).to(self.base_value.dtype)


def _after(model: Model, kind: str) -> str:
    """The site at which a component's write has just been added to the stream, and nothing that has read it."""
    return "resid_post" if kind == "mlps" or model.spec.parallel else "resid_mid"


def _from(values: Mapping[int, Tensor]) -> Replacement:
    def replacement(layer: int, value: Tensor) -> Tensor:
        if values[layer].shape != value.shape:
            raise PromptError(f"the two versions of the prompts differ in shape at layer {layer}")
        return values[layer]

    return replacement


@dataclass(frozen=True)
class _Into:
    """Keeps what it observes, by site and layer."""

    kept: dict[tuple[str, int], Tensor]
    site: str

    def __call__(self, layer: int, value: Tensor) -> None:
        self.kept[self.site, layer] = value
