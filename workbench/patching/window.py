"""The stretch of each prompt in which a patch can matter, and attention from it.

Clean and corrupted prompts agree before their first different token, so nothing there can change; nothing after the
answer position can reach it. What is left is a window per prompt. All windows of a batch get the same width and end at
the answer position (or start at 0), so that they stack; keys before a window come from the base run.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

import workbench_kernels as kernels
from workbench.models.spec import ModelSpec
from workbench.models.weights import Rotary, at_least_float32

_GRID = 65535
"""Batches that torch's fused attention takes at a time on CUDA."""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where each prompt of a batch is recomputed.

    Attributes:
        start: first recomputed position of each prompt.
        width: number of recomputed positions, the same for all.
        answer: answer position of each prompt.
        causal: whether a query sees only keys up to its own position.
    """

    start: Int[Tensor, "n"]
    width: int
    answer: Int[Tensor, "n"]
    causal: bool

    @classmethod
    def of(cls, first_difference: Int[Tensor, "n"], answer: Int[Tensor, "n"], *, length: int, causal: bool) -> "Window":
        """Smallest common window that holds every position from the first difference to the answer.

        Without a causal mask the answer also depends on what stands behind it: the window is all of `length`.
        """
        if not causal:
            return cls(start=torch.zeros_like(answer), width=length, answer=answer, causal=False)
        width = int((answer - first_difference + 1).clamp(min=1).max())
        return cls(start=(answer - width + 1).clamp(min=0), width=width, answer=answer, causal=True)

    @cached_property
    def positions(self) -> Int[Tensor, "n width"]:
        """Absolute positions of each window."""
        return self.start[:, None] + torch.arange(self.width, device=self.start.device)

    @cached_property
    def answer_index(self) -> Int[Tensor, "n"]:
        """Where in its window each prompt's answer position is."""
        return self.answer - self.start

    @cached_property
    def prefix(self) -> int:
        """Number of positions before the latest window: keys that are read from the base run."""
        return int(self.start.max())

    def take(self, full: Float[Tensor, "n pos *rest"]) -> Float[Tensor, "n width *rest"]:
        """The windows of a tensor that covers all positions."""
        rows = torch.arange(len(self.start), device=full.device)[:, None]
        return full[rows, self.positions]

    def at_answer(self, windowed: Float[Tensor, "*edges n width d"]) -> Float[Tensor, "*edges n 1 d"]:
        """The answer position of windowed streams."""
        rows = torch.arange(len(self.start), device=windowed.device)
        return windowed[..., rows, self.answer_index, :].unsqueeze(-2)

    @cached_property
    def within(self) -> Bool[Tensor, "n width width"]:
        """Which window keys each window query sees."""
        if not self.causal:
            return torch.ones(len(self.start), self.width, self.width, dtype=torch.bool, device=self.start.device)
        return (self.positions[:, :, None] >= self.positions[:, None, :]).contiguous()

    @cached_property
    def before(self) -> Bool[Tensor, "n prefix"]:
        """Which prefix keys lie before each window."""
        return torch.arange(self.prefix, device=self.start.device) < self.start[:, None]

    def rotary(self, rotary: Rotary, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the window positions, each `[n, width, rotary_dim]`."""
        cos, sin = rotary.table(int(self.positions.max()) + 1, dtype)
        return cos[self.positions], sin[self.positions]

    @cached_property
    def _additive(self) -> dict[tuple[bool, torch.dtype], Tensor]:
        return {}

    def mask(self, at_answer: bool, dtype: torch.dtype) -> Float[Tensor, "n q keys"]:
        """Additive mask over prefix keys, then window keys, for all window queries or the answer's alone."""
        key = (at_answer, dtype)
        if key not in self._additive:
            seen = torch.cat((self.before[:, None, :].expand(-1, self.width, -1), self.within), dim=-1)
            if at_answer:
                seen = seen[torch.arange(len(seen), device=seen.device), self.answer_index][:, None]
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            self._additive[key] = mask.masked_fill_(~seen, float("-inf"))
        return self._additive[key]


def attend_window(
    spec: ModelSpec,
    window: Window,
    q: Float[Tensor, "edges n q n_heads d_head"],
    k: Float[Tensor, "edges n width n_kv_heads d_head"],
    v: Float[Tensor, "edges n width n_kv_heads d_head"],
    prefix_k: Float[Tensor, "n prefix n_kv_heads d_head"],
    prefix_v: Float[Tensor, "n prefix n_kv_heads d_head"],
) -> Float[Tensor, "edges n q n_heads d_head"]:
    """`z` of window queries over the base run's keys before the window and the edges' own keys in it.

    The scores against prefix keys are one product per prompt and key head, shared by all edges.
    """
    edges, n, n_q = q.shape[:3]
    if window.causal and q.numel() > 0 and kernels.backend_for(q, d_head=q.shape[-1]) == "triton":
        if window.prefix == 0 and spec.group_size == 1 and edges * n <= _GRID:
            return _attend_causally(spec, q, k, v)
        if not (torch.is_grad_enabled() and q.requires_grad):
            tf32 = q.is_cuda and torch.backends.cuda.matmul.allow_tf32
            return kernels.suffix_attention(
                q,
                k,
                v,
                prefix_k,
                prefix_v,
                window.start.long(),
                scale=spec.attn_scale,
                precision="tf32" if tf32 else "ieee",
            )
    if window.prefix == 0 and edges * n * n_q > 0:
        mask = window.mask(False, q.dtype).expand(edges, n, -1, -1).flatten(0, 1)[:, None]
        folded_q, folded_k, folded_v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))
        z = F.scaled_dot_product_attention(
            folded_q,
            folded_k,
            folded_v,
            attn_mask=mask,
            scale=spec.attn_scale,
            enable_gqa=spec.group_size > 1,
        )
        return z.transpose(1, 2).unflatten(0, (edges, n))
    dtype = at_least_float32(q.dtype)
    grouped = q.unflatten(3, (spec.n_kv_heads, spec.group_size)) * spec.attn_scale
    # [n, kv, edges, q, group, d] x [n, kv, 1, d, prefix]
    shared = grouped.permute(1, 3, 0, 2, 4, 5).flatten(2, 4)
    early = shared @ prefix_k.permute(0, 2, 3, 1)
    own = grouped.permute(0, 1, 3, 2, 4, 5).flatten(3, 4) @ k.permute(0, 1, 3, 4, 2)
    early = early.unflatten(2, (edges, n_q, spec.group_size)).permute(2, 0, 1, 3, 4, 5)
    own = own.unflatten(3, (n_q, spec.group_size))
    scores = torch.cat((early, own), dim=-1).to(dtype)
    scores += window.mask(False, dtype)[None, :, None, :, None, :]
    pattern = scores.softmax(dim=-1).to(v.dtype)
    first = pattern[..., : window.prefix].permute(1, 2, 0, 3, 4, 5).flatten(2, 4) @ prefix_v.transpose(1, 2)
    first = first.unflatten(2, (edges, n_q, spec.group_size)).permute(2, 0, 1, 3, 4, 5)
    second = pattern[..., window.prefix :].flatten(3, 4) @ v.transpose(2, 3)
    z = first + second.unflatten(3, (n_q, spec.group_size))
    return z.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)


def _attend_causally(
    spec: ModelSpec,
    q: Float[Tensor, "edges n width n_heads d_head"],
    k: Float[Tensor, "edges n width n_heads d_head"],
    v: Float[Tensor, "edges n width n_heads d_head"],
) -> Float[Tensor, "edges n width n_heads d_head"]:
    """Attention where nothing comes before the windows and no heads are shared, by torch's kernel, without a mask."""
    flat = [x.flatten(0, 1).transpose(1, 2) for x in (q, k, v)]
    z = F.scaled_dot_product_attention(flat[0], flat[1], flat[2], is_causal=True, scale=spec.attn_scale)
    return z.transpose(1, 2).unflatten(0, q.shape[:2])
