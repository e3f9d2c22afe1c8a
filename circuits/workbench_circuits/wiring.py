"""Sets of edges as masks, what is connected to what within them, and which edges can matter at all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int

from workbench.errors import PromptError
from workbench.patching.graph import Edges, Graph

Mask = Bool[np.ndarray, "receivers senders"]

_HEAD = re.compile(r"a(\d+)\.h(\d+)$")


@dataclass(frozen=True)
class Wiring:
    """The graph of a model with what a circuit adds to it: which sender each receiver is an input of.

    A circuit is a mask `[receivers, senders]` over all pairs of the graph. A query feeds its head, a key or value every
    query head that shares it, and an MLP's input that MLP; `logits` feeds nothing.
    """

    graph: Graph

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Numbers of receivers and senders: the shape of a mask."""
        return len(self.graph.receivers), len(self.graph.senders)

    @cached_property
    def feeds(self) -> tuple[slice, ...]:
        """For every receiver, the senders whose write depends on it; they stand side by side."""
        spec, per_layer = self.graph.spec, self.graph.per_layer
        found = []
        for r in self.graph.receivers:
            first = 1 + r.layer * per_layer
            if r.kind == "logits":
                found.append(slice(0, 0))
            elif r.kind == "mlp":
                found.append(slice(first + spec.n_heads, first + spec.n_heads + 1))
            elif r.kind == "q":
                found.append(slice(first + r.head, first + r.head + 1))
            else:
                group = spec.group_size
                found.append(slice(first + r.head * group, first + (r.head + 1) * group))
        return tuple(found)

    @cached_property
    def everything(self) -> Mask:
        """The whole graph."""
        return np.arange(self.shape[1])[None] < self.graph.readable[:, None]

    def empty(self) -> Mask:
        """A circuit of no edges."""
        return np.zeros(self.shape, dtype=bool)

    def mask(self, edges: Edges | Iterable[str]) -> Mask:
        """The mask of some edges.

        Raises:
            PromptError: for a name that is not an edge of the graph.
        """
        found = self.empty()
        if not isinstance(edges, Edges):
            names = list(edges)
            if not names:
                return found
            edges = self.graph.edges(names)
        found[edges.receiver, edges.sender] = True
        return found

    def edges(self, mask: Mask) -> Edges:
        """The edges of a mask, receiver by receiver."""
        receiver, sender = np.nonzero(mask)
        return Edges(self.graph, sender, receiver)

    def useful(self, mask: Mask) -> tuple[Bool[np.ndarray, " receivers"], Bool[np.ndarray, " senders"]]:
        """Receivers and senders from which a path of the mask leads to `logits`."""
        receivers = np.zeros(self.shape[0], dtype=bool)
        senders = np.zeros(self.shape[1], dtype=bool)
        last = self.shape[0] - 1
        for r in range(last, -1, -1):
            if r == last or senders[self.feeds[r]].any():
                receivers[r] = True
                senders |= mask[r]
        return receivers, senders

    def reached(self, mask: Mask) -> Bool[np.ndarray, " senders"]:
        """Senders to which a path of the mask leads from `input`."""
        senders = np.zeros(self.shape[1], dtype=bool)
        senders[0] = True
        for r in range(self.shape[0]):
            if (mask[r] & senders).any():
                senders[self.feeds[r]] = True
        return senders

    def prune(self, mask: Mask, *, from_input: bool = True) -> Mask:
        """The edges that lie on a path from `input` to `logits`.

        With resample ablation the others change nothing: they carry the corrupted value, or nobody reads what they
        change.

        Args:
            mask: the circuit.
            from_input: False keeps edges that `input` does not reach. With zero or mean ablation they matter: a head
                whose inputs are all ablated still writes something else than the value that stands for it.
        """
        receivers, _ = self.useful(mask)
        kept = mask & receivers[:, None]
        return kept & self.reached(mask)[None] if from_input else kept

    def nodes(self, mask: Mask) -> tuple[str, ...]:
        """Senders that write an edge of the mask, in writing order, and `logits` if it is read."""
        names = [name for name, here in zip(self.graph.sender_names, np.any(mask, axis=0), strict=True) if here]
        return (*names, "logits") if mask[-1].any() else tuple(names)

    def heads(self, mask: Mask) -> tuple[tuple[int, int], ...]:
        """(layer, head) of every head that writes an edge of the mask."""
        return tuple(
            (s.layer, s.head)
            for s, here in zip(self.graph.senders, np.any(mask, axis=0), strict=True)
            if here and s.kind == "head"
        )

    def senders(self, nodes: Iterable[str]) -> Int[np.ndarray, " nodes"]:
        """Numbers of nodes that write.

        Raises:
            PromptError: for a name that is not one.
        """
        index = {name: i for i, name in enumerate(self.graph.sender_names)}
        nodes = list(nodes)
        unknown = [name for name in nodes if name not in index]
        if unknown:
            raise PromptError(
                f"{unknown[0]!r} is not a node that writes: name 'input', heads such as 'a3.h1', MLPs such as 'm5'"
            )
        return np.array([index[name] for name in nodes], dtype=np.int64)

    def between(self, nodes: Sequence[str]) -> Mask:
        """All edges from one of these nodes to another or to `logits`: a circuit given by its nodes.

        A shared key or value belongs to the circuit if any of its query heads does.

        Raises:
            PromptError: for an unknown node.
        """
        inside = np.zeros(self.shape[1], dtype=bool)
        inside[self.senders(name for name in nodes if name != "logits")] = True
        receiving = np.array([inside[fed].any() for fed in self.feeds])
        receiving[-1] = True
        found: Mask = self.everything & inside[None] & receiving[:, None]
        return found


def head_of(node: str) -> tuple[int, int] | None:
    """(layer, head) of a head's name, None for another node."""
    match = _HEAD.match(node)
    return None if match is None else (int(match[1]), int(match[2]))
