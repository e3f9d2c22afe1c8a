"""Receiver-exact effects of attention heads through the fused kernels, on CUDA.

Here are only the tensors that the kernels ask for: projected or factored deltas, the base stream's projection, and what
comes between a projection and the scores. The mathematics is that of `receiver_exact`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

import workbench_kernels as kernels
from workbench.models.weights import Norm
from workbench.patching.gradients import Gradients, folded
from workbench.patching.graph import Sender
from workbench.patching.precision import Precision
from workbench.patching.runs import Runs
from workbench.patching.sweep import Group

BACKEND = "triton"


def served_by_kernels(runs: Runs) -> bool:
    """Whether receivers of these runs are scored by Triton rather than by batched torch."""
    spec, layers = runs.weights.spec, runs.weights.layers
    norms = [norm for layer in layers for norm in (layer.q_norm, layer.k_norm) if norm is not None]
    if any(norm.kind != "rmsnorm" for norm in norms):
        return False
    return kernels.backend_for(runs.final, d_head=spec.d_head) == "triton"


@dataclass(frozen=True, kw_only=True)
class _Fixed:
    """What all senders of a group share.

    Attributes:
        base: base stream, centred where the norm centres, through the folded matrices `[n, width, receivers, d_head]`.
        constant: what biases add `[receivers, d_head]`.
        norm: of queries or keys.
        tables: cosines and sines `[n, width, rotary_dim]`.
    """

    base: Tensor
    constant: Tensor | None
    norm: Norm | None
    tables: tuple[Tensor, Tensor] | None


class KernelScores:
    """Scores receivers layer by layer.

    Args:
        runs: caches of the prompts.
        at: gradients of the base run.
        senders: all senders of the sweep, in the order of the deltas' axis.
        precision: how float32 operands of products are read.
        budget_bytes: bound on temporary memory.
    """

    def __init__(
        self, runs: Runs, at: Gradients, senders: Sequence[Sender], *, precision: Precision, budget_bytes: int
    ) -> None:
        self.runs, self.at, self.senders, self.budget_bytes = runs, at, senders, budget_bytes
        self.rounded = precision != "fp32"
        self.dtype = torch.bfloat16 if precision == "bf16" else runs.final.dtype
        self.products = "tf32" if precision == "tf32" else "ieee"
        self.backend = BACKEND
        self._layer = -1

    def _at_layer(self, index: int) -> tuple[kernels.Attention, kernels.BaseAttention]:
        """Clean attention of a layer and what it is worth, kept until another layer is asked for."""
        if self._layer != index:
            runs = self.runs
            self._attention = kernels.Attention(
                queries=self._operand(runs.queries[index]),
                keys=self._operand(runs.keys[index]),
                values=self._operand(runs.values[index]),
                gradient=self._operand(self.at.z[index]),
                start=runs.window.start.long(),
                scale=runs.weights.spec.attn_scale,
                causal=runs.window.causal,
            )
            self._base = kernels.base_attention(self._attention, precision=self.products, backend=self.backend)
            self._layer = index
        return self._attention, self._base

    def _operand(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self.dtype)
        return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

    def value_gradient(self, group: Group) -> Float[Tensor, "n width receivers d_head"]:
        """Gradient at the values of the group's receivers."""
        attention, base = self._at_layer(group.layer)
        pulled = kernels.value_gradient(attention, base, precision=self.products, backend=self.backend)
        return pulled[:, :, group.heads]

    def effects(
        self,
        group: Group,
        deltas: Float[Tensor, "n width senders d_model"],
        inverse: Float[Tensor, "n width senders"],
        unit: Float[Tensor, "n width d_model"],
        sigma: Float[Tensor, "n width"],
        constant: Float[Tensor, "receivers d_head"] | None,
    ) -> Float[Tensor, "n senders receivers"]:
        """Effects on the queries or keys of one layer.

        Args:
            group: the receivers, query heads or key/value heads.
            deltas: what every sender would write differently.
            inverse: 1/sigma of every patched stream.
            unit: base stream, centred where the norm centres, over its own sigma.
            sigma: of the base stream.
            constant: what biases add to the projections.
        """
        weights, wide = self.runs.weights, inverse.dtype
        layer, channel = weights.layers[group.layer], group.kind
        assert channel in {"q", "k"}
        lines = folded(layer.ln1, (layer.W_Q if channel == "q" else layer.W_K)[group.heads])
        rows = lines.flatten(0, 1).mT
        base = (unit @ rows).to(wide) * sigma[..., None]
        norm = layer.q_norm if channel == "q" else layer.k_norm
        fixed = _Fixed(
            base=base.unflatten(-1, (len(group.heads), -1)),
            constant=None if constant is None else constant.to(wide).contiguous(),
            norm=norm,
            tables=None if weights.rotary is None else self.runs.window.rotary(weights.rotary, wide),
        )
        found = inverse.new_empty(deltas.shape[0], deltas.shape[2], len(group.heads))
        heads = [c for c in range(deltas.shape[2]) if self.senders[c].kind == "head" and self._factors(deltas)]
        others = sorted(set(range(deltas.shape[2])) - set(heads))
        for part in self._chunks(others, deltas.shape[0] * deltas.shape[1], len(group.heads)):
            moved = (_columns(deltas, part) @ rows).unflatten(-1, (len(group.heads), -1))
            found[:, part] = self._score(group, fixed, _columns(inverse, part), moved=moved)
        for part in self._chunks(heads, max(weights.spec.d_head, deltas.shape[0] * deltas.shape[1]), len(group.heads)):
            numbers = [(self.senders[c].layer, self.senders[c].head) for c in part]
            outs = torch.stack([weights.layers[a].W_O[b] for a, b in numbers])
            pairs = (outs.flatten(0, 1) @ rows).unflatten(0, outs.shape[:2]).unflatten(-1, (len(group.heads), -1))
            mixed = self.runs.delta_z[[a for a, _ in numbers], [b for _, b in numbers]]
            matrices = pairs.transpose(1, 2).contiguous()
            found[:, part] = self._score(group, fixed, _columns(inverse, part), mixed=mixed, matrices=matrices)
        return found - self._null(group, fixed, sigma) if self.rounded else found

    def _factors(self, deltas: Tensor) -> bool:
        """Whether a head's write is cheaper to take through its pair of matrices than through the stream."""
        spec, rows = self.runs.weights.spec, deltas.shape[0] * deltas.shape[1]
        return rows * (spec.d_model - spec.d_head) > spec.d_head * spec.d_model

    def _chunks(self, columns: list[int], rows: int, receivers: int) -> list[list[int]]:
        """Senders whose projections (or matrices) fit the budget together."""
        per_sender = 3 * rows * receivers * self.runs.weights.spec.d_head * 4
        size = max(1, min(self.budget_bytes // per_sender, 65535))
        return [columns[first : first + size] for first in range(0, len(columns), size)]

    def _null(self, group: Group, fixed: "_Fixed", sigma: Tensor) -> Tensor:
        """The effect of an empty patch: what rounding alone gives, which is taken off every effect."""
        moved = torch.zeros_like(fixed.base, dtype=self.runs.final.dtype)[:, :, None]
        return self._score(group, fixed, (1 / sigma)[..., None], moved=moved)

    def _score(
        self, group: Group, fixed: "_Fixed", inverse: Float[Tensor, "n width senders"], **delta: Tensor
    ) -> Float[Tensor, "n senders receivers"]:
        attention, base = self._at_layer(group.layer)
        cos, sin = fixed.tables or (None, None)
        patch = kernels.Patch(
            base=fixed.base,
            inverse=inverse.contiguous(),
            constant=fixed.constant,
            norm_weight=None
            if fixed.norm is None or fixed.norm.weight is None
            else fixed.norm.weight.to(inverse.dtype),
            norm_eps=0.0 if fixed.norm is None else fixed.norm.eps,
            cos=cos,
            sin=sin,
            **{name: self._operand(tensor) for name, tensor in delta.items()},
        )
        channel: Literal["q", "k"] = "q" if group.kind == "q" else "k"
        return kernels.receiver_effects(
            attention, patch, channel, group.heads, base, precision=self.products, backend=self.backend
        )


def _columns(tensor: Float[Tensor, "n width senders *rest"], part: Sequence[int]) -> Tensor:
    """Some senders of a tensor, as a view where they lie side by side."""
    if part[-1] - part[0] + 1 == len(part):
        return tensor[:, :, part[0] : part[-1] + 1]
    return tensor[:, :, list(part)]
