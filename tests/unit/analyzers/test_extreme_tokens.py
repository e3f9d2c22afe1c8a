"""Extreme tokens against plain numpy on what the transformers module itself computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import workbench
from families import REFUSED, tiny_module
from oracle.hook_oracle import anatomy
from workbench.analyzers._extremes import is_massive, largest, typical, written_norms
from workbench.analyzers._interventions import Change, losses
from workbench.analyzers._tokens import random_ids
from workbench.analyzers.extreme_tokens import activations, run
from workbench.errors import BudgetError, PromptError

SMALL = {"length": 12, "n": 5, "n_loss": 4, "absolute": 1.0, "ratio": 4.0}
BUDGET = 1 << 28


def block_outputs(module, tokens):
    """What every block of the module writes out, in float64 numpy `[layer, n, pos, d_model]`."""
    seen = []
    handles = [
        layer.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)  # type: ignore[misc]
        )
        for layer in blocks(module)
    ]
    with torch.no_grad():
        module(tokens)
    for handle in handles:
        handle.remove()
    return np.stack([x.double().numpy() for x in seen])


def blocks(module):
    return module.transformer.h if hasattr(module, "transformer") else module.model.layers


def value(table, metric, **where):
    return table.select(metric, **where)["value"].to_numpy(float)


def planted(size=5000.0, token=3, dim=7):
    """A model in which one token carries one large activation through all layers, and nothing else does."""
    module = tiny_module("llama", dtype=torch.float64)
    with torch.no_grad():
        module.model.embed_tokens.weight[token, dim] = size
        for layer in module.model.layers:
            layer.input_layernorm.weight[dim] = 0
            layer.post_attention_layernorm.weight[dim] = 0
    return workbench.wrap_model(module)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_sizes_medians_and_norms_are_those_of_the_modules_streams(family):
    module = tiny_module(family, dtype=torch.float64)
    table = run(workbench.wrap_model(module), **SMALL, budget=1 << 18).validate()
    tokens = random_ids(workbench.wrap_model(module), 9, 12, seed=0, stream="extreme_tokens")[:5]
    streams = block_outputs(module, tokens)
    size = np.abs(streams).reshape(3, 5, -1)
    for place in (1, 2, 3):
        expected = np.sort(size, axis=2)[..., -place].mean(1)
        np.testing.assert_allclose(value(table, f"largest_{place}"), expected, rtol=1e-9)
    median = np.sort(size, axis=2)[..., (size.shape[2] - 1) // 2]
    np.testing.assert_allclose(value(table, "median_abs"), median.mean(1), rtol=1e-9)
    massive = (size > 1) & (size >= 4 * median[..., None])
    np.testing.assert_allclose(value(table, "massive_share"), massive.any(2).mean(1))
    norms = np.linalg.norm(streams, axis=-1)
    np.testing.assert_allclose(value(table, "resid_norm_first"), norms[..., 0].mean(1), rtol=1e-9)
    np.testing.assert_allclose(value(table, "resid_norm_rest"), norms[..., 1:].mean((1, 2)), rtol=1e-9)
    np.testing.assert_allclose(value(table, "resid_peak"), (norms[..., 0] - norms[..., 1:].mean(2)).mean(1), rtol=1e-8)


@pytest.mark.parametrize("family", ["gpt2", "llama", "llama_mqa"])
def test_value_norms_are_those_of_one_tokens_value_through_the_output_map(family):
    module = tiny_module(family, dtype=torch.float64)
    model = workbench.wrap_model(module)
    values = {}
    tokens = random_ids(model, 3, 10, seed=0, stream="x")
    model.forward(tokens, observe={"v": values.__setitem__})
    for layer, v in values.items():
        ours = written_norms(v, model.fast_weights.layers[layer].W_O)
        for head in range(4):
            z = torch.zeros(3, 10, 4, 8, dtype=torch.float64)
            z[:, :, head] = v[:, :, head * v.shape[2] // 4]
            o = anatomy(module).blocks[layer].out
            with torch.no_grad():
                wrote = o(z.flatten(-2)) - o(torch.zeros_like(z.flatten(-2)))
            torch.testing.assert_close(ours[:, :, head], wrote.norm(dim=-1))
    table = run(model, **SMALL)
    ratio = table.matrix("value_ratio")
    assert ratio.shape == (3, 4)
    assert np.isfinite(ratio).all()


def test_a_planted_activation_is_found_with_its_place_size_and_spread():
    model = planted()
    tokens = random_ids(model, 20, 12, seed=0, stream="extreme_tokens")
    has = (tokens[:12] == 3).any(1)
    assert 0 < has.sum() < 6, "some documents have the token, most do not"
    table = run(model, length=12, n=12, n_loss=8)
    assert table.provenance["first_layer"] is None, "most documents have none"
    assert "loss" not in set(table.frame["metric"])
    found = activations(table)
    assert set(found["dim"]) == {7}
    assert set(found["layer"]) == {0, 1, 2}
    assert found["n_samples"].groupby(found["layer"]).max().le(int(has.sum())).all()
    np.testing.assert_allclose(found["mean"], 5000, rtol=0.01)
    assert all(tokens == ["3"] for tokens in found["tokens"])
    np.testing.assert_allclose(value(table, "massive_share"), has.double().mean())


def test_zeroing_and_the_mean_do_what_hooks_on_the_module_do():
    module = tiny_module("gpt2", dtype=torch.float64)
    model = workbench.wrap_model(module)
    table = run(model, **SMALL)
    first = table.provenance["first_layer"]
    assert first is not None
    looked_at, measured = random_ids(model, 9, 12, seed=0, stream="extreme_tokens").split([5, 4])
    streams = block_outputs(module, looked_at)[first]

    def mask_of(x):
        median = np.sort(np.abs(x).reshape(len(x), -1), axis=1)[:, (x[0].size - 1) // 2]
        return (np.abs(x) > 1) & (np.abs(x) >= 4 * median[:, None, None])

    known = mask_of(streams)
    means = np.full((2, 32), np.nan)
    for later, part in ((0, slice(0, 1)), (1, slice(1, None))):
        for dim in np.flatnonzero(known[:, part].any((0, 1))):
            means[later, dim] = streams[:, part, dim][known[:, part, dim]].mean()
    dims = ~np.isnan(means).all(0)
    means = np.where(np.isnan(means), means[::-1], means)

    def loss_with(change):
        def hook(_, __, out):
            x = (out[0] if isinstance(out, tuple) else out).clone()
            mask = torch.tensor(mask_of(x.numpy()) & dims)
            changed = change(x, mask)
            return (changed, *out[1:]) if isinstance(out, tuple) else changed

        handle = blocks(module)[first].register_forward_hook(hook)
        with torch.no_grad():
            logits = module(measured).logits
        handle.remove()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), measured[:, 1:].flatten()).item()

    table_of_means = torch.tensor(means[[0] + [1] * 11]).expand(4, 12, 32)
    expected = {
        "loss": loss_with(lambda x, mask: x),
        "loss_set_zero": loss_with(lambda x, mask: torch.where(mask, 0.0, x)),
        "loss_set_mean": loss_with(lambda x, mask: torch.where(mask, table_of_means, x)),
    }
    for metric, loss in expected.items():
        np.testing.assert_allclose(value(table, metric), loss, rtol=1e-10)
    np.testing.assert_allclose(
        value(table, "delta_loss_set_zero"), expected["loss_set_zero"] - expected["loss"], rtol=1e-8
    )
    assert value(table, "loss_control") != pytest.approx(expected["loss"])


def test_the_mean_of_a_constant_activation_changes_nothing():
    module = tiny_module("llama", dtype=torch.float64)
    with torch.no_grad():
        module.model.embed_tokens.weight[:, 7] = 5000.0
        for layer in module.model.layers:
            layer.self_attn.o_proj.weight[7] = 0
            layer.mlp.down_proj.weight[7] = 0
    table = run(workbench.wrap_model(module), length=12, n=4, n_loss=4)
    assert table.provenance["first_layer"] == 0
    assert abs(value(table, "delta_loss_set_mean")) < 1e-9
    assert abs(value(table, "delta_loss_set_zero")) > 0.1


def test_attention_is_that_of_later_layers_and_a_change_at_the_last_has_none():
    model = workbench.wrap_model(tiny_module("llama", dtype=torch.float64))
    tokens = random_ids(model, 3, 9, seed=1, stream="x")
    patterns = {}
    model.forward(tokens, observe={"pattern": patterns.__setitem__})
    found = losses(model, tokens, {"none": Change(layer=0)}, from_layer=1, budget=BUDGET)
    expected = torch.stack([patterns[1], patterns[2]])[..., 0].mean((0, 2, 3))
    torch.testing.assert_close(found["first_token_attention"]["none"], expected)
    assert set(losses(model, tokens, {"none": Change(layer=2)}, from_layer=3, budget=BUDGET)) == {"loss"}


def test_batches_and_the_hook_path_give_the_same_numbers():
    model = workbench.wrap_model(tiny_module("gpt2"))
    whole, small = run(model, **SMALL), run(model, **SMALL, budget=1 << 17)
    np.testing.assert_allclose(whole.frame["value"], small.frame["value"], rtol=1e-4, atol=1e-6)
    other = workbench.wrap_model(REFUSED["reorder_and_upcast_attn"]())
    assert other.path == "hooks"
    hooks = run(other, **SMALL).validate()
    assert set(hooks.frame["path_taken"]) == {"hooks"}
    assert "value_norm_first" not in set(hooks.frame["metric"])
    for metric in ("largest_1", "resid_peak", "loss", "loss_set_zero", "loss_control"):
        np.testing.assert_allclose(value(hooks, metric), value(whole, metric), rtol=1e-4)


def test_documents_for_the_loss_are_others_than_those_looked_at(text_model):
    texts = ["abcdefghijkl", "mnopqrstuvwx", "yzabcdefghij", "0123456789ab"]
    table = run(text_model(), texts, length=12, absolute=1, ratio=4)
    assert set(table.frame["input"]) == {"natural"}
    assert (table.provenance["n"], table.provenance["n_loss"]) == (2, 2)
    assert set(table.select("largest_1")["n"]) == {2}
    swapped = run(text_model(), texts[:2] + texts[3:1:-1], length=12, absolute=1, ratio=4)
    np.testing.assert_allclose(value(swapped, "largest_1"), value(table, "largest_1"))


def test_thresholds_are_both_needed():
    x = torch.full((1, 4, 4), 0.01)
    x[0, 1, 2] = -150.0
    assert is_massive(x, typical(x)).nonzero().tolist() == [[0, 1, 2]]
    assert not is_massive(x * 0.5, typical(x * 0.5)).any(), "75 is not above 100"
    assert not is_massive(x, typical(x) * 20).any(), "150 is not 1000 times 0.2"
    assert largest(x, 2).tolist() == [[150.0, pytest.approx(0.01)]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 1}, "length is 1: expected 2 to 128"),
        ({"length": 129}, "length is 129"),
        ({"n": 0}, "n is 0"),
        ({"ratio": 0}, "expected positive thresholds"),
        ({"texts": "one text"}, "not one string"),
        ({"texts": ["one"]}, "give at least two"),
        (
            {"texts": ["a long enough text", "short"], "length": 10},
            r"texts\[1\] \('short' ...\) has 5 tokens of the 10",
        ),
        ({"n": 10_000}, "built-in documents have"),
    ],
)
def test_wrong_arguments_are_named(text_model, arguments, message):
    with pytest.raises(PromptError, match=message):
        run(text_model(), **{"length": 12, **arguments})


def test_a_document_beyond_the_budget_is_refused():
    with pytest.raises(BudgetError, match="budget is 100 bytes"):
        run(workbench.wrap_model(tiny_module("gpt2")), length=12, n=2, n_loss=2, budget=100)
