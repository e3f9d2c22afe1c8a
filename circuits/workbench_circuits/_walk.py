"""Many circuits at once through a model.

A receiver of a circuit reads the reference stream plus, for every edge of the circuit that ends there, what the sender
writes in this run minus what it writes in the reference. So one product per block of a 0/1 mask `[receivers, senders]`
with those differences `[senders, tokens x d_model]` gives every receiver its own stream. Where all circuits of a batch
have the same edges, as they do below the first edge in which they differ, they share one run; heads, MLPs and
receivers that cannot change anything are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.models.weights import at_least_float32, rotate
from workbench.patching.window import attend_window
from workbench_circuits._reference import Reference
from workbench_circuits.wiring import Wiring

Masks = Bool[np.ndarray, "circuits receivers senders"]
GATHER_BELOW = 0.25
"""Below this share of senders that a block reads, their differences are gathered before the product."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a batch of circuits has to compute.

    Attributes:
        masks: the circuits, without edges that cannot matter.
        active: senders whose difference from the reference can be non-zero and is read.
        own: those of them that differ between circuits; a suffix in writing order, but for idle ones.
    """

    masks: Masks
    active: Bool[np.ndarray, " senders"]
    own: Bool[np.ndarray, " senders"]

    @classmethod
    def of(cls, wiring: Wiring, masks: Masks, *, resample: bool) -> Plan:
        """Plan the run of some circuits."""
        union = np.any(masks, axis=0)
        receivers, read = wiring.useful(union)
        live = wiring.reached(union) if resample else np.ones_like(read)
        active = read & live
        masks = masks & receivers[:, None] & active[None]
        varies = (masks != masks[:1]).any((0, 2))
        first = int(np.argmax(varies)) if varies.any() else len(varies) - 1
        fed = wiring.feeds[first]
        own = np.zeros_like(active)
        if fed.stop > fed.start:
            stage_start = 1 + wiring.graph.receivers[first].layer * wiring.graph.per_layer
            if wiring.graph.receivers[first].kind == "mlp":
                stage_start = fed.start
            own[stage_start:] = True
        return cls(masks=masks, active=active, own=own & active)


@torch.no_grad()
def walk(reference: Reference, wiring: Wiring, plan: Plan) -> Float[Tensor, "circuits n d_model"]:
    """Run circuits.

    Returns:
        Their final streams at the answer position, in float32 or better.
    """
    return _Walk(reference, wiring, plan).run()


def walk_bytes(wiring: Wiring, tokens: int, circuits: int, *, share: float = 1.0, itemsize: int = 4) -> int:
    """Bytes that a batch of circuits takes beside the reference, if `share` of the senders are active."""
    spec = wiring.graph.spec
    receivers = spec.n_heads + 2 * spec.n_kv_heads
    peak = 3 * receivers * spec.d_model + 3 * spec.d_mlp + 4 * spec.n_heads * spec.d_head
    held = (share * wiring.shape[1] + 2) * spec.d_model
    return int(tokens * circuits * (held + peak) * max(4, itemsize))


class _Walk:
    def __init__(self, reference: Reference, wiring: Wiring, plan: Plan) -> None:
        self.ref, self.wiring, self.plan = reference, wiring, plan
        weights = reference.weights
        self.weights, self.spec, self.window = weights, weights.spec, reference.window
        self.n, self.width = self.window.positions.shape
        self.tokens = self.n * self.width
        self.wide = at_least_float32(weights.dtype)
        self.circuits = len(plan.masks)
        d_model = self.spec.d_model
        shared = plan.active & ~plan.own
        self.shared_columns, self.own_columns = np.flatnonzero(shared), np.flatnonzero(plan.own)
        like = weights.embed.new_empty(0, dtype=self.wide)
        self.shared = like.new_empty(len(self.shared_columns), self.tokens, d_model)
        self.own = like.new_empty(self.circuits, len(self.own_columns), self.tokens, d_model)
        self.written_shared = self.written_own = 0
        self.table = None if weights.rotary is None else self.window.rotary(weights.rotary, weights.dtype)

    def run(self) -> Float[Tensor, "circuits n d_model"]:
        if self.plan.active[0]:
            self._write(0, self.ref.delta_input.flatten(0, 1).to(self.wide)[None, None])
        per_layer = self.wiring.graph.per_layer
        for index in range(self.spec.n_layers):
            first = 1 + index * per_layer
            heads = np.flatnonzero(self.plan.active[first : first + self.spec.n_heads])
            if len(heads):
                self._attention(index, first, heads)
            if self.spec.d_mlp and self.plan.active[first + self.spec.n_heads]:
                self._mlp(index, first + self.spec.n_heads)
        return self._final()

    def _write(self, first: int, deltas: Float[Tensor, "circuits senders tokens d_model"]) -> None:
        """Keep the differences of active senders, from `first` on."""
        many = deltas.shape[1]
        if self.plan.own[first:].any() and self.own_columns[0] <= first:
            self.own[:, self.written_own : self.written_own + many] = deltas
            self.written_own += many
        else:
            self.shared[self.written_shared : self.written_shared + many] = deltas[0]
            self.written_shared += many

    def _read(
        self, rows: np.ndarray, stream: Float[Tensor, "tokens d_model"], deltas: tuple[Tensor, Tensor], *, wide: bool
    ) -> Float[Tensor, "circuits rows tokens d_model"]:
        """The stream of each of some receivers; one circuit stands for all unless `wide`."""
        shared, own = deltas
        masks = self.plan.masks[: self.circuits if wide else 1, rows]
        circuits, size = masks.shape[0], stream.numel()
        start = stream.to(self.wide).reshape(1, size)
        columns = self.shared_columns[: len(shared)]
        used = masks[:, :, columns].any((0, 1))
        if used.any():
            if used.mean() < GATHER_BELOW:
                columns, shared = columns[used], shared[torch.from_numpy(np.flatnonzero(used)).to(shared.device)]
            weights = self._weights(masks[:, :, columns]).flatten(0, 1)
            found = torch.addmm(start, weights, shared.reshape(len(columns), size))
        else:
            found = start.expand(circuits * len(rows), size)
        found = found.view(circuits, len(rows), size) if used.any() else found.unflatten(0, (circuits, len(rows)))
        if own.shape[1]:
            weights = self._weights(masks[:, :, self.own_columns[: own.shape[1]]])
            if masks[:, :, self.own_columns[: own.shape[1]]].any():
                found = torch.baddbmm(found, weights, own.reshape(circuits, own.shape[1], size))
        return found.unflatten(-1, stream.shape)

    def _weights(self, masks: np.ndarray) -> Tensor:
        return torch.from_numpy(masks).to(self.shared.device, self.wide)

    def _deltas(self) -> tuple[Tensor, Tensor]:
        return self.shared[: self.written_shared], self.own[:, : self.written_own]

    def _rows(self, index: int) -> tuple[int, int, int, int]:
        """Numbers of the first query, key, value and MLP receivers of a layer."""
        spec = self.spec
        first = index * (spec.n_heads + 2 * spec.n_kv_heads + (1 if spec.d_mlp else 0))
        return (
            first,
            first + spec.n_heads,
            first + spec.n_heads + spec.n_kv_heads,
            first + spec.n_heads + (2 * spec.n_kv_heads),
        )

    def _attention(self, index: int, first: int, heads: np.ndarray) -> None:
        """What the active heads of a layer write."""
        layer, ref, spec = self.weights.layers[index], self.ref, self.spec
        wide = bool(self.plan.own[first : first + spec.n_heads].any())
        groups = np.unique(heads // spec.group_size)
        members = (heads, groups, groups)
        rows = [base + chosen for base, chosen in zip(self._rows(index)[:3], members, strict=True)]
        union = np.any(self.plan.masks[: self.circuits if wide else 1], axis=0)
        changing = [union[r].any(1) for r in rows]
        reading = np.concatenate([r[c] for r, c in zip(rows, changing, strict=True)])
        circuits = self.circuits if wide else 1
        parts = []
        normed = None
        if len(reading):
            stream = self._read(reading, ref.pre[index].flatten(0, 1), self._deltas(), wide=wide)
            normed = layer.ln1(stream.to(self.weights.dtype))
        at = 0
        for kind, (chosen, change) in enumerate(zip(members, changing, strict=True)):
            base = (ref.q, ref.k, ref.v)[kind][index][:, :, torch.from_numpy(chosen).to(self.shared.device)]
            whole = base.expand(circuits, *base.shape)
            count = int(change.sum())
            if count:
                assert normed is not None
                fresh = self._project(index, kind, chosen[change], normed[:, at : at + count])
                at += count
                if count == len(chosen):
                    whole = fresh
                else:
                    whole = whole.clone()
                    whole[:, :, :, torch.from_numpy(np.flatnonzero(change)).to(self.shared.device)] = fresh
            parts.append(whole)
        q, k, v = parts
        prefix = [ref.prefix_k[index], ref.prefix_v[index]]
        if len(heads) == spec.n_heads:
            shape = spec
        else:  # every active head with a copy of its key and value
            shape = replace(spec, n_heads=len(heads), n_kv_heads=len(heads))
            own = torch.from_numpy(np.searchsorted(groups, heads // spec.group_size)).to(self.shared.device)
            k, v = k[:, :, :, own], v[:, :, :, own]
            shared = torch.from_numpy(heads // spec.group_size).to(self.shared.device)
            prefix = [part[:, :, shared] for part in prefix]
        z = attend_window(shape, self.window, q, k, v, prefix[0], prefix[1])
        picked = torch.from_numpy(heads).to(self.shared.device)
        change_z = (z - ref.z[index][:, :, picked]).permute(0, 3, 1, 2, 4).flatten(2, 3)
        self._write(first + int(heads[0]), torch.matmul(change_z, layer.W_O[picked]).to(self.wide))

    def _project(
        self, index: int, kind: int, heads: np.ndarray, normed: Float[Tensor, "circuits heads tokens d_model"]
    ) -> Float[Tensor, "circuits n width heads d_head"]:
        """Queries, keys or values of heads that each read a stream of their own."""
        layer = self.weights.layers[index]
        chosen = torch.from_numpy(heads).to(normed.device)
        found = torch.matmul(normed, layer.qkv.weights[kind][chosen])
        bias = layer.qkv.biases[kind]
        if bias is not None:
            found = found + bias[chosen][:, None]
        found = found.unflatten(2, (self.n, self.width)).permute(0, 2, 3, 1, 4)
        norm = (layer.q_norm, layer.k_norm, None)[kind]
        if norm is not None:
            found = norm(found)
        return found if self.table is None or kind == 2 else rotate(found, self.table)

    def _mlp(self, index: int, sender: int) -> None:
        layer = self.weights.layers[index]
        assert layer.mlp is not None
        row = np.array([self._rows(index)[3]])
        wide = bool(self.plan.own[sender])
        stream = self._read(row, self.ref.mid[index].flatten(0, 1), self._deltas(), wide=wide)
        out = layer.mlp(layer.ln2(stream.to(self.weights.dtype))) - self.ref.mlp_out[index].flatten(0, 1)
        self._write(sender, out.to(self.wide))

    def _final(self) -> Float[Tensor, "circuits n d_model"]:
        rows = torch.arange(self.n, device=self.shared.device)
        at_answer = rows * self.width + self.window.answer_index
        shared, own = self._deltas()
        deltas = (shared[:, at_answer], own[:, :, at_answer])
        last = np.array([self.wiring.shape[0] - 1])
        return self._read(last, self.ref.final, deltas, wide=True)[:, 0]
