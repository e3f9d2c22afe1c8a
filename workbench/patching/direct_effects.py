"""Direct logit attribution: what every write adds to the logit difference when nothing reads it but the unembedding.

The final stream is a sum of writes: the embedding, every head's `z W_O`, every attention layer's output bias, every
MLP's output. With the scale of the final norm held at what it is in this run, the norm and the unembedding are affine,
so the logit difference is the sum of what the writes contribute, plus the biases of norm and unembedding. Weights are
the raw ones: nothing is folded or centred (a LayerNorm's own centring is part of the map).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from workbench.errors import PromptError
from workbench.interventions.measured import base_tokens, batches
from workbench.metrics import logit_diff
from workbench.models.model import Model
from workbench.models.weights import ModelWeights, at_least_float32
from workbench.patching.metric import mean_row
from workbench.prompts import PromptPairs
from workbench.tables import HeadTable, provenance

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class FrozenNorm:
    """The map from a write at the answer position to the logit difference, with the scale of the final norm held.

    Attributes:
        direction: gain of the norm times (mean unembedding of the answers minus that of the wrong answers), over the
            standard deviation (LayerNorm) or root mean square (RMSNorm) of the final stream `[n, d_model]`.
        norm_bias: what the norm's bias contributes `[n]`; zero without one.
        unembed_bias: what the unembedding's bias contributes `[n]`; zero without one.
    """

    direction: Float[Tensor, "n d_model"]
    norm_bias: Float[Tensor, "n"]
    unembed_bias: Float[Tensor, "n"]

    @classmethod
    def of(cls, weights: ModelWeights, pairs: PromptPairs, final: Float[Tensor, "n d_model"]) -> "FrozenNorm":
        """The map of these prompts, with the scale that the norm has at these final streams."""
        dtype = at_least_float32(weights.dtype)
        rows, norm = weights.unembed.matrix.mT, weights.ln_final
        direction = mean_row(rows, pairs.answers) - mean_row(rows, pairs.wrong_answers)
        norm_bias = unembed_bias = direction.new_zeros(len(pairs))
        if norm.bias is not None:
            norm_bias = direction @ norm.bias.to(dtype)
        if weights.unembed.bias is not None:
            bias = weights.unembed.bias[:, None]
            unembed_bias = (mean_row(bias, pairs.answers) - mean_row(bias, pairs.wrong_answers)).squeeze(-1)
        if norm.weight is not None:
            wide = final.to(dtype)
            direction = direction * norm.weight.to(dtype)
            if norm.kind == "layernorm":
                square = wide.var(-1, unbiased=False, keepdim=True)
                direction = direction - direction.mean(-1, keepdim=True)  # the centring of a write, moved over
            else:
                square = wide.pow(2).mean(-1, keepdim=True)
            direction = direction * torch.rsqrt(square + norm.eps)
        return cls(direction=direction, norm_bias=norm_bias, unembed_bias=unembed_bias)

    def read(self, writes: Float[Tensor, "*many n d_model"]) -> Float[Tensor, "*many n"]:
        """What writes at the answer position add to the logit difference, in logits."""
        return (writes.to(self.direction.dtype) * self.direction).sum(-1)


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """Terms of the logit difference, per prompt, in logits.

    Attributes:
        heads: `[n_layers, n_heads, n]`.
        mlps: `[n_layers, n]`, no layers in a model without MLPs.
        attention_bias: what each layer's output bias contributes `[n_layers, n]`, or None.
        embedding: token embedding and learned positions `[n]`.
        norm_bias: `[n]`, or None.
        unembed_bias: `[n]`, or None.
        logit_diff: the metric, from the model's own logits `[n]`.
    """

    heads: Float[Tensor, "layers heads n"]
    mlps: Float[Tensor, "layers n"]
    attention_bias: Float[Tensor, "layers n"] | None
    embedding: Float[Tensor, "n"]
    norm_bias: Float[Tensor, "n"] | None
    unembed_bias: Float[Tensor, "n"] | None
    logit_diff: Float[Tensor, "n"]

    @property
    def sum(self) -> Float[Tensor, "n"]:
        """Sum of all terms, which is the logit difference up to rounding."""
        total = self.heads.sum((0, 1)) + self.mlps.sum(0) + self.embedding
        if self.attention_bias is not None:
            total = total + self.attention_bias.sum(0)
        for bias in (self.norm_bias, self.unembed_bias):
            total = total if bias is None else total + bias
        return total


@torch.no_grad()
def attribute(
    model: Model, pairs: PromptPairs, *, run: Literal["clean", "corrupted"] = "clean", progress: Progress | None = None
) -> Attribution:
    """Direct logit attribution of every term, per prompt; arguments and errors as for `direct_effects`."""
    weights = model.fast_weights
    if run not in {"clean", "corrupted"}:
        raise PromptError(f"run={run!r} is neither 'clean' nor 'corrupted'")
    pairs.check_vocabulary(weights.spec.d_vocab)
    pairs = pairs.to(weights.device)
    spec, dtype, n = weights.spec, at_least_float32(weights.dtype), len(pairs)
    tokens = base_tokens(pairs, "noising" if run == "clean" else "denoising")
    zeros = torch.zeros(n, dtype=dtype, device=weights.device)
    heads = zeros.new_zeros(spec.n_layers, spec.n_heads, n)
    mlps = zeros.new_zeros(spec.n_layers if spec.d_mlp else 0, n)
    biased = any(layer.b_O is not None for layer in weights.layers)
    biases = zeros.new_zeros(spec.n_layers, n)
    embedding, norm_bias, unembed_bias, own = (torch.zeros_like(zeros) for _ in range(4))
    done = 0
    for rows in batches(pairs.lengths):
        part = pairs.subset(rows)
        # of a causal model nothing behind the answer matters; else the batch keeps the width that the prompts have
        stop = int(part.answer_positions.max()) + 1 if spec.causal else tokens.shape[1]
        kept: dict[tuple[str, int], Tensor] = {}

        sites = ("resid_pre", "z", "mlp_out", "resid_post") if spec.d_mlp else ("resid_pre", "z", "resid_post")
        logits = model.forward(
            tokens[rows, :stop],
            observe={site: _AtAnswer(kept, site, part.answer_positions) for site in sites},
            unembed_positions=part.answer_positions,
        )
        frozen = FrozenNorm.of(weights, part, kept["resid_post", spec.n_layers - 1])
        own[rows] = logit_diff(logits, part).to(dtype)
        embedding[rows] = frozen.read(kept["resid_pre", 0])
        norm_bias[rows], unembed_bias[rows] = frozen.norm_bias, frozen.unembed_bias
        for index, layer in enumerate(weights.layers):
            # [n, d_model] through W_O once: how each head's z counts
            through = torch.einsum("hdm,nm->nhd", layer.W_O.to(dtype), frozen.direction)
            heads[index, :, rows] = (kept["z", index].to(dtype) * through).sum(-1).T
            if layer.b_O is not None:
                biases[index, rows] = frozen.direction @ layer.b_O.to(dtype)
            if layer.mlp is not None:
                mlps[index, rows] = frozen.read(kept["mlp_out", index])
        done += len(rows)
        if progress is not None:
            progress(f"direct logit attribution: {done} of {n} prompts")
    return Attribution(
        heads=heads,
        mlps=mlps,
        attention_bias=biases if biased else None,
        embedding=embedding,
        norm_bias=norm_bias if weights.ln_final.bias is not None else None,
        unembed_bias=unembed_bias if weights.unembed.bias is not None else None,
        logit_diff=own,
    )


@dataclass(frozen=True)
class _AtAnswer:
    """Keeps the answer position of what it observes, by site and layer."""

    kept: dict[tuple[str, int], Tensor]
    site: str
    answer: Tensor

    def __call__(self, layer: int, value: Tensor) -> None:
        self.kept[self.site, layer] = value[torch.arange(len(value), device=value.device), self.answer]


def direct_effects(
    model: Model,
    pairs: PromptPairs,
    *,
    run: Literal["clean", "corrupted"] = "clean",
    progress: Progress | None = None,
) -> HeadTable:
    """Direct logit attribution: the logit difference as a sum over everything that writes into the stream.

    A term is `(W_U[right] - W_U[wrong]) . g (w - mean(w)) / s` for a write `w` at the answer position, with the gain
    `g` and the scale `s` that the final norm has in this run (an RMSNorm does not centre). Sets of right and wrong
    answers enter with the mean of their unembeddings; `workbench.metrics.logit_diff` is the difference of mean logits,
    which is linear in the logits, so the terms add up to it exactly.

    Args:
        model: a model on the fast path.
        pairs: prompts with their answers.
        run: which version of the prompts.
        progress: called with a line a batch.

    Returns:
        A table in logits, with mean, standard error and 95 % interval over prompts. Metrics: of heads
        `direct_logit_attribution`; of MLPs `mlp_direct_logit_attribution`; where there is one, of each layer's output
        bias `attention_bias_direct_logit_attribution`; of the whole model `embedding_`, `norm_bias_`,
        `unembed_bias_direct_logit_attribution`, their sum `sum_of_terms`, and `logit_diff` from the model's logits.
        The provenance has `largest_remainder`, the largest difference of the two over the prompts.

    Raises:
        UnsupportedModelError: if the model is not on the fast path; says why.
        PromptError: if the prompts do not fit the model.

    Source: Elhage et al. 2021; nostalgebraist 2020 for reading the stream early; Wang et al. 2022 for heads on IOI.
    """
    found = attribute(model, pairs, run=run, progress=progress)
    what = "direct_logit_attribution"
    rows = rows_of(found.heads, what)
    rows += rows_of(found.mlps, f"mlp_{what}")
    if found.attention_bias is not None:
        rows += rows_of(found.attention_bias, f"attention_bias_{what}")
    whole = {f"embedding_{what}": found.embedding}
    for name, bias in (("norm_bias", found.norm_bias), ("unembed_bias", found.unembed_bias)):
        if bias is not None:
            whole[f"{name}_{what}"] = bias
    whole |= {"sum_of_terms": found.sum, "logit_diff": found.logit_diff}
    for metric, values in whole.items():
        rows += rows_of(values, metric)
    record = provenance(
        model,
        data_hash=pairs.data_hash,
        seed=pairs.seed,
        task=pairs.task,
        corruption=pairs.corruption,
        run=run,
        n=len(pairs),
        largest_remainder=float((found.sum - found.logit_diff).abs().max()),
    )
    return HeadTable.from_rows(
        rows,
        record,
        analysis="direct_effects",
        unit="logits",
        input=", ".join(filter(None, (pairs.task, f"{run} prompts"))),
        method="direct logit attribution, frozen norm",
    )


def rows_of(values: Float[Tensor, "*shape n"], metric: str, **constant: Any) -> list[dict[str, Any]]:
    """Rows of a table from per-prompt values `[n]` (whole model), `[layers, n]` or `[layers, heads, n]`."""
    from workbench.stats import mean_estimates

    estimates = mean_estimates(values.movedim(-1, 0).cpu())
    rows = []
    for place in np.ndindex(*values.shape[:-1]):
        each = estimates[place]
        at = dict(zip(("layer", "head"), place, strict=False))
        numbers = {name: getattr(each, name) for name in ("value", "stderr", "ci_low", "ci_high", "n")}
        rows.append({"metric": metric, **at, **numbers, **constant})
    return rows
