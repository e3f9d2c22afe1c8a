"""Roles: a model made by hand whose heads are known, the rules, and what wrong arguments are told."""

import pandas as pd
import pytest
import torch

import workbench_circuits as wc
from other_device import ELSEWHERE, ElsewhereMode, move
from tiny_text import tiny_text_model
from workbench.errors import PromptError
from workbench.models import Model, ModelSpec, ModelWeights
from workbench.models.weights import QKV, LayerWeights, Linear, Norm
from workbench.prompts import PromptPairs
from workbench.tables import HeadTable
from workbench_circuits._role_rules import Thresholds, label_heads
from workbench_circuits._role_scores import at_spans, holding
from workbench_circuits.roles import head_roles

V, T = 150, 16
TOKEN, PREVIOUS, OUT, PLACE = slice(0, V), slice(V, 2 * V), slice(2 * V, 3 * V), slice(3 * V, 3 * V + T)
WIDTH = 3 * V + T
SHARP = 40.0


def built_by_hand() -> Model:
    """Two layers of two heads without norms or MLPs. The stream is token, previous token, output and place, one-hot.

    a0.h0 looks one place back and writes that token into `previous`; a0.h1 looks at the same token and writes nothing.
    a1.h0 looks where the present token was the previous one, and writes the token there into `output`, twice; a1.h1
    looks there too and takes it away once. The unembedding reads `output`.
    """

    def map_of(*entries):
        """`[WIDTH, V]` from (slot, gain, shift) by head, side by side."""
        columns = []
        for slot, gain, shift in entries:
            matrix = torch.zeros(WIDTH, V)
            size = slot.stop - slot.start
            for at in range(size):
                matrix[slot.start + at, max(at + shift, 0)] = gain
            columns.append(matrix)
        return Linear(matrix=torch.cat(columns, dim=1))

    def back(*entries):
        rows = []
        for slot, gain in entries:
            matrix = torch.zeros(V, WIDTH)
            matrix[torch.arange(V), torch.arange(slot.start, slot.stop)] = gain
            rows.append(matrix)
        return Linear(matrix=torch.cat(rows))

    def layer(q, k, v, out):
        return LayerWeights(
            ln1=Norm(kind="none"),
            ln2=None,
            qkv=QKV(layout="separate", maps=(map_of(*q), map_of(*k), map_of(*v)), n_heads=2, n_kv_heads=2, d_head=V),
            out=back(*out),
            mlp=None,
        )

    token, place = (TOKEN, 1.0, 0), (PLACE, 1.0, 0)
    sharp = (TOKEN, SHARP, 0)
    first = layer(q=((PLACE, SHARP, -1), sharp), k=(place, token), v=(token, token), out=((PREVIOUS, 1.0), (OUT, 0.0)))
    second = layer(
        q=(sharp, sharp),
        k=((PREVIOUS, 1.0, 0), (PREVIOUS, 1.0, 0)),
        v=(token, token),
        out=((OUT, 2.0), (OUT, -1.0)),
    )
    spec = ModelSpec(
        architecture="hand", n_layers=2, n_heads=2, n_kv_heads=2, d_model=WIDTH, d_head=V, d_mlp=0, d_vocab=V,
        n_ctx=T, norm="none", positions="learned", attn_scale=1.0,
    )  # fmt: skip
    eye = torch.eye(WIDTH)
    weights = ModelWeights(
        spec=spec,
        embed=eye[TOKEN].clone(),
        position_embed=eye[PLACE].clone(),
        rotary=None,
        layers=(first, second),
        ln_final=Norm(kind="none"),
        unembed=Linear(matrix=eye[:, OUT].clone()),
    )
    return Model(name="by hand", module=None, weights=weights, provenance={"source": "hand"})


@pytest.fixture(scope="module")
def hand():
    return built_by_hand()


