"""Tasks of the user's own: CSV files and functions, and what wrong ones are told."""

import random
import sys

import pytest
import torch

import workbench_circuits as wc
from tiny_text import tiny_text_model
from workbench.errors import DataError, PromptError
from workbench.prompts import PromptPairs
from workbench_circuits.tasks import CsvTask, FunctionTask

HEAD = "clean,corrupted,correct,incorrect"


@pytest.fixture(scope="module")
def model():
    return tiny_text_model()


def ioi_rows(model, n=12):
    """Prompts of IOI as a user would write them: texts, words and ids."""
    pairs = wc.load_task("ioi").pairs(model, n, seed=3)
    rows = []
    for i in range(n):
        length = int(pairs.lengths[i])
        clean, corrupted = ("".join(model.to_str_tokens(ids[i, :length])) for ids in (pairs.clean, pairs.corrupted))
        rows.append((clean, corrupted, int(pairs.answers[i, 0]), int(pairs.wrong_answers[i, 0]), pairs.templates[i]))
    return pairs, rows


def write(path, header, rows):
    import csv

    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header.split(","))
        writer.writerows(rows)
    return path


@pytest.fixture
def files(model, tmp_path):
    """The same prompts with ids, as EAP-IG writes them, and with words."""
    pairs, rows = ioi_rows(model)
    ids = write(tmp_path / "ids.csv", "clean,corrupted,correct_idx,incorrect_idx", [row[:4] for row in rows])
    words = [(a, b, *model.to_str_tokens([x, y]), t) for a, b, x, y, t in rows]
    return pairs, ids, write(tmp_path / "words.csv", f"{HEAD},template", words)


def test_a_file_gives_the_prompts_that_went_into_it(model, files):
    pairs, ids, words = files
    for path in (ids, words, str(words)):
        task = wc.load_task(path)
        found = task.pairs(model)
        assert isinstance(task, CsvTask)
        assert (task.name, found.task, found.corruption) == (found.task, task.name, "given")
        assert torch.equal(found.clean, pairs.clean)
        assert torch.equal(found.corrupted, pairs.corrupted)
        assert torch.equal(found.answers, pairs.answers)
        assert torch.equal(found.wrong_answers, pairs.wrong_answers)
    assert wc.competence(model, found).chance == 0.5


def test_some_rows_are_drawn_without_replacement(model, files):
    pairs, ids, _ = files
    task = wc.load_task(ids)
    some, again, other = (task.pairs(model, 5, seed=seed) for seed in (1, 1, 2))
    assert some.data_hash == again.data_hash != other.data_hash
    rows = {tuple(row.tolist()) for row in some.clean}
    assert len(rows) == 5
    assert rows <= {tuple(row[: some.clean.shape[1]].tolist()) for row in pairs.clean}
    with pytest.raises(PromptError, match=r"n=13 prompts of .*ids\.csv: it has 12; ask for 1 to 12"):
        task.pairs(model, 13)


def test_splits_of_a_file_keep_families_apart(model, files):
    _, ids, words = files
    halves = [wc.load_task(words).pairs(model, split=split) for split in ("train", "held_out")]
    families = [{name.split("/")[0] for name in half.templates} for half in halves]
    assert not families[0] & families[1]
    assert sum(map(len, halves)) == 12
    halves = [wc.load_task(ids).pairs(model, split=split) for split in ("train", "held_out")]
    assert [len(half) for half in halves] == [6, 6]


