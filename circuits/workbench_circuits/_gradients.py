"""What every edge contributes to a circuit's metric at first order, from one differentiable run of the circuit."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.weights import at_least_float32, rotate
from workbench.patching.window import attend_window
from workbench_circuits._reference import Reference
from workbench_circuits.wiring import Wiring


def gradient_bytes(wiring: Wiring, tokens: int, itemsize: int) -> int:
    """Bytes that `edge_gradients` takes beside the reference."""
    spec = wiring.graph.spec
    receivers = spec.n_heads + 2 * spec.n_kv_heads + 1
    per_layer = 4 * receivers * spec.d_model + 6 * spec.d_mlp + 8 * spec.n_heads * spec.d_head
    return tokens * max(4, itemsize) * (spec.n_layers * per_layer + 3 * wiring.shape[1] * spec.d_model)


def edge_gradients(
    reference: Reference, wiring: Wiring, mask: Float[np.ndarray, "receivers senders"]
) -> Float[np.ndarray, "n receivers senders"]:
    """Derivative of each prompt's metric by the weight of every edge, at given weights.

    A receiver reads the reference stream plus, for every edge that ends there, its weight times the difference of the
    sender's write from the reference. A weight of 1 puts the edge into the circuit, 0 leaves it out. The derivative by
    a weight is the inner product of the gradient at the receiver's stream with the sender's difference.

    Args:
        reference: values of ablated edges.
        wiring: the graph.
        mask: weights of the edges.

    Returns:
        Derivatives, 0 where there is no edge.
    """
    with torch.enable_grad():
        return _Run(reference, wiring, mask).derivatives()


class _Run:
    def __init__(self, reference: Reference, wiring: Wiring, mask: np.ndarray) -> None:
        self.ref, self.wiring = reference, wiring
        self.weights, self.spec, self.window = reference.weights, reference.weights.spec, reference.window
        self.wide = at_least_float32(self.weights.dtype)
        self.mask = torch.from_numpy(mask).to(self.weights.device, self.wide)
        self.tokens = self.window.positions.numel()
        self.table = None
        if self.weights.rotary is not None:
            self.table = self.window.rotary(self.weights.rotary, self.weights.dtype)
        self.deltas: list[Tensor] = []
        self.streams: list[tuple[int, Tensor]] = []

    def derivatives(self) -> np.ndarray:
        spec, layers = self.spec, self.weights.layers
        self.deltas.append(self.ref.delta_input.flatten(0, 1).to(self.wide)[None].requires_grad_())
        receivers = spec.n_heads + 2 * spec.n_kv_heads
        per_layer = receivers + (1 if spec.d_mlp else 0)
        for index, layer in enumerate(layers):
            first = index * per_layer
            before = torch.cat(self.deltas)
            heads = self._attention(index, self._read(first, receivers, before, self.ref.pre[index]))
            if layer.mlp is not None:
                seen = before if spec.parallel else torch.cat([before, heads])
                stream = self._read(first + receivers, 1, seen, self.ref.mid[index])
                out = layer.mlp(layer.ln2(stream.to(self.weights.dtype))) - self.ref.mlp_out[index].flatten(0, 1)
                self.deltas += [heads, out.to(self.wide)]
            else:
                self.deltas.append(heads)
        rows = torch.arange(len(self.window.answer), device=self.weights.device)
        at_answer = rows * self.window.width + self.window.answer_index
        everything = torch.cat(self.deltas)
        final = self._read(per_layer * spec.n_layers, 1, everything[:, at_answer], self.ref.final[:, None])
        value = self.ref.metric.read(final[0].to(self.weights.dtype)).sum()
        gradients = torch.autograd.grad(value, [stream for _, stream in self.streams], allow_unused=True)
        return self._contract(gradients, everything.detach(), at_answer)

    def _read(self, first: int, count: int, deltas: Tensor, stream: Tensor) -> Float[Tensor, "rows tokens d_model"]:
        weights = self.mask[first : first + count, : len(deltas)]
        base = stream.flatten(0, 1).to(self.wide)
        found = torch.addmm(base.reshape(1, -1), weights, deltas.flatten(1)).unflatten(1, base.shape)
        self.streams.append((first, found))
        return found

    def _attention(self, index: int, stream: Tensor) -> Float[Tensor, "heads tokens d_model"]:
        layer, spec, ref = self.weights.layers[index], self.spec, self.ref
        normed = layer.ln1(stream.to(self.weights.dtype))
        sizes = (spec.n_heads, spec.n_kv_heads, spec.n_kv_heads)
        parts = []
        for kind, read in enumerate(normed.split(sizes)):
            found = torch.bmm(read, layer.qkv.weights[kind])
            bias = layer.qkv.biases[kind]
            if bias is not None:
                found = found + bias[:, None]
            found = found.unflatten(1, self.window.positions.shape).permute(1, 2, 0, 3)
            norm = (layer.q_norm, layer.k_norm, None)[kind]
            found = found if norm is None else norm(found)
            parts.append(found if self.table is None or kind == 2 else rotate(found, self.table))
        q, k, v = (part[None] for part in parts)
        z = attend_window(spec, self.window, q, k, v, ref.prefix_k[index], ref.prefix_v[index])[0]
        change = (z - ref.z[index]).permute(2, 0, 1, 3).flatten(1, 2)
        return torch.bmm(change, layer.W_O).to(self.wide)

    def _contract(self, gradients: tuple[Tensor | None, ...], deltas: Tensor, at_answer: Tensor) -> np.ndarray:
        n = len(self.window.answer)
        found = torch.zeros((n, *self.wiring.shape), dtype=self.wide, device=deltas.device)
        for (first, stream), gradient in zip(self.streams, gradients, strict=True):
            if gradient is None:
                continue
            seen = int(self.wiring.graph.readable[first])
            rows = slice(first, first + len(stream))
            last = first == self.wiring.shape[0] - 1
            senders = deltas[:seen, at_answer] if last else deltas[:seen]
            left, right = (x.unflatten(1, (n, -1)).transpose(0, 1).flatten(2) for x in (gradient, senders))
            found[:, rows, :seen] = left @ right.mT
        return found.cpu().numpy()
