"""Tensors that claim to be on another device, computed on the CPU: they catch what only a GPU would refuse.

Every operation checks that its tensors are all elsewhere or all here, as CUDA does; indices may come from the CPU, and
so may tensors without axes. The claimed device is `meta`, which torch lets autograd run on without hardware.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("meta")
T = TypeVar("T")


class Elsewhere(Tensor):
    """A CPU tensor under another device's name."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        """Wrap a tensor."""
        made: Elsewhere = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:
        """Python numbers, as from any device."""
        return self.inner.tolist()

    def __getitem__(self, index: Any) -> Tensor:
        """Index, with lists as CPU tensors: torch would make empty ones on the claimed device."""
        return super().__getitem__(_with_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_with_tensors(index), value)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class ElsewhereMode(TorchDispatchMode):
    """Within it, tensors can be made on the other device, and copied to and from it."""

    def __enter__(self) -> ElsewhereMode:
        # torch.tensor(numbers, device="meta") would drop the numbers
        self._make = torch.tensor
        make = self._make

        def tensor(data: Any, *, device: Any = None, **rest: Any) -> Tensor:
            made = make(data, **rest)
            return made if device is None else made.to(device)

        torch.tensor = tensor  # type: ignore[assignment]
        super().__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        torch.tensor = self._make
        super().__exit__(*problem)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_FROM_HERE = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
_COPIES = {"aten::_to_copy", "aten::copy_"}


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
    wraps = any(isinstance(x, Elsewhere) for x in tensors)
    if wraps and name not in _COPIES:
        indices = tree_flatten(args[1])[0] if name in _FROM_HERE else []
        for x in tensors:
            if not isinstance(x, Elsewhere) and x.dim() and not any(x is index for index in indices):
                raise RuntimeError(f"{name}: a tensor {tuple(x.shape)} is on {x.device}, others are elsewhere")
    assert all(isinstance(x, Elsewhere) or x.device.type == "cpu" for x in tensors), f"{name}: a tensor without numbers"
    device = kwargs.get("device")
    if device is not None:
        wraps = torch.device(device) == ELSEWHERE
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name == "aten::copy_":
        wraps = isinstance(args[0], Elsewhere)
    originals = {id(x.inner): x for x in tensors if isinstance(x, Elsewhere)}
    made = func(*tree_map(_here, args), **tree_map(_here, kwargs))
    if name == "aten::resize_" or not wraps:
        return made
    return tree_map(lambda x: originals[id(x)] if id(x) in originals else _there(x), made)


def _with_tensors(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(_with_tensors(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


def _here(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x


def _there(x: Any) -> Any:
    return Elsewhere(x) if isinstance(x, Tensor) else x


def here(x: Tensor) -> Tensor:
    """The numbers of a tensor, wherever it claims to be."""
    return x.inner if isinstance(x, Elsewhere) else x


def move(value: T) -> T:
    """A copy of frozen dataclasses, tuples and dictionaries with every tensor elsewhere; views stay views."""
    if isinstance(value, Elsewhere):
        return value
    if isinstance(value, Tensor):
        return Elsewhere(value.detach())  # type: ignore[return-value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: move(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return type(value)(**fields)
    if isinstance(value, tuple):
        return type(value)(move(x) for x in value)  # type: ignore[return-value]
    if isinstance(value, dict):
        return {}  # type: ignore[return-value]
    return value
