"""A circuit by its definition, with plain hooks on the transformers module and one forward a circuit.

Every receiver gets a residual stream of its own: the constant part (biases that belong to no head) plus, for every
sender that it can read, what the sender writes in this very run if the edge is in the circuit and a given other value
if it is not. The hooks compute these streams in the order of the forward pass; the module's own residual stream is
ignored, and nothing of workbench is used. Names are those of ``hook_oracle``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from oracle.hook_oracle import Hook, HookOracle, Metric, all_senders, hooked, logit_diff

Writes = dict[str, Tensor]


class CircuitOracle:
    """Runs circuits of one module on given tokens.

    Args:
        module: a causal language model of transformers, in eval mode.
        pairs: as for ``HookOracle``.
        other: the write of every sender where its edge is not in the circuit; the corrupted run's by default.
        metric: as for ``HookOracle``.
    """

    def __init__(
        self, module: Any, pairs: dict[str, Tensor], other: Writes | None = None, metric: Metric = logit_diff
    ) -> None:
        self.plain = HookOracle(module, pairs, metric=metric)
        self.module, self.parts, self.pairs = module, self.plain.parts, pairs
        self.other = self.plain.other_writes if other is None else other
        self.constants = self._constants()

    def _constants(self) -> dict[str, Tensor]:
        """What the stream holds in front of each reader that no sender wrote."""
        streams: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, args: tuple[Tensor]) -> None:
                streams[name] = args[0].clone()

            return hook

        hooks: list[Hook] = [(self.parts.final_norm, "pre", keep("logits"))]
        for layer, block in enumerate(self.parts.blocks):
            hooks += [(block.attn_norm, "pre", keep(f"a{layer}")), (block.mlp_norm, "pre", keep(f"m{layer}"))]
        with torch.no_grad(), hooked(*hooks):
            self.module(self.pairs["clean"])
        writes = self.plain.base_writes
        left = {name: x - sum(writes[s] for s in self._senders(name)) for name, x in streams.items()}
        # biases or nothing: what the subtraction leaves of nothing would be blown up by a norm
        return {name: torch.where(x.abs() < 1e-12, 0.0, x) for name, x in left.items()}

    def _senders(self, reader: str) -> list[str]:
        """Senders that write in front of ``a3``, ``m3`` or ``logits``."""
        if reader == "logits":
            return all_senders(self.module)
        before = all_senders(self.module, upto=int(reader[1:]))
        if reader[0] == "m" and not self.parts.parallel:
            before += [f"a{reader[1:]}.h{head}" for head in range(self.parts.n_heads)]
        return before

    @torch.no_grad()
    def logits(self, edges: Collection[str]) -> Tensor:
        """Logits [n, d_vocab] at the answer positions of the run of a circuit."""
        edges = set(edges)
        own: Writes = {}

        def stream(reader: str, receiver: str) -> Tensor:
            total = self.constants[reader].clone()
            for sender in self._senders(reader):
                total += own[sender] if f"{sender}->{receiver}" in edges else self.other[sender]
            return total

        def keep_input(_module: nn.Module, args: tuple[Tensor]) -> None:
            own["input"] = args[0]

        def reread(layer: int, kinds: str) -> Callable[..., Tensor]:
            block = self.parts.blocks[layer]

            def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
                output = output.clone()
                for kind in kinds:
                    grouped = kind in "kv" and self.parts.n_kv_heads != self.parts.n_heads
                    for head in range(self.parts.n_kv_heads if kind in "kv" else self.parts.n_heads):
                        name = f"a{layer}.{'kv' if grouped else 'h'}{head}<{kind}>"
                        columns = block.columns(kind, head)
                        read = block.projection[kind].forward(block.attn_norm.forward(stream(f"a{layer}", name)))
                        output[..., columns] = read[..., columns]
                return output

            return hook

        def keep_heads(layer: int) -> Callable[..., None]:
            def hook(out: nn.Module, args: tuple[Tensor]) -> None:
                d_head = self.parts.d_head
                for head in range(self.parts.n_heads):
                    alone = torch.zeros_like(args[0])
                    alone[..., head * d_head : (head + 1) * d_head] = args[0][..., head * d_head : (head + 1) * d_head]
                    own[f"a{layer}.h{head}"] = out.forward(alone) - out.forward(torch.zeros_like(alone))

            return hook

        def mlp(layer: int) -> Callable[..., Tensor]:
            block = self.parts.blocks[layer]

            def hook(module: nn.Module, _args: Any, _output: Tensor) -> Tensor:
                fresh = module.forward(block.mlp_norm.forward(stream(f"m{layer}", f"m{layer}")))
                return own.setdefault(f"m{layer}", fresh)

            return hook

        hooks: list[Hook] = [(self.parts.blocks[0].attn_norm, "pre", keep_input)]
        for layer, block in enumerate(self.parts.blocks):
            for kinds in {"".join(k for k in "qkv" if block.projection[k] is block.projection[j]) for j in "qkv"}:
                hooks.append((block.projection[kinds[0]], "post", reread(layer, kinds)))
            hooks += [(block.out, "pre", keep_heads(layer))]
            # in a parallel block the module may run its MLP before its attention: either way it reads no own head
            hooks += [(block.mlp, "post", mlp(layer))]
        hooks.append((self.parts.final_norm, "pre", lambda _module, _args: (stream("logits", "logits"),)))
        with hooked(*hooks):
            logits = self.module(self.pairs["clean"]).logits
        return logits[torch.arange(len(logits)), self.pairs["answer_positions"]]
