"""Random inputs of the kernels in one dtype, beside the same numbers in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench_kernels import Attention, Patch

Convert = Callable[[Tensor | None], Tensor | None]


def relative(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over norm of the truth, over the whole output; 1 where anything is not a number."""
    assert found.shape == truth.shape
    if not found.isfinite().all():
        return 1.0
    found, truth = found.double().cpu(), truth.double().cpu()
    return float((found - truth).norm() / truth.norm())


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of a receiver-scoring problem, and what lies between projection and score."""

    channel: str = "q"
    n: int = 2
    width: int = 5
    length: int = 9
    heads: int = 2
    kv_heads: int = 1
    d_head: int = 8
    senders: int = 2
    rotary: int = 8
    norm: bool = True
    constant: bool = True
    d_inner: int = 0
    causal: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def double(self) -> Case:
        """The same problem in float64."""
        return replace(self, dtype=torch.float64)

    @property
    def receivers(self) -> list[int]:
        """Receiver heads: all of them, last first."""
        return list(range(self.heads if self.channel == "q" else self.kv_heads))[::-1]

    def make(self, to: torch.dtype | None = None, device: str = "cpu") -> tuple[Attention, Patch]:
        """The inputs, drawn in float64, rounded to the case's dtype, held in `to`."""
        generator = torch.Generator().manual_seed(self.seed)
        held = self.dtype if to is None else to

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def operand(x: Tensor) -> Tensor:
            return x.to(self.dtype).to(held).to(device)

        def fixed(x: Tensor) -> Tensor:
            wide = torch.promote_types(self.dtype, torch.float32)
            return x.to(wide).to(torch.promote_types(held, torch.float32)).to(device)

        n, width, d_head, receivers = self.n, self.width, self.d_head, len(self.receivers)
        start = torch.randint(0, self.length - width + 1, (n,), generator=generator)
        attention = Attention(
            queries=operand(draw(n, width, self.heads, d_head)),
            keys=operand(draw(n, self.length, self.kv_heads, d_head)),
            values=operand(draw(n, self.length, self.kv_heads, d_head)),
            gradient=operand(draw(n, width, self.heads, d_head)),
            start=start.to(device),
            scale=d_head**-0.5,
            causal=self.causal,
        )
        angle = draw(n, width, self.rotary // 2).repeat(1, 1, 2)
        delta = {}
        if self.d_inner:
            delta["mixed"] = operand(draw(self.senders, n, width, self.d_inner))
            delta["matrices"] = operand(draw(self.senders, receivers, self.d_inner, d_head) * self.d_inner**-0.5)
        else:
            delta["moved"] = operand(draw(n, width, self.senders, receivers, d_head))
        patch = Patch(
            base=fixed(draw(n, width, receivers, d_head)),
            inverse=fixed(draw(n, width, self.senders).abs() + 0.5),
            constant=fixed(draw(receivers, d_head)) if self.constant else None,
            norm_weight=fixed(draw(d_head) + 1) if self.norm else None,
            norm_eps=1e-5 if self.norm else 0.0,
            cos=fixed(angle.cos()) if self.rotary else None,
            sin=fixed(angle.sin()) if self.rotary else None,
            **delta,
        )
        return attention, patch


SCORES = {
    "queries": Case(),
    "keys": Case(channel="k"),
    "two blocks of queries and three of keys": Case(n=1, width=35, length=37, heads=1, senders=1),
    "two blocks of patched keys": Case(channel="k", n=1, width=18, length=35, heads=2, senders=1),
    "one token": Case(n=3, width=1, length=1, heads=1),
    "one token after a prefix": Case(width=1, length=6),
    "keys of one token after a prefix": Case(channel="k", width=1, length=6),
    "grouped 3:1": Case(channel="k", heads=6, kv_heads=2, n=1),
    "grouped 8:1": Case(channel="k", heads=8, kv_heads=1, n=1),
    "queries grouped 3:1": Case(heads=3, kv_heads=1),
    "no rotation": Case(rotary=0),
    "keys without rotation": Case(channel="k", rotary=0),
    "a quarter rotates": Case(channel="k", d_head=16, rotary=4),
    "no query norm": Case(norm=False),
    "nothing between": Case(norm=False, constant=False, rotary=0),
    "factored queries": Case(d_inner=8),
    "factored keys": Case(channel="k", d_inner=8),
    "factors of two blocks": Case(d_inner=40, n=1),
    "factored keys multiplied out": Case(channel="k", d_inner=8, n=1, width=33, length=33, heads=2, senders=1),
    "wide head": Case(d_head=80, rotary=80, n=1, senders=1),
    "no causal mask": Case(width=9, causal=False),
    "keys without a causal mask": Case(channel="k", width=9, causal=False),
    "half precision": Case(dtype=torch.float16),
    "half precision keys": Case(channel="k", dtype=torch.float16, d_inner=8),
}
