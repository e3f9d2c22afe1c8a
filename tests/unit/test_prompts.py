import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

import workbench as wb
from families import tiny_module
from tiny_text import tiny_text_model
from workbench.errors import DataError, PromptError, WorkbenchError
from workbench.prompts import ABSENT, PromptPairs

CLEAN = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
CORRUPTED = [[1, 2, 9, 4], [5, 6, 7, 8], [8, 10, 11, 13]]


@pytest.fixture(scope="module")
def model():
    return tiny_text_model()


def make(**changed):
    fields = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "answers": [20, 21, 22],
        "wrong_answers": [30, 31, 32],
    }
    return PromptPairs.from_tokens(**{**fields, **changed})


def test_defaults_read_the_last_token_and_take_both_answers_as_candidates():
    pairs = make()
    assert len(pairs) == 3
    assert pairs.lengths.tolist() == [4, 4, 4]
    assert pairs.answer_positions.tolist() == [3, 3, 3]
    assert pairs.candidates.tolist() == [[20, 30], [21, 31], [22, 32]]
    assert pairs.first_difference.tolist() == [2, 4, 0]
    assert pairs.spans == {}


def test_tensors_arrays_and_lists_are_the_same_and_are_copied():
    source = tensor(CLEAN)
    pairs = make(clean=source, corrupted=tensor(CORRUPTED).numpy(), answers=tensor([[20], [21], [22]]))
    assert pairs.data_hash == make().data_hash
    source[0, 0] = 99
    assert pairs.clean[0, 0] == 1


def test_rows_of_unequal_length_with_lengths():
    pairs = make(clean=[[1, 2], [5, 6, 7], [9]], corrupted=[[1, 3], [5, 6, 8], [7]], lengths=[2, 3, 1])
    assert pairs.clean.shape == (3, 3)
    assert pairs.answer_positions.tolist() == [1, 2, 0]
    assert pairs.first_difference.tolist() == [1, 2, 0]


def test_padding_never_counts():
    short = make(clean=[[1, 2]] * 3, corrupted=[[1, 3]] * 3)
    one = make(clean=[[1, 2, 0, 0]] * 3, corrupted=[[1, 3, 0, 0]] * 3, lengths=[2, 2, 2])
    two = make(clean=[[1, 2, 7, 7]] * 3, corrupted=[[1, 3, 8, 9]] * 3, lengths=[2, 2, 2])
    assert short.data_hash == one.data_hash == two.data_hash
    assert two.first_difference.tolist() == [1, 1, 1]


