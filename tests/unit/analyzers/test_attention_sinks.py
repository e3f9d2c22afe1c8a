from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench
from families import REFUSED, tiny_module
from workbench.analyzers._patterns import bytes_per_sequence, score_patterns
from workbench.analyzers._rows import mean_shares
from workbench.analyzers._tokens import DOMAINS, built_in_documents, random_ids
from workbench.analyzers.attention_sinks import is_sink, key_importance, run
from workbench.errors import BudgetError, PromptError
from workbench.stats import mean_estimates

TEXTS = ["abc def ghi jkl", "One, two, three, four.", "1 + 1 = 2, 2 + 2 = 4"]


def causal(scores: Tensor) -> Tensor:
    length = scores.shape[-1]
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


def random_patterns(n: int, n_heads: int, length: int, seed: int) -> Tensor:
    return causal(3 * torch.randn(n, n_heads, length, length, generator=torch.Generator().manual_seed(seed)).double())


def test_uniform_attention_has_the_closed_form():
    length = 12
    alpha = key_importance(causal(torch.zeros(1, 1, length, length)))[0, 0]
    expected = [sum(1 / (q + 1) for q in range(k, length)) / (length - k) for k in range(length)]
    torch.testing.assert_close(alpha, torch.tensor(expected))


def test_a_perfect_sink_has_importance_one_at_its_key_whatever_the_position():
    length = 9
    for sink in range(length):
        pattern = torch.eye(length)
        pattern[sink:] = 0
        pattern[sink:, sink] = 1
        alpha = key_importance(pattern[None, None])[0, 0]
        assert alpha[sink] == 1
        # an earlier key is seen by itself alone, a later one by nobody
        assert alpha[:sink].tolist() == pytest.approx([1 / (length - k) for k in range(sink)])
        assert alpha[sink + 1 :].eq(0).all()


def test_attention_to_oneself_is_one_part_of_those_who_see_the_key():
    alpha = key_importance(torch.eye(5)[None, None], [4, 0, 2])[0, 0]
    torch.testing.assert_close(alpha, torch.tensor([1.0, 1 / 5, 1 / 3]))


