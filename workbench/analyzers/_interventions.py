"""The loss of a model, and its attention to the first token, with and without a change at one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from workbench.analyzers._patterns import batch_size
from workbench.analyzers.attention_sinks import key_importance
from workbench.models.weights import at_least_float32

if TYPE_CHECKING:
    from workbench.models import Model


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is done to the stream after the block `layer`; nothing without `to`."""

    layer: int
    to: Callable[[Float[Tensor, "n pos d_model"]], Float[Tensor, "n pos d_model"]] | None = None

    def __call__(self, layer: int, resid: Tensor) -> Tensor:
        """The stream after a block, as an editor of `resid_post` gives it."""
        return resid if self.to is None or layer != self.layer else self.to(resid)


def losses(
    model: Model,
    tokens: Int[Tensor, "n pos"],
    changes: Mapping[str, Change],
    *,
    from_layer: int,
    budget: int,
    progress: Callable[[str], None] | None = None,
) -> dict[str, dict[str, Float[Tensor, "n"]]]:
    """Loss and attention to the first token of every document under every change.

    Args:
        model: fast path or hooks.
        tokens: documents of one length.
        changes: by name.
        from_layer: attention is averaged over the heads of this layer and those behind.
        budget: working memory of a batch, in bytes.
        progress: called with a line after each batch.

    Returns:
        `loss`, the mean cross-entropy of the next token in nats, and, if there are such layers,
        `first_token_attention`, the mean over heads and queries: by change, of each document, in float64.
    """
    # logits, their float32 copy and log-probabilities of every position come on top of the forward pass
    per_document = 12 * tokens.shape[1] * model.spec.d_vocab
    size = max(1, min(batch_size(model, tokens.shape[1], budget), budget // per_document))
    found: dict[str, dict[str, list[Tensor]]] = {}
    watched = range(from_layer, model.spec.n_layers)
    for start in range(0, len(tokens), size):
        batch = tokens[start : start + size].to(model.device)
        for name, change in changes.items():
            attention: list[Tensor] = []

            def look(layer: int, pattern: Tensor, attention: list[Tensor] = attention) -> None:
                if layer in watched:
                    attention.append(key_importance(pattern, [0]).mean((1, 2)).to("cpu", torch.float64))

            observe = {"pattern": look} if watched and model.spec.causal else {}
            logits = model.forward(batch, observe=observe, edit={"resid_post": change})
            scores = logits[:, :-1].to(at_least_float32(logits.dtype))
            loss = F.cross_entropy(scores.flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
            loss = loss.unflatten(0, (len(batch), -1)).mean(1).to("cpu", torch.float64)
            found.setdefault("loss", {}).setdefault(name, []).append(loss)
            if attention:
                mean = torch.stack(attention).mean(0)
                found.setdefault("first_token_attention", {}).setdefault(name, []).append(mean)
        if progress is not None:
            progress(f"loss with and without extreme tokens: {start + len(batch)} of {len(tokens)} documents")
    return {what: {name: torch.cat(parts) for name, parts in by_name.items()} for what, by_name in found.items()}