def test_sets_of_unequal_size_are_filled_up():
    pairs = make(answers=[[20, 21], [22], [23, 24, 25]], wrong_answers=[[30], [31, 32], [33]])
    assert pairs.answers.tolist() == [[20, 21, ABSENT], [22, ABSENT, ABSENT], [23, 24, 25]]
    assert set(pairs.candidates[1].tolist()) == {22, 31, 32, ABSENT}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"clean": [], "corrupted": []}, ["clean", "empty", "at least one"]),
        ({"clean": torch.zeros(0, 4, dtype=torch.long), "corrupted": torch.zeros(0, 4, dtype=torch.long)}, ["empty"]),
        ({"clean": [[1, 2], [3, 4, 5], [6]]}, ["clean[1]", "unequal length", "lengths="]),
        ({"corrupted": [[1, 2], [3, 4, 5], [6]]}, ["corrupted[1]", "unequal length", "lengths="]),
        ({"clean": [[1, 2], [3], [6, 7]], "corrupted": [[1, 2], [3], [6, 7]], "lengths": [2, 2, 2]}, ["lengths[1]"]),
        ({"corrupted": [[1, 2, 3]] * 3}, ["[3, 4]", "[3, 3]", "line up"]),
        ({"clean": [1, 2, 3]}, ["clean", "[n, t]"]),
        ({"lengths": [4, 5, 4]}, ["lengths[1]", "5", "1 to 4"]),
        ({"lengths": [4, 0, 4]}, ["lengths[1]", "0"]),
        ({"lengths": [4, 4]}, ["lengths", "2 entries", "3 prompts"]),
        ({"lengths": [4, 4, 2], "answer_positions": [3, 3, 2]}, ["answer_positions[2]", "2 tokens", "0 to 1"]),
        ({"answer_positions": [3, -1, 3]}, ["answer_positions[1]", "-1"]),
        ({"answers": [20, 21]}, ["answers", "2 rows", "3 prompts"]),
        ({"answers": [20, 31, 22]}, ["prompt 1", "31", "answers", "wrong_answers"]),
        ({"answers": [[20, 20], [21], [22]]}, ["answers[0]", "once"]),
        ({"answers": [20, -3, 22]}, ["answers[1]", "-3"]),
        ({"answers": torch.tensor([[20], [ABSENT], [22]])}, ["answers[1]", "at least one"]),
        ({"answers": [20.0, float("nan"), 22.0]}, ["answers", "integers", "float"]),
        ({"clean": tensor(CLEAN).double()}, ["clean", "integers", "float64"]),
        ({"clean": [[1, 2, 3, -4], *CLEAN[1:]]}, ["clean[0]", "-4", "negative"]),
        ({"candidates": [[20, 40], [21, 31], [22, 32]]}, ["candidates[0]", "30"]),
        ({"templates": ["a", "b"]}, ["templates", "2 names", "3 prompts"]),
        ({"spans": {"S2": [0, 1]}}, ["spans['S2']", "[3]"]),
        ({"spans": {"S2": [0, 1, 4]}}, ["spans['S2'][2]", "4"]),
    ],
)
def test_what_does_not_fit_is_named(changed, words):
    with pytest.raises(PromptError) as caught:
        make(**changed)
    for word in words:
        assert word in str(caught.value)


def test_ids_outside_the_vocabulary_are_named_when_a_model_is_given():
    model = wb.wrap_model(tiny_module("gpt2"))
    make(model=model)
    for name, value in (("corrupted", [[1, 2, 101, 4], *CORRUPTED[1:]]), ("answers", [20, 101, 22])):
        with pytest.raises(PromptError, match=rf"{name}\[\d\] has token id 101.* 101 tokens"):
            make(model=model, **{name: value})


def test_padding_without_lengths_is_noticed(model):
    padded = tiny_text_model(pad_token="<pad>")
    pad = padded.tokenizer.pad_token_id
    rows = [[1, 2, 3], [4, 5, pad]]
    with pytest.raises(PromptError, match=r"clean\[1\] ends in the padding token .* lengths="):
        PromptPairs.from_tokens(rows, rows, [7, 8], [9, 10], model=padded)
    assert PromptPairs.from_tokens(rows, rows, [7, 8], [9, 10], [3, 2], model=padded).lengths.tolist() == [3, 2]


# --- texts ------------------------------------------------------------------------------------------


def test_texts_are_tokenised_and_padded(model):
    pairs = PromptPairs.from_texts(
        model,
        ["Then Mary gave a ring to", "Mary and John"],
        ["Then John gave a ring to", "Mary and Alice"],
        [" John", [" John", " Alice"]],
        [" Mary", " Tom"],
        spans={"first": [1, 0]},
        templates=["one", "two"],
    )
    assert pairs.lengths.tolist() == [6, 3]
    assert model.to_str_tokens(pairs.clean[1, :3]) == ["Mary", " and", " John"]
    assert pairs.answers[0].tolist() == [model.single_token(" John"), ABSENT]
    assert pairs.first_difference.tolist() == [1, 2]
    assert pairs.prepends_bos is False
    assert pairs.templates == ("one", "two")


