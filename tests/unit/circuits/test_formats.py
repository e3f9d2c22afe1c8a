"""Circuits as files: what comes back, what is refused, and the files of EAP-IG."""

import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unit.patching.patching_cases import model_of, tiny_prompts
from workbench.errors import DataError, OutputError, PromptError
from workbench.patching.graph import Graph
from workbench_circuits.circuit import Able, Circuit, GraphShape, Steadiness
from workbench_circuits.evaluation import evaluate
from workbench_circuits.run import run_circuit
from workbench_circuits.wiring import Wiring


@pytest.fixture(scope="module")
def model():
    return model_of("llama")


@pytest.fixture(scope="module")
def circuit(model):
    wiring = Wiring(Graph(model.spec))
    mask = wiring.everything & (np.random.default_rng(0).random(wiring.shape) < 0.3)
    names = wiring.edges(mask).names
    return Circuit.of_mask(
        model,
        mask,
        effects={name: float(i) - 7.25 for i, name in enumerate(names[:-1])},
        inclusion=tuple(np.linspace(0, 1, len(names)).tolist()),
        task="ioi",
        corruption="abc",
        method="exact",
        algorithm="greedy",
        target=0.8,
        taken=70,
        held_out=evaluate(model, tiny_prompts(model, n=4), mask),
        train=evaluate(model, tiny_prompts(model, n=1), mask),
        competence=Able(verdict="not solved", sentence="it <b>fails</b>", accuracy=0.4, chance=0.5, n=4),
        stability=Steadiness(
            jaccard=0.5, jaccard_low=0.4, jaccard_high=0.6, head_jaccard=0.7, pairwise=0.4, n_resamples=9, n_prompts=4
        ),
        provenance={"seed": 3, "nested": {"a": [1, 2, None]}},
    )


def same(a, b):
    """Equality in which NaN equals NaN."""
    return repr(replace(a, provenance=dict(a.provenance))) == repr(b) and str(a.__dict__) == str(b.__dict__)


def test_what_is_saved_comes_back(circuit, tmp_path):
    again = Circuit.load(circuit.save(tmp_path / "deep" / "c.json"))
    for name in circuit.__dataclass_fields__:
        assert str(getattr(again, name)) == str(getattr(circuit, name)), name
    assert math.isnan(again.effects[-1])
    assert math.isnan(again.train.faithfulness.ci_low), "one prompt has no interval"
    assert again.warning == circuit.warning
    assert "may be no circuit" in again.warning
    json.loads((tmp_path / "deep" / "c.json").read_text(), parse_constant=pytest.fail)


def test_nodes_heads_and_table(circuit):
    senders = {name.split("->")[0] for name in circuit.edges}
    assert set(circuit.nodes) - {"logits"} == senders
    assert {f"a{layer}.h{head}" for layer, head in circuit.heads} == {s for s in senders if s.startswith("a")}
    frame = circuit.frame
    assert (frame["sender"] + "->" + frame["receiver"]).tolist() == list(circuit.edges)
    assert frame["effect"].tolist()[:3] == [-7.25, -6.25, -5.25]
    assert set(frame["competence"]) == {"not solved"}
    assert "WARNING" in repr(circuit)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: "{", "is not JSON"),
        (lambda r: "[]", "holds no JSON object"),
        (lambda r: "\ufeff\x00", "is not JSON"),
        (lambda r: json.dumps({**r, "kind": "edge_effects"}), "is no circuit: its kind is 'edge_effects'"),
        (lambda r: json.dumps({"cfg": {}, "nodes": {}, "edges": {}}), "read it with Circuit.load_eap_ig"),
        (lambda r: json.dumps({**r, "schema_version": 99}), "has schema_version 99"),
        (lambda r: json.dumps({**r, "extra": 1}), "extra unknown"),
        (lambda r: json.dumps({k: v for k, v in r.items() if k != "edges"}), "edges missing"),
        (lambda r: json.dumps({**r, "edges": "a->b"}), "edges must be a list of names"),
        (lambda r: json.dumps({**r, "edges": [*r["edges"][:-1], "a0.h0->a0.h1<q>"]}), "writes after"),
        (lambda r: json.dumps({**r, "edges": [*r["edges"][:-1], r["edges"][0]]}), "names 1 edges twice"),
        (lambda r: json.dumps({**r, "effects": r["effects"][1:]}), "effects has"),
        (lambda r: json.dumps({**r, "effects": ["x"] * len(r["edges"])}), "is damaged"),
        (lambda r: json.dumps({**r, "shape": {**r["shape"], "n_heads": "4"}}), "shape.n_heads is '4'"),
        (lambda r: json.dumps({**r, "shape": {**r["shape"], "n_kv_heads": 3}}), "key/value heads"),
        (lambda r: json.dumps({**r, "held_out": {"faithfulness": 1}}), "is damaged"),
        (lambda r: json.dumps({**r, "model": None}), "model is None"),
    ],
)
def test_a_foreign_or_damaged_file_is_refused(circuit, tmp_path, damage, message):
    path = circuit.save(tmp_path / "c.json")
    path.write_text(damage(json.loads(path.read_text())), encoding="utf-8")
    with pytest.raises(DataError) as error:
        Circuit.load(path)
    assert message in str(error.value)
    assert "c.json" in str(error.value)


