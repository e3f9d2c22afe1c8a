"""The ablations of a head. They answer different questions: a number without its ablation means little.

With `A` the attention pattern of a head after the softmax, `v_k` its values and `z_q = sum_k A[q, k] v_k` what it mixes
before W_O, every ablation is a new `z'`, and what the head writes is `z' W_O`. The output bias of an attention layer
belongs to no head and stays.
"""

from enum import StrEnum
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from workbench.errors import PromptError
from workbench.models.spec import ModelSpec
from workbench.models.weights import at_least_float32


class Ablation(StrEnum):
    """What takes the place of what a head does.

    | member | `z'` of the head | asks | source |
    |---|---|---|---|
    | `ZERO` | `z' = 0` | what the write is worth against none; off the model's distribution | Michel et al. 2019 |
    | `MEAN` | `z'_q` = mean over reference prompts of the same template of their `z_q` | what of the write is particular to this prompt | Wang et al. 2022 |
    | `RESAMPLE` | `z'_q = z_q` of the other version of the prompt | what of the write hangs on the difference of the versions | Vig et al. 2020; Chan et al. 2022 |
    | `PATTERN_TO_FIRST` | `A'[q, 0] = 1`, so `z'_q = v_0` | what if the head rests, its attention on the first token | Guo et al. 2024 |
    | `UNIFORM_PATTERN` | `A'[q, k] = 1 / (number of visible k)` | what the choice of keys is worth | Wu et al. 2025 |
    | `QUERY_ZERO` | `q' = 0` after norm, bias and rotation | the same, by way of the scores | Wu et al. 2025 |
    | `VALUE_ZERO` | `v' = 0` as this head reads it, so `z' = 0` | what the values are worth, the pattern left alone | Merullo et al. 2024 |

    Where scores are query-key products and nothing else (every model on the fast path), a zero query has the score 0
    for every visible key and `QUERY_ZERO` equals `UNIFORM_PATTERN`; with a position bias on the scores it does not.
    Neither equals zero output, and both keep to visible keys: causality stays. `VALUE_ZERO` of one query head equals
    `ZERO` of it. With grouped queries that is not what zeroing the shared value does, which silences the whole group;
    here the other heads of a group are never touched.

    `ZERO`, `MEAN` and `RESAMPLE` are defined for the output of an MLP too; the others speak of attention.
    """  # noqa: E501

    ZERO = "zero"
    MEAN = "mean"
    RESAMPLE = "resample"
    PATTERN_TO_FIRST = "pattern_to_first"
    UNIFORM_PATTERN = "uniform_pattern"
    QUERY_ZERO = "query_zero"
    VALUE_ZERO = "value_zero"

    @classmethod
    def of(cls, value: "Ablation | str") -> "Ablation":
        """The member of that name.

        Raises:
            PromptError: if there is none.
        """
        try:
            return cls(value)
        except ValueError as error:
            raise PromptError(f"ablation {value!r} is not one of {', '.join(cls)}") from error

    @property
    def site(self) -> Literal["q", "pattern", "z"]:
        """Where `Model.forward` is edited for it."""
        if self is Ablation.QUERY_ZERO:
            return "q"
        return "pattern" if self in {Ablation.PATTERN_TO_FIRST, Ablation.UNIFORM_PATTERN} else "z"

    @property
    def on_mlps(self) -> bool:
        """Whether it is defined for what an MLP writes."""
        return self in {Ablation.ZERO, Ablation.MEAN, Ablation.RESAMPLE}

    @property
    def needs_prompts(self) -> bool:
        """Whether it puts in what was measured on other prompts."""
        return self in {Ablation.MEAN, Ablation.RESAMPLE}


def new_pattern(
    ablation: Ablation, visible: Bool[Tensor, "q k"], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "q k"]:
    """The attention pattern that `PATTERN_TO_FIRST`, `UNIFORM_PATTERN` or `QUERY_ZERO` leaves a head with.

    Args:
        ablation: one of the three.
        visible: which keys each query sees.
        dtype: of the result.
    """
    if ablation is Ablation.PATTERN_TO_FIRST:
        pattern = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        pattern[:, 0] = 1
        return pattern
    if ablation in {Ablation.UNIFORM_PATTERN, Ablation.QUERY_ZERO}:
        return visible.to(dtype) / visible.sum(-1, keepdim=True).to(dtype)
    raise ValueError(f"{ablation} does not set the pattern")


def new_z(
    ablation: Ablation, spec: ModelSpec, values: Float[Tensor, "n pos n_kv_heads d_head"]
) -> Float[Tensor, "n pos n_heads d_head"]:
    """What every head mixes under an ablation that needs no other prompts, each head by itself.

    Args:
        ablation: any but `MEAN` and `RESAMPLE`.
        spec: shape of the model.
        values: of all positions.
    """
    if ablation in {Ablation.ZERO, Ablation.VALUE_ZERO}:
        mixed = torch.zeros_like(values)
    else:
        from workbench.models.forward import visible

        n_pos = values.shape[1]
        sees = visible(n_pos, n_pos, values.device)
        pattern = new_pattern(
            ablation, sees if spec.causal else torch.ones_like(sees), at_least_float32(values.dtype)
        ).to(values.dtype)
        mixed = torch.einsum("qk,nkhd->nqhd", pattern, values)
    return mixed.repeat_interleave(spec.group_size, dim=2)
