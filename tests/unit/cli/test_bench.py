import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from workbench.bench.clock import Clock
from workbench.bench.patching import Plan, sample_edges
from workbench.bench.shapes import SHAPES, random_model, random_pairs
from workbench.cli import make_app
from workbench.errors import PromptError
from workbench.patching.graph import Graph


@pytest.fixture(scope="module")
def graph():
    return Graph(random_model(SHAPES["tiny"]).spec)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """One small benchmark: what it prints and what it writes."""
    file = tmp_path_factory.mktemp("bench") / "deep" / "found.json"
    threads = torch.get_num_threads()
    options = [
        "--shape",
        "tiny",
        "--edges",
        "30",
        "--shared",
        "5",
        "--prompts",
        "2",
        "--tokens",
        "6",
        "--first-difference",
        "2",
        "--repeats",
        "2",
    ]
    result = CliRunner().invoke(make_app(), ["bench", "patching", "--shape", "tiny", *options, "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert torch.get_num_threads() == threads
    return result.stdout, json.loads(file.read_text())


def test_both_libraries_agree_on_the_shared_edges(bench):
    found = bench[1]["agreement"]
    assert found["float64"]["largest_effect"] > 1e-3
    assert found["float64"]["largest_difference"] < 1e-10
    assert found["float32"]["largest_difference"] < 1e-4 * max(1.0, found["float32"]["largest_effect"])


def test_everything_is_timed_in_every_repeat(bench):
    text, found = bench
    assert {len(times) for times in found["times"].values()} == {2}
    assert all(time > 0 for times in found["times"].values() for time in times)
    ratios = np.array(found["times"]["transformer_lens"]) / np.array(found["times"]["exact"])
    assert found["ratios"]["transformer_lens / exact"] == pytest.approx(np.median(ratios))
    assert f"{np.median(ratios):.1f} times faster" in text
    assert f"all {found['head_edges']:,} head edges" in text
    for method in ("receiver_exact", "eap", "eap_ig"):
        assert method in text


def test_edges_are_drawn_uniformly(graph):
    """Over many draws every receiver gets edges in proportion to the heads it can read, every sender likewise."""
    every = graph.head_edges()
    assert len(every) == 3 * 4 * (4 + 8 + 12)
    counts = np.zeros(len(every))
    position = {key: at for at, key in enumerate(every.keys)}
    for seed in range(200):
        edges, shared = sample_edges(graph, Plan(shape="tiny", edges=40, shared=4, seed=seed))
        assert len(set(edges.keys.tolist())) == 40
        assert len(shared) == 4
        counts[[position[key] for key in edges.keys]] += 1
    expected = 200 * 40 / len(every)
    # hypergeometric counts: variance expected * (1 - 40 / 288); chi-square of 287 degrees of freedom
    chi_square = ((counts - expected) ** 2).sum() / (expected * (1 - 40 / len(every)))
    assert 200 < chi_square < 390


def test_prompts_differ_everywhere_from_the_first_difference_on():
    pairs = random_pairs(SHAPES["tiny"], n=3, tokens=9, first_difference=4)
    differs = pairs.clean != pairs.corrupted
    assert differs.all(0).tolist() == [False] * 4 + [True] * 5
    assert not differs[:, :4].any()
    with pytest.raises(PromptError, match="first_difference=9"):
        random_pairs(SHAPES["tiny"], n=3, tokens=9, first_difference=9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shape", "huge"], "shape 'huge' is not one of gpt2, tiny"),
        (["--shape", "tiny", "--edges", "289"], "288 edges"),
        (["--shape", "tiny", "--first-difference", "16"], "first_difference=16"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, words):
    result = CliRunner().invoke(make_app(), ["bench", "patching", *options])
    assert result.exit_code == 2
    assert words in result.stderr


def test_ratio_is_taken_within_repeats():
    clock = Clock()
    clock.seconds["slow"] += [10.0, 40.0, 90.0]
    clock.seconds["quick"] += [1.0, 10.0, 30.0]  # ratios 10, 4, 3
    assert clock.median_ratio("slow", "quick") == 4.0
    assert clock.median("slow") == 40.0
    assert clock.time("sum", lambda: sum(range(1000))) == 499500
    assert len(clock.seconds["sum"]) == 1
