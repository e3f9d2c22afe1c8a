"""The base run and the run that is patched in, for one batch of prompts: all that an effect is computed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.models.forward import Observer, embed, run_blocks
from workbench.models.weights import ModelWeights
from workbench.patching.graph import Sender
from workbench.patching.metric import BoundMetric, bind
from workbench.patching.window import Window
from workbench.prompts import PromptPairs

Direction = Literal["noising", "denoising"]


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Caches of a base run, differences to the patch run, and the window in which they can differ.

    All tensors but `keys` and `values` are windowed.

    Attributes:
        weights: canonical weights.
        pairs: the prompts.
        window: where each prompt is recomputed.
        resid_pre: base stream into each block.
        resid_mid: base stream into each MLP.
        queries: base queries, rotated, `[n, width, n_heads, d_head]` a layer.
        keys: base keys, rotated, of all positions, `[n, pos, n_kv_heads, d_head]` a layer.
        values: base values of all positions.
        z: base mixed values, `[n, width, n_heads, d_head]` a layer.
        mlp_out: base MLP output a layer (empty without MLPs).
        final: base final residual at the answer position `[n, d_model]`.
        delta_z: patch minus base, `[n_layers, n_heads, n, width, d_head]`.
        delta_mlp: patch minus base, `[n_layers, n, width, d_model]`.
        delta_input: patch minus base, `[n, width, d_model]`.
        metric: the metric, bound to these prompts.
        base_value: the metric of the base run.
        patch_value: the metric of the patch run.
        base_tokens: token ids of the base run.
        patch_tokens: token ids of the patch run.
    """

    weights: ModelWeights
    pairs: PromptPairs
    window: Window
    resid_pre: tuple[Tensor, ...]
    resid_mid: tuple[Tensor, ...]
    queries: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    final: Float[Tensor, "n d_model"]
    delta_z: Float[Tensor, "layers heads n width d_head"]
    delta_mlp: Float[Tensor, "layers n width d_model"]
    delta_input: Float[Tensor, "n width d_model"]
    metric: BoundMetric
    base_value: Float[Tensor, "n"]
    patch_value: Float[Tensor, "n"]
    base_tokens: Int[Tensor, "n pos"]
    patch_tokens: Int[Tensor, "n pos"]

    def writes(self, senders: Sequence[Sender]) -> Float[Tensor, "edges n width d_model"]:
        """What replacing each sender's write adds to the stream."""
        n, width, d_model = self.delta_input.shape
        found = self.delta_input.new_empty(len(senders), n, width, d_model)
        heads = [i for i, s in enumerate(senders) if s.kind == "head"]
        if heads:
            layer = [senders[i].layer for i in heads]
            head = [senders[i].head for i in heads]
            matrices = torch.stack([self.weights.layers[a].W_O[b] for a, b in zip(layer, head, strict=True)])
            mixed = self.delta_z[layer, head].flatten(1, 2) @ matrices
            found[heads] = mixed.unflatten(1, (n, width))
        mlps = [i for i, s in enumerate(senders) if s.kind == "mlp"]
        if mlps:
            found[mlps] = self.delta_mlp[[senders[i].layer for i in mlps]]
        inputs = [i for i, s in enumerate(senders) if s.kind == "input"]
        if inputs:
            found[inputs] = self.delta_input
        return found

    @cached_property
    def patterns(self) -> tuple[Float[Tensor, "n n_heads width pos"], ...]:
        """Base attention of the window's queries over all keys, in float32 or better."""
        return tuple(self.scores(layer).softmax(-1) for layer in range(self.weights.spec.n_layers))

    def scores(self, layer: int) -> Float[Tensor, "n n_heads width pos"]:
        """Base attention scores of one layer's window queries over all keys, masked."""
        spec = self.weights.spec
        q = self.queries[layer].transpose(1, 2)
        k = self.keys[layer].permute(0, 2, 3, 1).repeat_interleave(spec.group_size, dim=1)
        return (q @ k).to(self.base_value.dtype) * spec.attn_scale + self.visible[:, None]

    @cached_property
    def visible(self) -> Float[Tensor, "n width pos"]:
        """Additive mask of the window's queries over all keys: 0 where a key is seen, else minus infinity."""
        pos = torch.arange(self.base_tokens.shape[1], device=self.base_tokens.device)
        mask = torch.zeros(
            *self.window.positions.shape, len(pos), dtype=self.base_value.dtype, device=self.base_tokens.device
        )
        if self.window.causal:
            mask.masked_fill_(pos > self.window.positions[:, :, None], float("-inf"))
        return mask


