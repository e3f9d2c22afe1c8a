"""Two models that differ only in the names of their heads must have reports that differ only in those names."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch

import workbench as wb
from families import tiny_module
from workbench.report.build import write_report
from workbench.report.run import installed_sections

N_LAYERS, N_HEADS, N_KV = 2, 4, 2
# Place i of the permuted model holds head ORDER[layer][i]: groups of one KV head swap, and their members too.
ORDER = ((3, 2, 0, 1), (2, 3, 1, 0))
NAME = re.compile(r"a(\d+)\.h(\d+)")


def permuted(module):
    """Move the heads of a Llama in place, with their KV heads, so that its function stays the same."""
    with torch.no_grad():
        for order, block in zip(ORDER, module.model.layers, strict=True):
            attention = block.self_attn
            groups = [order[place] // (N_HEADS // N_KV) for place in range(0, N_HEADS, N_HEADS // N_KV)]
            for projection, places in (
                (attention.q_proj, order),
                (attention.k_proj, groups),
                (attention.v_proj, groups),
            ):
                for parameter in projection.parameters():
                    by_head = parameter.unflatten(0, (len(places), -1))
                    parameter.copy_(by_head[list(places)].flatten(0, 1))
            out = attention.o_proj.weight
            out.copy_(out.unflatten(1, (N_HEADS, -1))[:, list(order)].flatten(1, 2))
    return module


def renamed(text):
    """A text about the first model as it must read for the permuted one."""

    def new_name(found):
        layer, head = int(found[1]), int(found[2])
        return f"a{layer}.h{ORDER[layer].index(head)}"

    return NAME.sub(new_name, text)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Folders of the report of a model and of the same model with its heads permuted."""
    with_words = {"competence", "head_effects"}  # their prompts need a tokenizer
    sections = {name: make for name, make in installed_sections().items() if name not in with_words}
    folders = []
    for name, change in (("plain", lambda module: module), ("permuted", permuted)):
        module = change(tiny_module("llama", dtype=torch.float64, n_layers=N_LAYERS))
        report = write_report(
            wb.wrap_model(module, name="tiny"), tmp_path_factory.mktemp(name), sections=sections, quick=True
        )
        assert report.failed == ()
        folders.append(report.folder)
    return folders


def test_permutation_leaves_the_function_alone():
    tokens = torch.arange(24).reshape(2, 12)
    plain = tiny_module("llama", dtype=torch.float64, n_layers=N_LAYERS)
    moved = permuted(tiny_module("llama", dtype=torch.float64, n_layers=N_LAYERS))
    torch.testing.assert_close(plain(tokens).logits, moved(tokens).logits, rtol=1e-10, atol=1e-10)


def test_every_number_in_the_files_moves_with_its_head(reports):
    keys = ["analysis", "layer", "head", "metric", "input", "position", "method"]
    plain, moved = (pd.read_csv(folder / "heads.csv") for folder in reports)
    of_heads = plain["head"].notna()
    before = plain[of_heads].copy()
    before["head"] = [
        ORDER[int(layer)].index(int(head)) for layer, head in zip(before["layer"], before["head"], strict=True)
    ]
    after = moved[moved["head"].notna()].astype({"head": int})
    assert len(before) == len(after) > 0
    numbers = ["value", "stderr", "ci_low", "ci_high", "n"]
    expected = before.set_index(keys).sort_index()[numbers]
    found = after.set_index(keys).sort_index()[numbers]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-9, atol=1e-12)
    unmoved = plain[of_heads].set_index(keys).sort_index()["value"]
    for metric in ("alpha", "induction", "previous_token", "duplicate_token"):
        changed = ~np.isclose(found.xs(metric, level="metric")["value"], unmoved.xs(metric, level="metric"))
        assert changed.all(), f"the permutation moves every head, so every {metric} must change"
    pd.testing.assert_frame_equal(
        plain[~of_heads].reset_index(drop=True), moved[moved["head"].isna()].reset_index(drop=True), rtol=1e-9
    )


def test_every_sentence_follows_the_names(reports):
    plain, moved = (json.loads((folder / "manifest.json").read_text())["sections"] for folder in reports)
    assert len(plain) >= 2
    for before, after in zip(plain, moved, strict=True):
        assert after["sentence"] == renamed(before["sentence"])
        assert after["sentence"] != before["sentence"]
        assert len(set(NAME.findall(before["sentence"]))) >= 3


def test_every_table_and_figure_on_the_page_follows(reports):
    plain, moved = ((folder / "index.html").read_text(encoding="utf-8") for folder in reports)

    def small_tables(page):
        return re.findall(r'<table class="small"><caption>.*?</table>', page, flags=re.DOTALL)

    assert small_tables(moved) == [renamed(table) for table in small_tables(plain)] != small_tables(plain)
    rows = [
        dict(re.findall(r'<th scope="row"[^>]*>(a\d+\.h\d+)</th>(.*?)</tr>', page, flags=re.DOTALL))
        for page in (plain, moved)
    ]
    shown = [{name: re.findall(r">([^<>]+)</td>", cells) for name, cells in each.items()} for each in rows]
    assert shown[1] == {renamed(name): cells for name, cells in shown[0].items()}
    assert len(shown[0]) == N_LAYERS * N_HEADS

    def heatmaps(page):
        figures = re.findall(r'<script[^>]*data-figure="[^"]*">(.*?)</script>', page, flags=re.DOTALL)
        return [trace["z"] for each in figures for trace in json.loads(each)["data"] if trace["type"] == "heatmap"]

    before, after = heatmaps(plain), heatmaps(moved)
    assert len(before) == len(after) >= 5
    for x, y in zip(before, after, strict=True):
        expected = [[x[layer][old] for old in ORDER[layer]] for layer in range(N_LAYERS)]
        np.testing.assert_allclose(np.array(y), np.array(expected), rtol=1e-9, atol=1e-12)
