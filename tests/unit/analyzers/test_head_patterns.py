from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import workbench
from families import FAMILIES, REFUSED, tiny_module
from workbench.analyzers._patterns import batch_size, bytes_per_sequence, score_patterns
from workbench.analyzers._tokens import ordinary_ids, random_ids
from workbench.analyzers.head_patterns import METRICS, diagonal_scores, run
from workbench.errors import BudgetError, PromptError, UnsupportedModelError


def attends_back(offset: int, length: int, start: int = 0) -> Tensor:
    """One head whose every query attends to the key `offset` before it, or to key 0 where there is none."""
    pattern = torch.zeros(1, 1, length, length)
    for query in range(length):
        pattern[0, 0, query, query - offset if query - offset >= start else 0] = 1
    return pattern


def random_patterns(n: int, n_heads: int, length: int, seed: int) -> Tensor:
    scores = 3 * torch.randn(n, n_heads, length, length, generator=torch.Generator().manual_seed(seed)).double()
    return scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), float("-inf")).softmax(-1)


@pytest.mark.parametrize(("offset", "metric"), [(1, "previous_token"), (7, "duplicate_token"), (6, "induction")])
@pytest.mark.parametrize("start", [0, 1])
def test_a_perfect_head_scores_one_on_its_own_metric_and_next_to_nothing_on_the_others(offset, metric, start):
    found = diagonal_scores(attends_back(offset, 14 + start, start), period=7, start=start)[0, 0].tolist()
    scores = dict(zip(METRICS, found, strict=True))
    assert scores.pop(metric) == 1
    # queries that have no such key attend to key 0, and one of them may find it on another diagonal
    assert all(score < 1 / 7 + 1e-6 for score in scores.values())


def test_uniform_attention_has_the_closed_form():
    period = 5
    pattern = torch.ones(10, 10).tril() / torch.arange(1, 11)[:, None]
    expected = [
        sum(1 / (q + 1) for q in range(1, 10)) / 9,
        sum(1 / (q + 1) for q in range(5, 10)) / 5,
        sum(1 / (q + 1) for q in range(4, 10)) / 6,
    ]
    torch.testing.assert_close(diagonal_scores(pattern[None, None], period=period)[0, 0], torch.tensor(expected))


def test_attention_to_what_stands_in_front_counts_for_nothing():
    pattern = torch.zeros(1, 1, 11, 11)
    pattern[..., 0] = 1
    assert diagonal_scores(pattern, period=5, start=1).max() == 0


@given(seed=st.integers(0, 10**6), period=st.integers(2, 6), n_heads=st.integers(1, 4), start=st.integers(0, 1))
@settings(max_examples=40, deadline=None)
def test_scores_are_shares_and_follow_their_head_and_sequence(seed, period, n_heads, start):
    pattern = random_patterns(3, n_heads, 2 * period + start, seed)
    scores = diagonal_scores(pattern, period=period, start=start)
    assert scores.shape == (3, n_heads, 3)
    assert ((scores >= 0) & (scores <= 1)).all()
    order = torch.randperm(n_heads, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(diagonal_scores(pattern[:, order], period=period, start=start), scores[:, order])
    parts = [diagonal_scores(pattern[:1], period=period, start=start)]
    parts.append(diagonal_scores(pattern[1:], period=period, start=start))
    torch.testing.assert_close(torch.cat(parts), scores, rtol=0, atol=0)


def test_half_precision_patterns_are_averaged_in_float32():
    pattern = random_patterns(1, 2, 400, 0).bfloat16()
    scores = diagonal_scores(pattern, period=200)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), diagonal_scores(pattern.double(), period=200), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("shape", "period", "start", "message"),
    [((4, 5), 2, 0, "as many queries as keys"), ((4, 4), 4, 0, "nothing repeated"), ((4, 4), 1, 0, "period >= 2")],
)
def test_patterns_that_do_not_fit_are_refused(shape, period, start, message):
    with pytest.raises(PromptError, match=message):
        diagonal_scores(torch.rand(1, 1, *shape), period=period, start=start)


def test_table_is_valid_and_has_the_mean_over_sequences():
    model = workbench.wrap_model(tiny_module("qwen3"))
    table = run(model, n=8, period=10, seed=3).validate()
    tokens = random_ids(model, 8, 10, seed=3, stream="head_patterns").repeat(1, 2)
    scores = score_patterns(model, tokens, lambda pattern: diagonal_scores(pattern, period=10))
    for index, metric in enumerate(METRICS):
        torch.testing.assert_close(torch.tensor(table.matrix(metric)), scores[..., index].mean(0))
        frame = table.select(metric).set_index(["layer", "head"])
        spread = scores[..., index].std(0) / 8**0.5
        assert frame.loc[(2, 1), "stderr"] == pytest.approx(float(spread[2, 1]))
    assert set(table.frame["n"]) == {8}
    assert set(table.frame["path_taken"]) == {"fast"}


