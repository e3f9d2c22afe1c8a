"""TransformerLens' direct path patching, one edge at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from workbench.models import Model
from workbench.patching.graph import Edges, Receiver, Sender
from workbench.prompts import PromptPairs


class DirectPath:
    """`transformer_lens.patching.get_act_patch_direct_path` on one model and its prompts.

    It patches clean writes into the corrupted run, so its effects are those of `direction="denoising"`.

    Args:
        model: a model with as many key/value heads as heads.
        pairs: prompts that all end at their answer position.
    """

    def __init__(self, model: Model, pairs: PromptPairs) -> None:
        self.bridge: Any = model.bridge
        self.tokens = pairs.corrupted
        rows = torch.arange(len(pairs))

        def metric(logits: Tensor) -> Tensor:
            at = logits[rows, pairs.answer_positions]
            value = (at.gather(1, pairs.answers) - at.gather(1, pairs.wrong_answers)).mean()
            self.last = float(value)
            return value

        self.metric = metric
        with torch.no_grad():
            _, self.clean = self.bridge.run_with_cache(pairs.clean, names_filter=_is_z)
            logits, self.corrupted = self.bridge.run_with_cache(pairs.corrupted, names_filter=_is_z)
            self.base = float(metric(logits))

    def effect(self, sender: Sender, receiver: Receiver) -> float:
        """Mean effect over prompts of one edge from head to head: one forward of theirs, with their set-up."""
        from transformer_lens.patching import get_act_patch_direct_path

        with torch.no_grad(), _only(receiver.layer, receiver.head):
            found: Tensor = get_act_patch_direct_path(
                self.bridge,
                self.tokens,
                self.clean,
                self.corrupted,
                self.metric,
                sender.layer,
                sender.head,
                receiver.kind,
                verbose=False,
            )
        # `found` is float32 whatever the model's dtype; the metric was called for this one receiver
        assert found[receiver.layer, receiver.head] == torch.tensor(self.last, dtype=found.dtype)
        return self.last - self.base

    def effects(self, edges: Edges) -> list[float]:
        """`effect` of every edge."""
        graph = edges.graph
        ends = zip(edges.sender, edges.receiver, strict=True)
        return [self.effect(graph.senders[s], graph.receivers[r]) for s, r in ends]


def _is_z(name: str) -> bool:
    return name.endswith("attn.hook_z")


@contextmanager
def _only(layer: int, head: int) -> Iterator[None]:
    """Let the function go through one receiver, where it would go through all: its loop runs through its own `tqdm`."""
    import transformer_lens.patching as theirs

    usual = theirs.tqdm

    def one(pairs: list[tuple[int, int]], **_: Any) -> list[tuple[int, int]]:
        return [pair for pair in pairs if pair == (layer, head)]

    theirs.tqdm = one
    try:
        yield
    finally:
        theirs.tqdm = usual
