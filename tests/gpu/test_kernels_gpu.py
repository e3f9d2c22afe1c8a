"""Every kernel on a GPU, in every dtype and precision, against its float64 reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_cases import SCORES, Case, relative
from workbench_kernels import (
    base_attention,
    inverse_sigma,
    norm_delta,
    receiver_effects,
    suffix_attention,
    value_gradient,
)

pytestmark = pytest.mark.gpu

PRECISIONS = {
    "fp32": (torch.float32, "ieee", 1e-5),
    "tf32x3": (torch.float32, "tf32x3", 2e-5),
    "tf32": (torch.float32, "tf32", 1e-2),
    "fp16": (torch.float16, "ieee", 1e-2),
    "bf16": (torch.bfloat16, "ieee", 5e-2),
}
"""Dtype, how float32 is read, and the largest relative error; effects are differences, so rounding shows more."""

LARGE = {
    **SCORES,
    "GPT-2 small": Case(n=4, width=16, length=16, heads=12, kv_heads=12, d_head=64, rotary=0, norm=False, senders=7),
    "grouped keys of SmolLM2": Case(
        channel="k", n=3, width=50, length=70, heads=9, kv_heads=3, d_head=64, rotary=64, norm=False, senders=5
    ),
    "factored keys of a group": Case(
        channel="k", n=2, width=21, length=64, heads=9, kv_heads=3, d_head=64, rotary=64, d_inner=64, senders=5
    ),
    "long": Case(n=1, width=1000, length=1024, heads=2, kv_heads=1, d_head=64, rotary=32, senders=3),
    "long keys": Case(channel="k", n=1, width=1000, length=1024, heads=2, kv_heads=1, d_head=64, rotary=64, senders=3),
    "d_head 32": Case(n=2, width=40, length=60, heads=4, kv_heads=2, d_head=32, rotary=32, senders=3, d_inner=32),
    "d_head 128": Case(n=2, width=70, length=90, heads=4, kv_heads=2, d_head=128, rotary=128, senders=3, d_inner=128),
    "keys, d_head 128": Case(
        channel="k", n=2, width=30, length=90, heads=4, kv_heads=2, d_head=128, rotary=128, senders=3, d_inner=128
    ),
    "d_head 256": Case(n=2, width=70, length=90, heads=2, kv_heads=1, d_head=256, rotary=256, senders=3, d_inner=256),
    "keys, d_head 256": Case(
        channel="k", n=2, width=70, length=90, heads=2, kv_heads=1, d_head=256, rotary=256, senders=3, d_inner=256
    ),
    "many senders": Case(n=2, width=8, length=8, heads=2, kv_heads=2, d_head=16, rotary=0, senders=1000),
}


def of_dtype(name: str, dtype: torch.dtype) -> Case:
    return replace(LARGE[name], dtype=dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [name for name in LARGE if LARGE[name].dtype == torch.float32])
def test_receiver_effects(
    name: str, precision: str, cuda: torch.device, record_property: Callable[[str, object], None]
) -> None:
    dtype, read, limit = PRECISIONS[precision]
    case = of_dtype(name, dtype)
    attention, patch = case.make(device=str(cuda))
    found = receiver_effects(attention, patch, case.channel, case.receivers, precision=read)
    again = receiver_effects(attention, patch, case.channel, case.receivers, precision=read)
    assert torch.equal(found, again), "the same inputs give the same bits"
    attention, patch = case.make(torch.float64, str(cuda))
    truth = receiver_effects(attention, patch, case.channel, case.receivers, backend="torch")
    if case.length == 1:
        assert found.abs().max() < 1e-6
        return
    error = relative(found, truth)
    record_property("relative_error", error)
    assert error < limit


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "name", ["queries", "grouped 8:1", "GPT-2 small", "long", "d_head 32", "d_head 128", "d_head 256"]
)
def test_clean_attention_and_value_gradient(name: str, precision: str, cuda: torch.device) -> None:
    dtype, read, limit = PRECISIONS[precision]
    case = of_dtype(name, dtype)
    attention, _ = case.make(device=str(cuda))
    exact, _ = case.make(torch.float64, str(cuda))
    base, truth = base_attention(attention, precision=read), base_attention(exact, backend="torch")
    assert relative(base.worth, truth.worth) < limit
    assert relative(base.log_normaliser, truth.log_normaliser) < limit
    found = value_gradient(attention, base, precision=read)
    assert relative(found, value_gradient(exact, backend="torch")) < limit


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d_head", "width", "prefix"),
    [
        (12, 12, 64, 5, 40),
        (9, 3, 64, 16, 0),
        (1, 1, 24, 1, 4),
        (8, 1, 128, 70, 300),
        (2, 1, 256, 40, 9),
        (4, 2, 8, 6, 3),
    ],
)
def test_suffix_attention(
    precision: str, heads: int, kv_heads: int, d_head: int, width: int, prefix: int, cuda: torch.device
) -> None:
    dtype, read, limit = PRECISIONS[precision]
    edges, n = 5, 3
    own = [draw(edges, n, width, h, d_head, seed=i).to(cuda, dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]
    early = [draw(n, prefix, kv_heads, d_head, seed=9 + i).to(cuda, dtype) for i in range(2)]
    start = torch.tensor([0, prefix // 2, prefix], device=cuda)
    for i, first in enumerate(start.tolist()):  # what lies in the window must not be read
        for tensor in early:
            tensor[i, first:] = torch.nan
    found = suffix_attention(*own, *early, start, scale=d_head**-0.5, precision=read)
    clean = [tensor.nan_to_num().double() for tensor in early]
    truth = suffix_attention(*(x.double() for x in own), *clean, start, scale=d_head**-0.5, backend="torch")
    assert relative(found, truth) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("d_model", [40, 768, 5000])
def test_norms(dtype: torch.dtype, kind: str, d_model: int, cuda: torch.device) -> None:
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}[dtype]
    base, delta = (draw(2, 3, d_model) * 3 + 1).to(cuda, dtype), draw(4, 2, 3, d_model).to(cuda, dtype)
    weight = draw(d_model, seed=1).to(cuda, dtype)
    bias = draw(d_model, seed=2).to(cuda, dtype) if kind == "layernorm" else None
    found = norm_delta(kind, base, delta, weight, bias, eps=1e-5)
    double = None if bias is None else bias.double()
    truth = norm_delta(kind, base.double(), delta.double(), weight.double(), double, eps=1e-5)
    assert relative(found, truth) < limit
    x = base.double() - base.double().mean(-1, keepdim=True) if kind == "layernorm" else base.double()
    sigma = (x.square().mean(-1) + 1e-5).sqrt().float()
    unit = (x / sigma.double()[..., None]).to(dtype)
    deltas = delta.permute(1, 2, 0, 3).contiguous()[:, :, 1:]
    found = inverse_sigma(kind, unit, sigma, deltas, eps=1e-5)
    truth = inverse_sigma(kind, unit.double(), sigma.double(), deltas.double(), eps=1e-5)
    assert relative(found, truth) < limit


@pytest.mark.parametrize("channel", ["q", "k"])
def test_memory_does_not_grow_with_the_square_of_the_prompt(channel: str, cuda: torch.device) -> None:
    def beyond_inputs(tokens: int) -> int:
        case = Case(channel=channel, n=1, width=tokens, length=tokens, heads=4, kv_heads=4, d_head=64, senders=8)
        attention, patch = case.make(device=str(cuda))
        receiver_effects(attention, patch, channel, case.receivers)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        receiver_effects(attention, patch, channel, case.receivers)
        return torch.cuda.max_memory_allocated() - before

    short, long = beyond_inputs(256), beyond_inputs(1024)
    assert long <= 4 * short + (1 << 20)
    assert long < 8 * 4 * 1024 * 1024 * 4 / 50, "a score of every pair would take fifty times that"
