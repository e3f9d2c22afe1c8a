"""The precision of products: refused where it cannot be had, applied to nothing else, its error measured and stated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import workbench as wb
from families import tiny_module, tiny_pairs
from workbench.errors import PromptError
from workbench.patching import engine
from workbench.patching.precision import Rounded, check_precision, precision_error


def case(dtype: torch.dtype = torch.float32) -> tuple[wb.Model, wb.PromptPairs]:
    module = tiny_module("llama", dtype=dtype, n_layers=2)
    tensors = tiny_pairs(module, n=2, length=8)
    tensors.pop("first_difference")
    return wb.wrap_model(module), wb.PromptPairs.from_tokens(**tensors)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_a_cpu_multiplies_in_float32_only(precision: str) -> None:
    model, pairs = case()
    with pytest.raises(PromptError, match=f"precision='{precision}' needs a CUDA device and the model is on cpu"):
        wb.edge_effects(model, pairs, precision=precision)


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(PromptError, match="precision 'fp8' is not one of fp32, tf32, bf16"):
        check_precision("fp8", torch.float32, torch.device("cuda"))
    with pytest.raises(PromptError, match=r"rounds the products of a float32 model and this one is torch\.bfloat16"):
        check_precision("tf32", torch.bfloat16, torch.device("cuda"))
    check_precision("fp32", torch.float64, torch.device("cpu"))
    check_precision("tf32", torch.float32, torch.device("cuda"))


def test_rounding_meets_products_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*shape, generator=generator) for shape in ((3, 5), (5, 4), (3, 4)))
    low = a.bfloat16().float() @ b.bfloat16().float()
    with Rounded(torch.bfloat16):
        assert torch.equal(a @ b, low)
        assert torch.equal(F.linear(a, b.mT, c[0]), low + c[0])
        assert torch.equal((a[None] @ b[None])[0], low)
        assert torch.equal(torch.einsum("ij,jk->ik", a, b), low)
        assert torch.equal(a * a, a.mul(a))
        assert torch.equal(a.double() @ b.double(), torch.mm(a.double(), b.double()))
        assert (a @ b).dtype == torch.float32
    assert not torch.equal(a @ b, low)


def test_the_error_is_a_norm_a_mean_and_a_maximum() -> None:
    found = precision_error(np.array([[3.0, 4.5]]), np.array([[3.0, 4.0]]))
    assert found == {
        "edges": 1,
        "prompts": 2,
        "relative": pytest.approx(0.5 / 5),
        "root_mean_square": pytest.approx(0.5 / 2**0.5),
        "largest": 0.5,
    }


@pytest.mark.parametrize("method", ["exact", "receiver_exact"])
def test_a_result_states_the_measured_error(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products rounded as a GPU would round them, the stated error is that of the stated effects."""
    model, pairs = case()
    precise = wb.edge_effects(model, pairs, method=method, per_prompt=True)
    assert precise.provenance["settings"]["precision"] == "fp32"
    assert precise.provenance["precision_error"] == {"noise_floor": precise.noise_floor}

    @contextmanager
    def products(precision: str, _: torch.device) -> Iterator[None]:
        if precision == "fp32":
            yield
        else:
            with Rounded(torch.bfloat16):
                yield

    monkeypatch.setattr(engine, "products", products)
    monkeypatch.setattr(engine, "check_precision", lambda *_: None)
    monkeypatch.setattr(engine, "ERROR_EDGES", 10_000)
    rounded = wb.edge_effects(model, pairs, method=method, precision="bf16", per_prompt=True)
    stated = rounded.provenance["precision_error"][method]
    difference = rounded.per_prompt - precise.per_prompt
    assert stated["edges"] == len(precise)
    assert stated["prompts"] == 2
    assert stated["relative"] == pytest.approx(
        np.linalg.norm(difference) / np.linalg.norm(precise.per_prompt), rel=1e-3
    )
    assert stated["largest"] == pytest.approx(np.abs(difference).max(), rel=1e-3)
    assert 1e-4 < stated["relative"] < 0.1
    assert rounded.noise_floor == pytest.approx(stated["root_mean_square"])
