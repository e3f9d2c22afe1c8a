"""The oracle itself: identities that any mistake in its slices, norms or writes breaks, and TransformerLens."""

import pytest
import torch

from families import FAMILIES, tiny_module, tiny_pairs
from oracle.hook_oracle import HookOracle, all_edges, all_senders, anatomy, edge_effect, hooked, logit_diff

# float64 throughout, values of order one: anything beyond rounding is a mistake
CLOSE = {"rtol": 0.0, "atol": 1e-10}


@pytest.fixture(params=FAMILIES)
def oracle(request):
    module = tiny_module(request.param, dtype=torch.float64)
    return HookOracle(module, tiny_pairs(module))


def other_run(oracle):
    """The metric of the run that the patches come from."""
    with torch.no_grad():
        logits = oracle.module(oracle.pairs["corrupted"]).logits
    at = oracle.pairs["answer_positions"]
    return logit_diff(logits[torch.arange(len(logits)), at], oracle.pairs)


def receivers(oracle, layer=None):
    names = list(dict.fromkeys(receiver for _, receiver in all_edges(oracle.module)))
    return [n for n in names if layer is None or n.startswith((f"a{layer}.", f"m{layer}"))]


def readable(oracle, receiver):
    return [s for s, r in all_edges(oracle.module) if r == receiver]


def test_writes_and_output_biases_add_up_to_the_residual_stream(oracle):
    stream = []
    with hooked((oracle.parts.final_norm, "pre", lambda _module, args: stream.append(args[0]))), torch.no_grad():
        oracle.module(oracle.tokens)
    total = sum(oracle.base_writes.values())
    for block in oracle.parts.blocks:
        if block.out.bias is not None:
            total = total + block.out.bias
    torch.testing.assert_close(total, stream[0], **CLOSE)
    assert set(oracle.base_writes) == set(all_senders(oracle.module))


def test_all_senders_into_logits_give_the_other_run(oracle):
    effect = oracle.edge_effect(all_senders(oracle.module), "logits")
    expected = other_run(oracle) - oracle.base_value
    assert expected.abs().max() > 1e-1  # or the agreement would say nothing
    torch.testing.assert_close(effect, expected, **CLOSE)


def test_input_into_every_receiver_gives_the_other_run(oracle):
    hooks = [hook for receiver in receivers(oracle) for hook in oracle.patch("input", receiver)]
    torch.testing.assert_close(oracle.run(*hooks), other_run(oracle), **CLOSE)


def test_everything_into_one_head_changes_that_head_alone(oracle):
    parts = oracle.parts
    head, group = 2, 2 // (parts.n_heads // parts.n_kv_heads)
    kv = "h" if parts.n_kv_heads == parts.n_heads else "kv"
    before = all_senders(oracle.module, upto=1)
    hooks = [
        hook
        for receiver in (f"a1.h{head}<q>", f"a1.{kv}{group}<k>", f"a1.{kv}{group}<v>")
        for hook in oracle.patch(before, receiver)
    ]
    writes = oracle.writes(oracle.tokens, extra=hooks)
    torch.testing.assert_close(writes["a1.h2"], oracle.other_writes["a1.h2"], **CLOSE)
    assert (oracle.other_writes["a1.h2"] - oracle.base_writes["a1.h2"]).abs().max() > 1e-2
    size = parts.n_heads // parts.n_kv_heads
    for other in range(parts.n_heads):
        name = f"a1.h{other}"
        if other // size != group:
            torch.testing.assert_close(writes[name], oracle.base_writes[name], rtol=0, atol=0)
        elif other != head:  # shares the patched key and value, keeps its own query
            assert (writes[name] - oracle.base_writes[name]).abs().max() > 1e-3
            assert (writes[name] - oracle.other_writes[name]).abs().max() > 1e-3


def test_everything_into_one_mlp_gives_its_write_of_the_other_run(oracle):
    hooks = oracle.patch(readable(oracle, "m1"), "m1")
    writes = oracle.writes(oracle.tokens, extra=hooks)
    torch.testing.assert_close(writes["m1"], oracle.other_writes["m1"], **CLOSE)
    for head in range(oracle.parts.n_heads):
        torch.testing.assert_close(writes[f"a1.h{head}"], oracle.base_writes[f"a1.h{head}"], rtol=0, atol=0)
    missing = readable(oracle, "m1")[:-1]
    partly = oracle.writes(oracle.tokens, extra=oracle.patch(missing, "m1"))["m1"]
    assert (partly - oracle.other_writes["m1"]).abs().max() > 1e-3


