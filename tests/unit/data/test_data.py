"""The files of `data/`: their format, and that what they claim (programs, sums, records) is right."""

from __future__ import annotations

import ast
import csv
import json
import re
import shutil
import subprocess
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workbench.datafiles import data_path
from workbench.errors import DataError

if TYPE_CHECKING:
    from workbench.models import Model

DOMAINS = ("arithmetic", "c", "dialogue", "german", "logs", "prose", "python", "tables")
LISTS = {
    "names.txt": 120,
    "objects_ioi.txt": 20,
    "places.txt": 20,
    "objects_colored.txt": 17,
    "colours.txt": 8,
    "names_female.txt": 40,
    "names_male.txt": 40,
    "capitals.txt": 40,
    "nouns_number.txt": 40,
    "events.txt": 15,
    "words_common.txt": 200,
}
SEPARATOR = "%%"
SINK_LENGTH = 64  # tokens of a document that the attention-sink metric reads


def text_files() -> list[Path]:
    return sorted(data_path("texts").glob("*.txt"))


def documents(domain: str) -> list[str]:
    text = data_path(f"texts/{domain}.txt").read_text(encoding="utf-8")
    return text.removesuffix("\n").split(f"\n{SEPARATOR}\n")


def words(name: str) -> list[str]:
    lines = data_path(name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


# --- text domains ---------------------------------------------------------------------------------


def test_the_eight_domains_are_there() -> None:
    assert {path.stem for path in text_files()} >= set(DOMAINS)


@pytest.mark.parametrize("path", text_files(), ids=lambda path: path.stem)
def test_format(path: Path) -> None:
    raw = path.read_bytes()
    assert len(raw) >= 8200
    assert not raw.startswith(b"\xef\xbb\xbf")
    assert b"\r" not in raw
    assert b"\0" not in raw
    text = raw.decode("utf-8")  # strict
    assert "\ufffd" not in text
    assert text.endswith("\n")
    assert not [line for line in text.split("\n") if line != line.rstrip(" \t")]
    docs = documents(path.stem)
    assert len(docs) >= 13
    for document in docs:
        assert len(document) >= 450, document[:60]
        assert document == document.strip("\n"), document[:60]
        assert SEPARATOR not in document.splitlines()


def test_enough_documents_over_all_domains() -> None:
    assert sum(len(documents(path.stem)) for path in text_files()) >= 100


def test_no_document_twice_or_beginning_like_another() -> None:
    everything = sorted(document for path in text_files() for document in documents(path.stem))
    # In sorted order a prefix stands right before a text that begins with it.
    for first, second in pairwise(everything):
        assert not second.startswith(first[:150]), first[:60]


def test_no_paragraph_twice() -> None:
    for domain in ("prose", "dialogue", "german"):
        paragraphs = [part for document in documents(domain) for part in document.split("\n\n") if len(part) > 80]
        assert len(paragraphs) == len(set(paragraphs)), domain


@pytest.mark.parametrize("document", documents("python"), ids=lambda text: text.split("\n")[0][:40])
def test_python_parses(document: str) -> None:
    tree = ast.parse(document)
    assert len(list(ast.walk(tree))) > 60  # a program, not one string


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("document", documents("c"), ids=lambda text: text.split("\n")[0][:40])
def test_c_compiles(document: str) -> None:
    command = ["gcc", "-std=c11", "-Wall", "-fsyntax-only", "-x", "c", "-"]
    result = subprocess.run(command, input=document, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "warning" not in result.stderr


def test_german_is_german() -> None:
    for document in documents("german"):
        assert set("äöüß") & set(document.lower()), document[:60]
        tokens = re.findall(r"\w+", document.lower())
        common = {"der", "die", "das", "und", "den", "dem", "ein", "eine", "nicht", "ist"}
        assert sum(word in common for word in tokens) > 0.04 * len(tokens), document[:60]
        assert not {"the", "of"} & set(tokens)


def test_json_in_logs_is_json() -> None:
    whole, lines = 0, 0
    for document in documents("logs"):
        if document.startswith(("{\n", "[\n")):
            assert json.loads(document)
            whole += 1
        elif document.startswith("{"):
            for line in document.split("\n"):
                if not line.startswith("#"):
                    assert isinstance(json.loads(line), dict)
                    lines += 1
    assert whole >= 4
    assert lines >= 15


def test_delimited_tables_are_rectangular() -> None:
    checked = 0
    for document in documents("tables"):
        header = document.split("\n")[0]
        delimiter = next((mark for mark in "\t;," if header.count(mark) >= 4), None)
        if delimiter is None or "|" in header:
            continue
        rows = list(csv.reader(document.split("\n"), delimiter=delimiter))
        assert {len(row) for row in rows} == {len(rows[0])}, header
        checked += 1
    assert checked >= 4


# --- arithmetic -----------------------------------------------------------------------------------

_CHAIN = re.compile(r"[-+*/^() .\d]*\d[-+*/^() .\d]*(?:=[-+*/^() .\d]*\d[-+*/^() .\d]*)+")
_OPERATIONS = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.Pow: lambda a, b: a**b,
}


def evaluate(expression: str) -> Fraction:
    """The exact value of an expression of numbers, + - * / ^ and parentheses."""

    def value(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant(value=int() | float()):
                return Fraction(ast.get_source_segment(source, node) or "")
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return Fraction(_OPERATIONS[type(op)](value(left), value(right)))
        raise ValueError(f"{expression!r} is not plain arithmetic")

    source = expression.strip().rstrip(".").strip().replace("^", "**")
    return value(ast.parse(source, mode="eval").body)


def equations(text: str) -> list[tuple[str, str]]:
    """Both sides of every equation between numbers in a text; sides that hold a letter are left out.

    A chain a = b = c gives (a, b) and (b, c).
    """
    found = []
    for cell in re.split(r"\n|\s{3,}|\.\s", text):
        for match in _CHAIN.finditer(cell):
            sides = match.group().split("=")
            after_letter = cell[: match.start()][-1:].isalpha()
            if after_letter and re.match(r"\(|\^| *[-+*/^] ", sides[0]):  # the rest of "sqrt(9)" or "3x + 4"
                sides = sides[1:]
            if cell[match.end() :][:1].isalpha() and not sides[-1].endswith(" "):  # the "3" of "3x"
                sides = sides[:-1]
            found += [(left.strip(), right.strip()) for left, right in pairwise(sides)]
    return found


def test_equations_finds_and_skips_what_it_should() -> None:
    assert equations("so 3 + 4 = 7 km.") == [("3 + 4", "7")]
    assert equations("is -3 + 4 = 1") == [("-3 + 4", "1")]
    assert equations("3 * 4 = 12   3 * 5 = 15") == [("3 * 4", "12"), ("3 * 5", "15")]
    assert equations("sqrt(9) = 3") == []
    assert equations("1/2 + 1/3 = 3/6 + 2/6 = 5/6") == [("1/2 + 1/3", "3/6 + 2/6"), ("3/6 + 2/6", "5/6")]
    assert equations("3x + 4 = 19. Then 3x = 19 - 4 = 15") == [("19 - 4", "15")]
    assert equations("x = 15 / 3 = 5.") == [("15 / 3", "5.")]
    assert equations("19 = 3x + 4") == []
    assert equations("of 15 cm. 385 = 15 * 25 + 10, so") == [("385", "15 * 25 + 10")]


def test_evaluate_is_exact() -> None:
    assert evaluate("0.1 + 0.2") == Fraction(3, 10)
    assert evaluate("(5/3) / (1/11)") == Fraction(55, 3)
    assert evaluate("-2 + 5 * 2^3") == 38
    with pytest.raises(ValueError, match="not plain arithmetic"):
        evaluate("abs")


def test_every_equation_holds() -> None:
    found = [pair for document in documents("arithmetic") for pair in equations(document)]
    wrong = [f"{left} = {right}" for left, right in found if evaluate(left) != evaluate(right)]
    assert not wrong
    assert len(found) >= 200


def test_every_plain_line_is_among_the_equations() -> None:
    number = r"-?\d+(?:\.\d+)?"
    plain = re.compile(rf"({number}) ([-+*/]) ({number}) = ({number})")
    lines = [line for document in documents("arithmetic") for line in document.split("\n")]
    matches = [match for line in lines if (match := plain.fullmatch(line))]
    assert len(matches) >= 40
    for match in matches:
        left, operator, right, result = match.groups()
        assert evaluate(f"{left} {operator} {right}") == Fraction(result), match.group()


def test_quiz_answers_hold() -> None:
    text = "\n".join(documents("arithmetic"))
    answers = re.findall(r"^Q(\d+)\. (.+) = \?  A(\d+)\. (-?\d+)$", text, flags=re.MULTILINE)
    assert len(answers) == 20
    for question, expression, answer, value in answers:
        assert question == answer
        assert evaluate(expression) == int(value), expression


def test_column_additions_hold() -> None:
    text = "\n".join(documents("arithmetic"))
    columns = re.findall(r"^ +(\d+)\n \+ +(\d+)\n -+\n +(\d+)$", text, flags=re.MULTILINE)
    assert len(columns) >= 4
    for first, second, total in columns:
        assert int(first) + int(second) == int(total)


def test_equations_are_solved() -> None:
    text = "\n".join(documents("arithmetic"))
    linear = re.findall(r"(-?\d+)x ([-+]) (\d+) = (-?\d+)\. .* = (-?\d+)\.$", text, flags=re.MULTILINE)
    assert len(linear) >= 8
    for slope, sign, shift, right, x in linear:
        assert evaluate(f"{slope} * ({x}) {sign} {shift}") == int(right)
    quadratic = re.findall(r"x\^2 ([-+]) (\d*)x ([-+]) (\d+) = .* when x = (-?\d+)(?: or x = (-?\d+))?", text)
    assert len(quadratic) >= 8
    for sign, b, sign_c, c, first, second in quadratic:
        for root in {int(first), int(second or first)}:
            assert root**2 + int(f"{sign}{b or 1}") * root + int(f"{sign_c}{c}") == 0


# --- word lists -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTS)
def test_word_list(name: str) -> None:
    found = words(name)
    assert len(found) >= LISTS[name]
    assert len(found) == len(set(found))
    pattern = {
        "names": r"[A-Z][a-z]+",
        "capitals.txt": r"[A-Z][a-z]+ [A-Z][a-z]+",
        "nouns_number.txt": r"[a-z]+ [a-z]+",
    }.get("names" if name.startswith("names") else name, r"[a-z]+")
    for word in found:
        assert re.fullmatch(pattern, word), word
    assert data_path(name).read_text(encoding="utf-8").startswith("# ")


def test_colored_objects_has_exactly_the_words_of_the_paper() -> None:
    assert words("colours.txt") == ["red", "orange", "yellow", "green", "blue", "purple", "brown", "black"]
    assert len(words("objects_colored.txt")) == 17
    assert not set(words("colours.txt")) & set(words("objects_colored.txt"))


def test_lists_of_the_indirect_object_task() -> None:
    things, places = words("objects_ioi.txt"), words("places.txt")
    assert {"ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack"} <= set(things)
    assert not set(things) & set(places)
    assert not [thing for thing in things if thing[0] in "aeiou"]  # templates say "a ..."


@pytest.mark.model
def test_tokens_of_the_default_model(default_model: Model) -> None:
    for domain in DOMAINS:
        _, lengths = default_model.to_tokens(documents(domain), bos=False)
        assert int(lengths.min()) >= SINK_LENGTH, domain
    single = {
        name: [
            line
            for line in words(name)
            if all(default_model.single_token(f" {word}") is not None for word in line.split())
        ]
        for name in LISTS
    }
    assert len(single["names.txt"]) >= 120
    assert len(single["objects_ioi.txt"]) >= 20
    assert len(single["places.txt"]) >= 20
    assert len(single["objects_colored.txt"]) >= 12
    assert all(default_model.single_token(f" {colour.capitalize()}") is not None for colour in words("colours.txt"))
    assert len(single["colours.txt"]) == 8
    for name in ("names_female.txt", "names_male.txt", "nouns_number.txt", "capitals.txt"):
        assert len(single[name]) >= 30, name


# --- the README and the way to the files ----------------------------------------------------------


def test_readme_counts_are_right() -> None:
    readme = data_path("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)\.txt` \| [^|]+ \| (\d+) \|", readme, re.MULTILINE)
    texts = {name: int(count) for name, count in rows}
    assert texts == {path.stem: len(documents(path.stem)) for path in text_files()}
    assert f"\n{sum(texts.values())} documents" in readme
    rows = re.findall(r"^\| `(\w+\.txt)` \| +(\d+) \|", readme, re.MULTILINE)
    lists = {name: int(count) for name, count in rows}
    assert set(LISTS) <= set(lists)
    assert lists == {name: len(words(name)) for name in lists}
    here = {path.name for path in data_path("README.md").parent.glob("*.txt")}
    assert here == {*lists, "templates_ioi.txt"}


def test_a_missing_file_is_named() -> None:
    with pytest.raises(DataError, match=r"texts/verse\.txt"):
        data_path("texts/verse.txt")
