"""The sweep's benchmark counts the operations that its products take."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch.utils.flop_counter import FlopCounterMode

from workbench.bench.shapes import SHAPES, random_model, random_pairs
from workbench.bench.sweep import main, walk_flops
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Graph
from workbench.patching.runs import make_runs


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_operations_are_those_that_torch_counts(layer: int) -> None:
    """Less what the sender and the receiver themselves take, which the floor leaves out."""
    prompts, tokens = 2, 24
    model = random_model(SHAPES["tiny"])
    pairs = random_pairs(SHAPES["tiny"], n=prompts, tokens=tokens, first_difference=0)
    runs = make_runs(model.fast_weights, pairs, direction="noising", metric="logit_diff")
    edges = Graph(model.spec).head_edges()
    receivers = edges.graph.receivers
    mine = edges[np.flatnonzero([receivers[number].layer == layer for number in edges.receiver])[::5]]
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in exact_effects(runs, mine, budget_bytes=1 << 28):
            pass
    counted = counter.get_total_flops() / len(mine)
    floor = walk_flops(model.spec, layer, prompts=prompts, tokens=tokens)
    own = (
        prompts * tokens * 6 * model.spec.d_model * model.spec.d_head
    )  # W_O of the sender, W_Q and W_O of the receiver
    assert floor < counted
    assert counted - own < 1.1 * floor + own


def test_it_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sweep.json"
    main(["--shape", "tiny", "--device", "cpu", "--prompts", "2", "--tokens", "6", "--exact-edges", "20",
          "--json", str(out)])  # fmt: skip
    found = json.loads(out.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == found
    exact = found["methods"]["exact fp32"]
    assert exact["edges"] == 20
    assert exact["tflops"] == pytest.approx(exact["flops"] / exact["seconds"] / 1e12)
    assert exact["share_of_ceiling"] == pytest.approx(exact["tflops"] / found["ceilings_tflops"]["fp32"])
    assert set(found["methods"]) == {"exact fp32", "receiver_exact fp32", "eap fp32"}
