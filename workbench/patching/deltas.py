"""What every sender would write differently, laid out for products over all senders at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.patching.graph import Graph
from workbench.patching.runs import Runs


def sender_deltas(runs: Runs, graph: Graph, senders: list[int]) -> Float[Tensor, "n width senders d_model"]:
    """Patch minus base write of each of `senders` (numbers in ascending order), on the windows."""
    n, width, d_model = runs.delta_input.shape
    found = runs.delta_input.new_empty(n, width, len(senders), d_model)
    by_layer: dict[int, list[tuple[int, int]]] = {}
    for column, number in enumerate(senders):
        sender = graph.senders[number]
        if sender.kind == "input":
            found[:, :, column] = runs.delta_input
        elif sender.kind == "mlp":
            found[:, :, column] = runs.delta_mlp[sender.layer]
        else:
            by_layer.setdefault(sender.layer, []).append((column, sender.head))
    for layer, members in by_layer.items():
        columns, heads = zip(*members, strict=True)
        written = runs.delta_z[layer, list(heads)].flatten(1, 2) @ runs.weights.layers[layer].W_O[list(heads)]
        written = written.unflatten(1, (n, width)).permute(1, 2, 0, 3)
        if columns[-1] - columns[0] + 1 == len(columns):
            found[:, :, columns[0] : columns[-1] + 1] = written
        else:
            found[:, :, list(columns)] = written
    return found


def deltas_bytes(graph: Graph, n: int, width: int, itemsize: int) -> int:
    """Bytes of the deltas of all senders."""
    return n * width * len(graph.senders) * graph.spec.d_model * itemsize


def contract(
    deltas: Float[Tensor, "n width senders d_model"], gradient: Float[Tensor, "n width receivers d_model"]
) -> Float[Tensor, "n senders receivers"]:
    """First-order effect of each sender on each receiver: inner product over positions and the stream."""
    product = torch.bmm(deltas.flatten(0, 1), gradient.flatten(0, 1).mT)
    return product.unflatten(0, deltas.shape[:2]).sum(1, dtype=torch.promote_types(deltas.dtype, torch.float32))
