"""Metrics of an answer: pure functions on the logits at the answer position, one number a prompt.

Each takes logits of shape `[..., n, vocab]`, so that many patched runs of the same prompts can be measured at once, and
accumulates in float32 or, for float64 logits, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.errors import PromptError
from workbench.prompts import ABSENT, PromptPairs

MetricName = Literal["logit_diff", "answer_logprob", "kl_to_clean"]


def logit_diff(logits: Float[Tensor, "*runs n vocab"], pairs: PromptPairs) -> Float[Tensor, "*runs n"]:
    """Mean logit of the answers minus mean logit of the wrong answers (Wang et al. 2022, with sets averaged).

    Args:
        logits: at each prompt's answer position.
        pairs: the prompts, in the same order.

    Returns:
        The difference in logits; positive where the right answer is preferred.
    """
    logits = _wide(logits)
    return _mean_over(logits, pairs.answers) - _mean_over(logits, pairs.wrong_answers)


def answer_logprob(logits: Float[Tensor, "*runs n vocab"], pairs: PromptPairs) -> Float[Tensor, "*runs n"]:
    """Log of the probability that the next token is one of the answers: the probabilities of a set are summed.

    Args:
        logits: at each prompt's answer position.
        pairs: the prompts, in the same order.

    Returns:
        Log-probability in nats, at most 0.
    """
    logits = _wide(logits)
    values, present = _gather(logits, pairs.answers)
    return values.masked_fill(~present, -torch.inf).logsumexp(-1) - logits.logsumexp(-1)


def kl_to_clean(
    logits: Float[Tensor, "*runs n vocab"], clean_logits: Float[Tensor, "n vocab"]
) -> Float[Tensor, "*runs n"]:
    """Kullback-Leibler divergence KL(clean || patched) of the next-token distributions.

    Args:
        logits: of the patched run.
        clean_logits: of the clean run.

    Returns:
        Divergence in nats, at least 0 up to rounding; 0 where the distributions agree.
    """
    patched = _wide(logits).log_softmax(-1)
    clean = _wide(clean_logits).to(patched.device).log_softmax(-1)
    kept = clean.exp() > 0
    return torch.where(kept, clean.exp() * (clean - patched), 0.0).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric by name: its unit, and one signature for all of them.

    Attributes:
        unit: unit of the number.
        function: `(logits [..., n, vocab], pairs, clean_logits [n, vocab] or None) -> [..., n]`.
        needs_clean: whether `clean_logits` must be given.
    """

    unit: str
    function: Callable[[Tensor, PromptPairs, Tensor | None], Tensor]
    needs_clean: bool = False


def _kl(logits: Tensor, pairs: PromptPairs, clean_logits: Tensor | None) -> Tensor:
    if clean_logits is None:
        raise PromptError("metric 'kl_to_clean' needs clean_logits=, the logits of the clean run, got None")
    return kl_to_clean(logits, clean_logits)


METRICS: dict[str, Metric] = {
    "logit_diff": Metric(unit="logits", function=lambda logits, pairs, _: logit_diff(logits, pairs)),
    "answer_logprob": Metric(unit="nats", function=lambda logits, pairs, _: answer_logprob(logits, pairs)),
    "kl_to_clean": Metric(unit="nats", function=_kl, needs_clean=True),
}


def beats(
    logits: Float[Tensor, "*runs n vocab"], answers: Int[Tensor, "n k"], others: Int[Tensor, "n c"] | None = None
) -> Bool[Tensor, "*runs n"]:
    """Whether the best answer has a strictly higher logit than every rival; a tie is no success.

    Args:
        logits: at each prompt's answer position.
        answers: right tokens.
        others: tokens they compete with, which may include the answers; default: the whole vocabulary.

    Returns:
        One boolean a prompt.
    """
    logits = _wide(logits)
    values, present = _gather(logits, answers)
    best = values.masked_fill(~present, -torch.inf).amax(-1)
    ids = answers.to(logits.device)
    ids = torch.where(ids == ABSENT, ids.amax(-1, keepdim=True), ids)
    rivals = logits.scatter(-1, ids.expand(*logits.shape[:-1], ids.shape[-1]), -torch.inf)
    if others is None:
        return best > rivals.amax(-1)
    values, present = _gather(rivals, others)
    return best > values.masked_fill(~present, -torch.inf).amax(-1)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _gather(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of each row's ids `[..., n, k]`, and which of them are present."""
    if logits.shape[-2] != len(ids):
        raise PromptError(
            f"logits are of {logits.shape[-2]} prompts and pairs has {len(ids)}: pass those of these pairs"
        )
    ids = ids.to(logits.device)
    index = ids.clamp(min=0).expand(*logits.shape[:-1], ids.shape[-1])
    return logits.gather(-1, index), ids != ABSENT


def _mean_over(logits: Tensor, ids: Tensor) -> Tensor:
    values, present = _gather(logits, ids)
    return torch.where(present, values, 0.0).sum(-1) / present.sum(-1)