def test_bos_follows_the_tokenizer_unless_asked_and_is_recorded():
    model = tiny_text_model(bos_token="<s>")
    texts = (["Then Mary and"], ["Then John and"], [" John"], [" Mary"])
    assert PromptPairs.from_texts(model, *texts).prepends_bos is False
    with_bos = PromptPairs.from_texts(model, *texts, bos=True)
    assert with_bos.prepends_bos is True
    assert with_bos.clean[0, 0] == model.tokenizer.bos_token_id
    assert with_bos.first_difference.tolist() == [2]


def test_versions_of_unequal_length_are_named_with_both_counts(model):
    with pytest.raises(PromptError, match=r"prompt 1: clean is 3 tokens and corrupted is 4.*' Tom'"):
        PromptPairs.from_texts(
            model,
            ["Mary and", "Mary and John"],
            ["John and", "Mary and John Tom"],
            [" Tom", " Tom"],
            [" Ann", " Ann"],
        )


def test_an_answer_of_several_tokens_shows_its_split(model):
    with pytest.raises(PromptError) as caught:
        PromptPairs.from_texts(model, ["Mary and"], ["John and"], [" Mary-Ann"], [" Tom"])
    for word in ("answers[0]", "' Mary-Ann'", "3 tokens", "[' Mary', '-', 'Ann']", "single token"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("word", "words"),
    [(" nosuchword", r"unknown to this tokenizer \(it reads '<unk>'\)"), ("  Tom", r"2 tokens.*; ' Tom' would be one")],
)
def test_a_word_that_is_no_token_gets_the_remedy(model, word, words):
    with pytest.raises(PromptError, match=rf"wrong_answers\[0\].*{words}"):
        PromptPairs.from_texts(model, ["Mary and"], ["John and"], [" Ann"], [word])


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (([], [], [], []), "clean is empty"),
        ((["Mary"], ["Mary", "John"], [" Tom"], [" Ann"]), "1 texts and corrupted has 2"),
        (("Mary", ["John"], [" Tom"], [" Ann"]), "clean is one string"),
        ((["Mary"], ["John"], " Tom", [" Ann"]), "answers is one string"),
    ],
)
def test_bad_texts(model, texts, words):
    with pytest.raises(PromptError, match=words):
        PromptPairs.from_texts(model, *texts)


# --- CSV --------------------------------------------------------------------------------------------


def write(tmp_path, text):
    path = tmp_path / "mine.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_of_ids_as_eap_ig_writes_it(model, tmp_path):
    tom, ann, mary = (model.single_token(word) for word in (" Tom", " Ann", " Mary"))
    path = write(
        tmp_path,
        f',clean,corrupted,correct_idx,incorrect_idx\n0,Mary and,John and,{tom},"[{ann}, {mary}]"\n'
        f'1,"Mary, and","John, and",[{tom}],{ann}\n',
    )
    pairs = PromptPairs.from_csv(model, path)
    assert pairs.answers.tolist() == [[tom], [tom]]
    assert pairs.wrong_answers.tolist() == [[ann, mary], [ann, ABSENT]]
    assert pairs.lengths.tolist() == [2, 3]
    assert pairs.task == "mine"


