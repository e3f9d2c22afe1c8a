"""Edges arranged for methods that score all senders of a receiver layer in one product."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from workbench.patching.graph import Edges, Kind


@dataclass(frozen=True, kw_only=True)
class Group:
    """The edges into receivers of one kind in one layer.

    Attributes:
        kind: of the receivers.
        layer: of the receivers.
        heads: receiver heads that occur, ascending.
        readable: how many of the sweep's senders the group needs: a prefix.
        index: which of the edges these are.
        sender_column: for each of them, where its sender is among the sweep's senders.
        receiver_column: for each of them, where its receiver is among `heads`.
    """

    kind: Kind
    layer: int
    heads: list[int]
    readable: int
    index: Int[Tensor, "edges"]
    sender_column: Int[Tensor, "edges"]
    receiver_column: Int[Tensor, "edges"]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All groups, and the numbers of the senders that occur."""

    senders: list[int]
    groups: tuple[Group, ...]


def by_receiver_layer(edges: Edges) -> Sweep:
    """Group edges by kind and layer of their receiver."""
    senders = np.unique(edges.sender)
    column = np.searchsorted(senders, edges.sender)
    members: dict[tuple[int, str], list[int]] = defaultdict(list)
    receivers = edges.graph.receivers
    for index, number in enumerate(edges.receiver):
        members[receivers[number].layer, receivers[number].kind].append(index)
    groups = []
    for (layer, _), indices in sorted(members.items(), key=lambda item: int(edges.receiver[item[1][0]])):
        chosen = np.array(indices)
        found = [receivers[number] for number in edges.receiver[chosen]]
        heads = sorted({r.head for r in found})
        groups.append(
            Group(
                kind=found[0].kind,
                layer=layer,
                heads=heads,
                readable=int(column[chosen].max()) + 1,
                index=torch.from_numpy(chosen),
                sender_column=torch.from_numpy(column[chosen]),
                receiver_column=torch.tensor([heads.index(r.head) for r in found]),
            )
        )
    return Sweep(senders=senders.tolist(), groups=tuple(groups))
