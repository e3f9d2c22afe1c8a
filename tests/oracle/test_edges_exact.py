"""Every edge of every family, exactly: the engine against plain hooks, one forward an edge, and TransformerLens."""

import pytest
import torch

import workbench as wb
from families import FAMILIES, tiny_module, tiny_pairs
from oracle.hook_oracle import HookOracle, all_edges, anatomy, logit_diff
from unit.patching.patching_cases import LATE, prompts
from workbench.patching.runs import make_runs

TOLERANCE = 1e-8
BASE = {"noising": "clean", "denoising": "corrupted"}


def oracle_effects(module, raw, direction, metric=logit_diff):
    """Effects `[edges, ..., n]` by hooks, and the edges' names."""
    oracle = HookOracle(module, raw, base=BASE[direction], metric=metric)
    edges = all_edges(module)
    return torch.stack([oracle.edge_effect(*edge) for edge in edges]), [f"{s}->{r}" for s, r in edges]


def answer_logprob(logits, pairs):
    """Log of the summed probability of the answers, from probabilities."""
    return logits.softmax(-1).gather(1, pairs["answers"]).sum(1).log()


def kl_to_clean(module, raw):
    """A metric: KL(clean || patched), from a clean run of its own."""
    with torch.no_grad():
        logits = module(raw["clean"]).logits
    clean = torch.distributions.Categorical(logits=logits[torch.arange(len(logits)), raw["answer_positions"]])

    def metric(logits, _pairs):
        return torch.distributions.kl_divergence(clean, torch.distributions.Categorical(logits=logits))

    return metric


def metrics_of(family, module, raw):
    """Every metric on two families, the logit difference on the others."""
    found = {"logit_diff": logit_diff}
    if family in {"gpt2", "llama"}:
        found |= {"answer_logprob": answer_logprob, "kl_to_clean": kl_to_clean(module, raw)}
    return found


def engine_effects(model, pairs, direction, metric="logit_diff"):
    """Effects by name, per prompt, and the frame."""
    result = wb.edge_effects(model, pairs, method="exact", direction=direction, metric=metric, per_prompt=True)
    names = result.frame["sender"] + "->" + result.frame["receiver"]
    assert names.is_unique
    return dict(zip(names, torch.from_numpy(result.per_prompt), strict=True)), result.frame


def assert_agree(model, raw, direction, expected, names, *, rows=None, metric="logit_diff"):
    pairs = prompts(raw, rows)
    found, frame = engine_effects(model, pairs, direction, metric)
    assert set(found) == set(names)
    assert set(frame["path_taken"]) == {"fast"}
    assert set(frame["method"]) == {"exact"}
    assert set(frame["n_prompts"]) == {len(pairs)}
    expected = expected if rows is None else expected[:, list(rows)]
    ours = torch.stack([found[name] for name in names])
    worst = (ours - expected).abs().amax(1)
    assert worst.max() <= TOLERANCE, f"{names[int(worst.argmax())]} is off by {worst.max():.1e}"


@pytest.mark.parametrize("direction", ["noising", "denoising"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_edge_agrees_with_plain_hooks(family, direction):
    """Mixed lengths, first differences and last tokens; then only prompts whose prefix comes from the base run."""
    module = tiny_module(family, dtype=torch.float64)
    raw = tiny_pairs(module, n=5)
    metrics = metrics_of(family, module, raw)
    expected, names = oracle_effects(
        module, raw, direction, lambda logits, pairs: torch.stack([f(logits, pairs) for f in metrics.values()])
    )
    # large enough to tell right from wrong (the divergence from the base run itself is of second order: smaller)
    assert ((expected.abs().mean(-1) > 1e-3).double().mean(0) > 0.5).all()
    model = wb.wrap_model(module)
    whole = make_runs(model.fast_weights, prompts(raw), direction=direction, metric="logit_diff").window
    late = make_runs(model.fast_weights, prompts(raw, LATE), direction=direction, metric="logit_diff").window
    assert whole.prefix > 0
    assert whole.start.min() == 0
    assert late.start.min() > 0
    assert len(set(late.start.tolist())) == len(LATE)
    for index, metric in enumerate(metrics):
        assert_agree(model, raw, direction, expected[:, index], names, metric=metric)
        assert_agree(model, raw, direction, expected[:, index], names, rows=LATE, metric=metric)


@pytest.mark.parametrize(
    ("family", "direction"),
    [("llama", "noising"), ("llama", "denoising"), ("llama_mqa", "noising"), ("qwen3", "denoising")],
)
def test_ungrouped_heads_agree_with_plain_hooks_on_the_ungrouped_module(family, direction):
    model = wb.wrap_model(tiny_module(family, dtype=torch.float64), ungroup=True)
    raw = tiny_pairs(model.module, n=5)
    expected, names = oracle_effects(model.module, raw, direction)
    assert "a0.h1->a1.h3<k>" in names
    assert_agree(model, raw, direction, expected, names)


def test_ungrouped_key_effects_do_not_add_up_to_the_groups():
    """The grouped edge serves all query heads at once; an ungrouped one serves its own: two different questions."""
    module = tiny_module("llama", dtype=torch.float64)
    raw = tiny_pairs(module)
    grouped, _ = engine_effects(wb.wrap_model(module), prompts(raw), "noising")
    single, _ = engine_effects(wb.wrap_model(module, ungroup=True), prompts(raw), "noising")
    torch.testing.assert_close(grouped["m0->a2.h3<q>"], single["m0->a2.h3<q>"], rtol=0, atol=1e-10)
    parts = single["m0->a2.h0<k>"] + single["m0->a2.h1<k>"]
    assert (grouped["m0->a2.kv0<k>"] - parts).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["q", "k", "v"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_agrees_with_transformer_lens_direct_path(family, kind):
    """TransformerLens patches clean writes into the corrupted run, ours is called denoising."""
    pytest.importorskip("transformer_lens")
    from transformer_lens.patching import get_act_patch_direct_path

    model = wb.wrap_model(tiny_module(family, dtype=torch.float64), ungroup=True)
    raw = tiny_pairs(model.module)
    row = torch.arange(len(raw["clean"]))
    bridge = model.bridge
    n_heads = anatomy(model.module).n_heads
    found, _ = engine_effects(model, prompts(raw), "denoising")

    def metric(logits):
        return logit_diff(logits[row, raw["answer_positions"]], raw).mean()

    with torch.no_grad():
        _, clean_cache = bridge.run_with_cache(raw["clean"])
        corrupted_logits, corrupted_cache = bridge.run_with_cache(raw["corrupted"])
        for layer, head in ((0, 1), (0, 3), (1, 2)):
            theirs = get_act_patch_direct_path(
                bridge, raw["corrupted"], clean_cache, corrupted_cache, metric, layer, head, kind, verbose=False
            )
            theirs = (theirs - metric(corrupted_logits))[layer + 1 :]
            ours = torch.tensor(
                [
                    [found[f"a{layer}.h{head}->a{later}.h{to}<{kind}>"].mean() for to in range(n_heads)]
                    for later in range(layer + 1, 3)
                ]
            )
            assert ours.abs().max() > 1e-3
            torch.testing.assert_close(ours.to(theirs), theirs, rtol=0, atol=2e-5)  # theirs are float32
