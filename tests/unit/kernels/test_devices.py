"""The engine mixes no devices: run on tensors that claim to be elsewhere, it gives the same numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import workbench as wb
import workbench_kernels
from families import tiny_module, tiny_pairs
from other_device import ELSEWHERE, Elsewhere, ElsewhereMode, here, move
from workbench.models.weights import ModelWeights
from workbench.patching import kernel_scores
from workbench.patching.attribution import attribution_effects
from workbench.patching.exact import exact_effects
from workbench.patching.graph import Edges, Graph
from workbench.patching.noise import noise_floor
from workbench.patching.receiver_exact import receiver_exact_effects
from workbench.patching.runs import Runs, make_runs

BUDGET = 1 << 26


def sweep(weights: ModelWeights, pairs: wb.PromptPairs, edges: Edges, metric: str) -> dict[str, Tensor]:
    """Effects by every method, and the noise floor."""
    runs = make_runs(weights, pairs, direction="denoising", metric=metric, trace=True)

    def all_of(parts: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        found = torch.full((len(edges), len(pairs)), torch.nan, dtype=torch.float64)
        for index, effects in parts:
            assert isinstance(effects, Elsewhere) == (weights.device == ELSEWHERE)
            found[index] = here(effects).double()
        return found

    def rounded(runs: Runs) -> Iterator[tuple[Tensor, Tensor]]:
        return receiver_exact_effects(runs, edges, budget_bytes=BUDGET, precision="tf32")

    return {
        "exact": all_of(exact_effects(runs, edges, budget_bytes=BUDGET)),
        "receiver_exact": all_of(receiver_exact_effects(runs, edges, budget_bytes=BUDGET)),
        "rounded": all_of(rounded(runs)),
        "eap_ig": all_of(attribution_effects(runs, edges, steps=2)),
        "noise": torch.tensor(noise_floor(runs), dtype=torch.float64),
    }


@pytest.mark.parametrize(
    ("family", "kernels"),
    [("gpt2", False), ("neox_parallel", False), ("gpt2", True), ("llama_bias", True), ("qwen3", True)],
)
def test_the_engine(family: str, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels, everything that is prepared for them is; their references then run in their place."""
    module = tiny_module(family, dtype=torch.float64, n_layers=2)
    tensors = tiny_pairs(module, n=3, length=9)
    tensors.pop("first_difference")
    if family in {"qwen3", "gpt2"}:  # behind a prefix
        tensors["corrupted"][:, :3] = tensors["clean"][:, :3]
    pairs = wb.PromptPairs.from_tokens(**tensors)
    weights = wb.wrap_model(module).fast_weights
    every = Graph(weights.spec).all_edges()
    edges = every[torch.arange(0, len(every), 7).numpy()]
    metric = "answer_logprob" if family == "gpt2" else "logit_diff"
    truth = sweep(weights, pairs, edges, metric)
    if kernels:
        monkeypatch.setattr(workbench_kernels, "backend_for", lambda *_, **__: "triton")
        monkeypatch.setattr(kernel_scores, "BACKEND", "torch")
    with ElsewhereMode():
        found = sweep(move(weights), pairs, edges, metric)
    for name, values in found.items():
        assert torch.allclose(values, truth[name], rtol=1e-9, atol=1e-12), name


def test_mixed_devices_are_refused() -> None:
    """The instrument itself: what CUDA refuses, it refuses."""
    x, index = torch.ones(3, 2), torch.tensor([0, 2])
    there = move(x)
    with ElsewhereMode():
        assert there[index].device == ELSEWHERE
        assert (there * torch.tensor(2.0)).device == ELSEWHERE
        assert (there + x.to(ELSEWHERE)).device == ELSEWHERE
        assert there.cpu().device.type == "cpu"
        assert torch.equal(here(torch.arange(3, device=ELSEWHERE)), torch.arange(3))
        for mix in (lambda: there + x, lambda: there @ x.T, lambda: torch.where(there > 0, there, x),
                    lambda: torch.cat((there, x)), lambda: x[move(index)]):  # fmt: skip
            with pytest.raises(RuntimeError, match="is on cpu, others are elsewhere"):
                mix()
