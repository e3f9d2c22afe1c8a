"""Edge attribution patching: first-order effects of all edges from one gradient, or from several along a path.

`eap` is Nanda's attribution patching on edges (Syed et al. 2023): the difference in what the sender writes, times the
gradient of the metric at what the receiver reads. `eap_ig` (Hanna et al. 2024) averages that gradient over inputs
interpolated from the patched-in run's embeddings to the base run's.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from workbench.patching.deltas import contract, sender_deltas
from workbench.patching.gradients import gradients, receiver_gradients
from workbench.patching.graph import Edges
from workbench.patching.runs import Runs
from workbench.patching.sweep import by_receiver_layer


def attribution_effects(runs: Runs, edges: Edges, *, steps: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """First-order effects of edges.

    Args:
        runs: caches of the prompts.
        edges: the edges.
        steps: 1 for `eap`, with the gradient of the base run; more for `eap_ig`, with gradients at fractions
            1/steps, 2/steps, ..., 1 of the way from the patch run's input to the base run's.

    Yields:
        Indices into `edges` and their effects `[edges, n]`, receiver layer by receiver layer.
    """
    base = runs.resid_pre[0]
    passes = [gradients(runs, base + runs.delta_input * (1 - step / steps)) for step in range(1, steps)]
    passes.append(gradients(runs))
    sweep = by_receiver_layer(edges)
    deltas = sender_deltas(runs, edges.graph, sweep.senders)
    for group in sweep.groups:
        seen = deltas[:, :, : group.readable]
        if group.kind == "logits":
            gradient = sum(p.final for p in passes) / steps
            at_answer = runs.window.at_answer(seen.permute(2, 0, 1, 3)).squeeze(-2)
            effects = (at_answer * gradient).sum(-1).T.unsqueeze(-1)
        else:
            layer = runs.weights.layers[group.layer]
            total = sum(receiver_gradients(layer, group.kind, p, group.layer) for p in passes)
            assert isinstance(total, Tensor)
            effects = contract(seen, total[:, :, group.heads] / steps)
        yield (
            group.index,
            effects[:, group.sender_column, group.receiver_column].T.to(
                torch.promote_types(effects.dtype, torch.float32)
            ),
        )