def run_bytes(weights: ModelWeights, n: int, width: int, length: int) -> int:
    """Bytes that `Runs` of `n` prompts hold, and at the peak of making them."""
    spec = weights.spec
    heads = spec.n_heads * spec.d_head
    windowed = width * (3 * spec.d_model + 3 * heads + spec.d_model)
    whole = 2 * length * spec.n_kv_heads * spec.d_head
    peak = length * (spec.d_model * 3 + spec.d_mlp * 3 + heads * 3)
    return n * (spec.n_layers * (windowed + whole) + peak) * weights.embed.element_size()


@torch.no_grad()
def make_runs(weights: ModelWeights, pairs: PromptPairs, *, direction: Direction, metric: str) -> Runs:
    """Run both versions of the prompts and keep what effects need.

    Args:
        weights: canonical weights.
        pairs: prompts; those with windows of like width should share a batch.
        direction: `noising`: the clean run is the base and corrupted writes are patched in; `denoising`: the reverse.
        metric: name of a metric of `workbench.metrics`.
    """
    pairs = pairs.to(weights.device)
    spec = weights.spec
    answer = pairs.answer_positions
    window = Window.of(pairs.first_difference, answer, causal=spec.causal)
    length = max(int(answer.max()) + 1, window.width)
    clean, corrupted = pairs.clean[:, :length], pairs.corrupted[:, :length]
    base_tokens, patch_tokens = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    rows = torch.arange(len(pairs), device=weights.device)
    windowed: dict[str, list[Tensor]] = {site: [] for site in ("resid_pre", "resid_mid", "q", "z", "mlp_out")}
    whole: dict[str, list[Tensor]] = {"k": [], "v": []}
    observe: dict[str, Observer] = {
        site: (lambda layer, x, kept=kept: kept.append(window.take(x))) for site, kept in windowed.items()
    }
    observe |= {site: (lambda layer, x, kept=kept: kept.append(x)) for site, kept in whole.items()}
    base_input, patch_input = embed(weights, base_tokens), embed(weights, patch_tokens)
    base_final = run_blocks(weights, base_input, observe=observe)[rows, answer]

    delta_z: list[Tensor] = []
    delta_mlp: list[Tensor] = []

    def see_z(layer: int, x: Tensor) -> None:
        delta_z.append((window.take(x) - windowed["z"][layer]).permute(2, 0, 1, 3))

    def see_mlp(layer: int, x: Tensor) -> None:
        delta_mlp.append(window.take(x) - windowed["mlp_out"][layer])

    patch_final = run_blocks(weights, patch_input, observe={"z": see_z, "mlp_out": see_mlp})[rows, answer]
    bound = bind(metric, weights, pairs, base_final if direction == "noising" else patch_final)
    delta_input = window.take(patch_input - base_input)
    return Runs(
        weights=weights,
        pairs=pairs,
        window=window,
        resid_pre=tuple(windowed["resid_pre"]),
        resid_mid=tuple(windowed["resid_pre" if spec.parallel else "resid_mid"]),
        queries=tuple(windowed["q"]),
        keys=tuple(whole["k"]),
        values=tuple(whole["v"]),
        z=tuple(windowed["z"]),
        mlp_out=tuple(windowed["mlp_out"]),
        final=base_final,
        delta_z=torch.stack(delta_z),
        delta_mlp=torch.stack(delta_mlp) if delta_mlp else delta_input.new_zeros(0, *delta_input.shape),
        delta_input=delta_input,
        metric=bound,
        base_value=bound.read(base_final),
        patch_value=bound.read(patch_final),
        base_tokens=base_tokens,
        patch_tokens=patch_tokens,
    )
