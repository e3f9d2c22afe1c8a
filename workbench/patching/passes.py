"""One pass of the model over the windows, with everything kept that effects and gradients need."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from workbench.models.weights import ModelWeights, rotate
from workbench.patching.window import Window, attend_window


@dataclass(frozen=True, kw_only=True)
class Pass:
    """Activations of a pass, windowed, one entry a layer; attached to the graph if gradients were on.

    Attributes:
        pre: the stream into each block.
        mid: the stream into each MLP, the MLP's own copy.
        raw: outputs of the query, key and value projections, before norm and rotation.
        q: queries as they meet the keys.
        k: keys likewise.
        z: mixed values.
        mlp_out: what each MLP writes; empty without MLPs.
        final: the final stream at the answer position `[n, d_model]`.
    """

    pre: tuple[Tensor, ...]
    mid: tuple[Tensor, ...]
    raw: tuple[tuple[Tensor, Tensor, Tensor], ...]
    q: tuple[Tensor, ...]
    k: tuple[Tensor, ...]
    z: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    final: Float[Tensor, "n d_model"]


def run_window(
    weights: ModelWeights,
    window: Window,
    start: Float[Tensor, "n width d_model"],
    keys: Sequence[Tensor] = (),
    values: Sequence[Tensor] = (),
) -> Pass:
    """Run the blocks over the windows.

    Args:
        weights: canonical weights.
        window: where; keys before it come from `keys` and `values`.
        start: stream into the first block.
        keys: of all positions, a layer each; not needed if the windows begin at position 0.
        values: likewise.
    """
    spec = weights.spec
    table = None if weights.rotary is None else window.rotary(weights.rotary, start.dtype)
    kept: dict[str, list[Tensor]] = {name: [] for name in ("pre", "mid", "q", "k", "z", "mlp_out")}
    projections = []
    x = start
    for index, layer in enumerate(weights.layers):
        raw = layer.qkv(layer.ln1(x))
        q, k, v = raw
        if layer.q_norm is not None and layer.k_norm is not None:
            q, k = layer.q_norm(q), layer.k_norm(k)
        if table is not None:
            q, k = rotate(q, table), rotate(k, table)
        prefix_k = keys[index][:, : window.prefix] if window.prefix else k[:, :0]
        prefix_v = values[index][:, : window.prefix] if window.prefix else v[:, :0]
        z = attend_window(spec, window, q[None], k[None], v[None], prefix_k, prefix_v)[0]
        after = x + layer.out(z.flatten(-2))
        own = x.view_as(x) if spec.parallel else after.view_as(after)
        if layer.mlp is not None:
            out = layer.mlp(layer.ln2(own))
            kept["mlp_out"].append(out)
            after = after + out
        for name, value in (("pre", x), ("mid", own), ("q", q), ("k", k), ("z", z)):
            kept[name].append(value)
        projections.append(raw)
        x = after
    parts = {name: tuple(found) for name, found in kept.items()}
    final = x[torch.arange(len(x), device=x.device), window.answer_index]
    return Pass(
        pre=parts["pre"],
        mid=parts["mid"],
        raw=tuple(projections),
        q=parts["q"],
        k=parts["k"],
        z=parts["z"],
        mlp_out=parts["mlp_out"],
        final=final,
    )
