"""What an effect is measured in: a number per prompt, read from the final residual stream at the answer position."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from workbench.errors import PromptError
from workbench.models.forward import unembed
from workbench.models.weights import ModelWeights, at_least_float32
from workbench.prompts import PromptPairs

UNITS = {"logit_diff": "logits", "answer_logprob": "nats", "kl": "nats"}
"""Metrics of the patching engine and the unit of their effects."""

_LOGIT_BYTES = 1 << 27


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric bound to a batch of prompts.

    Attributes:
        name: one of `UNITS`.
        read: from final residuals `[..., n, d_model]` to values `[..., n]` in float32 or better; differentiable.
    """

    name: str
    read: Callable[[Float[Tensor, "*edges n d_model"]], Float[Tensor, "*edges n"]]


def bind(
    name: str, weights: ModelWeights, pairs: PromptPairs, clean_final: Float[Tensor, "n d_model"] | None = None
) -> Metric:
    """Bind a metric to prompts.

    Args:
        name: `logit_diff`: mean logit of the answers minus mean logit of the wrong answers; `answer_logprob`: log of
            the summed probability of the answers; `kl`: divergence of the prediction from the clean prompt's.
        weights: canonical weights.
        pairs: prompts with their answers.
        clean_final: final residuals of the clean prompts at the answer position, for `kl`.

    Raises:
        PromptError: for an unknown name.
    """
    if name == "logit_diff":
        return Metric(name=name, read=_logit_diff(weights, pairs.answers, pairs.wrong_answers))
    if name == "answer_logprob":
        return Metric(name=name, read=_over_logits(weights, _answer_logprob(pairs.answers)))
    if name == "kl":
        assert clean_final is not None
        with torch.no_grad():
            clean = _log_softmax(unembed(weights, clean_final))
        return Metric(name=name, read=_over_logits(weights, _kl(clean)))
    raise PromptError(f"metric {name!r} is not one of {', '.join(UNITS)}")


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(at_least_float32(logits.dtype)).log_softmax(dim=-1)


def _logit_diff(
    weights: ModelWeights, answers: Int[Tensor, "n k"], wrong: Int[Tensor, "n w"]
) -> Callable[[Tensor], Tensor]:
    """A logit difference is linear in the normalised residual: one direction per prompt, no unembedding."""
    wide = at_least_float32(weights.dtype)
    rows = weights.unembed.matrix.mT
    direction = rows[answers].to(wide).mean(1) - rows[wrong].to(wide).mean(1)
    offset = torch.zeros(len(answers), dtype=wide, device=rows.device)
    if weights.unembed.bias is not None:
        bias = weights.unembed.bias.to(wide)
        offset = bias[answers].mean(1) - bias[wrong].mean(1)

    def read(final: Tensor) -> Tensor:
        return (weights.ln_final(final).to(wide) * direction).sum(-1) + offset

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


def _answer_logprob(answers: Int[Tensor, "n k"]) -> Callable[[Tensor], Tensor]:
    def score(logits: Tensor) -> Tensor:
        logprobs = _log_softmax(logits)
        return logprobs.gather(-1, answers.expand(*logits.shape[:-1], -1)).logsumexp(-1)

    return score


def _kl(clean: Float[Tensor, "n d_vocab"]) -> Callable[[Tensor], Tensor]:
    def score(logits: Tensor) -> Tensor:
        return (clean.exp() * (clean - _log_softmax(logits))).sum(-1)

    return score
