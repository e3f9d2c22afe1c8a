import json
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench_circuits as wc
from tiny_text import tiny_text_model
from workbench.errors import PromptError
from workbench.prompts import PromptPairs
from workbench_circuits.tasks import TASKS
from workbench_circuits.tasks.words import read_lines, with_article

CASES = [(name, corruption) for name in TASKS for corruption in wc.load_task(name).corruptions]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "brown", "black"]


@cache
def shared_model():
    return tiny_text_model()


@pytest.fixture(scope="module")
def model():
    return shared_model()


def text(model, ids, length):
    return "".join(model.to_str_tokens(ids[: int(length)]))


def texts(model, pairs):
    return [
        (text(model, clean, n), text(model, corrupted, n))
        for clean, corrupted, n in zip(pairs.clean, pairs.corrupted, pairs.lengths, strict=True)
    ]


def words_at(model, pairs, span, version="clean"):
    ids = getattr(pairs, version)[torch.arange(len(pairs)), pairs.spans[span]]
    return [word.strip() for word in model.to_str_tokens(ids)]


def differing(pairs):
    """Positions at which the two versions of each prompt differ."""
    return [
        [at for at in range(int(n)) if clean[at] != corrupted[at]]
        for clean, corrupted, n in zip(pairs.clean, pairs.corrupted, pairs.lengths, strict=True)
    ]


# --- every task ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "corruption"), CASES)
@given(n=st.integers(1, 30), seed=st.integers(0, 10**6))
@settings(max_examples=6, deadline=None)
def test_prompts_are_distinct_aligned_and_answered(name, corruption, n, seed):
    model = shared_model()
    pairs = wc.load_task(name).pairs(model, n, seed=seed, corruption=corruption)
    assert (len(pairs), pairs.task, pairs.corruption, pairs.seed) == (n, name, corruption, seed)
    assert len({clean for clean, _ in texts(model, pairs)}) == n
    assert model.tokenizer.unk_token_id not in pairs.clean
    assert model.tokenizer.unk_token_id not in pairs.corrupted
    assert torch.equal(pairs.spans["END"], pairs.lengths - 1)
    assert torch.equal(pairs.answer_positions, pairs.lengths - 1)
    assert (pairs.first_difference < pairs.lengths).all()
    assert name == "docstring" or all(text.count("  ") == 0 for both in texts(model, pairs) for text in both)
    assert {"END", *pairs.spans} == set(pairs.spans)
    assert all((at >= 0).all() for at in pairs.spans.values())


def test_the_same_seed_gives_the_same_prompts_in_another_process(model):
    code = (
        "import json, workbench_circuits as wc; from tiny_text import tiny_text_model;"
        "from workbench_circuits.tasks import TASKS; model = tiny_text_model();"
        "drawn = {name: wc.load_task(name).pairs(model, 6, seed=5) for name in TASKS};"
        "print(json.dumps({name: [p.data_hash, p.templates, {k: v.tolist() for k, v in p.spans.items()}]"
        " for name, p in drawn.items()}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=__file__.rsplit("/unit/", 1)[0],
        env={"PYTHONHASHSEED": "7", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(out.stdout.strip().splitlines()[-1])
    for name in TASKS:
        mine = wc.load_task(name).pairs(model, 6, seed=5)
        assert found[name] == [mine.data_hash, list(mine.templates), {k: v.tolist() for k, v in mine.spans.items()}]
        assert wc.load_task(name).pairs(model, 6, seed=6).data_hash != mine.data_hash


@pytest.mark.parametrize("name", TASKS)
def test_splits_share_no_template_family_and_cover_all(model, name):
    task = wc.load_task(name)
    families = [
        {template.split("/")[0] for template in task.pairs(model, 150, seed=1, split=split).templates}
        for split in ("train", "held_out", None)
    ]
    assert not families[0] & families[1]
    assert families[0] | families[1] == families[2]
    assert min(len(families[0]), len(families[1])) >= 4


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_that_of_the_candidates(model, name):
    task = wc.load_task(name)
    pairs = task.pairs(model, 200)
    shares = (pairs.answers >= 0).sum(1) / (pairs.candidates >= 0).sum(1)
    spread = 3 * float(shares.std()) / 200**0.5
    assert task.chance == pytest.approx(float(shares.mean()), abs=spread + 1e-6)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"n": 0}, "n=0"),
        ({"corruption": "acb"}, "'acb'.*did you mean 'abc'"),
        ({"split": "test"}, "'test'.*'train', 'held_out'"),
    ],
)
def test_bad_arguments_are_named(model, changed, words):
    with pytest.raises(PromptError, match=words):
        wc.load_task("ioi").pairs(model, **{"n": 2, **changed})


def test_unknown_tasks_and_options_are_named():
    with pytest.raises(PromptError, match=r"'colored_object'.*did you mean 'colored_objects'"):
        wc.load_task("colored_object")
    with pytest.raises(PromptError, match=r"'ioi' does not take .*'n_objects'"):
        wc.load_task("ioi", n_objects=2)
    with pytest.raises(PromptError, match="n_objects is 1"):
        wc.load_task("colored_objects", n_objects=1)