def test_a_split_needs_two_families(model, tmp_path, files):
    _, rows = ioi_rows(model, 3)
    path = write(
        tmp_path / "one.csv", "clean,corrupted,correct_idx,incorrect_idx,template", [(*r[:4], "a") for r in rows]
    )
    with pytest.raises(PromptError, match="only one template family"):
        wc.load_task(path).pairs(model, split="train")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", PromptError, "is empty: its first line must name the columns"),
        (b"clean,corrupted,right\nMary,John, Tom\n", PromptError, r"lacks the columns \['correct', 'incorrect'\]"),
        (f"{HEAD}\n".encode(), PromptError, "has a header and no rows"),
        (f"{HEAD}\nMary and,John, Tom, Mark\n".encode(), PromptError, r"line 2: clean is 2 tokens and corrupted is 1"),
        (
            f"{HEAD}\nMary and,John and, Tom, Mark\nMary,John, Mary-Ann, Tom\n".encode(),
            PromptError,
            "line 3: correct is ' Mary-Ann', which is 3 tokens.*choose another word",
        ),
        (f"{HEAD}\nMary,Mary, Tom, Mark\n".encode(), PromptError, "line 2: clean and corrupted are both 'Mary'"),
        (f"{HEAD}\nMary,John, Tom, Tom\n".encode(), PromptError, "line 2: ' Tom' is in correct and in incorrect"),
        (f"{HEAD}\nMary,John, Tom, Mark\nJos\xe9,John, Tom, Mark\n".encode("latin-1"), DataError, r"line 3: byte 0xe9"),
        (f"{HEAD}\nMary,John, Tom, Mark\n".encode("utf-16"), DataError, r"line 1: byte 0xff.*UTF-16.*save it as UTF-8"),
        (f'{HEAD}\n"Mary,John, Tom, Mark\n'.encode(), DataError, "cannot be read as a CSV file"),
        (
            b"clean,corrupted,correct_idx,incorrect_idx\nMary,John,3,50256\n",
            PromptError,
            "line 2: incorrect_idx is 50256, but the model's vocabulary is 0 to .*other tokenizer",
        ),
    ],
)
def test_wrong_files(model, tmp_path, data, error, words):
    path = tmp_path / "mine.csv"
    path.write_bytes(data)
    with pytest.raises(error, match=words.replace("other tokenizer", "another tokenizer")) as caught:
        wc.load_task(path).pairs(model)
    assert str(path) in str(caught.value)


def test_lines_count_line_feeds_inside_quotes(model, tmp_path):
    path = tmp_path / "two.csv"
    path.write_text(f'{HEAD}\n"Mary\nand","John\nand", Tom, Mark\nMary,John and, Tom, Mark\n', encoding="utf-8")
    with pytest.raises(PromptError, match="line 5: clean is 1 tokens and corrupted is 2"):
        wc.load_task(path).pairs(model)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.csv is no file.*ioi"):
        wc.load_task(tmp_path / "none.csv")
    with pytest.raises(
        PromptError, match=r"task is 'iol'.*did you mean 'ioi'.*a \.csv file or package\.module:function"
    ):
        wc.load_task("iol")
    with pytest.raises(PromptError, match=r"corruption of x\.csv is 'abc'"):
        CsvTask(path=tmp_path / "x.csv").pairs(tiny_text_model(), corruption="abc")


# --- functions ------------------------------------------------------------------------------------


def capital_letters(draw: random.Random):
    """Say which name comes next."""
    first, second, third = draw.sample(["Mary", "John", "Tom", "Anna", "Mark"], 3)
    return {
        "clean": f"{first} and {second} met {first} and",
        "corrupted": {
            "other": f"{first} and {second} met {third} and",
            "swap": f"{third} and {second} met {first} and",
        },
        "correct": f" {second}",
        "incorrect": [f" {first}", f" {third}"],
        "template": "met",
        "spans": {"NAME": second, "AGAIN": (first, 0)},
    }


def test_a_function_makes_prompts(model):
    task = wc.Task.from_function(capital_letters)
    assert isinstance(task, FunctionTask)
    assert (task.name, task.title, task.corruptions) == ("capital_letters", "capital_letters", ("other", "swap"))
    assert task.description == "Say which name comes next."
    assert task.chance == pytest.approx(1 / 3)
    pairs = task.pairs(model, 20, seed=4, corruption="swap")
    assert isinstance(pairs, PromptPairs)
    assert (pairs.task, pairs.corruption, len(pairs)) == ("capital_letters", "swap", 20)
    assert set(pairs.first_difference.tolist()) == {0}
    assert pairs.spans["NAME"].tolist() == [2] * 20
    # "AGAIN" is the word with a space in front, which the text's first word has not.
    assert pairs.spans["AGAIN"].tolist() == [4] * 20
    assert wc.competence(model, pairs).chance == pytest.approx(1 / 3)
    assert task.pairs(model, 20, seed=4, corruption="swap").data_hash == pairs.data_hash
    named = wc.load_task(capital_letters, title="Names")
    assert named.title == "Names"


