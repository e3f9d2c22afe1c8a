"""Wrong arguments are refused with the same words before either implementation, and the references are right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kernel_cases import Case
from workbench_kernels import (
    VARIABLE,
    Attention,
    KernelError,
    Patch,
    backend_for,
    base_attention,
    inverse_sigma,
    norm_delta,
    receiver_effects,
    suffix_attention,
    value_gradient,
)

BACKENDS = ("triton", "torch")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": torch.ones(2, 9, 1)}, r"keys has shape \(2, 9, 1\); expected 4 axes"),
        ({"keys": torch.ones(3, 9, 1, 8)}, r"keys has shape .* so n=3, but queries has n=2"),
        ({"keys": torch.ones(2, 9, 1, 8, dtype=torch.float64)}, "keys is torch.float64, expected torch.float32"),
        ({"values": torch.ones(2, 9, 1, 16)[..., ::2]}, r"values has strides .* last axis must be contiguous"),
        ({"gradient": torch.ones(2, 5, 2, 8, device="meta")}, "gradient is on meta, expected cpu"),
        ({"start": torch.zeros(2, dtype=torch.int32)}, "start is torch.int32, expected torch.int64"),
        ({"start": torch.tensor([0, 5])}, "start is between 0 and 5; windows of 5 positions must lie within the 9"),
        ({"start": torch.tensor([-1, 0])}, "start is between -1 and 0"),
        ({"causal": False}, "causal=False with windows of 5 and keys of 9"),
        (
            {"keys": torch.ones(2, 9, 3, 8), "values": torch.ones(2, 9, 3, 8)},
            "queries have 2 heads and keys 3; expected a multiple",
        ),
        ({"keys": torch.ones(2, 3, 1, 8), "values": torch.ones(2, 3, 1, 8)}, "windows of 5 positions do not fit keys"),
    ],
)
def test_attention(change: dict[str, object], words: str) -> None:
    attention, _ = Case().make()
    with pytest.raises(KernelError, match=words):
        replace(attention, **change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"moved": None}, "given no delta; expected moved alone, or mixed with matrices"),
        ({"mixed": torch.ones(2, 2, 5, 8)}, "given moved, mixed; expected moved alone"),
        ({"cos": None}, "cos and sin belong together"),
        ({"inverse": torch.ones(2, 5, 3)}, r"moved has shape .* senders=2, but inverse has senders=3"),
        ({"constant": torch.ones(2, 9)}, "d_head=9, but base has d_head=8"),
        ({"norm_weight": torch.ones(8).half()}, "norm_weight is torch.float16, expected torch.float32"),
        ({"cos": torch.ones(2, 5, 3), "sin": torch.ones(2, 5, 3)}, "cos has 3 columns for d_head=8"),
        ({"moved": torch.ones(2, 5, 2, 2, 16)[..., ::2]}, "moved has strides"),
        ({"moved": torch.ones(2, 5, 2, 2, 8, dtype=torch.int64)}, "dtype torch.int64 is not one of"),
    ],
)
def test_patch(change: dict[str, object], words: str) -> None:
    _, patch = Case().make()
    with pytest.raises(KernelError, match=words):
        replace(patch, **change)


@pytest.mark.parametrize("backend", BACKENDS)
def test_receiver_effects(backend: str) -> None:
    attention, patch = Case().make()
    for arguments, words in (
        ((attention, patch, "v", [1, 0]), "channel='v' is not 'q' or 'k'"),
        ((attention, patch, "q", [0]), "heads has 1 entries and base 2 receivers"),
        ((attention, patch, "q", [0, 2]), r"heads=\[0, 2\] for channel 'q'; expected numbers from 0 to 1"),
        ((attention, patch, "k", [0, 1]), "expected numbers from 0 to 0"),
        ((replace(attention, keys=attention.keys.double(), values=attention.values.double(),
                  queries=attention.queries.double(), gradient=attention.gradient.double()), patch, "q", [1, 0]),
         "moved is torch.float32, expected torch.float64"),
        ((attention, Case(width=4).make()[1], "q", [1, 0]), "width=4, but queries has width=5"),
    ):  # fmt: skip
        with pytest.raises(KernelError, match=words):
            receiver_effects(*arguments, backend=backend)
    with pytest.raises(KernelError, match="precision='fp32' is not one of 'ieee', 'tf32x3', 'tf32'"):
        receiver_effects(attention, patch, "q", [1, 0], precision="fp32", backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norms_and_suffixes(backend: str) -> None:
    x = torch.ones(2, 3, 4)
    with pytest.raises(KernelError, match="kind='rms' is not"):
        norm_delta("rms", x, x[None], x[0, 0], eps=0.0, backend=backend)
    with pytest.raises(KernelError, match="bias is given for an RMSNorm"):
        norm_delta("rmsnorm", x, x[None], x[0, 0], x[0, 0], eps=0.0, backend=backend)
    with pytest.raises(KernelError, match=r"delta has shape .* expected 4 axes"):
        norm_delta("rmsnorm", x, x, x[0, 0], eps=0.0, backend=backend)
    with pytest.raises(KernelError, match=r"sigma is torch\.float64"):
        inverse_sigma("rmsnorm", x, x[..., 0].double(), x[:, :, None], eps=0.0, backend=backend)
    q = torch.ones(1, 2, 3, 2, 4)
    with pytest.raises(KernelError, match=r"start has shape .* so n=3"):
        suffix_attention(q, q, q, q[0], q[0], torch.zeros(3).long(), scale=1.0, backend=backend)
    with pytest.raises(KernelError, match="q has 2 heads and k 3"):
        suffix_attention(q, *[torch.ones(1, 2, 3, 3, 4)] * 2, *[torch.ones(2, 1, 3, 4)] * 2,
                         torch.zeros(2).long(), scale=1.0, backend=backend)  # fmt: skip
    with pytest.raises(KernelError, match="edges=0; expected at least 1"):
        suffix_attention(q[:0], q[:0], q[:0], q[0], q[0], torch.zeros(2).long(), scale=1.0, backend=backend)


def test_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    x = torch.ones(2)
    assert backend_for(x) == "torch"
    assert backend_for(x, "torch") == "torch"
    with pytest.raises(KernelError, match="tensors are on cpu: move them to CUDA, or set TRITON_INTERPRET=1"):
        backend_for(x, "triton")
    with pytest.raises(KernelError, match="backend is 'cuda', expected 'triton' or 'torch'"):
        backend_for(x, "cuda")
    with pytest.raises(KernelError, match=r"not torch.float64: use backend='torch'"):
        backend_for(x.double(), "triton")
    with pytest.raises(KernelError, match="d_head=7; the kernels take even widths up to 256"):
        backend_for(x, "triton", d_head=7)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend_for(x, "triton") == "triton"
    assert backend_for(x) == "torch", "nothing was asked for"
    with pytest.raises(KernelError, match="the interpreter has no bfloat16"):
        backend_for(x.bfloat16(), "triton")
    monkeypatch.setenv(VARIABLE, "triton")
    assert backend_for(x) == "triton"
    assert backend_for(x, "torch") == "torch", "an argument comes before the environment"
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(KernelError, match="the environment variable WORKBENCH_KERNELS is 'fast'"):
        backend_for(x)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one head by torch, `[n, width, d_head]`, the last query at the last key."""
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def test_the_references_are_what_torch_and_autograd_say() -> None:
    """One head, its window at the end: worth is z.g, the value gradient is autograd's, an effect is a difference."""
    case = Case(n=1, heads=1, d_head=6, rotary=0, norm=False, constant=False, width=4, length=4).double()
    attention, patch = case.make()
    start = torch.tensor([2])
    keys, values = (torch.randn(1, 6, 1, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    attention = Attention(**{**attention.__dict__, "keys": keys.detach(), "values": values.detach(), "start": start})
    z = attend(attention.queries[:, :, 0], keys[:, :, 0], values[:, :, 0])
    worth = (z * attention.gradient[:, :, 0]).sum(-1)
    base = base_attention(attention)
    assert torch.allclose(base.worth[:, 0], worth)
    (pulled,) = torch.autograd.grad(worth.sum(), values)
    assert torch.allclose(value_gradient(attention), pulled[:, 2:])
    assert isinstance(patch, Patch)
    assert patch.moved is not None
    for channel in ("q", "k"):
        found = receiver_effects(attention, patch, channel, [0])
        for sender in range(case.senders):
            own = (patch.moved[:, :, sender, 0] + patch.base[:, :, 0]) * patch.inverse[:, :, sender, None]
            q, k = attention.queries[:, :, 0], attention.keys[:, :, 0]
            q, k = (own, k) if channel == "q" else (q, torch.cat((k[:, :2], own), dim=1))
            moved = (attend(q, k, attention.values[:, :, 0]) * attention.gradient[:, :, 0]).sum(-1)
            assert torch.allclose(found[:, sender, 0], (moved - worth).sum(-1))
