"""What the figures of circuits show must be what the tables say."""

import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import DataError
from workbench_circuits._layout import curve, node_of, place, receiver_parts
from workbench_circuits.figure import CHANNELS, circuit_figure, faithfulness_figure

SPEC = SimpleNamespace(n_layers=4, n_heads=6, n_kv_heads=2)
EDGES = pd.DataFrame(
    [
        ("input", "a0.kv0<k>", 0.2),
        ("input", "m0", -0.5),
        ("a0.h1", "a2.h5<q>", -2.0),
        ("m0", "a2.kv1<v>", 0.7),
        ("m0", "a2.kv1<k>", float("nan")),
        ("a2.h5", "logits", -1.0),
        ("a2.h0", "m3", -0.1),
        ("m3", "logits", 0.3),
    ],
    columns=["sender", "receiver", "effect"],
)


def lines_of(figure):
    """The traces of edges, strongest last."""
    return [
        trace
        for trace in figure.data
        if trace.mode == "lines" and trace.showlegend is False and trace.line.dash != "dot"
    ]


def drawn(figure):
    """Edge and effect of every trace, from the hover texts, which stand in the order of the traces."""
    (texts,) = (trace.text for trace in figure.data if trace.mode == "markers")
    found = [re.fullmatch(r"<b>(.+)-&gt;(.+)</b><br>(.+)", text).groups() for text in texts]
    return [(sender, receiver.replace("&lt;", "<").replace("&gt;", ">"), said) for sender, receiver, said in found]


def entries(figure):
    return [trace.name for trace in figure.data if trace.showlegend is not False and trace.name]


def test_every_edge_is_drawn_once_with_its_colour_sign_and_width():
    figure = circuit_figure(EDGES, SPEC)
    known = {(row.sender, row.receiver): row.effect for row in EDGES.itertuples()}
    assert {edge[:2] for edge in drawn(figure)} == set(known)
    widths = []
    for (sender, receiver, said), line in zip(drawn(figure), lines_of(figure), strict=True):
        effect = known[sender, receiver]
        assert line.line.color == CHANNELS[receiver_parts(receiver)[1]][0]
        assert line.line.dash == ("dash" if effect > 0 else "solid")
        assert said == ("effect not known" if np.isnan(effect) else f"{effect:+.3g} logits")
        widths.append((0 if np.isnan(effect) else abs(effect), line.line.width))
    for (a, thin), (b, thick) in pairwise(sorted(widths)):
        assert thick > thin or a == b
    assert widths[-1] == (2.0, 6.0)


def test_edges_begin_and_end_at_their_nodes_and_go_up():
    figure = circuit_figure(EDGES, SPEC)
    places = {note.text: (note.x, note.y) for note in figure.layout.annotations}
    assert set(places) == {"input", "logits", "m0", "m3", "a0.h1", "a2.h5", "a2.h0", "a0.kv0", "a2.kv1"}
    for (sender, receiver, _), line in zip(drawn(figure), lines_of(figure), strict=True):
        node = receiver_parts(receiver)[0]
        assert (line.x[0], line.y[0]) == pytest.approx(places[sender])
        assert (line.x[-1], line.y[-1]) == pytest.approx(places[node])
        assert all(a < b for a, b in pairwise(line.y))
    assert places["input"][1] < places["a0.kv0"][1] < places["a0.h1"][1] < places["m0"][1] < places["a2.kv1"][1]
    assert max(y for _, y in places.values()) == places["logits"][1]
    ends = [(trace.y[0], trace.y[1]) for trace in figure.data if trace.line.dash == "dot"]
    # a0.h1 reads kv0 and a2.h5 reads kv1; a2.h0 reads kv0 of layer 2, which is not in the circuit
    assert len(ends) == 2
    assert list(figure.layout.yaxis.ticktext) == ["layer 0", "layer 2", "layer 3"]


def test_two_edges_between_the_same_nodes_do_not_cover_each_other():
    figure = circuit_figure(EDGES, SPEC)
    twins = [
        tuple(line.x)
        for (sender, receiver, _), line in zip(drawn(figure), lines_of(figure), strict=True)
        if sender == "m0" and receiver.startswith("a2.kv1")
    ]
    assert len(twins) == 2
    assert np.abs(np.subtract(*twins)).max() > 0.2


def test_the_title_says_how_good_the_circuit_is_and_whether_the_model_can_do_the_task():
    figure = circuit_figure(
        EDGES,
        SPEC,
        title="IOI <b>",
        faithfulness=(0.834, 0.77, 0.88),
        n_all=1000,
        mark="NOT SOLVED: 40 % right & worse",
        roles={"a2.h5": "mover"},
        max_edges=3,
    )
    title = figure.layout.title.text
    for words in (
        "IOI &lt;b&gt;",
        "8 edges of 1,000 (0.8 %)",
        "the 3 strongest edges are drawn",
        "faithfulness 0.83 [0.77, 0.88] on held-out prompts",
        "NOT SOLVED: 40 % right &amp; worse",
    ):
        assert words in title, words
    assert {edge[:2] for edge in drawn(figure)} == {("a0.h1", "a2.h5<q>"), ("a2.h5", "logits"), ("m0", "a2.kv1<v>")}
    assert any("a2.h5<br>" in note.text and "mover" in note.text for note in figure.layout.annotations)
    assert "held-out" not in circuit_figure(EDGES, SPEC, faithfulness=(1, 1, 1), held_out=False).layout.title.text
    assert "color:#b3360b" not in circuit_figure(EDGES, SPEC).layout.title.text