def test_csv_of_words_equals_from_texts(model, tmp_path):
    path = write(
        tmp_path, 'template,clean,corrupted,correct,incorrect\nt1,Mary and,John and, Tom,"["" Ann"", "" Mary""]"\n'
    )
    pairs = PromptPairs.from_csv(model, path)
    same = PromptPairs.from_texts(model, ["Mary and"], ["John and"], [" Tom"], [[" Ann", " Mary"]])
    assert pairs.data_hash == same.data_hash
    assert pairs.templates == ("t1",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("clean,corrupted,correct\nMary,John, Tom\n", r"\['incorrect'\].*header must name"),
        ("", r"is empty: its first line must name the columns"),
        ("clean,corrupted,correct,incorrect\n", "no rows"),
        ("clean,corrupted,correct,incorrect\nMary and,John and, Tom\n", "line 2: incorrect is empty"),
        ("clean,corrupted,correct,incorrect\nMary and,,x,y\n", "line 2: corrupted is empty"),
        ("clean,corrupted,correct_idx,incorrect_idx\nMary and,John and,5,six\n", "line 2: incorrect_idx is 'six'"),
        ("clean,corrupted,correct_idx,incorrect_idx\nMary and,John and,5,6.5\n", "line 2: incorrect_idx is '6.5'"),
        ("clean,corrupted,correct_idx,incorrect_idx\nMary and,John and,[],6\n", "line 2: correct_idx"),
        ("clean,corrupted,correct_idx,incorrect_idx\nMary and,John and,5,999999\n", "999999.*vocabulary"),
        ("clean,corrupted,correct,incorrect\nMary and,John and, Mary-Ann, Tom\n", r"line 2: correct is.*3 tokens"),
        ("clean,corrupted,correct,incorrect\nMary and,John, Mary, Tom\n", "line 2: clean is 2 .*corrupted is 1"),
        ("clean,corrupted,correct,incorrect\nMary and,John and, Tom, Tom\n", "line 2: ' Tom' is in correct and in inc"),
        ("clean,corrupted,correct,incorrect\nMary and,Mary and, Tom, John\n", "line 2: clean and corrupted are both"),
        ("clean,corrupted,correct,incorrect\nMary, and,John, and, Tom, Jo\n", "line 2: 6 cells for 4 columns.*quotes"),
        (
            "clean,corrupted,correct_idx,incorrect_idx\nMary and,John and,5,5\n",
            "line 2: 5 is in correct_idx and in inc",
        ),
    ],
)
def test_wrong_csv(model, tmp_path, text, words):
    with pytest.raises(PromptError, match=words):
        PromptPairs.from_csv(model, write(tmp_path, text))


def test_csv_that_cannot_be_read(model, tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv"):
        PromptPairs.from_csv(model, tmp_path / "nothing.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00clean")
    with pytest.raises(DataError, match=r"binary\.csv.*UTF-8"):
        PromptPairs.from_csv(model, tmp_path / "binary.csv")


# --- subset, split, concat ----------------------------------------------------------------------------


@st.composite
def batches(draw):
    n = draw(st.integers(2, 12))
    lengths = draw(st.lists(st.integers(1, 6), min_size=n, max_size=n))
    rows = [draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)) for length in lengths]
    others = [draw(st.lists(st.integers(0, 9), min_size=length, max_size=length)) for length in lengths]
    families = draw(st.lists(st.sampled_from(["a/1", "a/2", "b/1", "c"]), min_size=n, max_size=n))
    return PromptPairs.from_tokens(
        rows,
        others,
        [[100 + i] for i in range(n)],
        [[200 + i, 300 + i] if i % 2 else [200 + i] for i in range(n)],
        lengths,
        templates=families,
        spans={"at": [length - 1 for length in lengths]},
        task="t",
        seed=3,
    )


def rows_of(pairs):
    """Everything about each prompt, as comparable values."""
    found = []
    for i, length in enumerate(pairs.lengths.tolist()):
        sets = [
            tuple(x for x in ids[i].tolist() if x != ABSENT)
            for ids in (pairs.answers, pairs.wrong_answers, pairs.candidates)
        ]
        tokens = (tuple(pairs.clean[i, :length].tolist()), tuple(pairs.corrupted[i, :length].tolist()))
        places = (int(pairs.answer_positions[i]), int(pairs.spans["at"][i]))
        found.append((*tokens, *sets, *places, pairs.templates[i]))
    return found


