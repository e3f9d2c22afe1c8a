"""The prompts of the tasks besides IOI and Colored Objects, read by other means than they were made by."""

import ast
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import workbench_circuits as wc
from tiny_text import tiny_text_model
from workbench.datafiles import data_path
from workbench.errors import PromptError

MODELS = {pairs: tiny_text_model(pairs_of_digits=pairs) for pairs in (False, True)}
DRAWN = {"n": st.integers(1, 20), "seed": st.integers(0, 10**6)}
quick = settings(max_examples=8, deadline=None)


def lines(name):
    text = data_path(f"{name}.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def read(pairs, model):
    """For each prompt: clean and corrupted text, answers and wrong answers without spaces."""
    for row in range(len(pairs)):
        length = int(pairs.lengths[row])
        both = ["".join(model.to_str_tokens(ids[row, :length])) for ids in (pairs.clean, pairs.corrupted)]
        sets = [
            {word.strip() for word in model.to_str_tokens(ids[row][ids[row] >= 0])}
            for ids in (pairs.answers, pairs.wrong_answers)
        ]
        yield (*both, *sets)


def word_at(pairs, model, span, row, version="clean"):
    return model.to_str_tokens([getattr(pairs, version)[row, pairs.spans[span][row]]])[0].strip()


def changed(pairs, row):
    return (pairs.clean[row] != pairs.corrupted[row]).nonzero().flatten().tolist()


@given(**DRAWN)
@quick
def test_greater_than_digit_by_digit(n, seed):
    model = MODELS[False]
    pairs = wc.load_task("greater_than").pairs(model, n, seed=seed)
    for row, (clean, corrupted, right, wrong) in enumerate(read(pairs, model)):
        century, first, last = re.search(r"(1\d)(\d\d)\b.*\b(1\d)$", clean).groups()
        assert century == last
        assert right == {str(digit) for digit in range(int(first[0]) + 1, 10)}
        assert wrong == {str(digit) for digit in range(int(first[0]))}
        assert corrupted == clean.replace(century + first, f"{century}01", 1)
        assert word_at(pairs, model, "YEAR", row) == first[0]
        assert word_at(pairs, model, "UNIT", row) == first[1]
        assert pairs.spans["CENTURY"][row] == pairs.lengths[row] - 2
        assert set(changed(pairs, row)) <= {int(pairs.spans["YEAR"][row]), int(pairs.spans["UNIT"][row])}


@given(**DRAWN)
@quick
def test_greater_than_in_pairs_of_digits(n, seed):
    model = MODELS[True]
    pairs = wc.load_task("greater_than").pairs(model, n, seed=seed)
    for row, (clean, corrupted, right, wrong) in enumerate(read(pairs, model)):
        century, first = re.search(r"(1\d)(\d\d)\b", clean).groups()
        assert clean.endswith(f" {century}")
        assert 2 <= int(first) <= 98
        assert right == {f"{number:02}" for number in range(int(first) + 1, 100)}
        assert wrong == {f"{number:02}" for number in range(int(first) + 1)}
        assert corrupted == clean.replace(century + first, f"{century}01", 1)
        assert changed(pairs, row) == [int(pairs.spans["YEAR"][row])]
        assert word_at(pairs, model, "YEAR", row) == first
        assert word_at(pairs, model, "CENTURY", row) == century


def test_greater_than_refuses_other_tokenizers():
    model = tiny_text_model()
    pieces = model.tokenizer
    from tokenizers import Regex, pre_tokenizers

    pieces.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?[A-Za-z]+|\n *|[0-9]{1,3}|[^A-Za-z\s]| +"), behavior="isolated"
    )
    with pytest.raises(PromptError, match="pairs of digits or digit by digit; this one cuts"):
        wc.load_task("greater_than").pairs(model, 2)


@given(**DRAWN, sizes=st.sampled_from([(16, 8), (9, 1), (20, 3)]))
@quick
def test_induction(n, seed, sizes):
    model, (n_words, repeated) = MODELS[False], sizes
    for corruption in ("first_a", "first_b"):
        task = wc.load_task("induction", n_words=n_words, repeated=repeated)
        pairs = task.pairs(model, n, seed=seed, corruption=corruption)
        for row, (clean, corrupted, right, wrong) in enumerate(read(pairs, model)):
            words, others = clean.split(), corrupted.split()
            assert len(words) == n_words + repeated
            assert len(set(words)) == n_words
            first = words.index(words[-1])
            assert words[first + 1 - repeated : first + 1] == words[-repeated:]
            assert right == {words[first + 1]}
            (wrong_word,) = wrong
            assert wrong_word in words
            (place,) = (at for at, (a, b) in enumerate(zip(words, others, strict=True)) if a != b)
            if corruption == "first_a":
                assert place == first
                assert others[place] not in words
            else:
                assert place == first + 1
                assert others[place] == wrong_word
            assert [int(pairs.spans[name][row]) for name in ("A1", "B", "A2")] == [first, first + 1, len(words) - 1]


def test_induction_checks_its_sizes():
    with pytest.raises(PromptError, match="repeated is 0"):
        wc.load_task("induction", repeated=0)
    with pytest.raises(PromptError, match="n_words is 12"):
        wc.load_task("induction", n_words=12)


@given(**DRAWN)
@quick
def test_capitals(n, seed):
    model, capital = MODELS[False], dict(line.split() for line in lines("capitals"))
    pairs = wc.load_task("capitals").pairs(model, n, seed=seed)
    for row, (clean, corrupted, right, wrong) in enumerate(read(pairs, model)):
        (country,) = (word for word in re.findall(r"\w+", clean) if word in capital)
        (other,) = (word for word in re.findall(r"\w+", corrupted) if word in capital)
        assert (right, wrong) == ({capital[country]}, {capital[other]})
        assert changed(pairs, row) == [int(pairs.spans["COUNTRY"][row])]
        assert int((pairs.candidates[row] >= 0).sum()) == 5


