import math

import pytest
import torch

import workbench as wb
import workbench_circuits as wc
from families import REFUSED, tiny_module, tiny_pairs
from tiny_text import tiny_text_model
from workbench.errors import PromptError
from workbench.prompts import PromptPairs
from workbench.stats import Estimate, mean_estimate, proportion
from workbench_circuits._competence import Competence


@pytest.fixture(scope="module")
def model():
    return tiny_text_model(seed=3)


def by_hand(module, pairs):
    """Right among candidates, first in the vocabulary, logit difference clean and corrupted, one prompt at a time."""
    rows = []
    for i in range(len(pairs)):
        length, at = int(pairs.lengths[i]), int(pairs.answer_positions[i])
        with torch.no_grad():
            clean, corrupted = (
                module(version[i : i + 1, :length]).logits[0, at].tolist() for version in (pairs.clean, pairs.corrupted)
            )
        right, wrong, among = (
            [x for x in ids[i].tolist() if x >= 0] for ids in (pairs.answers, pairs.wrong_answers, pairs.candidates)
        )
        differences = [
            sum(logits[x] for x in right) / len(right) - sum(logits[x] for x in wrong) / len(wrong)
            for logits in (clean, corrupted)
        ]
        best = max(clean[x] for x in right)
        rows.append((best >= max(clean[x] for x in among), best >= max(clean), *differences))
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def random_pairs(module, seed):
    prompts = tiny_pairs(module, 7, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(101, generator=generator) for _ in range(7)])
    answers = [row[: 1 + i % 3].tolist() for i, row in enumerate(ids)]
    return PromptPairs.from_tokens(
        prompts["clean"],
        prompts["corrupted"],
        answers,
        ids[:, 3:5],
        prompts["lengths"],
        prompts["lengths"] - 1 - torch.arange(7) % 2,
        candidates=[
            [*right, *row[3 : 5 + i % 4].tolist()] for i, (right, row) in enumerate(zip(answers, ids, strict=True))
        ],
    )


@pytest.mark.parametrize(
    "build", [lambda: tiny_module("llama"), lambda: tiny_module("gpt2"), REFUSED["sliding_window"]]
)
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_against_the_module_prompt_by_prompt(build, batch_size):
    module = build()
    pairs = random_pairs(module, seed=batch_size)
    expected = by_hand(module, pairs)
    model = wb.wrap_model(module)
    found = wc.competence(model, pairs, batch_size=batch_size)
    values = [found.accuracy, found.top1, found.metric_clean, found.metric_corrupted]
    assert [each.value for each in values] == pytest.approx(expected, abs=1e-4)
    assert found.path_taken == model.path
    shares = [
        int((row >= 0).sum()) / int((other >= 0).sum())
        for row, other in zip(pairs.answers, pairs.candidates, strict=True)
    ]
    assert found.chance == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(("name", "corruption"), [("ioi", "abc"), ("ioi", "s2_flip"), ("colored_objects", "mindiff")])
def test_tasks_on_a_tiny_model(model, name, corruption):
    pairs = wc.load_task(name).pairs(model, 40, corruption=corruption)
    found = wc.competence(model, pairs)
    assert [
        each.value for each in (found.accuracy, found.top1, found.metric_clean, found.metric_corrupted)
    ] == pytest.approx(by_hand(model.module, pairs), abs=1e-4)
    assert found.chance == pytest.approx(wc.load_task(name).chance)
    assert (found.task, found.corruption, found.n, found.prepends_bos) == (name, corruption, 40, False)
    assert found.data_hash == pairs.data_hash


def test_only_the_answer_position_is_unembedded(model, monkeypatch):
    pairs = wc.load_task("ioi").pairs(model, 5)
    shapes = []
    forward = model.forward

    def spy(*args, **options):
        logits = forward(*args, **options)
        shapes.append(tuple(logits.shape))
        return logits

    monkeypatch.setattr(model, "forward", spy)
    wc.competence(model, pairs)
    assert shapes == [(5, model.spec.d_vocab)] * 2


def test_a_model_that_knows_nothing_is_right_by_no_tie(model):
    with torch.no_grad():
        flat = tiny_text_model()
        flat.module.lm_head.weight.zero_()
    found = wc.competence(flat, wc.load_task("ioi").pairs(flat, 20))
    assert (found.accuracy.value, found.top1.value, found.verdict) == (0, 0, "not solved")


def made(right, n=100, chance=1 / 3, difference=1.0):
    sample = torch.linspace(-0.5, 0.5, n) + difference
    return Competence(
        model="M",
        task="T",
        corruption="c",
        n=n,
        chance=chance,
        accuracy=proportion(right, n),
        top1=proportion(right // 2, n),
        metric_clean=mean_estimate(sample),
        metric_corrupted=mean_estimate(-sample),
        data_hash="h",
        seed=0,
        prepends_bos=False,
        path_taken="fast",
    )


@pytest.mark.parametrize(
    ("right", "difference", "verdict", "words"),
    [
        (98, 1.0, "solved", "M solves T: right among the candidates in 98 % [93, 99] of 100 prompts (chance 33 %)"),
        (70, 1.0, "above chance", "M does better than chance on T"),
        (37, 1.0, "not solved", "M does not solve T"),
        (98, 0.0, "not solved", "M does not solve T"),
    ],
)
def test_the_verdict_follows_the_rule(right, difference, verdict, words):
    found = made(right, difference=difference)
    assert (found.verdict, found.solved, found.above_chance) == (verdict, verdict == "solved", verdict != "not solved")
    assert words in found.sentence


def test_one_prompt_proves_nothing():
    found = made(1, n=1)
    assert isinstance(found.metric_clean, Estimate)
    assert math.isnan(found.metric_clean.ci_low)
    assert found.verdict == "not solved"
    assert "nan" not in found.sentence


def test_the_frame_says_everything():
    found = made(98)
    frame = found.frame.set_index("quantity")
    assert list(frame.index) == ["accuracy", "top1", "logit_diff_clean", "logit_diff_corrupted"]
    assert frame.loc["accuracy", "value"] == 0.98
    assert frame.loc["accuracy", "chance"] == pytest.approx(1 / 3)
    assert frame.loc["logit_diff_corrupted", "ci_low"] == found.metric_corrupted.ci_low
    assert set(frame["unit"]) == {"share", "logits"}
    assert set(frame["verdict"]) == {"solved"}


def test_errors(model):
    pairs = wc.load_task("ioi").pairs(model, 3)
    with pytest.raises(PromptError, match="batch_size is 0"):
        wc.competence(model, pairs, batch_size=0)
    with pytest.raises(PromptError, match="vocabulary has 101 tokens"):
        wc.competence(wb.wrap_model(tiny_module("llama")), pairs)