@given(seed=st.integers(0, 10**6), length=st.integers(1, 12), n_heads=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_importance_is_a_share_and_follows_its_head_and_sample(seed, length, n_heads):
    pattern = random_patterns(3, n_heads, length, seed)
    alpha = key_importance(pattern)
    assert ((alpha >= 0) & (alpha <= 1)).all()
    # the columns, weighted by who sees them, hold all the attention there is
    visible = torch.arange(length, 0, -1).double()
    torch.testing.assert_close((alpha * visible).sum(-1), torch.full((3, n_heads), float(length)).double())
    order = torch.randperm(n_heads, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(key_importance(pattern[:, order]), alpha[:, order])
    torch.testing.assert_close(torch.cat([key_importance(pattern[:2]), key_importance(pattern[2:])]), alpha)
    backwards = list(range(length))[::-1]
    torch.testing.assert_close(key_importance(pattern, backwards), alpha[..., backwards])


def test_the_threshold_is_strict():
    assert is_sink(torch.tensor([0.25, 0.2500001, 0.9]), 0.25).tolist() == [0, 1, 1]


def test_half_precision_patterns_are_averaged_in_float32():
    pattern = random_patterns(1, 2, 300, 0).bfloat16()
    alpha = key_importance(pattern)
    assert alpha.dtype == torch.float32
    torch.testing.assert_close(alpha.double(), key_importance(pattern.double()), rtol=1e-5, atol=0)


def test_rate_is_the_mean_of_the_indicator_and_not_the_indicator_of_the_mean():
    model = workbench.wrap_model(tiny_module("llama"))
    tokens = random_ids(model, 30, 16, seed=5, stream="random")
    alpha = score_patterns(model, tokens, lambda pattern: key_importance(pattern, [0]))[..., 0]
    eps = float(alpha.median())
    table = run(model, inputs=("random",), length=16, n=30, eps=eps, seed=5).validate()
    rate = (alpha > eps).double().mean(0)
    np.testing.assert_allclose(table.matrix("alpha"), alpha.mean(0))
    np.testing.assert_allclose(table.matrix("sink_rate"), rate)
    assert (rate - (alpha.mean(0) > eps).double()).abs().max() > 0.1
    whole = table.frame[table.frame["layer"].isna()]
    assert len(whole) == 1
    assert whole["value"].item() == pytest.approx(float((alpha > eps).double().mean()))
    over_samples = (alpha > eps).double().mean((1, 2))
    assert whole["stderr"].item() == pytest.approx(float(over_samples.std() / 30**0.5))


def test_intervals_of_shares_stay_between_zero_and_one():
    found = mean_shares(torch.tensor([[1.0, 0.0, 0.5], [0.7, 0.2, 0.5]]))
    unbounded = mean_estimates([[1.0, 0.0, 0.5], [0.7, 0.2, 0.5]])
    assert (unbounded.ci_high[0] > 1) & (unbounded.ci_low[1] < 0)
    assert found.ci_high.tolist() == [1, 1, 0.5]
    assert found.ci_low.tolist() == [0, 0, 0.5]
    np.testing.assert_allclose(found.value, [0.85, 0.1, 0.5])
    assert np.isnan(mean_shares(torch.ones(1, 2)).ci_low).all()


def test_every_position_asked_for_has_its_own_rows():
    model = workbench.wrap_model(tiny_module("gpt2"))
    several = run(model, inputs=("random",), positions=(5, 0), length=16, n=4).validate()
    single = run(model, inputs=("random",), positions=(5,), length=16, n=4)
    np.testing.assert_allclose(several.matrix("alpha", position=5), single.matrix("alpha"), rtol=0, atol=1e-7)
    assert abs(several.matrix("alpha", position=5) - several.matrix("alpha", position=0)).max() > 0.01


def test_batches_do_not_change_the_numbers():
    model = workbench.wrap_model(tiny_module("qwen2", dtype=torch.float64))
    said: list[str] = []
    whole = run(model, inputs=("random", "repeated"), length=16, n=7)
    small = 2 * bytes_per_sequence(model, 16)
    split = run(model, inputs=("random", "repeated"), length=16, n=7, budget=small, progress=said.append)
    assert len(said) == 8
    columns = ["value", "stderr", "ci_low", "ci_high"]
    np.testing.assert_allclose(split.frame[columns], whole.frame[columns], rtol=0, atol=1e-7)


def test_one_kind_of_input_does_not_shift_the_draws_of_another():
    model = workbench.wrap_model(tiny_module("gpt2"))
    alone = run(model, inputs=("repeated",), length=16, n=4)
    beside = run(model, inputs=("random", "repeated"), length=16, n=4)
    np.testing.assert_allclose(beside.matrix("alpha", input="repeated"), alone.matrix("alpha"), atol=1e-7)


@pytest.mark.parametrize("bos", [False, True])
def test_built_in_documents_are_taken_in_turn_and_told_apart_by_domain(text_model, bos):
    model = text_model(bos=bos)
    table = run(model, inputs=("natural",), length=24, n=20).validate()
    documents = built_in_documents()[:20]
    assert [domain for _, domain, _ in documents] == [*DOMAINS, *DOMAINS, *DOMAINS[:4]]
    counts = {domain: 3 if domain in DOMAINS[:4] else 2 for domain in DOMAINS}
    assert {d: set(table.select("alpha", input=d)["n"]) for d in DOMAINS} == {d: {c} for d, c in counts.items()}
    weighted = sum(counts[domain] * table.matrix("alpha", input=domain) for domain in DOMAINS) / 20
    np.testing.assert_allclose(weighted, table.matrix("alpha", input="natural"), atol=1e-12)
    ids = torch.tensor([model.tokenizer(text)["input_ids"][:24] for _, _, text in documents])
    assert (ids[:, 0] == model.tokenizer.bos_token_id).all() == bos
    alpha = score_patterns(model, ids, lambda pattern: key_importance(pattern, [0]))[..., 0].mean(0)
    np.testing.assert_allclose(table.matrix("alpha", input="natural"), alpha)
    assert table.provenance["prepends_bos"] is bos
    assert table.provenance["inputs"] == {"natural": 20}


def test_all_118_documents_are_there_once():
    documents = built_in_documents()
    assert len({name for name, _, _ in documents}) == len({text for _, _, text in documents}) == len(documents) == 118


def test_texts_of_ones_own_are_all_taken_and_have_no_domains(text_model):
    model = text_model()
    table = run(model, TEXTS, inputs=("natural",), length=12)
    assert set(table.frame["input"]) == {"natural"}
    assert set(table.frame["n"]) == {3}
    ids = torch.tensor([model.tokenizer(text)["input_ids"][:12] for text in TEXTS])
    alpha = score_patterns(model, ids, lambda pattern: key_importance(pattern, [0]))[..., 0].mean(0)
    np.testing.assert_allclose(table.matrix("alpha"), alpha)
    shuffled = run(model, TEXTS[::-1], inputs=("natural",), length=12)
    np.testing.assert_allclose(shuffled.matrix("alpha"), table.matrix("alpha"))
    assert shuffled.provenance["data_hash"] != table.provenance["data_hash"]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([*TEXTS, "short"], {"length": 12}, r"texts\[3\] \('short' \.\.\.\) has 5 tokens of the 12"),
        ([], {}, "texts is empty"),
        ("one text", {}, "not one string"),
        (TEXTS, {"inputs": ("random",)}, "add 'natural'"),
        (None, {"n": 119}, "118 of the 118 built-in documents have 64 tokens and n is 119"),
        (None, {"inputs": ("natural", "nature")}, "natural, random, repeated"),
        (None, {"inputs": "natural"}, "expected a sequence"),
        (None, {"inputs": ()}, "expected a sequence"),
        (None, {"length": 129}, "expected 2 to 128"),
        (None, {"eps": 1.0}, "eps is 1.0"),
        (None, {"n": 0}, "n is 0"),
        (None, {"positions": ()}, "positions is empty"),
        (None, {"positions": (64,)}, "from 0 to 63"),
        (None, {"positions": (-1,)}, "from 0 to 63"),
        (None, {"positions": (3, 3)}, "different key positions"),
    ],
)
def test_bad_input_is_refused_with_what_to_do(text_model, texts, options, message):
    with pytest.raises(PromptError, match=message):
        run(text_model(), texts, **options)


def test_natural_text_needs_a_tokenizer():
    with pytest.raises(PromptError, match="needs a tokenizer"):
        run(workbench.wrap_model(tiny_module("gpt2")))


def test_a_budget_too_small_for_one_sample_is_refused(text_model):
    with pytest.raises(BudgetError, match="budget is 1000 bytes"):
        run(text_model(), budget=1000)


def test_the_hook_path_says_that_it_was_taken():
    model = workbench.wrap_model(REFUSED["sliding_window"]())
    table = run(model, inputs=("random", "repeated"), length=24, n=3).validate()
    assert set(table.frame["path_taken"]) == {"hooks"}
    assert "sliding_window" in table.provenance["refusal"]
