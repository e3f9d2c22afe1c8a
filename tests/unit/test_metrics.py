import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import PromptError
from workbench.metrics import METRICS, answer_logprob, beats, kl_to_clean, logit_diff
from workbench.prompts import PromptPairs

VOCAB = 11


def pairs_of(answers, wrong, candidates=None):
    n = len(answers)
    rows = [[1, 2]] * n
    return PromptPairs.from_tokens(rows, rows, answers, wrong, candidates=candidates)


@st.composite
def cases(draw):
    n = draw(st.integers(1, 4))
    answers, wrong, candidates = [], [], []
    for _ in range(n):
        ids = draw(st.permutations(range(VOCAB)))
        k, w, c = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 4))
        answers.append(list(ids[:k]))
        wrong.append(list(ids[k : k + w]))
        candidates.append(list(ids[: k + w + c]))
    seed = draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, VOCAB, generator=generator, dtype=torch.float64) * 3
    return logits, pairs_of(answers, wrong, candidates), answers, wrong, candidates


@given(cases())
@settings(max_examples=60, deadline=None)
def test_against_their_definitions(case):
    logits, pairs, answers, wrong, candidates = case
    probabilities = [[math.exp(x) for x in row] for row in logits.tolist()]
    for i, row in enumerate(logits.tolist()):
        expected = sum(row[a] for a in answers[i]) / len(answers[i]) - sum(row[w] for w in wrong[i]) / len(wrong[i])
        assert logit_diff(logits, pairs)[i].item() == pytest.approx(expected, abs=1e-12)
        share = sum(probabilities[i][a] for a in answers[i]) / sum(probabilities[i])
        assert answer_logprob(logits, pairs)[i].item() == pytest.approx(math.log(share), abs=1e-12)
        best = max(row[a] for a in answers[i])
        assert beats(logits, pairs.answers)[i] == (row.index(max(row)) in answers[i])
        rivals = [row[c] for c in candidates[i] if c not in answers[i]]
        assert beats(logits, pairs.answers, pairs.candidates)[i] == (best > max(rivals))


@given(cases(), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_kl_against_its_definition(case, seed):
    clean, *_ = case
    other = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p, q = clean.softmax(-1), other.softmax(-1)
    assert torch.allclose(kl_to_clean(other, clean), (p * (p / q).log()).sum(-1), atol=1e-12)
    assert torch.equal(kl_to_clean(clean, clean), torch.zeros(len(clean), dtype=torch.float64))
    assert (kl_to_clean(other, clean) >= -1e-12).all()


@given(cases(), st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_a_constant_added_to_the_logits_changes_nothing(case, constant):
    logits, pairs, *_ = case
    for name, metric in METRICS.items():
        values = [metric.function(x, pairs, logits) for x in (logits, logits + constant)]
        assert torch.allclose(*values, atol=1e-10), name


def test_kl_where_the_clean_probability_is_zero():
    clean = torch.tensor([[0.0, -math.inf]])
    assert kl_to_clean(torch.tensor([[0.0, 0.0]]), clean).item() == pytest.approx(math.log(2))


@pytest.mark.parametrize("name", METRICS)
def test_runs_in_front_are_measured_one_by_one(name):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 4, VOCAB, generator=generator)
    clean = torch.randn(4, VOCAB, generator=generator)
    pairs = pairs_of([[1], [2, 3], [4], [5]], [[6], [7], [8, 9, 10], [0]])
    metric = METRICS[name]
    values = metric.function(logits, pairs, clean)
    assert values.shape == (2, 3, 4)
    assert torch.allclose(values[1, 2], metric.function(logits[1, 2], pairs, clean), atol=1e-6)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("given", "expected"), [("bfloat16", "float32"), ("float32", "float32"), ("float64", "float64")]
)
def test_accumulation_is_at_least_float32(name, given, expected):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)).to(getattr(torch, given))
    values = METRICS[name].function(logits, pairs_of([[1]], [[2]]), logits)
    assert values.dtype == getattr(torch, expected)


def test_a_tie_is_no_success():
    pairs = pairs_of([[3], [3, 4]], [[5], [5]])
    flat = torch.zeros(2, VOCAB)
    assert not beats(flat, pairs.answers).any()
    assert not beats(flat, pairs.answers, pairs.candidates).any()
    flat[1, 4] = 1
    assert beats(flat, pairs.answers).tolist() == [False, True]


def test_token_zero_is_a_rival_although_sets_are_filled_up():
    pairs = pairs_of([[3, 4], [5]], [[6], [7]], [[0, 3, 4, 6], [0, 5, 7]])
    logits = torch.zeros(2, VOCAB)
    logits[:, 0], logits[:, 3], logits[:, 5] = 2.0, 1.0, 1.0
    assert not beats(logits, pairs.answers).any()
    assert not beats(logits, pairs.answers, pairs.candidates).any()


def test_gradients_flow():
    logits = torch.randn(1, VOCAB, requires_grad=True)
    logit_diff(logits, pairs_of([[1, 2]], [[3]])).sum().backward()
    assert logits.grad.tolist() == [[0, 0.5, 0.5, -1] + [0] * (VOCAB - 4)]


def test_errors_name_what_is_missing():
    pairs = pairs_of([[1]], [[2]])
    with pytest.raises(PromptError, match="2 prompts and pairs has 1"):
        logit_diff(torch.zeros(2, VOCAB), pairs)
    with pytest.raises(PromptError, match="clean_logits"):
        METRICS["kl_to_clean"].function(torch.zeros(1, VOCAB), pairs, None)
    assert {name for name, metric in METRICS.items() if metric.needs_clean} == {"kl_to_clean"}
