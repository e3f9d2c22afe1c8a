"""What a transformer looks like, in the field's names, whatever its module calls them."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shape and kind of a decoder, as far as the functional forward needs to know it.

    Attributes:
        architecture: the transformers `model_type`, for example `llama`.
        d_mlp: width of the MLP's hidden layer; 0 where a model has no MLPs.
        norm: `none` is for compiled models that have no normalisation.
        rotary_dim: leading dimensions of each head that rotate; 0 without rotary positions.
        parallel: attention and MLP of a block both read the block's input.
        qk_norm: queries and keys are normalised per head before they rotate.
        attn_scale: what query-key products are multiplied by, usually `d_head ** -0.5`.
        causal: a query sees no later key. False only for compiled models.
    """

    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    norm: Literal["layernorm", "rmsnorm", "none"]
    positions: Literal["learned", "rotary", "none"]
    rotary_dim: int = 0
    gated: bool = False
    parallel: bool = False
    qk_norm: bool = False
    attn_scale: float
    causal: bool = True

    @property
    def group_size(self) -> int:
        """Query heads that share one key and value head."""
        return self.n_heads // self.n_kv_heads
