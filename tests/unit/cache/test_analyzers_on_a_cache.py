"""Analyzers give the same rows from a capture as from the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench as wb
from families import REFUSED, tiny_module
from tiny_text import tiny_text_model
from workbench.analyzers import attention_sinks, head_patterns
from workbench.errors import DataError, PromptError

NUMBERS = ["value", "stderr", "ci_low", "ci_high"]


def tiny(name="llama"):
    return wb.wrap_model(tiny_module(name) if name != "sliding_window" else REFUSED[name]())


def same_provenance(ours, theirs):
    """What both have but what a capture adds; when and how they were called aside."""
    apart = {"created", "command"}
    assert {key: ours[key] for key in ours if key not in {*apart, "capture"}} == {
        key: theirs[key] for key in theirs if key not in apart
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "sliding_window"])
@pytest.mark.parametrize("reduce", [None, "diagonals(1,9,8)"])
def test_head_patterns(name, reduce, tmp_path):
    model = tiny(name)
    drawn = head_patterns.sequences(model, n=5, period=9, seed=3)
    expected = wb.head_patterns(model, n=5, period=9, seed=3).validate()
    held = wb.capture(model, drawn.tokens, "pattern", reduce=reduce, seed=3, batch_size=5, store=tmp_path)
    for cache in (held, wb.open_cache(tmp_path)):
        table = wb.head_patterns(cache).validate()
        assert table.frame.equals(expected.frame)
        same_provenance(table.provenance, expected.provenance)
        assert table.provenance["capture"] == cache.manifest["capture_id"]


@pytest.mark.parametrize("reduce", [None, "key_mean"])
def test_attention_sinks_of_all_inputs(reduce):
    model = tiny_text_model()
    texts = ["Then Mary and John went to the store and gave a drink to Mary", "the store " * 12]
    options = {"length": 12, "n": 4, "seed": 2}
    drawn = attention_sinks.sequences(model, texts, **options)
    assert drawn.labels["input"] == ("natural",) * 2 + ("random",) * 4 + ("repeated",) * 4
    expected = wb.attention_sinks(model, texts, positions=(3, 0), eps=0.2, **options).validate()
    cache = wb.capture(model, drawn.tokens, "pattern", reduce=reduce, labels=drawn.labels, seed=2, batch_size=4)
    table = wb.attention_sinks(cache, length=12, positions=(3, 0), eps=0.2).validate()
    keys = [column for column in expected.frame.columns if column not in NUMBERS]
    assert table.frame[keys].equals(expected.frame[keys])
    np.testing.assert_allclose(table.frame[NUMBERS].to_numpy(), expected.frame[NUMBERS].to_numpy(), atol=1e-6)
    same_provenance(table.provenance, expected.provenance)
    only = wb.attention_sinks(cache, inputs=("repeated",), length=12)
    assert set(only.frame["input"]) == {"repeated"}


def test_attention_sinks_of_the_built_in_documents_by_domain():
    from workbench.analyzers._tokens import built_in_documents

    model = tiny_text_model()
    expected = wb.attention_sinks(model, inputs=("natural",), length=16, n=10)
    drawn = attention_sinks.sequences(model, inputs=("natural",), length=16, n=10)
    assert drawn.labels["domain"] == tuple(domain for _, domain, _ in built_in_documents()[:10])
    cache = wb.capture(model, drawn.tokens, "pattern", reduce="key_mean", labels=drawn.labels, batch_size=10)
    table = wb.attention_sinks(cache, length=16)
    assert table.frame.equals(expected.frame)
    assert table.provenance["texts"] == expected.provenance["texts"] == "built-in"


def test_the_first_tokens_of_longer_prompts_need_the_whole_pattern():
    model = tiny()
    tokens = torch.randint(101, (6, 20), generator=torch.Generator().manual_seed(0))
    whole = wb.capture(model, tokens, "pattern", batch_size=4)
    cut = wb.capture(model, tokens[:, :16], "pattern", reduce="key_mean")
    found, expected = (wb.attention_sinks(each, inputs=("natural",), length=16) for each in (whole, cut))
    np.testing.assert_allclose(found.frame[NUMBERS].to_numpy(), expected.frame[NUMBERS].to_numpy(), atol=1e-6)
    reduced = wb.capture(model, tokens, "pattern", reduce="key_mean")
    with pytest.raises(DataError, match=r"of 20 tokens; 16 are asked for.*reduce='key_mean'"):
        wb.attention_sinks(reduced, inputs=("natural",), length=16)


def test_what_a_cache_lacks_is_said_with_what_to_capture():
    model = tiny()
    drawn = head_patterns.sequences(model, n=3, period=9)
    z = wb.capture(model, drawn.tokens, "z")
    with pytest.raises(DataError, match=r"holds z, and this needs 'pattern.diagonals\(1,9,8\)' or 'pattern' of all 3"):
        wb.head_patterns(z)
    some = wb.capture(model, drawn.tokens, "pattern", layers=[0, 1])
    with pytest.raises(DataError, match="all 3 layers"):
        wb.head_patterns(some)
    tokens = torch.randint(101, (3, 16), generator=torch.Generator().manual_seed(0))
    other = wb.capture(model, tokens, "pattern")
    with pytest.raises(DataError, match="not one stretch of tokens, twice over"):
        wb.head_patterns(other)
    with pytest.raises(DataError, match="does not say what input"):
        wb.attention_sinks(other, length=16)
    with pytest.raises(DataError, match="length is 64 and the prompts of the cache have 16"):
        wb.attention_sinks(other)
    with pytest.raises(PromptError, match="beside a cache"):
        wb.attention_sinks(other, ["a text"], inputs=("natural",), length=16)
    labelled = wb.capture(model, tokens, "pattern", labels={"input": ["random"] * 3})
    with pytest.raises(DataError, match="the cache is of random"):
        wb.attention_sinks(labelled, inputs=("natural",), length=16)
    short = wb.capture(model, tokens, "pattern", lengths=[16, 16, 9])
    with pytest.raises(DataError, match="fewer than 16 tokens"):
        wb.attention_sinks(short, inputs=("natural",), length=16)
