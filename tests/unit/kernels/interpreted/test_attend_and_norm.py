"""Attention of suffixes and norms of patched streams in the interpreter equal their float64 references."""

import pytest
import torch
from torch import Tensor

from kernel_cases import relative
from workbench_kernels import inverse_sigma, norm_delta, suffix_attention

LIMIT = {torch.float32: 1e-5, torch.float16: 2e-3}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "d_head", "width", "prefix"),
    [(2, 2, 8, 3, 5), (3, 1, 16, 20, 7), (1, 1, 24, 1, 4), (8, 1, 8, 5, 40), (2, 1, 8, 6, 0), (1, 1, 8, 1, 0)],
)
def test_suffix_attention(dtype: torch.dtype, heads: int, kv_heads: int, d_head: int, width: int, prefix: int) -> None:
    edges, n = 2, 3
    own = [draw(edges, n, width, h, d_head, seed=i).to(dtype) for i, h in enumerate((heads, kv_heads, kv_heads))]
    early = [draw(n, prefix, kv_heads, d_head, seed=9 + i).to(dtype) for i in range(2)]
    start = torch.tensor([0, prefix // 2, prefix])
    for i, first in enumerate(start.tolist()):  # what lies in the window must not be read
        for tensor in early:
            tensor[i, first:] = torch.nan
    found = suffix_attention(*own, *early, start, scale=0.3, backend="triton")
    clean = [tensor.nan_to_num().double() for tensor in early]
    truth = suffix_attention(*(x.double() for x in own), *clean, start, scale=0.3, backend="torch")
    assert found.dtype == dtype
    assert relative(found, truth) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("d_model", [1, 40, 300])
def test_norms(dtype: torch.dtype, kind: str, d_model: int) -> None:
    base, delta = (draw(2, 3, d_model) * 3 + 1).to(dtype), draw(2, 2, 3, d_model).to(dtype)
    weight = draw(d_model, seed=1).to(dtype)
    bias = draw(d_model, seed=2).to(dtype) if kind == "layernorm" else None
    found = norm_delta(kind, base, delta, weight, bias, eps=1e-5, backend="triton")
    double = None if bias is None else bias.double()
    truth = norm_delta(kind, base.double(), delta.double(), weight.double(), double, eps=1e-5, backend="torch")
    assert found.dtype == dtype
    assert relative(found, truth) < LIMIT[dtype]


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_inverse_sigma(dtype: torch.dtype, kind: str) -> None:
    x = draw(2, 3, 300) * 3 + 1
    x = x - x.mean(-1, keepdim=True) if kind == "layernorm" else x
    sigma = (x.square().mean(-1) + 1e-5).sqrt().float()
    unit = (x / sigma.double()[..., None]).to(dtype)
    deltas = draw(2, 3, 20, 300).to(dtype)[:, :, 2:]  # a view
    found = inverse_sigma(kind, unit, sigma, deltas, eps=1e-5, backend="triton")
    truth = inverse_sigma(kind, unit.double(), sigma.double(), deltas.double(), eps=1e-5, backend="torch")
    # the base stream counts by its own sigma, of which a rounded unit stream falls short
    assert relative(found, truth) < {torch.float32: 1e-5, torch.float16: 1e-3}[dtype]