def parameters(prompt, answer=None):
    """Names in the definition and in the docstring, by Python's own parser."""
    end = f' {answer}: x\n    """\n' if answer else ' the_end: x\n    """\n'
    (function,) = ast.parse(prompt + end).body
    documented = re.findall(r"[:@](?:param|arg) (\w+):", ast.get_docstring(function))
    return [argument.arg for argument in function.args.args][1:], documented


@given(**DRAWN)
@quick
def test_docstring(n, seed):
    model = MODELS[False]
    for corruption in ("random_random", "random_definition", "random_docstring"):
        pairs = wc.load_task("docstring").pairs(model, n, seed=seed, corruption=corruption)
        for row, (clean, corrupted, right, wrong) in enumerate(read(pairs, model)):
            defined, documented = parameters(clean, *right)
            assert documented == defined[:3]
            assert right | wrong == set(defined)
            assert len(set(defined)) == 5
            others, described = parameters(corrupted)
            assert len(others) == 5
            if corruption == "random_docstring":
                assert others == defined
            else:
                assert not set(others) & set(defined)
            if corruption == "random_definition":
                assert described[:2] == documented[:2]
            else:
                assert not set(described[:2]) & {*defined, *others}
            for letter, name in zip("ABCDE", defined, strict=True):
                assert word_at(pairs, model, f"{letter}_def", row) == name
            assert pairs.spans["A_def"][row] < pairs.spans["E_def"][row] < pairs.spans["A_doc"][row]
            assert [word_at(pairs, model, f"{letter}_doc", row) for letter in "AB"] == defined[:2]


@given(**DRAWN)
@quick
def test_gendered_pronoun(n, seed):
    model = MODELS[False]
    kinds = dict.fromkeys(lines("names_female"), "she") | dict.fromkeys(lines("names_male"), "he")
    pairs = wc.load_task("gendered_pronoun").pairs(model, n, seed=seed)
    found = []
    for row, (clean, corrupted, right, wrong) in enumerate(read(pairs, model)):
        name, other = word_at(pairs, model, "NAME", row), word_at(pairs, model, "NAME", row, "corrupted")
        assert (right, wrong) == ({kinds[name]}, {kinds[other]})
        assert clean.replace(name, other) == corrupted
        assert not re.search(r"\b(she|he|her|his|him)\b", clean)
        found += right
    assert abs(found.count("she") - found.count("he")) <= 1


def test_no_name_is_in_both_lists():
    assert not set(lines("names_female")) & set(lines("names_male"))


@given(**DRAWN)
@quick
def test_subject_verb(n, seed):
    model = MODELS[False]
    number = {word: at for line in lines("nouns_number") for at, word in enumerate(line.split())}
    verbs = [{"is", "was", "has"}, {"are", "were", "have"}]
    pairs = wc.load_task("subject_verb").pairs(model, n, seed=seed)
    found = []
    for row, (clean, corrupted, right, wrong) in enumerate(read(pairs, model)):
        subject, attractor = (word_at(pairs, model, span, row) for span in ("SUBJECT", "ATTRACTOR"))
        assert [word for word in re.findall(r"\w+", clean) if word in number] == [subject, attractor]
        assert number[attractor] == 1 - number[subject]
        assert (right, wrong) == (verbs[number[subject]], verbs[number[attractor]])
        changed_to = word_at(pairs, model, "SUBJECT", row, "corrupted")
        assert changed(pairs, row) == [int(pairs.spans["SUBJECT"][row])]
        assert f"{subject} {changed_to}" in lines("nouns_number") or f"{changed_to} {subject}" in lines("nouns_number")
        found.append(number[subject])
        assert corrupted != clean
    assert abs(found.count(0) - found.count(1)) <= 1


def test_templates_have_their_slots():
    slots = {
        "greater_than": ["EVENT", "YEAR", "CENTURY"],
        "capitals": ["COUNTRY"],
        "gendered_pronoun": ["NAME"],
        "subject_verb": ["SUBJECT", "OTHER"],
    }
    for task, needed in slots.items():
        templates = lines(f"templates_{task}")
        assert len(templates) >= 8
        for template in templates:
            assert sorted(re.findall(r"\{(\w+)\}", template)) == sorted(needed)
            assert template == template.strip()
            assert not template.startswith("{")
        if task == "greater_than":
            assert all(template.endswith(" {CENTURY}") for template in templates)


@pytest.mark.parametrize(
    ("task", "file", "keep"),
    [("capitals", "capitals", 4), ("induction", "words_common", 12), ("greater_than", "events", 0)],
)
def test_too_few_words_are_an_error_that_names_them(task, file, keep):
    words = [line.split()[0] for line in lines(file)]
    model = tiny_text_model(without=tuple(words[keep:]))
    with pytest.raises(PromptError, match=rf"{file}\.txt: \d+ of {len(words)} words are single tokens"):
        wc.load_task(task).pairs(model, 2)


def test_bos_moves_every_span():
    with_bos = tiny_text_model(bos_token="<s>")
    if not with_bos.prepends_bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer = with_bos.tokenizer
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
        with_bos.__dict__.pop("prepends_bos", None)
    assert with_bos.prepends_bos
    for task in ("greater_than", "docstring", "induction"):
        plain = wc.load_task(task).pairs(MODELS[False], 6, seed=2)
        shifted = wc.load_task(task).pairs(with_bos, 6, seed=2)
        assert torch.equal(shifted.lengths, plain.lengths + 1)
        for name, at in plain.spans.items():
            assert torch.equal(shifted.spans[name], at + 1)
