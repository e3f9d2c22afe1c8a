"""What ablations put in that has to be measured on prompts first: means by template, and another run's values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import BudgetError, PromptError
from workbench.models.model import Model
from workbench.models.weights import at_least_float32
from workbench.prompts import PromptPairs

GIB = 1 << 30
TOKENS_PER_PASS = 2048
ANY = ""
"""Name of the template of prompts that have none."""

Direction = Literal["noising", "denoising"]


def base_tokens(pairs: PromptPairs, direction: Direction) -> Int[Tensor, "n pos"]:
    """Tokens of the version that is run."""
    return pairs.clean if direction == "noising" else pairs.corrupted


def patch_tokens(pairs: PromptPairs, direction: Direction) -> Int[Tensor, "n pos"]:
    """Tokens of the version from which values are taken."""
    return pairs.corrupted if direction == "noising" else pairs.clean


def batches(lengths: Int[Tensor, "n"]) -> list[Int[Tensor, "batch"]]:
    """Indices of prompts of like length, few enough for one pass."""
    order = lengths.argsort(stable=True)
    size = max(1, TOKENS_PER_PASS // int(lengths.max()))
    return list(order.split(size))


@dataclass(frozen=True, kw_only=True)
class Means:
    """Means of what heads mix and MLPs write, by template and position.

    Attributes:
        templates: place of each template in the tensors.
        counts: how many prompts have each position `[templates, pos]`.
        z: `[n_layers, templates, pos, n_heads, d_head]`, in the dtype of the model.
        mlp: `[n_layers, templates, pos, d_model]`; no layers where a model has no MLPs.
        everywhere_z: mean over all templates and positions `[n_layers, n_heads, d_head]`.
        everywhere_mlp: likewise `[n_layers, d_model]`.
    """

    templates: Mapping[str, int]
    counts: Int[Tensor, "templates pos"]
    z: Float[Tensor, "layers templates pos n_heads d_head"]
    mlp: Float[Tensor, "layers templates pos d_model"]
    everywhere_z: Float[Tensor, "layers n_heads d_head"]
    everywhere_mlp: Float[Tensor, "layers d_model"]

    def places(self, pairs: PromptPairs) -> Int[Tensor, "n"]:
        """For each prompt the place of its template.

        Raises:
            PromptError: if a prompt's template has no reference prompt, or none that is as long up to the answer.
        """
        names = pairs.templates or (ANY,) * len(pairs)
        missing = sorted({name for name in names if name not in self.templates})
        if missing:
            raise PromptError(
                f"reference has no prompt of template {missing[0]!r} ({len(missing)} templates are missing): mean "
                "ablation is keyed by template, so draw more reference prompts, or leave reference out"
            )
        found = torch.tensor([self.templates[name] for name in names], device=self.counts.device)
        answers = pairs.answer_positions.to(found.device)
        short = (answers >= self.counts.shape[1]) | (
            self.counts[found, answers.clamp(max=self.counts.shape[1] - 1)] == 0
        )
        if short.any():
            row = int(short.nonzero()[0])
            raise PromptError(
                f"reference has no prompt of template {names[row]!r} as long as prompt {row}, which is read at "
                f"position {int(answers[row])}: draw reference prompts of the same shape"
            )
        return found

    def at(
        self, means: Float[Tensor, "templates pos *rest"], places: Int[Tensor, "n"], width: int
    ) -> Float[Tensor, "n width *rest"]:
        """One layer's means for prompts of these templates, 0 behind the longest reference prompt."""
        found = means[places, :width]
        if found.shape[1] < width:
            rest = found.new_zeros(len(places), width - found.shape[1], *found.shape[2:])
            found = torch.cat((found, rest), dim=1)
        return found


