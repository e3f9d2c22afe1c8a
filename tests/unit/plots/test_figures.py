import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from head_tables import grid, row, table_of
from workbench.errors import DataError
from workbench.plots import head_heatmap, metric_scatter, plot, rates, top_heads
from workbench.plots.labels import head_name, interval, number, percent

VALUES = np.array([[0.1, 0.9, 0.3], [0.7, 0.0, 0.5]])


def test_heatmap_cells_are_the_values_at_layer_and_head():
    figure = head_heatmap(table_of(grid("score", VALUES.tolist())))
    np.testing.assert_array_equal(np.array(figure.data[0].z, dtype=float), VALUES)
    hover = figure.data[0].hovertext[1][0]
    for part in ("a1.h0", "layer 1", "head 0", "0.700", "[0.680, 0.720]", "n = 50", "probability"):
        assert part in hover


def test_sequential_scale_starts_at_zero_and_diverging_is_centred_on_it():
    sequential = head_heatmap(table_of(grid("score", VALUES.tolist()))).layout.coloraxis
    assert (sequential.cmin, sequential.cmax) == (0.0, 0.9)
    diverging = head_heatmap(table_of(grid("score", (VALUES - 0.8).tolist()))).layout.coloraxis
    assert diverging.cmin == -diverging.cmax == pytest.approx(-0.8)
    assert sequential.colorscale != diverging.colorscale


def test_missing_head_is_empty_and_not_zero():
    rows = [each for each in grid("score", VALUES.tolist()) if (each["layer"], each["head"]) != (0, 2)]
    assert head_heatmap(table_of(rows)).data[0].z[0][2] is None


def test_panels_for_every_metric_and_input_in_the_order_asked_for():
    rows = grid("a", VALUES.tolist(), input="natural") + grid("a", (VALUES / 2).tolist(), input="random")
    figure = head_heatmap(table_of(rows))
    assert [trace.name for trace in figure.data] == ["natural", "random"]
    figure = head_heatmap(table_of([*grid("a", VALUES.tolist()), *grid("b", VALUES.tolist())]), ["b", "a"])
    assert [trace.name for trace in figure.data] == ["b", "a"]


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (30, 9), (48, 64)])
def test_axes_stay_readable_for_small_and_large_models(shape):
    figure = head_heatmap(table_of(grid("score", np.linspace(0, 1, shape[0] * shape[1]).reshape(shape).tolist())))
    assert shape[0] / figure.layout.yaxis.dtick <= 17
    assert shape[1] / figure.layout.xaxis.dtick <= 17
    margins = figure.layout.margin.t + figure.layout.margin.b
    assert 9 <= (figure.layout.height - margins) / shape[0] <= 60
    assert figure.layout.height <= 700


def test_top_heads_are_the_largest_with_their_interval():
    trace = top_heads(table_of(grid("score", VALUES.tolist())), k=3).data[0]
    assert list(trace.y) == ["a0.h1", "a1.h0", "a1.h2"]
    assert list(trace.x) == [0.9, 0.7, 0.5]
    np.testing.assert_allclose(trace.error_x.array, 0.02, atol=1e-9)
    np.testing.assert_allclose(trace.error_x.arrayminus, 0.02, atol=1e-9)


def test_signed_metric_is_ranked_by_size():
    assert list(top_heads(table_of(grid("effect", [[0.5, -0.9, 0.1]])), k=2).data[0].y) == ["a0.h1", "a0.h0"]


def test_rates_show_one_point_an_input_in_per_cent():
    rows = [row("sink_rate", 0.4, input="natural", position=0), row("sink_rate", 0.1, input="random", position=0)]
    trace = rates(table_of(rows), "sink_rate").data[0]
    assert dict(zip(trace.y, trace.x, strict=True)) == {"natural": 40.0, "random": 10.0}
    assert trace.error_x.array == pytest.approx([2.0, 2.0])


def test_scatter_pairs_the_two_metrics_of_each_head():
    rows = grid("a", VALUES.tolist()) + list(reversed(grid("b", (1 - VALUES).tolist())))
    trace = metric_scatter(table_of(rows), "a", "b").data[0]
    np.testing.assert_allclose(np.array(trace.x) + np.array(trace.y), 1.0)
    assert list(trace.marker.color) == [0, 0, 0, 1, 1, 1]


def test_plot_chooses_by_what_the_table_holds():
    assert plot(table_of(grid("score", VALUES.tolist()))).data[0].type == "heatmap"
    assert plot(table_of([row("rate", 0.4, input="natural")])).data[0].type == "scatter"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: plot(t, kind="pie"), "unknown kind of figure 'pie'"),
        (lambda t: plot(t, "nope"), "no row has metric = "),
        (lambda t: plot(t, kind="scatter"), "a scatter needs two metrics"),
        (lambda t: head_heatmap(t, colour="red"), "cannot select by 'colour'"),
        (lambda t: rates(t, "score"), "has no row for the whole model"),
        (lambda t: metric_scatter(t, "score", "twice"), "has 2 numbers a head"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(call, message):
    rows = grid("score", VALUES.tolist())
    rows += grid("twice", VALUES.tolist(), input="natural") + grid("twice", VALUES.tolist(), input="random")
    with pytest.raises(DataError, match=message):
        call(table_of(rows))


def test_names_from_outside_are_escaped():
    evil = "<img src=x onerror=alert(1)>"
    rows = grid(evil, VALUES.tolist(), unit=evil, input=evil)
    for kind in ("heatmap", "top"):
        assert evil not in plot(table_of(rows), kind=kind).to_json().replace("\\u003c", "<").replace("\\u003e", ">")


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12))
def test_number_keeps_three_significant_digits(value):
    read = float(number(value).replace("\u2212", "-"))
    assert read == pytest.approx(value, rel=0.0051, abs=1e-300)


def test_labels():
    assert head_name(3, 1) == "a3.h1"
    assert number(None) == number(float("nan")) == "–"
    assert number(-0.01234) == "\u22120.0123"
    assert number(1.0) == "1.00"
    assert percent(0.4567) == "45.7 %"
    assert interval(0.1, 0.25) == "[0.100, 0.250]"
    assert interval(None, 0.2) == ""
