"""What an effect is measured in: a number per prompt, read from the final residual stream at the answer position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import PromptError
from workbench.metrics import METRICS
from workbench.models.forward import unembed
from workbench.models.weights import ModelWeights, at_least_float32
from workbench.prompts import ABSENT, PromptPairs

_LOGIT_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class BoundMetric:
    """A metric bound to a batch of prompts.

    Attributes:
        name: one of `workbench.metrics.METRICS`.
        read: from final residuals `[..., n, d_model]` to values `[..., n]` in float32 or better; differentiable.
    """

    name: str
    read: Callable[[Float[Tensor, "*edges n d_model"]], Float[Tensor, "*edges n"]]


def bind(name: str, weights: ModelWeights, pairs: PromptPairs, clean_final: Float[Tensor, "n d_model"]) -> BoundMetric:
    """Bind a metric of `workbench.metrics` to prompts.

    Args:
        name: the metric.
        weights: canonical weights.
        pairs: prompts with their answers.
        clean_final: final residuals of the clean prompts at the answer position.

    Raises:
        PromptError: for an unknown name.
    """
    if name not in METRICS:
        raise PromptError(f"metric {name!r} is not one of {', '.join(METRICS)}")
    if name == "logit_diff":
        return BoundMetric(name=name, read=_logit_diff(weights, pairs))
    metric = METRICS[name]
    with torch.no_grad():
        clean = unembed(weights, clean_final) if metric.needs_clean else None
    return BoundMetric(name=name, read=_over_logits(weights, lambda logits: metric.function(logits, pairs, clean)))


def mean_row(rows: Float[Tensor, "d_vocab d"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """Mean over each set of ids, in float32 or better; `ABSENT` ids do not count."""
    present = (ids != ABSENT).to(rows.device)
    picked = rows[ids.clamp(min=0).to(rows.device)].to(at_least_float32(rows.dtype))
    return (picked * present[..., None]).sum(1) / present.sum(1, keepdim=True)


def _logit_diff(weights: ModelWeights, pairs: PromptPairs) -> Callable[[Tensor], Tensor]:
    """A logit difference is linear in the normalised residual: one direction per prompt, no unembedding."""
    rows = weights.unembed.matrix.mT
    direction = mean_row(rows, pairs.answers) - mean_row(rows, pairs.wrong_answers)
    offset = torch.zeros(len(pairs), dtype=direction.dtype, device=rows.device)
    if weights.unembed.bias is not None:
        bias = weights.unembed.bias[:, None]
        offset = (mean_row(bias, pairs.answers) - mean_row(bias, pairs.wrong_answers)).squeeze(-1)

    def read(final: Tensor) -> Tensor:
        return (weights.ln_final(final).to(direction.dtype) * direction).sum(-1) + offset

    return read


def _over_logits(weights: ModelWeights, score: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Read a metric that needs all logits, a bounded number of edges at a time."""

    def read(final: Tensor) -> Tensor:
        if final.dim() == 2:
            return score(unembed(weights, final))
        flat = final.flatten(0, -3)
        per_edge = flat.shape[1] * weights.spec.d_vocab * 4
        parts = flat.split(max(1, _LOGIT_BYTES // per_edge))
        return torch.cat([score(unembed(weights, part)) for part in parts]).unflatten(0, final.shape[:-2])

    return read
