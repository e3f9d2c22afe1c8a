"""The canonical per-head view of a transformer's weights.

Every tensor here is a view of the wrapped module's own parameters: nothing is copied, folded or centred, so the
numbers are those of the raw model.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from workbench.models.spec import ModelSpec


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics of tensors of `dtype` are accumulated."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """LayerNorm, RMSNorm or nothing, over the last dimension.

    Attributes:
        weight: gain `[d]`, or None for `none`.
        bias: shift `[d]`, LayerNorm only.
    """

    kind: Literal["layernorm", "rmsnorm", "none"]
    weight: Float[Tensor, "d"] | None = None
    bias: Float[Tensor, "d"] | None = None
    eps: float = 0.0

    def __call__(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Normalise `x`, with statistics in float32 or better."""
        if self.kind == "none":
            return x
        assert self.weight is not None
        if self.kind == "layernorm":
            return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
        wide = x.to(at_least_float32(x.dtype))
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`x @ matrix + bias`, with `matrix` `[d_in, d_out]` a view of the module's weight."""

    matrix: Float[Tensor, "d_in d_out"]
    bias: Float[Tensor, "d_out"] | None = None

    def __call__(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """Apply the map; `matrix` is a transposed view for `nn.Linear`, which the product takes as it is."""
        return F.linear(x, self.matrix.mT, self.bias)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions: the module's own inverse frequencies (with whatever scaling made them) and factor.

    Attributes:
        inv_freq: `[rotary_dim / 2]`, radians per position.
        factor: what cosines and sines are multiplied by (YaRN's attention factor), 1 otherwise.
    """

    inv_freq: Float[Tensor, "half"]
    factor: float = 1.0
    _tables: dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def table(
        self, n: int, dtype: torch.dtype, first: int = 0
    ) -> tuple[Float[Tensor, "pos rotary"], Float[Tensor, "pos rotary"]]:
        """Cosines and sines of positions `first .. first + n`, computed in float32 as transformers does."""
        key = (n, first, dtype)
        if key not in self._tables:
            position = torch.arange(first, first + n, device=self.inv_freq.device, dtype=torch.float32)
            angle = position[:, None] * self.inv_freq.float()
            angle = torch.cat((angle, angle), dim=-1)
            if len(self._tables) > 16:
                self._tables.clear()
            self._tables[key] = ((angle.cos() * self.factor).to(dtype), (angle.sin() * self.factor).to(dtype))
        return self._tables[key]


def rotate(
    x: Float[Tensor, "*batch pos heads d_head"],
    table: tuple[Float[Tensor, "*#batch pos rotary"], Float[Tensor, "*#batch pos rotary"]],
) -> Float[Tensor, "*batch pos heads d_head"]:
    """Rotate the first `rotary` dimensions of every head by its position (Su et al. 2021, half-split layout)."""
    cos, sin = (part.unsqueeze(-2) for part in table)
    width = cos.shape[-1]
    turning, still = x[..., :width], x[..., width:]
    first, second = turning[..., : width // 2], turning[..., width // 2 :]
    turned = turning * cos + torch.cat((-second, first), dim=-1) * sin
    return turned if still.shape[-1] == 0 else torch.cat((turned, still), dim=-1)


@dataclass(frozen=True, kw_only=True)
class QKV:
    """The three projections of an attention layer, in the layout in which the module stores them.

    Attributes:
        layout: `separate`: three maps; `concatenated`: one map whose output is all q, then all k, then all v (GPT-2);
            `interleaved`: one map whose output is q, k, v of head 0, then of head 1 (GPT-NeoX).
        maps: three maps, or one.
    """

    layout: Literal["separate", "concatenated", "interleaved"]
    maps: tuple[Linear, ...]
    n_heads: int
    n_kv_heads: int
    d_head: int

    def _split(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut the last dimension of a fused output (or weight, or bias) into q, k, v `[..., heads, d_head]`."""
        lead = joined.shape[:-1]
        if self.layout == "concatenated":
            parts = joined.unflatten(-1, (3, self.n_heads, self.d_head))
            q, k, v = parts.unbind(dim=-3)
        else:
            parts = joined.unflatten(-1, (self.n_heads, 3, self.d_head))
            q, k, v = parts.unbind(dim=-2)
        assert q.shape[:-2] == lead
        return q, k, v

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[..., n_heads, d_head]`, keys and values `[..., n_kv_heads, d_head]` of a normalised stream."""
        if self.layout != "separate":
            return self._split(self.maps[0](x))
        q, k, v = (m(x) for m in self.maps)
        return (
            q.unflatten(-1, (self.n_heads, self.d_head)),
            k.unflatten(-1, (self.n_kv_heads, self.d_head)),
            v.unflatten(-1, (self.n_kv_heads, self.d_head)),
        )

    @cached_property
    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """W_Q `[n_heads, d_model, d_head]`, W_K and W_V `[n_kv_heads, d_model, d_head]`, as views."""
        if self.layout == "separate":
            parts = [m.matrix.unflatten(-1, (-1, self.d_head)) for m in self.maps]
        else:
            parts = list(self._split(self.maps[0].matrix))
        q, k, v = (part.movedim(-2, 0) for part in parts)
        return q, k, v

    @cached_property
    def biases(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """b_Q `[n_heads, d_head]`, b_K and b_V `[n_kv_heads, d_head]`, as views, None where a model has none."""
        if self.layout == "separate":
            q, k, v = (None if m.bias is None else m.bias.unflatten(-1, (-1, self.d_head)) for m in self.maps)
            return q, k, v
        bias = self.maps[0].bias
        return (None, None, None) if bias is None else self._split(bias)


@dataclass(frozen=True, kw_only=True)
class MLPWeights:
    """Plain `out(act(in(x)))` or gated `out(act(gate(x)) * in(x))`."""

    w_in: Linear
    w_out: Linear
    act: Callable[[Tensor], Tensor]
    gate: Linear | None = None

    def hidden(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_mlp"]:
        """Activations before the output map."""
        if self.gate is None:
            return self.act(self.w_in(x))
        return self.act(self.gate(x)) * self.w_in(x)

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the MLP writes, given its normalised input."""
        return self.w_out(self.hidden(x))


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """One block. `ln2` normalises the MLP's input (of a parallel block: the same stream as `ln1`)."""

    ln1: Norm
    ln2: Norm
    qkv: QKV
    out: Linear
    mlp: MLPWeights | None
    q_norm: Norm | None = None
    k_norm: Norm | None = None

    @property
    def W_Q(self) -> Float[Tensor, "n_heads d_model d_head"]:
        """Query weights per head."""
        return self.qkv.weights[0]

    @property
    def W_K(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        """Key weights per key/value head."""
        return self.qkv.weights[1]

    @property
    def W_V(self) -> Float[Tensor, "n_kv_heads d_model d_head"]:
        """Value weights per key/value head."""
        return self.qkv.weights[2]

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:
        """Output weights per head."""
        return self.out.matrix.unflatten(0, (-1, self.qkv.d_head))

    @property
    def b_O(self) -> Float[Tensor, "d_model"] | None:
        """Output bias, which belongs to no head."""
        return self.out.bias


@dataclass(frozen=True, kw_only=True)
class ModelWeights:
    """All of a decoder, as views of its module's parameters.

    Attributes:
        embed: token embedding `[d_vocab, d_model]`.
        position_embed: learned positions `[n_ctx, d_model]`, or None.
        unembed: `[d_model, d_vocab]` with its bias where there is one.
    """

    spec: ModelSpec
    embed: Float[Tensor, "d_vocab d_model"]
    position_embed: Float[Tensor, "n_ctx d_model"] | None
    rotary: Rotary | None
    layers: tuple[LayerWeights, ...]
    ln_final: Norm
    unembed: Linear

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.embed.device
