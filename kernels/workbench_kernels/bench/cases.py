"""What is measured: every operation at a grid of sizes, with the operations it must do and the bytes it must move."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from workbench_kernels.ops.attend import suffix_attention
from workbench_kernels.ops.norm import inverse_sigma, norm_delta
from workbench_kernels.ops.score import Attention, Patch, base_attention, receiver_effects, value_gradient

Run = Callable[[str, str], Tensor]
"""Runs an operation, given a backend and a precision."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size.

    Attributes:
        operation: its name.
        sizes: what it is run on, in words.
        flops: floating-point operations that it must do.
        bytes: bytes that it must move: every input read once, every output written once.
        run: runs it.
        small: the same on a part of the inputs, in their dtype and in float64, for the error.
    """

    operation: str
    sizes: str
    flops: float
    bytes: float
    run: Run
    small: Callable[[torch.dtype], Run]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of receiver scoring."""

    n: int
    tokens: int
    senders: int
    heads: int
    kv_heads: int
    d_head: int
    prefix: int = 0

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head and prompt under the causal mask."""
        return self.tokens * self.prefix + self.tokens * (self.tokens + 1) // 2

    def words(self, what: str) -> str:
        """The sizes, for the table."""
        prefix = f"+{self.prefix}" if self.prefix else ""
        return (
            f"{self.n} prompts x {self.tokens}{prefix} tokens, {self.senders} {what}, "
            f"{self.heads}/{self.kv_heads} heads x {self.d_head}"
        )


def random_scores(problem: Problem, channel: str, factored: bool, dtype: torch.dtype, device: torch.device) -> tuple[
    Attention, Patch
]:  # fmt: skip
    """Random inputs with rotation, without query/key norm and biases; the same numbers whatever the dtype."""
    generator = torch.Generator(device=device).manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    p = problem

    def draw(*shape: int, to: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(to)

    keys = [draw(p.n, p.prefix + p.tokens, p.kv_heads, p.d_head) for _ in range(2)]
    attention = Attention(
        queries=draw(p.n, p.tokens, p.heads, p.d_head),
        keys=keys[0],
        values=keys[1],
        gradient=draw(p.n, p.tokens, p.heads, p.d_head),
        start=torch.full((p.n,), p.prefix, device=device),
        scale=p.d_head**-0.5,
    )
    receivers = p.heads if channel == "q" else p.kv_heads
    angle = draw(p.n, p.tokens, p.d_head // 2, to=wide).repeat(1, 1, 2)
    if factored:
        scale = p.d_head**-0.5
        deltas = {
            "mixed": draw(p.senders, p.n, p.tokens, p.d_head),
            "matrices": draw(p.senders, receivers, p.d_head, p.d_head) * scale,
        }
    else:
        deltas = {"moved": draw(p.n, p.tokens, p.senders, receivers, p.d_head)}
    patch = Patch(
        base=draw(p.n, p.tokens, receivers, p.d_head, to=wide),
        inverse=draw(p.n, p.tokens, p.senders, to=wide).abs() + 0.5,
        cos=angle.cos(),
        sin=angle.sin(),
        **deltas,
    )
    return attention, patch


def bytes_of(*tensors: Tensor | None) -> int:
    """Bytes of the tensors that there are."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def score_cases(problems: list[Problem], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Receiver scoring of queries and keys, projected and factored; what clean attention is worth; value gradients."""
    for p in problems:
        for channel in ("q", "k"):
            for factored in (False, True):
                yield _score_case(p, channel, factored, dtype, device)
        attention, _ = random_scores(replace(p, senders=1), "q", False, dtype, device)
        read = bytes_of(attention.queries, attention.keys, attention.values, attention.gradient)
        flops = 4.0 * p.n * p.heads * p.pairs * p.d_head

        def worth(of: Attention, backend: str, precision: str) -> Tensor:
            return base_attention(of, precision=precision, backend=backend).worth

        def pulled(of: Attention, backend: str, precision: str) -> Tensor:
            return value_gradient(of, precision=precision, backend=backend)

        for name, function, times, out in (
            ("base_attention", worth, 1, 8 * p.n * p.heads * p.tokens),
            ("value_gradient", pulled, 2, 4 * p.n * p.kv_heads * p.tokens * p.d_head),
        ):
            yield Case(
                operation=name,
                sizes=p.words("-"),
                flops=times * flops,
                bytes=read + out,
                run=lambda backend, precision, f=function, a=attention: f(a, backend, precision),  # type: ignore[misc]
                small=lambda to, f=function, a=attention: (  # type: ignore[misc]
                    lambda backend, precision: f(_converted(a, to), backend, precision)
                ),
            )


