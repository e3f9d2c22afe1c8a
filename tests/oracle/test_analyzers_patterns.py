"""Scores against naive loops over the attention that transformers itself returns (eager, `output_attentions`)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import workbench
from families import FAMILIES, REFUSED, tiny_module
from workbench.analyzers import attention_sinks, head_patterns
from workbench.analyzers._tokens import random_ids
from workbench.models import Model


def module_of(name: str) -> nn.Module:
    return tiny_module(name, seed=1) if name in FAMILIES else REFUSED[name](seed=1)


def attentions(module: nn.Module, tokens: Tensor) -> list[list[list[list[list[float]]]]]:
    """`[layer][sample][head][query][key]` as plain numbers."""
    module.set_attn_implementation("eager")
    with torch.no_grad():
        found = module(tokens, output_attentions=True).attentions
    assert len(found) == 3
    return [layer.double().tolist() for layer in found]


@pytest.mark.parametrize("name", [*FAMILIES, *REFUSED])
def test_scores_are_those_of_transformers_own_attention(name: str) -> None:
    model = workbench.wrap_model(module_of(name))
    assert model.path == ("fast" if name in FAMILIES else "hooks")
    reference = module_of(name)
    check_diagonals(model, reference)
    check_sinks(model, reference)


def check_diagonals(model: Model, reference: nn.Module) -> None:
    n, period = 3, 11
    table = head_patterns.run(model, n=n, period=period, seed=4)
    tokens = random_ids(model, n, period, seed=4, stream="head_patterns").repeat(1, 2)
    found = attentions(reference, tokens)
    total = 2 * period
    for layer in range(3):
        for head in range(4):
            sums = dict.fromkeys(head_patterns.METRICS, 0.0)
            for sample in range(n):
                rows = found[layer][sample][head]
                previous = [rows[q][q - 1] for q in range(total) if q >= 1]
                duplicate = [rows[q][q - period] for q in range(total) if q >= period]
                induction = [rows[q][q - period + 1] for q in range(total) if q >= period - 1]
                for metric, values in zip(sums, (previous, duplicate, induction), strict=True):
                    sums[metric] += sum(values) / len(values) / n
            for metric, value in sums.items():
                assert table.matrix(metric)[layer, head] == pytest.approx(value, abs=2e-6), (layer, head, metric)


def check_sinks(model: Model, reference: nn.Module) -> None:
    n, length, positions = 4, 24, (0, 3, 23)
    kinds = {
        "random": random_ids(model, n, length, seed=4, stream="random"),
        "repeated": random_ids(model, n, 1, seed=4, stream="repeated").repeat(1, length),
    }
    table = attention_sinks.run(model, inputs=tuple(kinds), length=length, positions=positions, n=n, eps=0.2, seed=4)
    frame = table.frame.set_index(["input", "position", "metric", "layer", "head"])["value"]
    whole = table.frame[table.frame["layer"].isna()].set_index(["input", "position"])["value"]
    for kind, tokens in kinds.items():
        found = attentions(reference, tokens)
        for key in positions:
            sinks = 0
            for layer in range(3):
                for head in range(4):
                    alphas = []
                    for sample in range(n):
                        rows = found[layer][sample][head]
                        alphas.append(sum(rows[query][key] for query in range(key, length)) / (length - key))
                    hits = sum(alpha > 0.2 for alpha in alphas)
                    sinks += hits
                    assert min(abs(alpha - 0.2) for alpha in alphas) > 1e-5  # no sample is too close to call
                    assert frame[kind, key, "alpha", layer, head] == pytest.approx(sum(alphas) / n, abs=2e-6)
                    assert frame[kind, key, "sink_rate", layer, head] == pytest.approx(hits / n)
            assert whole[kind, key] == pytest.approx(sinks / (n * 12))
