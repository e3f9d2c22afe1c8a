"""What the edges outside a circuit carry, for one batch of prompts: the corrupted run, its mean, or zero."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.forward import embed
from workbench.models.weights import ModelWeights, rotate
from workbench.patching.metric import BoundMetric, bind
from workbench.patching.passes import Pass, run_window
from workbench.patching.runs import make_runs
from workbench.patching.window import Window
from workbench.prompts import PromptPairs

Ablation = Literal["resample", "mean", "zero"]
ABLATIONS: tuple[Ablation, ...] = ("resample", "mean", "zero")


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Values that stand for ablated edges, and the streams that are made of them alone. All windowed.

    Attributes:
        weights: canonical weights.
        window: where circuits are run; before it, clean and corrupted prompts agree.
        pre: reference stream into each block.
        mid: reference stream into each MLP.
        q: queries that the reference stream gives, rotated, a layer each.
        k: keys likewise.
        v: values likewise.
        prefix_k: keys before the window, a layer each.
        prefix_v: values before the window.
        z: reference mixed values; a head's reference write is `z W_O`.
        mlp_out: reference MLP writes.
        final: reference stream at the answer position.
        delta_input: clean input minus its reference value.
        metric: bound to the prompts.
        clean: the metric of the clean run `[n]`.
        none: the metric of the empty circuit `[n]`.
    """

    weights: ModelWeights
    window: Window
    pre: tuple[Tensor, ...]
    mid: tuple[Tensor, ...]
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]
    prefix_k: tuple[Tensor, ...]
    prefix_v: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    final: Float[Tensor, "n d_model"]
    delta_input: Float[Tensor, "n width d_model"]
    metric: BoundMetric
    clean: Float[Tensor, " n"]
    none: Float[Tensor, " n"]


def reference_bytes(weights: ModelWeights, width: int) -> int:
    """Bytes that the reference of one prompt takes."""
    spec = weights.spec
    per_layer = 3 * spec.d_model + 3 * (spec.n_heads + spec.n_kv_heads) * spec.d_head
    peak = 4 * spec.d_model + 3 * spec.d_mlp
    return width * (2 * spec.n_layers * per_layer + peak) * weights.embed.element_size()


def window_of(weights: ModelWeights, pairs: PromptPairs, ablation: Ablation) -> Window:
    """Where circuits are run; only with resample ablation is there nothing to do before the first difference."""
    first = pairs.first_difference if ablation == "resample" else torch.zeros_like(pairs.answer_positions)
    return Window.of(first, pairs.answer_positions, length=pairs.clean.shape[1], causal=weights.spec.causal)


@torch.no_grad()
def resample_reference(weights: ModelWeights, pairs: PromptPairs, metric: str) -> Reference:
    """Ablated edges carry what their sender writes in the corrupted run."""
    runs = make_runs(weights, pairs, direction="denoising", metric=metric)
    window, prefix = runs.window, runs.window.prefix
    return Reference(
        weights=weights,
        window=window,
        pre=runs.resid_pre,
        mid=runs.resid_mid,
        q=runs.queries,
        k=tuple(window.take(k) for k in runs.keys),
        v=tuple(window.take(v) for v in runs.values),
        prefix_k=tuple(k[:, :prefix] for k in runs.keys),
        prefix_v=tuple(v[:, :prefix] for v in runs.values),
        z=runs.z,
        mlp_out=runs.mlp_out,
        final=runs.final,
        delta_input=runs.delta_input,
        metric=runs.metric,
        clean=runs.patch_value,
        none=runs.base_value,
    )


@dataclass(frozen=True, kw_only=True)
class Values:
    """What every sender writes, and the streams these writes add up to; the input's write is the first stream.

    Attributes:
        pre: streams into the blocks.
        mid: streams into the MLPs.
        z: mixed values.
        mlp_out: MLP writes.
        final: the stream at the answer position.
    """

    pre: tuple[Tensor, ...]
    mid: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    final: Tensor

    def map(self, *others: Values) -> list[list[Tensor]]:
        """The tensors of this and others, field by field and layer by layer."""
        return [
            [*each]
            for name in ("pre", "mid", "z", "mlp_out")
            for each in zip(*(getattr(v, name) for v in (self, *others)), strict=True)
        ] + [[v.final for v in (self, *others)]]

    @classmethod
    def unmap(cls, tensors: Sequence[Tensor], layers: int) -> Values:
        """The inverse of `map`."""
        parts = [tuple(tensors[i * layers : (i + 1) * layers]) for i in range(3)]
        return cls(pre=parts[0], mid=parts[1], z=parts[2], mlp_out=tuple(tensors[3 * layers : -1]), final=tensors[-1])


def values_of(made: Pass) -> Values:
    """The values of a run."""
    return Values(pre=made.pre, mid=made.mid, z=made.z, mlp_out=made.mlp_out, final=made.final)


@torch.no_grad()
def corrupted_values(weights: ModelWeights, pairs: PromptPairs) -> Values:
    """The corrupted run over whole prompts, up to the answer position."""
    window = window_of(weights, pairs, "mean")
    return values_of(run_window(weights, window, embed(weights, pairs.corrupted[:, : window.width])))


@torch.no_grad()
def zero_values(weights: ModelWeights, n: int, width: int) -> Values:
    """Nothing is written; what is left of the stream are the output biases of attention, which belong to no head."""
    spec = weights.spec
    stream = weights.embed.new_zeros(n, width, spec.d_model)
    pre, mid = [], []
    for layer in weights.layers:
        pre.append(stream)
        after = stream if layer.b_O is None else stream + layer.b_O
        mid.append(pre[-1] if spec.parallel else after)
        stream = after
    z = stream.new_zeros(n, width, spec.n_heads, spec.d_head)
    n_mlps = sum(layer.mlp is not None for layer in weights.layers)
    return Values(
        pre=tuple(pre),
        mid=tuple(mid),
        z=(z,) * spec.n_layers,
        mlp_out=(torch.zeros_like(stream),) * n_mlps,
        final=stream[:, 0],
    )


@torch.no_grad()
def reference_from(weights: ModelWeights, pairs: PromptPairs, metric: str, values: Values) -> Reference:
    """A reference over whole prompts from given values, `[n, width, ...]` each."""
    window = window_of(weights, pairs, "zero")
    clean = run_window(weights, window, embed(weights, pairs.clean[:, : window.width]))
    bound = bind(metric, weights, pairs, clean.final)
    table = None if weights.rotary is None else window.rotary(weights.rotary, weights.dtype)
    queries, keys, mixed = [], [], []
    for layer, stream in zip(weights.layers, values.pre, strict=True):
        q, k, v = layer.qkv(layer.ln1(stream))
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        queries.append(q)
        keys.append(k)
        mixed.append(v)
    first = values.pre[0] if weights.spec.n_layers else values.final[:, None]
    return Reference(
        weights=weights,
        window=window,
        pre=values.pre,
        mid=values.mid,
        q=tuple(queries),
        k=tuple(keys),
        v=tuple(mixed),
        prefix_k=tuple(k[:, :0] for k in keys),
        prefix_v=tuple(v[:, :0] for v in mixed),
        z=values.z,
        mlp_out=values.mlp_out,
        final=values.final,
        delta_input=clean.pre[0] - first,
        metric=bound,
        clean=bound.read(clean.final),
        none=bound.read(values.final),
    )