def test_the_legend_names_only_what_is_there():
    assert entries(circuit_figure(EDGES.iloc[[5]], SPEC)) == ["into the logits", "patching lowers the logit difference"]
    without = circuit_figure(EDGES[["sender", "receiver"]], SPEC)
    assert not [name for name in entries(without) if "patching" in name]


@pytest.mark.parametrize(
    ("edges", "words"),
    [
        (EDGES.iloc[:0], "edges has no rows"),
        (EDGES[["sender", "effect"]], r"lacks the columns \['receiver'\]"),
        (pd.DataFrame({"sender": ["a0.h1"], "receiver": ["a2.h5"]}), "'a2.h5' is no receiver"),
        (pd.DataFrame({"sender": ["head 3"], "receiver": ["logits"]}), "'head 3' is no node"),
        (pd.DataFrame({"sender": ["m7"], "receiver": ["logits"]}), "'m7' is in layer 7 and the model has 4"),
    ],
)
def test_wrong_edges(edges, words):
    with pytest.raises(DataError, match=words):
        circuit_figure(edges, SPEC)


names = st.one_of(
    st.builds("a{}.h{}".format, st.integers(0, 3), st.integers(0, 5)),
    st.builds("a{}.kv{}".format, st.integers(0, 3), st.integers(0, 1)),
    st.builds("m{}".format, st.integers(0, 3)),
)


@given(st.lists(names, min_size=1, max_size=20, unique=True), st.data())
@settings(max_examples=60, deadline=None)
def test_nodes_never_overlap_and_rows_go_up_with_the_layers(inner, data):
    nodes = [node_of(name, 4) for name in ("input", *inner, "logits")]
    pairs = st.tuples(st.sampled_from(inner), st.sampled_from(inner))
    widths = data.draw(st.dictionaries(st.sampled_from(inner), st.floats(1, 3)))
    places = place(nodes, data.draw(st.lists(pairs, max_size=30)), widths)
    assert set(places) == {node.name for node in nodes}
    for a in nodes:
        for b in nodes:
            (xa, ya), (xb, yb) = places[a.name], places[b.name]
            if a != b and (a.layer, a.level) == (b.layer, b.level):
                assert ya == yb
                assert abs(xa - xb) > (widths.get(a.name, 1) + widths.get(b.name, 1)) / 2 - 1e-9
            elif (a.layer, a.level) < (b.layer, b.level):
                assert yb - ya >= 1


def test_a_curve_swings_as_far_as_it_is_told():
    xs, ys = curve((0.0, 0.0), (0.0, 2.0), 1.5)
    assert max(xs) == pytest.approx(1.5)
    assert ys[12] == pytest.approx(1.0)


# --- faithfulness -------------------------------------------------------------------------------------


def curves(**changed):
    rows = [
        {"method": method, "fraction": share, "faithfulness": base + share, "ci_low": base, "ci_high": base + 0.3}
        for method, base in (("random", 0.0), ("verified", 0.5), ("eap", 0.4))
        for share in (1.0, 0.0, 0.01, 0.1)
    ]
    return pd.DataFrame(rows).assign(**changed)


def test_curves_show_the_numbers_of_the_table():
    areas = pd.DataFrame({"method": ["eap"], "cpr": [0.9], "cmd": [0.1]})
    figure = faithfulness_figure(curves(n_edges=7.0), title="IOI", mark="NOT SOLVED: x", areas=areas, target=0.8)
    lines = [trace for trace in figure.data if trace.mode == "lines+markers"]
    assert [line.name for line in lines] == ["verified", "eap (CPR 0.90, CMD 0.10)", "random"]
    for line, base in zip(lines, (0.5, 0.4, 0.0), strict=True):
        assert list(line.x) == pytest.approx([1, 10, 100])
        assert list(line.y) == pytest.approx([base + share for share in (0.01, 0.1, 1.0)])
    bands = [trace for trace in figure.data if trace.fill == "toself"]
    assert len(bands) == 3
    assert list(bands[0].y) == pytest.approx([0.8] * 3 + [0.5] * 3)
    assert figure.layout.xaxis.type == "log"
    assert "NOT SOLVED: x" in figure.layout.title.text
    assert len({line.line.color for line in lines}) == 3
    assert lines[-1].line.dash == "dot"


def test_curves_without_intervals_have_no_bands():
    figure = faithfulness_figure(curves().drop(columns=["ci_low"]))
    assert not [trace for trace in figure.data if trace.fill == "toself"]


def test_wrong_curves():
    with pytest.raises(DataError, match="curves has no rows"):
        faithfulness_figure(curves().iloc[:0])
    with pytest.raises(DataError, match="fractions above 0"):
        faithfulness_figure(curves(fraction=0.0))
    with pytest.raises(DataError, match=r"lacks the columns \['method'\]"):
        faithfulness_figure(curves().drop(columns="method"))
