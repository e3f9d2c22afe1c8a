"""The measurements behind head roles, against hooks on the transformers modules."""

import pytest
import torch

import workbench as wb
from families import FAMILIES, tiny_module, tiny_pairs
from oracle.hook_oracle import HookOracle, anatomy, hooked
from workbench.prompts import PromptPairs
from workbench_circuits._role_scores import at_end, copying, mover_attention_changes

HEADS = [(layer, head) for layer in range(3) for head in range(4)]


def made(name, seed=0):
    """A module with eager attention, its pairs, the same as a model and as prompt pairs."""
    module = tiny_module(name, seed=seed)
    prompts = tiny_pairs(module, 4, seed=seed)
    model = wb.wrap_model(tiny_module(name, seed=seed))
    assert model.path == "fast"
    pairs = PromptPairs.from_tokens(
        prompts["clean"],
        prompts["corrupted"],
        prompts["answers"],
        prompts["wrong_answers"],
        prompts["lengths"],
        prompts["answer_positions"],
    )
    module.set_attn_implementation("eager")
    return module, prompts, model, pairs


def pattern(module, tokens, ends, *hooks):
    """Attention from the answer position, `[layer][n, heads, pos]`."""
    with torch.no_grad(), hooked(*hooks):
        found = module(tokens, output_attentions=True).attentions
    return [layer[torch.arange(len(tokens)), :, ends] for layer in found]


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_from_the_answer_position(name):
    module, prompts, model, pairs = made(name)
    for version in ("clean", "corrupted"):
        found = at_end(model, prompts[version], pairs)
        expected = pattern(module, prompts[version], pairs.answer_positions)
        for layer in range(3):
            torch.testing.assert_close(found.attention[layer], expected[layer], atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_mover_attention_changes_are_those_of_patched_queries(name):
    module, prompts, model, pairs = made(name, seed=2)
    generator = torch.Generator().manual_seed(5)
    upto = torch.arange(pairs.clean.shape[1]) <= pairs.answer_positions[:, None]
    marks = torch.rand(pairs.clean.shape, generator=generator)
    right, wrong = (marks < 0.3) & upto, (marks > 0.8) & upto
    movers, senders = [(2, 1), (1, 0)], [(0, 0), (0, 3), (1, 2), (2, 0)]
    clean, corrupted = (at_end(model, prompts[version], pairs) for version in ("clean", "corrupted"))
    found = mover_attention_changes(model, pairs, clean, corrupted, movers, senders, right, wrong)

    oracle = HookOracle(module, prompts)

    def focus(attention, layer, head):
        return (attention[layer][:, head] * (right.float() - wrong.float())).sum(-1)

    plain = pattern(module, pairs.clean, pairs.answer_positions)
    largest = 0.0
    for row, (layer, head) in enumerate(senders):
        behind = [mover for mover in movers if mover[0] > layer]
        if not behind:
            assert found[row].isnan().all()
            continue
        changes = []
        for mover in behind:
            hooks = oracle.patch(f"a{layer}.h{head}", f"a{mover[0]}.h{mover[1]}<q>")
            patched = pattern(module, pairs.clean, pairs.answer_positions, *hooks)
            changes.append(focus(patched, *mover) - focus(plain, *mover))
        expected = torch.stack(changes).mean(0)
        largest = max(largest, float(expected.abs().max()))
        torch.testing.assert_close(found[row], expected, atol=3e-6, rtol=1e-4)
    assert largest > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_copying_is_that_of_the_modules_own_maps(name):
    module, _, model, _ = made(name, seed=1)
    parts = anatomy(module)
    group = parts.n_heads // parts.n_kv_heads
    streams = torch.randn(9, 32, generator=torch.Generator().manual_seed(3))
    tokens = torch.arange(9) * 10
    copies, negative = copying(model.fast_weights, HEADS, streams, tokens, top=30)
    seen = [0, 0]
    for row, (layer, head) in enumerate(HEADS):
        block = parts.blocks[layer]
        with torch.no_grad():
            values = block.projection["v"](block.attn_norm(streams))[:, block.columns("v", head // group)]
            alone = torch.zeros(9, parts.n_heads * parts.d_head)
            alone[:, head * parts.d_head : (head + 1) * parts.d_head] = values
            write = block.out(alone) - block.out(torch.zeros_like(alone))
            for found, sign in ((copies, 1), (negative, -1)):
                best = parts.unembed(parts.final_norm(sign * write)).topk(30).indices
                expected = (best == tokens[:, None]).any(1)
                assert found[row].tolist() == expected.tolist(), (layer, head, sign)
                seen[sign < 0] += int(expected.sum())
    assert min(seen) > 5