def _score_case(p: Problem, channel: str, factored: bool, dtype: torch.dtype, device: torch.device) -> Case:
    attention, patch = random_scores(p, channel, factored, dtype, device)
    receivers = p.heads if channel == "q" else p.kv_heads
    heads = list(range(receivers))
    flops = 4.0 * p.n * p.senders * p.heads * p.pairs * p.d_head
    if factored:
        flops += 2.0 * p.n * p.senders * receivers * p.tokens * p.d_head**2
    read = bytes_of(
        attention.queries, attention.keys, attention.values, attention.gradient,
        patch.moved, patch.mixed, patch.matrices, patch.base, patch.inverse, patch.cos, patch.sin,
    )  # fmt: skip
    base = base_attention(attention)

    def run(backend: str, precision: str) -> Tensor:
        return receiver_effects(attention, patch, channel, heads, base, precision=precision, backend=backend)  # type: ignore[arg-type]

    def small(to: torch.dtype) -> Run:
        few = min(4, p.senders)
        part = replace(
            patch,
            inverse=patch.inverse[:, :, :few],
            moved=None if patch.moved is None else patch.moved[:, :, :few],
            mixed=None if patch.mixed is None else patch.mixed[:few],
            matrices=None if patch.matrices is None else patch.matrices[:few],
        )
        own, delta = _converted(attention, to), _converted_patch(part, to)
        return lambda backend, precision: receiver_effects(
            own,
            delta,
            channel,  # type: ignore[arg-type]
            heads,
            precision=precision,
            backend=backend,
        )

    form = "factored" if factored else "projected"
    return Case(
        operation=f"receiver_effects {channel} {form}",
        sizes=p.words("senders"),
        flops=flops,
        bytes=read + 4 * p.n * p.senders * receivers,
        run=run,
        small=small,
    )


def _converted(attention: Attention, to: torch.dtype) -> Attention:
    names = ("queries", "keys", "values", "gradient")
    return replace(attention, **{name: getattr(attention, name).to(to) for name in names})


def _converted_patch(patch: Patch, to: torch.dtype) -> Patch:
    wide = torch.promote_types(to, torch.float32)
    kinds = {
        **dict.fromkeys(("moved", "mixed", "matrices"), to),
        **dict.fromkeys(("base", "inverse", "cos", "sin"), wide),
    }
    given = {name: getattr(patch, name) for name in kinds}
    return replace(patch, **{name: t.to(kinds[name]) for name, t in given.items() if t is not None})


def attend_cases(problems: list[Problem], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Attention from the windows of many edges; `senders` is their number."""
    for p in problems:
        generator = torch.Generator(device=device).manual_seed(0)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        own = [draw(p.senders, p.n, p.tokens, h, p.d_head) for h in (p.heads, p.kv_heads, p.kv_heads)]
        early = [draw(p.n, p.prefix, p.kv_heads, p.d_head) for _ in range(2)]
        start = torch.full((p.n,), p.prefix, device=device)

        def attended(
            own: list[Tensor], early: list[Tensor], backend: str, precision: str, *,
            start: Tensor = start, scale: float = p.d_head**-0.5,
        ) -> Tensor:  # fmt: skip
            return suffix_attention(
                own[0], own[1], own[2], early[0], early[1], start, scale=scale, precision=precision, backend=backend
            )

        yield Case(
            operation="suffix_attention",
            sizes=p.words("edges"),
            flops=4.0 * p.senders * p.n * p.heads * p.pairs * p.d_head,
            bytes=bytes_of(*own, *early, own[0]),
            run=lambda backend, precision, f=attended, o=own, e=early: f(o, e, backend, precision),  # type: ignore[misc]
            small=lambda to, f=attended, o=own, e=early: (  # type: ignore[misc]
                lambda backend, precision: f([x[:2].to(to) for x in o], [x.to(to) for x in e], backend, precision)
            ),
        )


def norm_cases(sizes: list[tuple[int, int, int, int]], dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Norms of patched streams, for (prompts, tokens, edges, d_model)."""
    for n, tokens, edges, d_model in sizes:
        generator = torch.Generator(device=device).manual_seed(0)

        def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(dtype)

        base, weight = draw(n, tokens, d_model), draw(d_model)
        delta = draw(edges, n, tokens, d_model)
        words = f"{n} prompts x {tokens} tokens, {edges} edges, d_model {d_model}"

        def normed(base: Tensor, delta: Tensor, weight: Tensor, backend: str) -> Tensor:
            return norm_delta("rmsnorm", base, delta, weight, eps=1e-5, backend=backend)

        yield Case(
            operation="norm_delta",
            sizes=words,
            flops=6.0 * delta.numel(),
            bytes=bytes_of(base, delta, weight, delta),
            run=lambda backend, _, b=base, d=delta, w=weight: normed(b, d, w, backend),  # type: ignore[misc]
            small=lambda to, b=base, d=delta, w=weight: (  # type: ignore[misc]
                lambda backend, _: normed(b.to(to), d[:2].to(to), w.to(to), backend)
            ),
        )
        deltas = delta.permute(1, 2, 0, 3).contiguous()
        sigma = torch.ones(n, tokens, device=device, dtype=torch.promote_types(dtype, torch.float32))

        def inverted(unit: Tensor, deltas: Tensor, sigma: Tensor, backend: str) -> Tensor:
            own = sigma.to(torch.promote_types(unit.dtype, torch.float32))
            return inverse_sigma(
                "layernorm", unit - unit.mean(-1, keepdim=True), own, deltas, eps=1e-5, backend=backend
            )

        # a unit stream whose deviation is its sigma, but for the rounding of its dtype
        unit = base / base.std(-1, keepdim=True, correction=0)
        yield Case(
            operation="inverse_sigma",
            sizes=words,
            flops=6.0 * deltas.numel(),
            bytes=bytes_of(unit, sigma, deltas) + 4 * n * tokens * edges,
            run=lambda backend, _, u=unit, d=deltas, s=sigma: inverted(u, d, s, backend),  # type: ignore[misc]
            small=lambda to, u=unit, d=deltas, s=sigma: (  # type: ignore[misc]
                lambda backend, _: inverted(u.to(to), d[:, :, :2].to(to), s, backend)
            ),
        )
