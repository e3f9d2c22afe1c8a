"""One pass over documents that looks at residual streams and values and keeps what is extreme about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from workbench.analyzers._extremes import first_and_rest, is_massive, largest, typical, written_norms
from workbench.models.weights import at_least_float32

if TYPE_CHECKING:
    from workbench.models import Model

MOST = 0.5
"""Massive activations are said to appear at the first layer at which this share of the samples has one."""

RECORDS = 400
"""At most so many (layer, dimension, first or later token) groups are listed, those of the largest mean size."""


@dataclass(kw_only=True)
class Found:
    """What the first pass saw; lists become tensors by layer when it ends."""

    tokens: Int[Tensor, "n pos"]
    largest: Float[Tensor, "n n_layers k"]
    median: Float[Tensor, "n n_layers"]
    counts: Float[Tensor, "n n_layers"]
    resid_first: Float[Tensor, "n n_layers"]
    resid_rest: Float[Tensor, "n n_layers"]
    value_first: Float[Tensor, "n n_layers n_heads"] | None
    value_rest: Float[Tensor, "n n_layers n_heads"] | None
    places: Int[Tensor, "found 4"]
    values: Float[Tensor, "found"]

    def share(self) -> Any:
        """Share of samples with a massive activation, by layer, with Wilson's interval."""
        from workbench.analyzers._rows import share_estimates

        return share_estimates((self.counts > 0).double())

    def first_layer(self) -> int | None:
        """The first layer at which most samples have a massive activation."""
        layers = ((self.counts > 0).double().mean(0) >= MOST).nonzero().flatten()
        return int(layers[0]) if len(layers) else None

    @cached_property
    def groups(self) -> dict[tuple[int, int, bool], Bool[Tensor, "found"]]:
        """Which of `values` belong to each (layer, dimension, at a later token), the largest mean size first."""
        layer, position, dim = self.places[:, 1], self.places[:, 2], self.places[:, 3]
        keys = torch.stack([layer, dim, (position > 0).long()], dim=1)
        found = {}
        for key in keys.unique(dim=0):
            found[(int(key[0]), int(key[1]), bool(key[2]))] = (keys == key).all(1)
        return dict(sorted(found.items(), key=lambda item: -float(self.values[item[1]].abs().mean())))

    def records(self, model: Model) -> list[dict[str, Any]]:
        """The groups as JSON."""
        listed = []
        for (layer, dim, later), chosen in list(self.groups.items())[:RECORDS]:
            places, values = self.places[chosen], self.values[chosen]
            samples, positions = places[:, 0], places[:, 2]
            ids = self.tokens[samples, positions]
            listed.append(
                {
                    "layer": layer,
                    "dim": dim,
                    "token": "later" if later else "first",
                    "n_samples": len(samples.unique()),
                    "share": len(samples.unique()) / len(self.tokens),
                    "mean": float(values.mean()),
                    "std": float(values.std()) if len(values) > 1 else 0.0,
                    "ratio": float((values.abs() / self.median[samples, layer]).mean()),
                    "positions": _most(positions.tolist()),
                    "tokens": _most(_names(model, ids.tolist())),
                }
            )
        return sorted(listed, key=lambda record: (record["layer"], -abs(record["mean"])))


def look(
    model: Model,
    tokens: Int[Tensor, "n pos"],
    size: int,
    absolute: float,
    ratio: float,
    progress: Callable[[str], None] | None,
) -> Found:
    """One pass over the documents, reduced as it goes."""
    spec = model.spec
    kept: dict[str, list[list[Tensor]]] = {}
    places, values = [], []
    for start in range(0, len(tokens), size):
        batch = tokens[start : start + size]
        seen: dict[str, dict[int, Tensor]] = {}

        def keep(name: str, layer: int, value: Tensor, seen: dict[str, dict[int, Tensor]] = seen) -> None:
            seen.setdefault(name, {})[layer] = value.to("cpu", torch.float64)

        def on_resid(layer: int, resid: Tensor, keep: Any = keep, start: int = start) -> None:
            median = typical(resid)
            keep("largest", layer, largest(resid, min(3, resid[0].numel())))
            keep("median", layer, median)
            mask = is_massive(resid, median, absolute=absolute, ratio=ratio)
            keep("counts", layer, mask.flatten(1).sum(1))
            at = mask.nonzero()
            places.append(
                torch.stack([at[:, 0] + start, torch.full_like(at[:, 0], layer), at[:, 1], at[:, 2]], dim=1).cpu()
            )
            values.append(resid[mask].to("cpu", torch.float64))
            norms = resid.to(at_least_float32(resid.dtype)).norm(dim=-1)
            for name, part in zip(("resid_first", "resid_rest"), first_and_rest(norms), strict=True):
                keep(name, layer, part)

        def on_value(layer: int, v: Tensor, keep: Any = keep) -> None:
            norms = written_norms(v, model.fast_weights.layers[layer].W_O)
            for name, part in zip(("value_first", "value_rest"), first_and_rest(norms), strict=True):
                keep(name, layer, part)

        observe = {"resid_post": on_resid} | ({"v": on_value} if model.weights is not None else {})
        last = torch.full((len(batch),), batch.shape[1] - 1, device=model.device)
        model.forward(batch, observe=observe, unembed_positions=last)
        for name, by_layer in seen.items():
            kept.setdefault(name, []).append([by_layer[layer] for layer in range(spec.n_layers)])
        if progress is not None:
            progress(f"residual streams: {start + len(batch)} of {len(tokens)} documents")
    joined = {name: torch.cat([torch.stack(batch, dim=1) for batch in batches]) for name, batches in kept.items()}
    return Found(
        tokens=tokens,
        places=torch.cat(places),
        values=torch.cat(values),
        **{name: joined.get(name) for name in ("largest", "median", "counts", "resid_first", "resid_rest")},  # type: ignore[arg-type]
        value_first=joined.get("value_first"),
        value_rest=joined.get("value_rest"),
    )


def _names(model: Model, ids: list[int]) -> list[str]:
    return [str(index) for index in ids] if model.tokenizer is None else model.to_str_tokens(ids)


def _most(values: Iterable[Any]) -> list[Any]:
    """The five most frequent, most frequent first."""
    return [value for value, _ in Counter(values).most_common(5)]
