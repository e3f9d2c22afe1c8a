import pytest

from head_tables import grid, row, table_of
from workbench.errors import DataError
from workbench.report.heads import main_rows
from workbench.report.sections import attention_sinks, head_patterns
from workbench.tables import HeadTable

ALPHA = [[0.10, 0.90, 0.30], [0.70, 0.20, 0.50]]


def sinks(shares, alpha=None):
    rows = []
    for kind, share in shares.items():
        fields = {"input": kind, "position": 0, "analysis": "attention_sinks"}
        rows.append(row("sink_rate", share, unit="share", **fields))
        rows += grid("alpha", alpha or ALPHA, **fields) + grid("sink_rate", alpha or ALPHA, unit="share", **fields)
    rows += grid("alpha", ALPHA, input="prose", position=0, analysis="attention_sinks")
    source = {"data_hash": "0", "seed": 0, "eps": 0.3, "length": 64, "inputs": dict.fromkeys(shares, 50)}
    return HeadTable(frame=table_of(rows).frame, provenance={**source, "prepends_bos": False})


def patterns(**scores):
    rows = [each for metric, values in scores.items() for each in grid(metric, values, analysis="head_patterns")]
    source = {"data_hash": "0", "seed": 0, "n": 24, "period": 100, "prepends_bos": True, "notes": ["shortened"]}
    return HeadTable(frame=table_of(rows).frame, provenance=source)


def test_sink_sentence_states_the_shares_and_the_five_strongest_in_order():
    assert attention_sinks.sentence(sinks({"natural": 0.456, "random": 0.25, "repeated": 0.1})) == (
        "The first position is an attention sink for 45.6 % [43.6, 47.6] of the heads on natural text, "
        "25.0 % [23.0, 27.0] on random tokens and 10.0 % [8.0, 12.0] on one token repeated.\n"
        "The strongest sinks on natural text are a0.h1 0.900 [0.880, 0.920], a1.h0 0.700 [0.680, 0.720], "
        "a1.h2 0.500 [0.480, 0.520], a0.h2 0.300 [0.280, 0.320], a1.h1 0.200 [0.180, 0.220]."
    )


def test_sink_sentence_without_natural_text_speaks_of_what_there_is():
    text = attention_sinks.sentence(sinks({"random": 0.25, "repeated": 0.1}))
    assert "natural" not in text
    assert "25.0 % [23.0, 27.0] of the heads on random tokens and 10.0 %" in text
    assert "strongest sinks on random tokens are a0.h1" in text


def test_sink_section_keeps_the_domains_in_the_files_and_out_of_the_table_of_heads():
    table = sinks({"natural": 0.4, "random": 0.2, "repeated": 0.1})
    section = attention_sinks.describe(table)
    assert "prose" in set(section.tables[0].frame["input"])
    assert set(main_rows(section)[0].frame["input"]) == {"natural", "random", "repeated"}
    assert "alpha exceeds 0.3" in section.method
    assert "50 natural, 50 random, 50 repeated of 64 tokens" in section.method
    assert "No BOS token" in section.method


def test_pattern_sentence_counts_and_names_the_heads_of_each_pattern():
    table = patterns(
        previous_token=[[0.6, 0.1], [0.7, 0.2]], duplicate_token=[[0.1, 0.2], [0.3, 0.4]], induction=ALPHA_SQUARE
    )
    lines = head_patterns.sentence(table).split("\n")
    assert lines[0].startswith("1 of 4 heads scores above 0.5 as induction heads; the strongest are a1.h0 0.800")
    assert lines[1].startswith("2 of 4 heads score above 0.5 as previous-token heads; the strongest are a1.h0 0.700")
    assert lines[2].startswith("0 of 4 heads score above 0.5 as duplicate-token heads; the strongest are a1.h1 0.400")


ALPHA_SQUARE = [[0.1, 0.5], [0.8, 0.2]]


def test_pattern_section_tells_sizes_and_notes():
    section = head_patterns.describe(
        patterns(previous_token=ALPHA_SQUARE, duplicate_token=ALPHA_SQUARE, induction=ALPHA_SQUARE)
    )
    assert section.warnings == ("shortened",)
    assert "24 sequences of 100 tokens" in section.method
    assert "with a BOS token in front" in section.method
    strongest = section.html_tables[0]
    assert strongest["induction"].tolist()[0] == "a1.h0 0.800 [0.780, 0.820]"
    assert strongest.attrs["caption"]


@pytest.mark.parametrize("describe", [attention_sinks.describe, head_patterns.describe])
def test_a_table_without_the_metrics_is_refused(describe):
    source = {"eps": 0.3, "length": 64, "inputs": {}, "n": 1, "period": 2}
    with pytest.raises(DataError):
        describe(HeadTable(frame=table_of(grid("other", ALPHA)).frame, provenance=source))