def test_a_function_by_its_import_name(model, tmp_path, monkeypatch):
    (tmp_path / "my_tasks.py").write_text(
        "def pets(draw):\n"
        "    a, b = draw.sample(['dog', 'cat', 'cow', 'fish'], 2)\n"
        "    return {'clean': f'the {a} and the', 'corrupted': f'the {b} and the', 'correct': f' {a}',"
        " 'incorrect': f' {b}'}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = wc.load_task("my_tasks:pets")
    assert (task.name, task.source, task.corruptions) == ("pets", "my_tasks:pets", ("given",))
    assert len(task.pairs(model, 4)) == 4
    sys.modules.pop("my_tasks")
    for wrong in ("my_tasks:birds", "no_such_module:pets", "my_tasks:"):
        with pytest.raises(PromptError, match="is no function that can be imported"):
            wc.load_task(wrong)


def broken(**changed):
    def function(draw):
        base = {"clean": "the dog", "corrupted": "the cat", "correct": " Mary", "incorrect": " John"}
        return {key: value for key, value in {**base, **changed}.items() if value is not None}

    return function


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (7, "got 7: give a function"),
        (lambda draw: "the dog", "returned 'the dog', expected a mapping with clean"),
        (broken(correct=None), r"lacks \['correct'\]"),
        (broken(answer=" x"), r"unknown keys \['answer'\]"),
        (broken(clean=3), "returned clean=3"),
        (broken(correct=[]), r"correct or incorrect is \[\]"),
        (broken(corrupted="the dog"), "clean and corrupted \\(given\\) are both 'the dog'"),
        (broken(corrupted="the cat sat"), "prompt 0: clean is 2 tokens and corrupted is"),
        (broken(correct=" Mary-Ann"), r"answers\[0\] is ' Mary-Ann', which is 3 tokens"),
        (broken(incorrect=" Mary"), "in answers and in wrong_answers"),
        (broken(spans={"PET": "cow"}), "looked for as PET"),
        (lambda draw: 1 / 0, "raised ZeroDivisionError"),
    ],
)
def test_wrong_functions(model, function, words):
    with pytest.raises(PromptError, match=words):
        wc.Task.from_function(function).pairs(model, 1)


def test_a_function_that_repeats_itself_and_one_asked_for_a_split(model):
    task = wc.Task.from_function(broken(), name="always")
    with pytest.raises(PromptError, match="always gave only 1 different prompts where n=2"):
        task.pairs(model, 2)
    with pytest.raises(PromptError, match=r"split='train' of always.*by_template=True"):
        task.pairs(model, 1, split="train")
    with pytest.raises(PromptError, match=r"does not take \['colour'\]"):
        wc.Task.from_function(broken(), colour=1)


# --- positions named in a file --------------------------------------------------------------------


def test_columns_can_name_positions_by_their_words(model, tmp_path):
    pairs = wc.load_task("ioi").pairs(model, 6, seed=1)
    rows = []
    for i in range(6):
        length = int(pairs.lengths[i])
        texts = ["".join(model.to_str_tokens(ids[i, :length])) for ids in (pairs.clean, pairs.corrupted)]
        io, s = (model.to_str_tokens(ids[i])[0] for ids in (pairs.answers, pairs.wrong_answers))
        rows.append((*texts, io, s, io.strip(), f"{s.strip()}#2", "" if i else texts[0].split(" ")[0]))
    path = write(tmp_path / "spans.csv", f"{HEAD},span:IO,span:S2,span:FIRST", rows)
    found = wc.load_task(path).pairs(model)
    assert torch.equal(found.spans["IO"], pairs.spans["IO"])
    assert torch.equal(found.spans["S2"], pairs.spans["S2"])
    assert found.spans["FIRST"].tolist() == [0, -1, -1, -1, -1, -1]
    assert torch.equal(found.spans["END"], pairs.answer_positions)
    # a BOS in front moves them all
    with_bos = PromptPairs.from_csv(tiny_text_model(bos_token="<s>"), path, bos=True)
    assert torch.equal(with_bos.spans["S2"], pairs.spans["S2"] + 1)
    assert with_bos.spans["FIRST"][0] == 1


def test_a_position_that_is_not_there_is_named(model, tmp_path):
    path = write(
        tmp_path / "spans.csv", f"{HEAD},span:PET", [("the dog and", "the cat and", " Mary", " John", "dog#2")]
    )
    with pytest.raises(PromptError, match=r"line 2: span:PET is 'dog', occurrence 2, and clean has it 1 times"):
        wc.load_task(path).pairs(model)
