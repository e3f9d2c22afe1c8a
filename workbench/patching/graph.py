"""Nodes and edges of a decoder, and their names.

Senders write into the residual stream: `input`, every head `a3.h1`, every MLP `m5`. Receivers read it: each head's
query `a3.h1<q>`, each key and value head (`a3.kv0<k>` where query heads share one, else `a3.h1<k>`), every MLP `m5`,
and `logits`. Senders are numbered in the order in which they write, so what a receiver can read is always a prefix of
them.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from workbench.errors import PromptError
from workbench.models.spec import ModelSpec

Kind = Literal["q", "k", "v", "mlp", "logits"]


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """Where an edge ends. `head` counts key/value heads for `k` and `v`; 0 for MLPs and logits."""

    kind: Kind
    layer: int
    head: int = 0


@dataclass(frozen=True, kw_only=True)
class Sender:
    """Where an edge begins; `layer` is -1 for the input."""

    kind: Literal["input", "head", "mlp"]
    layer: int
    head: int = 0


@dataclass(frozen=True)
class Graph:
    """All nodes and edges of a model with this spec."""

    spec: ModelSpec

    @property
    def per_layer(self) -> int:
        """Senders per layer."""
        return self.spec.n_heads + (1 if self.spec.d_mlp else 0)

    @cached_property
    def senders(self) -> tuple[Sender, ...]:
        """All senders in writing order."""
        found = [Sender(kind="input", layer=-1)]
        for layer in range(self.spec.n_layers):
            found += [Sender(kind="head", layer=layer, head=head) for head in range(self.spec.n_heads)]
            if self.spec.d_mlp:
                found.append(Sender(kind="mlp", layer=layer))
        return tuple(found)

    @cached_property
    def receivers(self) -> tuple[Receiver, ...]:
        """All receivers in reading order: per layer q, k, v, then the MLP; `logits` last."""
        found: list[Receiver] = []
        for layer in range(self.spec.n_layers):
            found += [Receiver(kind="q", layer=layer, head=head) for head in range(self.spec.n_heads)]
            found += [Receiver(kind="k", layer=layer, head=head) for head in range(self.spec.n_kv_heads)]
            found += [Receiver(kind="v", layer=layer, head=head) for head in range(self.spec.n_kv_heads)]
            if self.spec.d_mlp:
                found.append(Receiver(kind="mlp", layer=layer))
        found.append(Receiver(kind="logits", layer=self.spec.n_layers))
        return tuple(found)

    @cached_property
    def sender_names(self) -> tuple[str, ...]:
        """Names of `senders`."""
        return tuple(_sender_name(s) for s in self.senders)

    @cached_property
    def receiver_names(self) -> tuple[str, ...]:
        """Names of `receivers`."""
        grouped = self.spec.n_kv_heads != self.spec.n_heads
        return tuple(_receiver_name(r, grouped) for r in self.receivers)

    @cached_property
    def readable(self) -> np.ndarray:
        """For every receiver, how many senders (a prefix of `senders`) it can read."""
        counts = []
        for r in self.receivers:
            own_heads = r.kind == "mlp" and not self.spec.parallel
            counts.append(1 + r.layer * self.per_layer + (self.spec.n_heads if own_heads else 0))
        return np.array(counts, dtype=np.int64)

    @cached_property
    def _sender_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.sender_names)}

    @cached_property
    def _receiver_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.receiver_names)}

    @property
    def n_edges(self) -> int:
        """Number of edges of the whole graph."""
        return int(self.readable.sum())

    def all_edges(self) -> "Edges":
        """Every edge, receiver by receiver."""
        receiver = np.repeat(np.arange(len(self.receivers)), self.readable)
        first = np.repeat(np.cumsum(self.readable) - self.readable, self.readable)
        return Edges(self, np.arange(len(receiver)) - first, receiver)

    def head_edges(self) -> "Edges":
        """Every edge from a head to a head's q, k or v."""
        edges = self.all_edges()
        return edges[edges.classes == "head to head"]

    def edges(self, names: Iterable[str]) -> "Edges":
        """Edges by name, for example `a9.h3->a10.h0<q>`, in the order given; one that is named twice counts once.

        Raises:
            PromptError: for a name that is not an edge of this model; says why and what is near it.
        """
        names = list(dict.fromkeys(names))
        if not names:
            raise PromptError(
                "edges is empty: name at least one edge, for example 'm2->logits', or leave it out for all"
            )
        pairs = [self._parse(name) for name in names]
        return Edges(self, np.array([s for s, _ in pairs]), np.array([r for _, r in pairs]))

    def _parse(self, name: str) -> tuple[int, int]:
        sender, arrow, receiver = name.partition("->")
        if not arrow:
            raise PromptError(f"{name!r} is not an edge: write sender->receiver, for example 'a0.h1->a3.h1<q>'")
        for part, index, what in ((sender, self._sender_index, "sender"), (receiver, self._receiver_index, "receiver")):
            if part not in index:
                near = difflib.get_close_matches(part, index, n=3)
                hint = f"; near it: {', '.join(near)}" if near else ""
                if what == "receiver" and ("<k>" in part or "<v>" in part) and self.spec.group_size > 1:
                    hint += (
                        f". Query heads share {self.spec.n_kv_heads} key/value heads here: name them a0.kv0<k>, "
                        "or load the model with ungroup=True"
                    )
                raise PromptError(f"{name!r}: {part!r} is not a {what} of this model{hint}")
        s, r = self._sender_index[sender], self._receiver_index[receiver]
        if s >= self.readable[r]:
            raise PromptError(f"{name!r}: {sender} writes after {receiver} has read, so there is no such edge")
        return s, r


class Edges:
    """A list of edges of one graph, as sender and receiver numbers."""

    def __init__(self, graph: Graph, sender: np.ndarray, receiver: np.ndarray) -> None:
        self.graph = graph
        self.sender = np.asarray(sender, dtype=np.int64)
        self.receiver = np.asarray(receiver, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sender)

    def __getitem__(self, index: np.ndarray | Sequence[int] | slice) -> "Edges":
        return Edges(self.graph, self.sender[index], self.receiver[index])

    @property
    def keys(self) -> np.ndarray:
        """One number per edge, unique within the graph."""
        return self.receiver * len(self.graph.senders) + self.sender

    @property
    def names(self) -> list[str]:
        """`sender->receiver` of every edge."""
        senders, receivers = self.graph.sender_names, self.graph.receiver_names
        return [f"{senders[s]}->{receivers[r]}" for s, r in zip(self.sender, self.receiver, strict=True)]

    @property
    def classes(self) -> np.ndarray:
        """`logits`, `input`, `MLP` or `head to head`: the class of each edge, the first that applies."""
        sender_kind = np.array([s.kind for s in self.graph.senders])[self.sender]
        receiver_kind = np.array([r.kind for r in self.graph.receivers])[self.receiver]
        return np.select(
            [receiver_kind == "logits", sender_kind == "input", (sender_kind == "mlp") | (receiver_kind == "mlp")],
            ["logits", "input", "MLP"],
            "head to head",
        )


def _sender_name(sender: Sender) -> str:
    if sender.kind == "input":
        return "input"
    return f"m{sender.layer}" if sender.kind == "mlp" else f"a{sender.layer}.h{sender.head}"


def _receiver_name(receiver: Receiver, grouped: bool) -> str:
    if receiver.kind == "logits":
        return "logits"
    if receiver.kind == "mlp":
        return f"m{receiver.layer}"
    head = "kv" if grouped and receiver.kind in {"k", "v"} else "h"
    return f"a{receiver.layer}.{head}{receiver.head}<{receiver.kind}>"