@given(batches(), st.floats(0.05, 0.95), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_split_is_disjoint_complete_and_repeatable(pairs, fraction, seed):
    train, held_out = pairs.split(fraction, seed)
    assert sorted(rows_of(train) + rows_of(held_out)) == sorted(rows_of(pairs))
    answers = [set(part.answers[:, 0].tolist()) for part in (train, held_out)]
    assert not answers[0] & answers[1]
    assert len(train) == min(max(round(fraction * len(pairs)), 1), len(pairs) - 1)
    again = pairs.split(fraction, seed)
    assert (again[0].data_hash, again[1].data_hash) == (train.data_hash, held_out.data_hash)


@given(batches(), st.floats(0.05, 0.95), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_split_by_template_keeps_families_apart(pairs, fraction, seed):
    families = {name[0] for name in pairs.templates}
    if len(families) < 2:
        with pytest.raises(PromptError, match="two template families"):
            pairs.split(fraction, seed, by_template=True)
        return
    train, held_out = pairs.split(fraction, seed, by_template=True)
    assert sorted(rows_of(train) + rows_of(held_out)) == sorted(rows_of(pairs))
    assert not {name[0] for name in train.templates} & {name[0] for name in held_out.templates}


@given(batches(), st.data())
@settings(max_examples=60, deadline=None)
def test_subset_and_concat_undo_each_other(pairs, data):
    cut = data.draw(st.integers(1, len(pairs) - 1))
    first, second = pairs.subset(slice(0, cut)), pairs.subset(torch.arange(len(pairs)) >= cut)
    assert first.clean.shape[1] == int(first.lengths.max())
    joined = PromptPairs.concat([first, second])
    assert rows_of(joined) == rows_of(pairs)
    assert joined.data_hash == pairs.data_hash
    assert (joined.task, joined.seed) == ("t", 3)
    order = data.draw(st.permutations(range(len(pairs))))
    assert rows_of(pairs.subset(order)) == [rows_of(pairs)[i] for i in order]


@pytest.mark.parametrize("index", [[], [3], [-4], torch.zeros(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)])
def test_bad_subsets(index):
    with pytest.raises(PromptError, match="index"):
        make().subset(index)


def test_bad_splits():
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(PromptError, match="between 0 and 1"):
            make().split(fraction)
    with pytest.raises(PromptError, match="at least 2"):
        make().subset([0]).split()
    with pytest.raises(PromptError, match="templates="):
        make().split(by_template=True)


def test_concat_drops_what_is_not_shared_and_refuses_mixed_bos():
    joined = PromptPairs.concat([make(task="a", seed=1, spans={"x": [0, 0, 0]}), make(task="b", seed=1)])
    assert (joined.task, joined.seed, joined.spans, joined.templates) == (None, 1, {}, None)
    with pytest.raises(PromptError, match="BOS policy"):
        PromptPairs.concat([make(prepends_bos=True), make(prepends_bos=False)])
    with pytest.raises(PromptError, match="at least one"):
        PromptPairs.concat([])


# --- identity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"clean": [[1, 2, 3, 5], *CLEAN[1:]]},
        {"corrupted": [[1, 2, 9, 5], *CORRUPTED[1:]]},
        {"answers": [23, 21, 22]},
        {"wrong_answers": [33, 31, 32]},
        {"answer_positions": [2, 3, 3]},
        {"lengths": [4, 4, 3]},
        {"candidates": [[20, 30, 40], [21, 31, 40], [22, 32, 40]]},
    ],
)
def test_the_hash_sees_every_change(changed):
    assert make(**changed).data_hash != make().data_hash


def test_the_hash_does_not_see_the_order_of_a_set_and_is_stable_over_processes():
    one, two = (make(answers=[ids, [21], [22]]).data_hash for ids in ([20, 25], [25, 20]))
    assert one == two
    code = (
        "from workbench.prompts import PromptPairs as P;"
        f"print(P.from_tokens({CLEAN}, {CORRUPTED}, [20, 21, 22], [30, 31, 32]).data_hash)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == make().data_hash


def test_pairs_are_frozen_and_print_shortly():
    pairs = make(task="ioi")
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.seed = 1
    assert repr(pairs) == "PromptPairs(3 prompts of 4-4 tokens, task='ioi')"
    assert pairs.to("cpu").data_hash == pairs.data_hash
    assert issubclass(PromptError, WorkbenchError)