@torch.no_grad()
def measure_means(
    model: Model, tokens: Int[Tensor, "n pos"], lengths: Int[Tensor, "n"], templates: Sequence[str] | None, budget: int
) -> Means:
    """Means over prompts; padding does not count. Sums are kept in float32 or better.

    Args:
        model: the model.
        tokens: the prompts, padded on the right.
        lengths: tokens of each.
        templates: name of each prompt's template, or None for one group.
        budget: bytes that the means may take.

    Raises:
        BudgetError: if they need more.
    """
    names = tuple(templates or (ANY,) * len(tokens))
    place = {name: index for index, name in enumerate(dict.fromkeys(names))}
    spec, device = model.spec, model.device
    dtype = at_least_float32(model.dtype)
    width = int(lengths.max())
    head_width = spec.n_heads * spec.d_head
    needed = spec.n_layers * len(place) * width * (head_width + spec.d_model) * torch.finfo(dtype).bits // 8
    if needed > budget:
        raise BudgetError(
            f"means of {len(place)} templates by position need {needed / GIB:.2f} GiB and {budget / GIB:.2f} GiB of "
            "the budget are for them: raise budget_bytes, or use prompts of fewer templates"
        )
    mlps = spec.n_layers if spec.d_mlp else 0
    z = torch.zeros(spec.n_layers, len(place), width, spec.n_heads, spec.d_head, dtype=dtype, device=device)
    mlp = torch.zeros(mlps, len(place), width, spec.d_model, dtype=dtype, device=device)
    counts = torch.zeros(len(place), width, dtype=torch.long, device=device)
    groups = torch.tensor([place[name] for name in names], device=device)
    tokens, lengths = tokens.to(device), lengths.to(device)
    for rows in batches(lengths):
        stop = int(lengths[rows].max())
        real = torch.arange(stop, device=device) < lengths[rows, None]
        counts[:, :stop].index_add_(0, groups[rows], real.long())

        def adder(into: Tensor, rows: Tensor = rows, stop: int = stop, real: Tensor = real) -> "_Adder":
            return _Adder(into, groups[rows], stop, real)

        observe = {"z": adder(z)}
        if mlps:
            observe["mlp_out"] = adder(mlp)
        last = lengths[rows] - 1
        model.forward(tokens[rows, :stop], observe=observe, unembed_positions=last)
    total = counts.sum().to(dtype)
    everywhere = z.sum((1, 2)) / total, mlp.sum((1, 2)) / total
    shares = counts.clamp(min=1).to(dtype)
    z /= shares[None, :, :, None, None]
    mlp /= shares[None, :, :, None]
    return Means(
        templates=place,
        counts=counts,
        z=z.to(model.dtype),
        mlp=mlp.to(model.dtype),
        everywhere_z=everywhere[0].to(model.dtype),
        everywhere_mlp=everywhere[1].to(model.dtype),
    )


@dataclass(frozen=True)
class _Adder:
    """Adds what it observes to sums by template and position."""

    into: Tensor
    groups: Int[Tensor, "batch"]
    stop: int
    real: Tensor

    def __call__(self, layer: int, value: Tensor) -> None:
        kept = value.to(self.into.dtype).masked_fill(~self.real.reshape(*self.real.shape, *(1,) * (value.dim() - 2)), 0)
        self.into[layer, :, : self.stop].index_add_(0, self.groups, kept)


@torch.no_grad()
def record(
    model: Model, tokens: Int[Tensor, "n pos"], z_layers: set[int], mlp_layers: set[int]
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """`z` and MLP outputs of some layers, by layer, on all positions of the prompts."""
    parts: dict[str, dict[int, list[Tensor]]] = {"z": {}, "mlp_out": {}}

    def keeper(site: str, layers: set[int]) -> "_Keeper":
        return _Keeper(parts[site], layers)

    size = max(1, TOKENS_PER_PASS // tokens.shape[1])
    for rows in tokens.split(size):
        observe = {}
        if z_layers:
            observe["z"] = keeper("z", z_layers)
        if mlp_layers:
            observe["mlp_out"] = keeper("mlp_out", mlp_layers)
        model.forward(
            rows, observe=observe, unembed_positions=torch.zeros(len(rows), dtype=torch.long, device=model.device)
        )
    z, mlp = ({layer: torch.cat(found) for layer, found in parts[site].items()} for site in ("z", "mlp_out"))
    return z, mlp


@dataclass(frozen=True)
class _Keeper:
    """Keeps what it observes of some layers."""

    into: dict[int, list[Tensor]]
    layers: set[int]

    def __call__(self, layer: int, value: Tensor) -> None:
        if layer in self.layers:
            self.into.setdefault(layer, []).append(value)
