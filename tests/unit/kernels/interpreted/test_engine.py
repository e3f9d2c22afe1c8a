"""Effects through the interpreted kernels equal those of the torch path."""

import numpy as np
import pytest
import torch

import workbench as wb
from families import tiny_module, tiny_pairs
from workbench.patching import kernel_scores

EDGES = {
    "gpt2": ("h", ["m0->a1.h1<q>", "m0->a1.h1<v>"]),
    "llama": ("kv", ["m0->a1.h3<q>", "m0->a1.kv1<k>"]),
    "qwen3": ("kv", ["m0->a1.h3<q>", "m0->a1.kv0<v>"]),
    "neox_parallel": ("h", ["m0->a1.h1<k>"]),
}


def pairs_for(module: torch.nn.Module, *, same_until: int | None = None) -> wb.PromptPairs:
    tensors = tiny_pairs(module, n=2, length=8)
    tensors.pop("first_difference")
    if same_until is not None:  # windows behind a prefix
        tensors["corrupted"][:, :same_until] = tensors["clean"][:, :same_until]
    return wb.PromptPairs.from_tokens(**tensors)


@pytest.mark.parametrize(
    ("family", "same_until"), [("gpt2", None), ("gpt2", 4), ("llama", None), ("qwen3", 4), ("neox_parallel", None)]
)
def test_receiver_exact(family: str, same_until: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kv, names = EDGES[family]
    names = [
        *("input->a1.h1<q>", "a0.h0->a1.h1<q>", "a0.h3->a1.h0<q>"),
        *(f"input->a1.{kv}1<k>", f"a0.h2->a1.{kv}1<k>", f"a0.h2->a1.{kv}0<v>", "a0.h1->m1", "a0.h1->logits"),
        *names,
    ]
    module = tiny_module(family, n_layers=2)
    model, pairs = wb.wrap_model(module), pairs_for(module, same_until=same_until)
    scored = []
    score = kernel_scores.KernelScores.effects

    def counted(self: kernel_scores.KernelScores, group, *rest):  # type: ignore[no-untyped-def]
        scored.append(group.kind)
        return score(self, group, *rest)

    monkeypatch.setattr(kernel_scores.KernelScores, "effects", counted)
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("WORKBENCH_KERNELS", backend)
        found[backend] = wb.edge_effects(model, pairs, method="receiver_exact", edges=names, per_prompt=True).per_prompt
        assert set(scored) == (set() if backend == "torch" else {"q", "k"})
    norm = np.linalg.norm(found["torch"], axis=1)
    away = np.linalg.norm(found["torch"] - found["triton"], axis=1)
    assert (norm > 1e-4).all()
    assert (away < 1e-5 * norm.max()).all()


@pytest.mark.parametrize(("family", "same_until"), [("gpt2", None), ("llama", 4), ("qwen3", None)])
def test_exact(family: str, same_until: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    kv = EDGES[family][0]
    names = [f"input->a1.{kv}1<k>", "a0.h0->a1.h1<q>", "a0.h0->m0"]
    module = tiny_module(family, n_layers=3)
    model, pairs = wb.wrap_model(module), pairs_for(module, same_until=same_until)
    found = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("WORKBENCH_KERNELS", backend)
        found[backend] = wb.edge_effects(model, pairs, method="exact", edges=names, per_prompt=True).per_prompt
    assert np.abs(found["torch"] - found["triton"]).max() < 1e-5 * np.abs(found["torch"]).max()
    assert not np.array_equal(found["torch"], found["triton"]), "the kernels must have taken part"
