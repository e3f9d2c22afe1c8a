"""How large an effect rounding alone can produce."""

from functools import partial

import torch
from torch import Tensor

from workbench.patching.exact import Stage, base_stream, walk
from workbench.patching.runs import Runs

_STAGES = 6
_DRAWS = 2


@torch.no_grad()
def noise_floor(runs: Runs, seed: int = 0) -> float:
    """Root mean square change of the metric when a base stream is rounded differently.

    At up to six depths every element of the base run's stream is multiplied by `1 + eps u`, with `eps` the machine
    epsilon of the dtype and `u` uniform on [-1, 1], and taken through the rest of the model like a patched stream. The
    largest root mean square over prompts and draws is the floor. Errors of the sender's and receiver's own products are
    of the same order: each is a sum that is rounded to the same precision.

    Args:
        runs: caches of the prompts.
        seed: seed of `u`.
    """
    n_layers = runs.weights.spec.n_layers
    eps = torch.finfo(runs.final.dtype).eps
    generator = torch.Generator().manual_seed(seed)
    worst = 0.0

    def disturbed(base: Tensor) -> list[Tensor]:
        u = torch.rand((_DRAWS, *base.shape), generator=generator, dtype=torch.float32) * 2 - 1
        return [base + base * u.to(base) * eps]

    for layer in sorted({round(i * (n_layers - 1) / (_STAGES - 1)) for i in range(_STAGES)}):
        at: Stage = (layer, 1)
        change = walk(runs, {at: partial(disturbed, base_stream(runs, at))}) - runs.base_value
        worst = max(worst, float(change.square().mean().sqrt()))
    return worst
