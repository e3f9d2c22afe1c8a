"""Edits of the forward pass, against hooks of TransformerLens that put the same values in place."""

import pytest
import torch

import workbench
from families import tiny_module, tiny_pairs
from workbench.errors import ModelError, PromptError
from workbench.models.bridge import forward_with_hooks
from workbench.models.forward import SITES


def shaken(site):
    """An editor that moves every value by a third of it, with another sign from place to place."""

    def edit(layer, value):
        signs = torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(layer)).sign()
        return value * (1 + signs.to(value) / 3)

    return {site: edit}


@pytest.mark.parametrize("site", [site for site in SITES if site != "resid_mid"])
@pytest.mark.parametrize("name", ["gpt2", "neox_parallel", "llama", "qwen3"])
def test_an_edit_does_what_a_hook_does(name, site):
    if name == "neox_parallel" and site in {"q", "k"}:
        pytest.skip("TransformerLens has no hook there")
    module = tiny_module(name)
    model = workbench.wrap_model(module)
    tokens = tiny_pairs(module)["clean"]
    plain, ours = model.forward(tokens), model.forward(tokens, edit=shaken(site))
    theirs = forward_with_hooks(model.bridge, tokens, {}, shaken(site))
    assert (ours - plain).abs().max() > 0.05, "the edit moves the logits"
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max() + 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_editing_the_middle_of_a_block_is_editing_what_attention_writes(name):
    module = tiny_module(name, dtype=torch.float64)
    model = workbench.wrap_model(module)
    tokens = tiny_pairs(module)["clean"]
    mids = {}
    edit = shaken("resid_mid")["resid_mid"]

    def middle(layer, value):
        mids[layer] = edit(layer, value) - value
        return value + mids[layer]

    ours = model.forward(tokens, edit={"resid_mid": middle})
    by_write = model.forward(tokens, edit={"attn_out": lambda layer, value: value + mids[layer]})
    assert (ours - model.forward(tokens)).abs().max() > 0.05
    assert (ours - by_write).abs().max() < 1e-10
    with pytest.raises(ModelError, match="cannot edit 'resid_mid'"):
        forward_with_hooks(model.bridge, tokens, {}, {"resid_mid": edit})


def test_an_edit_that_returns_the_value_changes_nothing_and_observers_see_edits():
    module = tiny_module("llama", dtype=torch.float64)
    model = workbench.wrap_model(module)
    tokens = tiny_pairs(module)["clean"]
    same = model.forward(tokens, edit={site: lambda layer, value: value for site in SITES})
    assert (same - model.forward(tokens)).abs().max() < 1e-12
    seen = {}
    model.forward(
        tokens,
        edit={"z": lambda layer, value: torch.full_like(value, layer + 2.0)},
        observe={"z": seen.__setitem__},
    )
    assert [float(value.unique()) for value in seen.values()] == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("returned", [None, torch.zeros(1), "short", "double"])
def test_an_editor_that_returns_something_else_is_named(returned):
    model = workbench.wrap_model(tiny_module("gpt2"))
    makes = {"short": lambda value: value[:, :-1], "double": lambda value: value.double()}
    edit = {"z": lambda layer, value: makes[returned](value) if isinstance(returned, str) else returned}
    with pytest.raises(PromptError, match=r"editor of 'z' returned .* at layer 0; expected \(1, 3, 4, 8\)"):
        model.forward(torch.tensor([[1, 2, 3]]), edit=edit)
    with pytest.raises(PromptError, match="edit has unknown sites"):
        model.forward(torch.tensor([[1, 2, 3]]), edit={"hook_z": lambda layer, value: value})