@pytest.fixture(scope="module")
def induction():
    """x A B x x x x A, next B; corrupted: the first A is another token."""
    draw = torch.Generator().manual_seed(0)
    rows = torch.stack([torch.randperm(V, generator=draw)[:9] for _ in range(30)])
    clean = torch.cat([rows[:, :7], rows[:, 1:2]], dim=1)
    corrupted = clean.clone()
    corrupted[:, 1] = rows[:, 8]
    ends = torch.full((30,), 7)
    return PromptPairs.from_tokens(
        clean, corrupted, rows[:, 2], rows[:, 4], task="toy", corruption="first_a",
        spans={"A1": torch.full((30,), 1), "B": torch.full((30,), 2), "END": ends},
    )  # fmt: skip


def test_a_model_made_by_hand_has_the_roles_it_was_made_with(hand, induction):
    found = head_roles(hand, induction, n_random=40, period=6)
    assert found.labels == {
        "a0.h0": "previous token",
        "a0.h1": "duplicate token",
        "a1.h0": "mover, induction, copying",
        "a1.h1": "negative mover, induction, negative copying",
    }
    frame = found.frame.set_index("node")
    # The output slot gets 2 - 1 times the token that is looked at, which is the answer.
    assert frame["direct_effect"].tolist() == pytest.approx([0, 0, 2, -1], abs=1e-4)
    assert frame["attention_to_B"].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-4)
    assert frame["attention_to_answer"].tolist() == pytest.approx([0, 0, 1, 1], abs=1e-4)
    assert frame["attention_to_A1"].tolist() == pytest.approx([0, 0.5, 0, 0], abs=1e-4)
    assert frame["copying"].tolist() == [0, 0, 1, 0]
    assert frame["negative_copying"].tolist() == [0, 0, 0, 1]
    assert frame["copying_without_first_block"].tolist() == [0, 0, 1, 0]
    assert found.movers == ("a1.h0",)
    # What the movers' queries read is the token itself, which no head writes.
    assert frame["mover_attention_change"][:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert frame["mover_attention_change"][2:].isna().all()
    assert (found.competence.accuracy.value, found.competence.mark) == (1.0, "")
    assert "direct effect +2" in frame.loc["a1.h0", "rule"]
    assert "induction 0." in frame.loc["a1.h0", "rule"]
    # of the seven queries on the diagonal the first has nothing to find, and a token may come twice by chance
    assert 0.6 < frame.loc["a1.h0", "induction"] < 6 / 7


def test_an_inhibition_head_is_found_by_what_it_does_to_the_mover(hand, induction):
    """Give a0.h1 an output that takes the looked-at token out of the queries: without it the mover looks elsewhere."""
    from dataclasses import replace

    weights = hand.fast_weights
    first = weights.layers[0]
    matrix = first.out.matrix.clone()
    rows = torch.arange(V)
    matrix[V + rows, TOKEN.start + rows] = 1.0  # the mean of the present token and its earlier copy, added once more
    half = weights.layers[1].qkv.maps[0].matrix / SHARP * 3.0  # queries so blunt that what is added matters
    maps = (Linear(matrix=half), *weights.layers[1].qkv.maps[1:])
    layers = (
        replace(first, out=Linear(matrix=matrix)),
        replace(weights.layers[1], qkv=replace(weights.layers[1].qkv, maps=maps)),
    )
    model = Model(name="hand", module=None, weights=replace(weights, layers=layers), provenance={})
    # corrupted prompts in which END differs: the head's write there is another token
    other = induction.corrupted.clone()
    other[:, 7] = other[:, 1]
    pairs = PromptPairs.from_tokens(
        induction.clean, other, induction.answers, induction.wrong_answers, spans=dict(induction.spans)
    )
    found = head_roles(model, pairs, n_random=4, period=6, movers=["a1.h0"])
    row = found.frame.set_index("node").loc["a0.h1"]
    # Queries are 3 (1 + 1) times the token; without the head's write 3 times it and 3 times one that is not there.
    with_it, without = (torch.tensor([each, *[0.0] * 7]).softmax(0)[0] for each in (6.0, 3.0))
    right_minus_wrong = [float(value - (1 - value) / 7) for value in (with_it, without)]
    assert row["mover_attention_change"] == pytest.approx(right_minus_wrong[1] - right_minus_wrong[0], abs=2e-3)
    assert "S-inhibition" in row["label"]
    assert "S-inhibition" not in found.labels.get("a0.h0", "")


# --- the rules ----------------------------------------------------------------------------------------


def scored(**changed):
    row = {
        "node": "a1.h0",
        "direct_effect": 0.0,
        "direct_effect_low": -0.1,
        "direct_effect_high": 0.1,
        "attention_to_IO": 0.5,
        "induction": 0.1,
        "previous_token": 0.1,
        "duplicate_token": 0.1,
        "copying": 0.0,
        "negative_copying": 0.0,
    }
    return {**row, **changed}


@pytest.mark.parametrize(
    ("changed", "label"),
    [
        ({}, ""),
        ({"direct_effect": 1.0, "direct_effect_low": 0.2}, "mover"),
        ({"direct_effect": 1.0, "direct_effect_low": -0.2}, ""),
        ({"direct_effect": 0.2, "direct_effect_low": 0.1}, ""),
        ({"direct_effect": 1.0, "direct_effect_low": 0.2, "attention_to_IO": 0.05}, ""),
        ({"direct_effect": -1.0, "direct_effect_low": -2.0, "direct_effect_high": -0.2}, "negative mover"),
        (
            {
                "direct_effect": 1.0,
                "direct_effect_low": 0.2,
                "attention_to_answer": 0.1,
                "attention_to_wrong_answer": 0.6,
                "negative_copying": 0.3,
            },
            "suppressor",
        ),
        (
            {
                "direct_effect": 1.0,
                "direct_effect_low": 0.2,
                "attention_to_answer": 0.1,
                "attention_to_wrong_answer": 0.6,
                "copying": 0.3,
            },
            "mover",
        ),
        ({"mover_attention_change": -0.3, "mover_attention_change_high": -0.1}, "S-inhibition"),
        ({"mover_attention_change": -0.3, "mover_attention_change_high": 0.1}, ""),
        ({"mover_attention_change": 0.3, "mover_attention_change_high": 0.4}, ""),
        ({"mover_attention_change": float("nan"), "mover_attention_change_high": float("nan")}, ""),
        ({"previous_token": 0.41}, "previous token"),
        ({"previous_token": 0.39}, ""),
        ({"induction": 0.6, "duplicate_token": 0.7}, "induction, duplicate token"),
        ({"copying": 0.5}, "copying"),
        ({"negative_copying": 0.9}, "negative copying"),
    ],
)
def test_labels_follow_the_rules(changed, label):
    rules = Thresholds(direct_share=0.1, pattern=0.4)
    found = label_heads(pd.DataFrame([scored(**changed)]), rules, logit_diff=-5.0)
    assert found["label"].tolist() == [label]
    assert (found["rule"][0] != "") == (label != "")


def test_answers_are_found_in_the_prompt_up_to_its_answer_position():
    pairs = PromptPairs.from_tokens(
        [[5, 6, 5, 7], [6, 7, 8, 5]], [[1, 6, 5, 7], [1, 7, 8, 5]], [[5, 7], [9, 6]], [8, 5], answer_positions=[2, 2],
        spans={"X": [1, -1]},
    )  # fmt: skip
    assert holding(pairs, pairs.answers).tolist() == [[True, False, True, False], [True, False, False, False]]
    assert holding(pairs, pairs.wrong_answers).tolist() == [[False] * 4, [False] * 4]
    assert at_spans(pairs, ["X"]).tolist() == [[False, True, False, False], [False] * 4]


# --- on a task ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return tiny_text_model(seed=2)


@pytest.fixture(scope="module")
def ioi(model):
    return wc.load_task("ioi").pairs(model, 9)


FEW = {"n_random": 3, "period": 10, "n_copying": 7}


def test_roles_of_some_heads_are_those_of_all(model, ioi, tmp_path):
    everything = head_roles(model, ioi, **FEW)
    some = head_roles(model, ioi, ["a1.h2", (0, 3)], movers=list(everything.movers) or None, **FEW)
    assert some.frame["node"].tolist() == ["a1.h2", "a0.h3"]
    whole = everything.frame.set_index("node")
    for row in some.frame.to_dict("records"):
        for name in ("direct_effect", "attention_to_S2", "copying", "induction"):
            assert row[name] == pytest.approx(whole.loc[row["node"], name], abs=1e-6)
    assert {"attention_to_IO", "attention_to_S1", "attention_to_S2", "attention_to_S1+1"} <= set(whole.columns)
    assert "attention_to_END" not in whole.columns
    assert "NOT SOLVED" in repr(everything)
    folder = everything.save(tmp_path / "roles")
    assert len(HeadTable.load(folder)) == len(everything.table)
    assert list(pd.read_csv(folder / "roles.csv")["node"]) == whole.index.tolist()
    assert everything.table.provenance["thresholds"]["pattern"] == 0.4


def test_the_table_has_intervals_and_counts(model, ioi):
    frame = head_roles(model, ioi, ["a1.h0"], **FEW).table.frame
    rows = frame.set_index("metric")
    assert rows.loc["attention_to_IO", "n"] == 9
    assert rows.loc["copying", "n"] == 7
    assert rows.loc["induction", "n"] == 3
    assert (frame["ci_low"] <= frame["value"]).all()
    assert (frame["ci_high"] >= frame["value"]).all()
    assert rows.loc["direct_effect", "unit"] == "logits"


def test_movers_and_spans_can_be_named(model, ioi):
    by_tokens = head_roles(model, ioi, ["a0.h1"], movers=["a1.h1"], **FEW).frame
    by_spans = head_roles(
        model, ioi, ["a0.h1"], movers=["a1.h1"], answer_spans=["IO"], wrong_spans=["S1", "S2"], **FEW
    ).frame
    assert by_tokens["mover_attention_change"][0] == pytest.approx(by_spans["mover_attention_change"][0], abs=1e-6)
    assert by_tokens["mover_attention_change"][0] != 0
    by_tokens = by_tokens.iloc[0]
    assert by_tokens["attention_to_answer"] == pytest.approx(by_tokens["attention_to_IO"], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": ["a9.h0"]}, r"heads has 'a9\.h0': expected names a0\.h0 to a1\.h3"),
        ({"heads": ["head 1"]}, "heads has 'head 1'"),
        ({"movers": [(0, 4)]}, r"movers has \(0, 4\)"),
        ({"answer_spans": ["S3"]}, "answer_spans has 'S3'; the prompts have the spans IO, S1"),
        ({"n_copying": 0}, "n_copying is 0"),
    ],
)
def test_wrong_arguments(model, ioi, options, words):
    with pytest.raises(PromptError, match=words):
        head_roles(model, ioi, **{**FEW, **options})


def test_roles_mix_no_devices(hand, induction):
    """With weights that claim to be on another device, as on a GPU, the numbers are the same."""
    there = Model(name="hand", module=None, weights=move(hand.fast_weights), provenance={})
    there.__dict__["model_hash"] = hand.model_hash
    few = induction.subset(slice(0, 5))
    expected = head_roles(hand, few, movers=["a1.h0"], n_random=2, period=6)
    with ElsewhereMode():
        assert there.device == ELSEWHERE
        found = head_roles(there, few, movers=["a1.h0"], n_random=2, period=6)
    pd.testing.assert_frame_equal(found.frame, expected.frame)