def test_patching_the_same_run_changes_nothing(oracle):
    pairs = {**oracle.pairs, "corrupted": oracle.pairs["clean"]}
    same = HookOracle(oracle.module, pairs)
    for sender, receiver in all_edges(oracle.module)[::17]:
        assert same.edge_effect(sender, receiver).abs().max() < 1e-12


def test_effects_are_large_enough_to_tell_right_from_wrong(oracle):
    effects = torch.stack([oracle.edge_effect(*edge) for edge in all_edges(oracle.module)[::7]])
    assert effects.abs().amax(1).median() > 1e-3
    assert effects.abs().max() > 1e-1


def test_padding_and_other_prompts_do_not_matter():
    module = tiny_module("llama", dtype=torch.float64)
    pairs = tiny_pairs(module)
    oracle = HookOracle(module, pairs, base="corrupted")
    noise = {k: v.clone() for k, v in pairs.items()}
    padding = torch.arange(pairs["clean"].shape[1]) >= pairs["lengths"][:, None]
    noise["clean"][padding], noise["corrupted"][padding] = 11, 13
    alone = {k: v[1:2, : pairs["lengths"][1]] if v.shape[1:] == (12,) else v[1:2] for k, v in pairs.items()}
    for edge in [("a0.h1", "a1.kv1<k>"), ("m0", "m2"), ("input", "a2.h3<q>"), ("a1.h0", "logits")]:
        effect = oracle.edge_effect(*edge)
        torch.testing.assert_close(HookOracle(module, noise, base="corrupted").edge_effect(*edge), effect, **CLOSE)
        torch.testing.assert_close(edge_effect(module, alone, *edge, base="corrupted"), effect[1:2], **CLOSE)


@pytest.mark.parametrize(
    ("name", "heads", "mlps", "logits"),
    [
        # per layer 12 q/k/v receivers (8 with two KV heads) that read 1, 6 and 11 senders
        ("gpt2", 12 * 18, 5 + 10 + 15, 16),
        ("llama", 8 * 18, 5 + 10 + 15, 16),
        ("llama_mqa", 6 * 18, 5 + 10 + 15, 16),
        ("neox_sequential", 12 * 18, 5 + 10 + 15, 16),
        ("neox_parallel", 12 * 18, 1 + 6 + 11, 16),
    ],
)
def test_all_edges_are_counted(name, heads, mlps, logits):
    edges = all_edges(tiny_module(name))
    assert len(set(edges)) == len(edges) == heads + mlps + logits
    assert sum(r.startswith("m") for _, r in edges) == mlps
    assert sum(r == "logits" for _, r in edges) == logits


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("gpt2", "neox_parallel", "llama_mha") for kind in "qkv"] + [("llama", "q")],
)
def test_agrees_with_transformer_lens_direct_path(name, kind):
    """TransformerLens patches clean writes into the corrupted run; with grouped queries it takes q alone."""
    pytest.importorskip("transformer_lens")
    from transformer_lens.patching import get_act_patch_direct_path

    from workbench.models.bridge import make_bridge

    module = tiny_module(name)
    parts = anatomy(module)
    pairs = tiny_pairs(module)
    oracle = HookOracle(module, pairs, base="corrupted")
    bridge = make_bridge(module)
    row = torch.arange(len(pairs["clean"]))

    def metric(logits):
        return logit_diff(logits[row, pairs["answer_positions"]], pairs).mean()

    with torch.no_grad():
        _, clean_cache = bridge.run_with_cache(pairs["clean"])
        corrupted_logits, corrupted_cache = bridge.run_with_cache(pairs["corrupted"])
        for head in range(parts.n_heads):
            theirs = get_act_patch_direct_path(
                bridge, pairs["corrupted"], clean_cache, corrupted_cache, metric, 0, head, kind, verbose=False
            )
            theirs = theirs[1:] - metric(corrupted_logits)
            ours = torch.tensor(
                [
                    [oracle.edge_effect(f"a0.h{head}", f"a{layer}.h{to}<{kind}>").mean() for to in range(4)]
                    for layer in (1, 2)
                ]
            )
            assert ours.abs().max() > 1e-3
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
