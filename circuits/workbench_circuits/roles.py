"""What each head does: scores, where it looks from END, what it does to the answer, and a label by stated rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from workbench.errors import OutputError, PromptError
from workbench.plots.labels import head_name
from workbench_circuits._role_rules import Thresholds, label_heads
from workbench_circuits._role_scores import AtEnd, Head, at_end, at_spans, copying, holding, mover_attention_changes
from workbench_circuits._role_table import Scores

if TYPE_CHECKING:
    import pandas as pd

    from workbench.models import Model
    from workbench.models.weights import ModelWeights
    from workbench.prompts import PromptPairs
    from workbench.tables import HeadTable
    from workbench_circuits._competence import Competence

__all__ = ["HeadRoles", "Thresholds", "head_roles"]

Progress = Callable[[str], None]
END = "END"


@dataclass(frozen=True, eq=False, kw_only=True)
class HeadRoles:
    """Roles of heads on one task.

    Attributes:
        frame: one row a head: `node`, `layer`, `head`, its scores, `label` (empty if no rule holds) and `rule`, what
            the rules found, in words.
        table: the same numbers in the tidy schema, with standard errors and 95 % intervals.
        thresholds: those of the rules.
        movers: heads whose attention `mover_attention_change` is measured on.
        competence: whether the model can do the task on these prompts.
    """

    frame: pd.DataFrame
    table: HeadTable
    thresholds: Thresholds
    movers: tuple[str, ...]
    competence: Competence

    @property
    def labels(self) -> dict[str, str]:
        """The label of every head that has one, by node, as `circuit_figure(roles=)` takes them."""
        return {str(row["node"]): str(row["label"]) for row in self.frame.to_dict("records") if row["label"]}

    def __repr__(self) -> str:
        mark = f"; {self.competence.mark}" if self.competence.mark else ""
        return f"HeadRoles({len(self.frame)} heads, {len(self.labels)} with a label, {self.competence.n} prompts{mark})"

    def _repr_html_(self) -> str:
        return str(self.frame._repr_html_())  # type: ignore[operator]

    def save(self, folder: str | Path) -> Path:
        """Write the tidy table (as `HeadTable.save`) and `roles.csv`, one row a head.

        Raises:
            OutputError: if the folder cannot be written.
        """
        path = self.table.save(folder)
        try:
            self.frame.to_csv(path / "roles.csv", index=False)
        except OSError as error:
            raise OutputError(f"{path / 'roles.csv'} cannot be written: {error}") from error
        return path


def head_roles(
    model: Model,
    pairs: PromptPairs,
    heads: Sequence[str | Head] | None = None,
    *,
    movers: Sequence[str | Head] | None = None,
    answer_spans: Sequence[str] | None = None,
    wrong_spans: Sequence[str] | None = None,
    thresholds: Thresholds | None = None,
    n_random: int = 12,
    period: int = 100,
    n_copying: int = 48,
    seed: int = 0,
    progress: Progress | None = None,
) -> HeadRoles:
    """What heads do on a task, measured, and named by rules.

    Scores of each head:

    - `previous_token`, `duplicate_token`, `induction`: mean attention on repeated random tokens (see
      `workbench.analyzers.head_patterns`).
    - `copying`: share of words of the prompts (the tokens at their spans) that the head's OV circuit brings back among
      the 5 highest logits, from the stream behind the first block (Wang et al. 2022: the first MLP is part of the
      embedding there); `negative_copying`: likewise with the sign of its write turned;
      `copying_without_first_block`: from the embedding itself.
    - `attention_to_<span>`: mean attention from the answer position to each named span; `attention_to_answer`,
      `attention_to_wrong_answer`: to the positions that hold a right or a wrong answer, summed.
    - `direct_effect`: what the head adds to the logit difference through the unembedding alone, with the scale of the
      final norm held (see `workbench.patching.direct_effects`), in logits.
    - `mover_attention_change`: change of the movers' attention, `attention_to_answer` minus
      `attention_to_wrong_answer`, when this head's write is that of the corrupted prompt in what the movers' queries
      read and nowhere else (a direct path; the other heads and MLPs are left alone), mean over the movers behind it.

    The rules are those of `Thresholds`.

    Args:
        model: a model on the fast path.
        pairs: prompts of a task; their spans are what heads may look at.
        heads: names (`a3.h1`) or (layer, head); default: all.
        movers: heads whose attention `mover_attention_change` is measured on; default: those that the rules call
            movers, the strongest first, at most `Thresholds.most_movers`.
        answer_spans: spans that hold the right answer; default: every position whose token is an answer.
        wrong_spans: likewise for the wrong answer.
        thresholds: of the rules.
        n_random: sequences of random tokens.
        period: their length, twice.
        n_copying: words that copying is counted on, drawn from the prompts.
        seed: of the random tokens and of that draw.
        progress: called with a line about each step.

    Raises:
        UnsupportedModelError: if the model is not on the fast path.
        PromptError: if a head, span or count is wrong, or the prompts do not fit the model.

    Source: Wang et al. 2022, Interpretability in the Wild, section 3; rules and thresholds are this project's own.
    """
    from workbench.analyzers import head_patterns
    from workbench.patching.direct_effects import attribute
    from workbench_circuits._competence import competence

    weights = model.fast_weights
    spec = weights.spec
    rules = thresholds or Thresholds()
    chosen = _chosen("heads", heads, spec.n_layers, spec.n_heads)
    for name, value in (("n_random", n_random), ("n_copying", n_copying)):
        if value < 1:
            raise PromptError(f"{name} is {value}: give at least 1")
    for name, spans in (("answer_spans", answer_spans), ("wrong_spans", wrong_spans)):
        if unknown := [span for span in spans or () if span not in pairs.spans]:
            known = ", ".join(pairs.spans) or "none"
            raise PromptError(f"{name} has {unknown[0]!r}; the prompts have the spans {known}: name some of those")
    say = progress or (lambda line: None)
    pairs = pairs.to(weights.device)
    able = competence(model, pairs)
    say("attention on repeated random tokens ...")
    patterns = head_patterns.run(model, n=n_random, period=period, seed=seed)
    say("direct effects ...")
    direct = attribute(model, pairs).heads
    say("attention from the answer position ...")
    clean, corrupted = at_end(model, pairs.clean, pairs), at_end(model, pairs.corrupted, pairs)
    right = holding(pairs, pairs.answers) if answer_spans is None else at_spans(pairs, answer_spans)
    wrong = holding(pairs, pairs.wrong_answers) if wrong_spans is None else at_spans(pairs, wrong_spans)
    samples: dict[str, Tensor] = {"direct_effect": direct.permute(2, 0, 1)}
    for span, at in pairs.spans.items():
        if span != END and (there := (at >= 0).nonzero().flatten()).numel():
            picked = clean.attention[:, there, :, at[there]]  # indices on both sides of a slice: prompts come first
            samples[f"attention_to_{span}"] = picked
    for name, mask in (("attention_to_answer", right), ("attention_to_wrong_answer", wrong)):
        if (there := mask.any(1).nonzero().flatten()).numel():
            mass = torch.einsum("lnhp,np->nlh", clean.attention[:, there], mask[there].to(clean.attention.dtype))
            samples[name] = mass
    found = Scores(model=model, chosen=chosen)
    found.add_table(patterns)
    for name, sample in samples.items():
        found.add_means(name, sample, unit="logits" if name == "direct_effect" else "probability")
    say("copying ...")
    words = _Words.of(pairs, clean, n_copying, seed)
    words.add(found)
    if movers is None:
        named = found.movers(rules, float(able.metric_clean.value), lambda heads: words.against(weights, heads))
    else:
        named = _chosen("movers", movers, spec.n_layers, spec.n_heads)
    usable = right.any(1) | wrong.any(1)
    if named and usable.any() and len(chosen):
        say(f"what turns the queries of {', '.join(head_name(*head) for head in named)} ...")
        changes = mover_attention_changes(model, pairs, clean, corrupted, named, chosen, right, wrong)[:, usable]
        found.add_changes(changes)
    frame = label_heads(found.frame(), rules, float(able.metric_clean.value))
    record: dict[str, Any] = {
        "thresholds": rules.as_dict(),
        "movers": [head_name(*head) for head in named],
        "mark": able.mark,
    }
    table = found.table(pairs, seed=seed, verdict=able.verdict, **record)
    return HeadRoles(
        frame=frame, table=table, thresholds=rules, movers=tuple(head_name(*head) for head in named), competence=able
    )


def _chosen(what: str, heads: Sequence[str | Head] | None, n_layers: int, n_heads: int) -> list[Head]:
    import re

    if heads is None:
        return [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    found: list[Head] = []
    for each in heads:
        match = re.fullmatch(r"a(\d+)\.h(\d+)", each) if isinstance(each, str) else None
        layer, head = (int(match[1]), int(match[2])) if match else each if not isinstance(each, str) else (-1, -1)
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise PromptError(
                f"{what} has {each!r}: expected names a0.h0 to a{n_layers - 1}.h{n_heads - 1}, or (layer, head)"
            )
        found.append((int(layer), int(head)))
    return list(dict.fromkeys(found))


@dataclass(frozen=True, kw_only=True)
class _Words:
    """Words of the prompts, on which copying is counted: streams in front of and behind the first block, and tokens."""

    first_in: Tensor
    first_out: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, pairs: PromptPairs, run: AtEnd, n: int, seed: int) -> _Words:
        """Words at the spans, or, of prompts without spans, all their tokens but the last; `n` of them, drawn."""
        named = at_spans(pairs, [span for span in pairs.spans if span != END])
        if not named.any():
            positions = torch.arange(pairs.clean.shape[1], device=named.device)
            named = positions < pairs.answer_positions[:, None]
        rows, places = named.nonzero(as_tuple=True)
        drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:n])
        keep = torch.as_tensor(drawn, device=rows.device)
        at = rows[keep], places[keep]
        return cls(first_in=run.first_in[at], first_out=run.first_out[at], tokens=pairs.clean[at])

    def against(self, weights: ModelWeights, heads: list[Head]) -> list[Head]:
        """The heads whose write's negative brings back more of the words than the write."""
        if not heads or not len(self.tokens):
            return []
        copies, negative = copying(weights, heads, self.first_out, self.tokens)
        return [head for head, more in zip(heads, (negative.sum(1) > copies.sum(1)).tolist(), strict=True) if more]

    def add(self, found: Scores) -> None:
        """Add the copying scores of the chosen heads."""
        if not len(self.tokens):
            return
        weights = found.model.fast_weights
        copies, negative = copying(weights, found.chosen, self.first_out, self.tokens)
        plain, _ = copying(weights, found.chosen, self.first_in, self.tokens)
        found.add_shares("copying", copies)
        found.add_shares("negative_copying", negative)
        found.add_shares("copying_without_first_block", plain)