def test_too_few_words_are_listed():
    names = read_lines("names.txt")
    with pytest.raises(PromptError) as caught:
        wc.load_task("ioi").pairs(tiny_text_model(without=tuple(names[4:])), 2)
    for word in ("names.txt", f"4 of {len(names)} words", "5 are needed", names[4]):
        assert word in str(caught.value)
    model = tiny_text_model(without=("red", "Orange", "blue", "Blue"))
    with pytest.raises(PromptError, match=r"colours\.txt: 5 of 8 .* 6 are needed.*: red, orange, blue\."):
        wc.load_task("colored_objects").pairs(model, 2)


def test_a_model_without_tokenizer_is_told_so():
    import workbench as wb
    from families import tiny_module

    with pytest.raises(PromptError, match="no tokenizer"):
        wc.load_task("ioi").pairs(wb.wrap_model(tiny_module("gpt2")), 2)


def test_more_prompts_than_there_are_is_an_error():
    places, objects = (read_lines(f"{name}.txt") for name in ("places", "objects_ioi"))
    model = tiny_text_model(without=(*read_lines("names.txt")[5:], *places[1:], *objects[1:]))
    task = wc.load_task("ioi")
    # 5 names make 20 ordered pairs (IO, S); half of the 16 templates, two orders, one place, one object.
    assert len(task.pairs(model, 200, split="train")) == 200
    with pytest.raises(PromptError, match=r"gave only 3\d\d different prompts where n=400"):
        task.pairs(model, 400, split="train")


# --- IOI ----------------------------------------------------------------------------------------------


def test_ioi_templates():
    templates = read_lines("templates_ioi.txt")
    assert len(templates) >= 15
    for template in templates:
        slots = re.findall(r"\{(\w+)\}", template)
        assert Counter(slots) == Counter(["A", "B", "S", "PLACE", "AN_OBJECT"])
        assert [slot for slot in slots if slot in "ABS"] == ["A", "B", "S"]
        assert all(template[match.start() - 1] == " " for match in re.finditer(r"\{", template))
        assert template.endswith(" to")