def test_batches_do_not_change_the_numbers_and_are_reported():
    model = workbench.wrap_model(tiny_module("llama", dtype=torch.float64))
    said: list[str] = []
    whole = run(model, n=7, period=9)
    split = run(model, n=7, period=9, budget=3 * bytes_per_sequence(model, 18), progress=said.append)
    assert [line.split(": ")[1] for line in said] == ["3 of 7 sequences", "6 of 7 sequences", "7 of 7 sequences"]
    columns = ["value", "stderr", "ci_low", "ci_high"]
    torch.testing.assert_close(
        torch.tensor(split.frame[columns].to_numpy()), torch.tensor(whole.frame[columns].to_numpy()), rtol=0, atol=1e-7
    )


def test_permuting_the_heads_of_a_model_permutes_their_scores():
    module = tiny_module("llama_mha", dtype=torch.float64)
    before = run(workbench.wrap_model(module), n=2, period=8)
    order = torch.tensor([2, 0, 3, 1])
    attention = module.model.layers[1].self_attn
    for matrix in (attention.q_proj, attention.k_proj, attention.v_proj):
        matrix.weight.data = matrix.weight.unflatten(0, (4, -1))[order].flatten(0, 1)
    attention.o_proj.weight.data = attention.o_proj.weight.unflatten(1, (4, -1))[:, order].flatten(1, 2)
    after = run(workbench.wrap_model(module), n=2, period=8)
    for metric in METRICS:
        expected = before.matrix(metric).copy()
        expected[1] = expected[1, order.numpy()]
        assert abs(after.matrix(metric) - expected).max() < 1e-6
        assert abs(before.matrix(metric) - expected).max() > 1e-4


def test_a_short_context_shortens_the_period_and_says_so():
    model = workbench.wrap_model(tiny_module("gpt2"), name="short")
    table = run(model, n=2)
    assert table.provenance["period"] == 64
    assert table.provenance["notes"] == ["period 64 in place of 100: the context of short is 128 tokens"]
    assert run(model, n=2, period=64).provenance["notes"] == []


def test_bos_follows_the_tokenizer(text_model):
    with_bos, without = text_model(bos=True), text_model()
    assert run(with_bos, n=2, period=8).provenance["bos_in_front"] is True
    assert run(without, n=2, period=8).provenance["bos_in_front"] is False
    tokens = random_ids(with_bos, 2, 8, seed=0, stream="head_patterns").repeat(1, 2)
    tokens = torch.cat([torch.zeros(2, 1, dtype=torch.long), tokens], dim=1)
    scores = score_patterns(with_bos, tokens, lambda pattern: diagonal_scores(pattern, period=8, start=1)).mean(0)
    table = run(with_bos, n=2, period=8)
    torch.testing.assert_close(torch.tensor(table.matrix("induction")), scores[..., METRICS.index("induction")])
    assert run(with_bos, n=2).provenance["period"] == 63


def test_tokens_are_drawn_from_all_of_the_vocabulary_but_special_and_unused_ids(text_model):
    model = text_model()
    used = len(model.tokenizer)
    assert used < model.spec.d_vocab
    assert ordinary_ids(model).tolist() == list(range(3, used))
    drawn = random_ids(model, 200, 20, seed=0, stream="x")
    assert set(drawn.flatten().tolist()) == set(range(3, used))
    assert (drawn != random_ids(model, 200, 20, seed=1, stream="x")).any()
    assert (drawn != random_ids(model, 200, 20, seed=0, stream="y")).any()
    assert torch.equal(drawn, random_ids(model, 200, 20, seed=0, stream="x"))


def test_memory_estimate_sets_the_batch_and_too_small_a_budget_is_refused():
    model = workbench.wrap_model(tiny_module(FAMILIES[0]))
    one = bytes_per_sequence(model, 32)
    assert one > 4 * model.spec.n_heads * 32 * 32
    assert [batch_size(model, 32, budget) for budget in (one, 2 * one - 1, 2 * one)] == [1, 1, 2]
    with pytest.raises(BudgetError, match=f"budget is {one - 1} bytes and one sequence of 32 tokens"):
        batch_size(model, 32, one - 1)


@pytest.mark.parametrize(("options", "message"), [({"n": 0}, "n is 0"), ({"period": 1}, "period is 1")])
def test_senseless_arguments_are_refused(options, message):
    with pytest.raises(PromptError, match=message):
        run(workbench.wrap_model(tiny_module("gpt2")), **options)


def test_attention_that_is_not_causal_is_refused(monkeypatch):
    from dataclasses import replace

    model = workbench.wrap_model(tiny_module("gpt2"))
    monkeypatch.setattr(model, "spec", replace(model.spec, causal=False))
    with pytest.raises(UnsupportedModelError, match="not causal"):
        run(model, n=1, period=4)


def test_the_hook_path_says_that_it_was_taken():
    table = run(workbench.wrap_model(REFUSED["rope_type"]()), n=3, period=12).validate()
    assert set(table.frame["path_taken"]) == {"hooks"}
    assert "rope" in table.provenance["refusal"]
