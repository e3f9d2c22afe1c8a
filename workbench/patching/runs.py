"""The base run and the run that is patched in, for one batch of prompts: all that an effect is computed from."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.forward import Observer, embed, run_blocks
from workbench.models.weights import ModelWeights
from workbench.patching.graph import Sender
from workbench.patching.metric import BoundMetric, bind
from workbench.patching.passes import Pass, run_window
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
        length: number of positions of the longest prompt that are run.
        traced: the base run with its graph, where gradients were announced and the windows are whole prompts.
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
    length: int
    traced: Pass | None = None

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
        pos = torch.arange(self.length, device=self.final.device)
        mask = self.base_value.new_zeros(*self.window.positions.shape, self.length)
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


def make_runs(
    weights: ModelWeights,
    pairs: PromptPairs,
    *,
    direction: Direction,
    metric: str,
    trace: bool = False,
    whole_prompts: bool = False,
) -> Runs:
    """Run both versions of the prompts and keep what effects need.

    Args:
        weights: canonical weights.
        pairs: prompts; those with windows of like width should share a batch.
        direction: `noising`: the clean run is the base and corrupted writes are patched in; `denoising`: the reverse.
        metric: name of a metric of `workbench.metrics`.
        trace: gradients of the base run will be asked for: where its windows are whole prompts, keep its graph.
        whole_prompts: let windows begin at the first token: what is patched in is not only the other run's.
    """
    pairs = pairs.to(weights.device)
    answer = pairs.answer_positions
    first = torch.zeros_like(answer) if whole_prompts else pairs.first_difference
    window = Window.of(first, answer, length=pairs.clean.shape[1], causal=weights.spec.causal)
    length = max(int(answer.max()) + 1, window.width)
    clean, corrupted = pairs.clean[:, :length], pairs.corrupted[:, :length]
    base_tokens, patch_tokens = (clean, corrupted) if direction == "noising" else (corrupted, clean)
    with torch.no_grad():
        base_input = embed(weights, base_tokens)
        delta_input = window.take(embed(weights, patch_tokens) - base_input)
    whole = int(window.start.max()) == 0
    with torch.set_grad_enabled(trace and whole):
        if whole:
            base = run_window(weights, window, base_input.requires_grad_(trace))
            keys = tuple(k.detach() for k in base.k)
            values = tuple(raw[2].detach() for raw in base.raw)
        else:
            base, keys, values = _whole_run(weights, window, base_input)
    with torch.no_grad():
        patch = run_window(weights, window, base.pre[0].detach() + delta_input, keys, values)
        base_final = base.final.detach()
        bound = bind(metric, weights, pairs, base_final if direction == "noising" else patch.final)
        delta_z = torch.stack([(b - a).permute(2, 0, 1, 3) for a, b in zip(base.z, patch.z, strict=True)])
        if weights.spec.d_mlp:
            delta_mlp = torch.stack([b - a for a, b in zip(base.mlp_out, patch.mlp_out, strict=True)])
        else:
            delta_mlp = delta_input.new_zeros(0, *delta_input.shape)
        return Runs(
            weights=weights,
            pairs=pairs,
            window=window,
            resid_pre=tuple(x.detach() for x in base.pre),
            resid_mid=tuple(x.detach() for x in base.mid),
            queries=tuple(x.detach() for x in base.q),
            keys=keys,
            values=values,
            z=tuple(x.detach() for x in base.z),
            mlp_out=tuple(x.detach() for x in base.mlp_out),
            final=base_final,
            delta_z=delta_z,
            delta_mlp=delta_mlp,
            delta_input=delta_input,
            metric=bound,
            base_value=bound.read(base_final),
            patch_value=bound.read(patch.final),
            length=length,
            traced=base if trace and whole else None,
        )


def _whole_run(
    weights: ModelWeights, window: Window, start: Float[Tensor, "n pos d_model"]
) -> tuple[Pass, tuple[Tensor, ...], tuple[Tensor, ...]]:
    """A run over all positions, cut to the windows; its keys and values whole."""
    kept: dict[str, list[Tensor]] = {site: [] for site in ("resid_pre", "resid_mid", "q", "k", "v", "z", "mlp_out")}

    def keeper(site: str) -> Observer:
        into = kept[site]
        if site in {"k", "v"}:
            return lambda _, x: into.append(x)
        return lambda _, x: into.append(window.take(x))

    end = run_blocks(weights, start, observe={site: keeper(site) for site in kept})
    rows = torch.arange(len(end), device=end.device)
    made = Pass(
        pre=tuple(kept["resid_pre"]),
        mid=tuple(kept["resid_pre" if weights.spec.parallel else "resid_mid"]),
        raw=(),
        q=tuple(kept["q"]),
        k=(),
        z=tuple(kept["z"]),
        mlp_out=tuple(kept["mlp_out"]),
        final=end[rows, window.answer],
    )
    return made, tuple(kept["k"]), tuple(kept["v"])