@given(n=st.integers(2, 24), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_ioi_names_and_positions(n, seed):
    model = shared_model()
    pairs = wc.load_task("ioi").pairs(model, n, seed=seed)
    names = set(read_lines("names.txt"))
    orders = Counter(template.split("/")[1] for template in pairs.templates)
    assert abs(orders["ABBA"] - orders["BABA"]) <= 1
    spans = {span: words_at(model, pairs, span) for span in ("IO", "S1", "S2", "S1+1")}
    answers = [word.strip() for word in model.to_str_tokens(pairs.answers[:, 0])]
    wrong = [word.strip() for word in model.to_str_tokens(pairs.wrong_answers[:, 0])]
    assert spans["IO"] == answers
    assert spans["S1"] == spans["S2"] == wrong
    assert torch.equal(pairs.spans["S1+1"], pairs.spans["S1"] + 1)
    for i, (clean, _) in enumerate(texts(model, pairs)):
        people = [word for word in re.findall(r"[A-Za-z]+", clean) if word in names]
        io, s = answers[i], wrong[i]
        assert io != s
        assert people == ([io, s, s] if pairs.templates[i].endswith("ABBA") else [s, io, s])
        assert not re.search(r"\ba [aeiou]", clean)


@given(n=st.integers(2, 24), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_abc_puts_three_unrelated_names_in_the_same_places(n, seed):
    model = shared_model()
    pairs = wc.load_task("ioi").pairs(model, n, seed=seed, corruption="abc")
    for i, places in enumerate(differing(pairs)):
        assert places == sorted(int(pairs.spans[span][i]) for span in ("IO", "S1", "S2"))
        old, new = ({int(x) for x in version[i, places]} for version in (pairs.clean, pairs.corrupted))
        assert len(new) == 3
        assert not old & new
        assert new <= {model.single_token(f" {name}") for name in read_lines("names.txt")}


@given(n=st.integers(2, 24), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_s2_flip_changes_only_the_second_subject(n, seed):
    model = shared_model()
    pairs = wc.load_task("ioi").pairs(model, n, seed=seed, corruption="s2_flip")
    assert differing(pairs) == [[at] for at in pairs.spans["S2"].tolist()]
    assert words_at(model, pairs, "S2", "corrupted") == words_at(model, pairs, "IO")


def test_ioi_corruptions_share_the_clean_prompts(model):
    task = wc.load_task("ioi")
    one, two = (task.pairs(model, 12, seed=3, corruption=name) for name in task.corruptions)
    assert torch.equal(one.clean, two.clean)
    assert torch.equal(one.answers, two.answers)


def test_prompts_of_one_template_have_one_length_and_the_same_positions(model):
    pairs = wc.load_task("ioi").pairs(model, 120, seed=2)
    seen = {}
    for i, template in enumerate(pairs.templates):
        places = (int(pairs.lengths[i]), *(int(at[i]) for at in pairs.spans.values()))
        assert seen.setdefault(template, places) == places


def test_multi_token_names_are_left_out():
    names = read_lines("names.txt")
    model = tiny_text_model(without=tuple(names[10:]))
    pairs = wc.load_task("ioi").pairs(model, 40)
    assert set(words_at(model, pairs, "IO")) | set(words_at(model, pairs, "S1")) <= set(names[:10])


# --- Colored Objects ------------------------------------------------------------------------------------

_LIST = r"(an? \w+ \w+), (an? \w+ \w+), and (an? \w+ \w+)"
_QUESTION = rf"Q: On the (?:table|desk|floor), (?:there is|you see|I see) {_LIST}\. What color is the (\w+)\?\nA:"


@given(n=st.integers(1, 20), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_colored_objects_format_and_answers(n, seed):
    model = shared_model()
    pairs = wc.load_task("colored_objects").pairs(model, n, seed=seed)
    for i, (clean, _) in enumerate(texts(model, pairs)):
        match = re.fullmatch(rf"{_QUESTION} (\w+)\n{_QUESTION}", clean)
        assert match, clean
        groups = match.groups()
        shown, (shown_asked, shown_answer), listed, asked = groups[:3], groups[3:5], groups[5:8], groups[8]
        pictures = [dict(reversed(thing.split()[1:]) for thing in things) for things in (shown, listed)]
        assert pictures[0][shown_asked].capitalize() == shown_answer
        answer = model.to_str_tokens(pairs.answers[i])[0]
        assert answer == f" {pictures[1][asked].capitalize()}"
        colours = [set(picture.values()) for picture in pictures]
        assert len(colours[0] | colours[1]) == 6
        assert colours[0] | colours[1] <= set(COLOURS)
        assert len(set(pictures[0]) | set(pictures[1])) == 6
        candidates = {word.strip().lower() for word in model.to_str_tokens(pairs.candidates[i])}
        assert candidates == colours[1]
        for thing in (*shown, *listed):
            assert thing.startswith("an ") == thing.split()[1].startswith("o")


@given(n=st.integers(1, 20), seed=st.integers(0, 10**6), n_objects=st.sampled_from([2, 3, 4]))
@settings(max_examples=15, deadline=None)
def test_mindiff_changes_only_the_asked_object_and_the_answer(n, seed, n_objects):
    model = shared_model()
    pairs = wc.load_task("colored_objects", n_objects=n_objects).pairs(model, n, seed=seed)
    assert differing(pairs) == [[at] for at in pairs.spans["asked"].tolist()]
    assert not (pairs.answers == pairs.wrong_answers).any()
    spans = {name: words_at(model, pairs, name) for name in pairs.spans}
    for version, answers in (("clean", pairs.answers), ("corrupted", pairs.wrong_answers)):
        asked = words_at(model, pairs, "asked", version)
        for i, word in enumerate(asked):
            place = next(k for k in range(1, n_objects + 1) if spans[f"object{k}"][i] == word)
            colour = model.to_str_tokens(answers[i])[0].strip()
            assert spans[f"colour{place}"][i].capitalize() == colour
    for k in range(1, n_objects + 1):
        assert torch.equal(pairs.spans[f"object{k}"], pairs.spans[f"colour{k}"] + 1)


def test_two_objects_are_a_task_of_their_own_name(model):
    task = wc.load_task("colored_objects", n_objects=2)
    pairs = task.pairs(model, 3)
    assert (task.name, pairs.task, task.chance) == ("colored_objects_2", "colored_objects_2", 0.5)
    assert all(
        re.search(r"see an? \w+ \w+ and an? \w+ \w+\.|is an? \w+ \w+ and an?", clean)
        for clean, _ in texts(model, pairs)
    )
    assert pairs.candidates.shape[1] == 2


def test_articles():
    assert with_article("orange cup") == "an orange cup"
    assert with_article("red envelope") == "a red envelope"


def test_a_tokenizer_that_splits_by_surroundings_is_noticed(model):
    from workbench_circuits.tasks.base import Example, find

    example = Example(
        clean="Then Mary",
        corrupted={},
        answer=" John",
        wrong_answer={},
        candidates=(),
        template="",
        marks={"IO": ("Mary", 1)},
        after={},
    )
    with pytest.raises(PromptError, match=r"'Mary' is the token .* looked for as IO"):
        find(example, model.to_tokens("Then Mary")[0][0].tolist(), model, "IO")


def test_pairs_move_and_split_like_any_other(model):
    pairs = wc.load_task("ioi").pairs(model, 20)
    assert isinstance(pairs, PromptPairs)
    train, held_out = pairs.split(0.5, by_template=True)
    assert len(train) + len(held_out) == 20
    assert train.spans.keys() == pairs.spans.keys()
