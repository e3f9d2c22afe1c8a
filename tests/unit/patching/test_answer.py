import pytest
import torch

import workbench as wb
from families import FAMILIES, tiny_module, tiny_pairs
from workbench.models.weights import rotate
from workbench.patching.answer import attend_at_answer
from workbench.patching.runs import make_runs
from workbench.patching.window import attend_window


def prompt_pairs(module, rows):
    raw = tiny_pairs(module, n=3)
    names = ("clean", "corrupted", "answers", "wrong_answers", "lengths", "answer_positions")
    return wb.PromptPairs.from_tokens(*(raw[name][rows] for name in names))


@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2], [2]], ids=["whole", "prefix", "short"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answer_attends_like_any_other_position(family, rows):
    """Against forming every query, key and value and attending from all positions."""
    module = tiny_module(family, dtype=torch.float64)
    model = wb.wrap_model(module)
    runs = make_runs(model.fast_weights, prompt_pairs(module, rows), direction="noising", metric="logit_diff")
    window, index = runs.window, model.spec.n_layers - 1
    layer = model.fast_weights.layers[index]
    generator = torch.Generator().manual_seed(0)
    shape = (5, *runs.resid_pre[index].shape)
    normed = layer.ln1(torch.randn(shape, generator=generator, dtype=torch.float64) * 2)
    q, k, v = layer.qkv(normed)
    if layer.q_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if model.fast_weights.rotary is not None:
        table = window.rotary(model.fast_weights.rotary, q.dtype)
        q, k = rotate(q, table), rotate(k, table)
    before = (runs.keys[index][:, : window.prefix], runs.values[index][:, : window.prefix])
    everywhere = attend_window(model.spec, window, q, k, v, *before)
    expected = window.at_answer(everywhere.flatten(-2)).squeeze(-2).unflatten(-1, everywhere.shape[-2:])
    assert expected.std() > 0.1
    torch.testing.assert_close(attend_at_answer(runs, index, normed), expected, rtol=0, atol=1e-12)