def test_a_missing_file_and_a_full_place(circuit, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Circuit.load(tmp_path / "none.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        circuit.save(tmp_path / "file" / "c.json")


@given(
    text=st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=6,
    ),
    field=st.sampled_from(
        ["edges", "shape", "effects", "held_out", "competence", "stability", "provenance", "inclusion"]
    ),
)
@settings(max_examples=80, deadline=None)
def test_no_value_of_a_field_gets_past_as_another_error(circuit, tmp_path_factory, text, field):
    path = circuit.save(tmp_path_factory.mktemp("c") / "c.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), field: text}), encoding="utf-8")
    with contextlib.suppress(DataError):  # anything else is a failure; some values happen to fit
        assert isinstance(Circuit.load(path), Circuit)


def test_a_circuit_is_not_evaluated_on_another_model(circuit, model):
    pairs = tiny_prompts(model, n=4)
    assert circuit.evaluate(model, pairs).faithfulness.value == pytest.approx(circuit.held_out.faithfulness.value)
    with pytest.raises(PromptError, match="has other nodes"):
        circuit.evaluate(model_of("gpt2"), pairs)
    with pytest.raises(PromptError, match="has weights"):
        replace(circuit, model_hash="0" * 64).evaluate(model, pairs)


# ---- EAP-IG


def eap_ig_edges(n_layers, n_heads, parallel):
    """Edge names of EAP-IG's graph, as its `Graph.from_model` makes them: every head's q, k and v, MLPs, logits."""
    stream, edges = ["input"], []
    for layer in range(n_layers):
        heads = [f"a{layer}.h{h}" for h in range(n_heads)]
        edges += [f"{s}->{h}<{c}>" for s in stream for h in heads for c in "qkv"]
        if not parallel:
            stream = stream + heads
        edges += [f"{s}->m{layer}" for s in stream]
        stream = stream + (heads if parallel else []) + [f"m{layer}"]
    return {*edges, *(f"{s}->logits" for s in stream)}


@pytest.mark.parametrize("family", ["gpt2", "neox_parallel"])
def test_eap_ig_files_have_its_names_and_come_back(family, tmp_path):
    model = model_of(family)
    wiring = Wiring(Graph(model.spec))
    mask = wiring.prune(wiring.everything & (np.random.default_rng(1).random(wiring.shape) < 0.4))
    names = wiring.edges(mask).names
    circuit = Circuit.of_mask(model, mask, effects={name: i / 8 for i, name in enumerate(names)})
    path = circuit.save_eap_ig(tmp_path / "graph.json")
    record = json.loads(path.read_text())
    assert record["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": family == "neox_parallel", "d_model": 32}
    assert set(record["edges"]) == eap_ig_edges(3, 4, family == "neox_parallel")
    assert {name for name, info in record["edges"].items() if info["in_graph"]} == set(names)
    assert record["nodes"]["logits"] == {"in_graph": True}
    assert {n for n, info in record["nodes"].items() if info["in_graph"]} == {*circuit.nodes, "logits"}
    again = Circuit.load_eap_ig(path, model=model)
    assert again.edges == circuit.edges
    assert again.effects == circuit.effects
    assert again.model_hash == model.model_hash


def test_eap_ig_files_of_its_older_version_are_read(tmp_path):
    """There, nodes were plain booleans and cfg had no d_model."""
    edges = {name: {"score": 0.5, "in_graph": name == "input->logits"} for name in eap_ig_edges(3, 4, False)}
    old = {"cfg": {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False}, "nodes": {"input": True}, "edges": edges}
    (tmp_path / "old.json").write_text(json.dumps(old))
    read = Circuit.load_eap_ig(tmp_path / "old.json", name="gpt2")
    assert read.edges == ("input->logits",)
    assert (read.effects, read.model, read.model_hash) == ((0.5,), "gpt2", "")
    assert Circuit.load_eap_ig(tmp_path / "old.json", model=model_of("gpt2")).shape.d_model == 32


def test_grouped_queries_native_and_ungrouped(circuit, model, tmp_path):
    """The ungrouped file is the same circuit of the ungrouped model: it scores the same there."""
    native = json.loads(circuit.save_eap_ig(tmp_path / "native.json").read_text())
    assert any(".kv" in name for name in native["edges"])
    assert Circuit.load_eap_ig(tmp_path / "native.json", model=model).edges == circuit.edges
    path = circuit.save_eap_ig(tmp_path / "ungrouped.json", ungroup=True)
    assert set(json.loads(path.read_text())["edges"]) == eap_ig_edges(3, 4, False)
    import torch

    import workbench as wb
    from families import tiny_module

    apart = wb.wrap_model(tiny_module("llama", dtype=torch.float64), ungroup=True)
    read = Circuit.load_eap_ig(path, model=apart)
    assert read.shape == GraphShape.of(apart.spec)
    pairs = tiny_prompts(model, n=4)
    np.testing.assert_allclose(
        run_circuit(apart, pairs, read).values, run_circuit(model, pairs, circuit).values, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: {"edges": {}}, "is no graph of EAP-IG"),
        (lambda r: {**r, "cfg": {}}, "damaged graph of EAP-IG"),
        (lambda r: {**r, "edges": {"input->logits": 1}}, "damaged graph of EAP-IG"),
        (lambda r: {**r, "edges": {"input->a9.h9<q>": {"score": 1.0, "in_graph": True}}}, "does not fit its own cfg"),
        (lambda r: {**r, "nodes": {"m0": {"in_graph": True, "neurons": [True]}}}, "selects neurons"),
        (lambda r: {**r, "cfg": {**r["cfg"], "n_layers": 2}, "edges": {}}, "is of a model with"),
    ],
)
def test_a_foreign_graph_is_refused(tmp_path, change, message):
    model = model_of("gpt2")
    path = Circuit.of_mask(model, Wiring(Graph(model.spec)).everything).save_eap_ig(tmp_path / "g.json")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError) as error:
        Circuit.load_eap_ig(path, model=model)
    assert message in str(error.value)
