"""Edge effects by their definition, with plain hooks on the transformers module and one forward an edge.

This is the slow, readable implementation that the patching engine is held against. It imports nothing of workbench.

The effect of the edge ``sender -> receiver`` is ``metric(base run with that edge patched) - metric(base run)``. In the
patched run the receiver, and nobody else, reads a residual stream in which the sender's write is the one it has in the
*other* run; whatever lies downstream of the receiver follows. Here that is done as follows:

* both prompts run once, and the writes of all senders are kept (``Writes``);
* a hook on the norm in front of the receiver remembers the stream that enters it; the stream is altered, taken through
  that same norm and the receiver's own projection (or MLP), and the receiver's slice of the projection's output is
  replaced. Biases, QK-norms, rotary positions, the softmax, W_O and everything later are the module's own business.

Nodes are named ``input``, ``a0.h1``, ``m0``, ``logits``; receivers ``a1.h2<q>``, ``a1.h2<k>``, ``a1.h2<v>``, and with
grouped queries ``a1.kv0<k>``, ``a1.kv0<v>``, where the altered key or value serves the whole group. A head writes
``z_h W_O``, without the output bias. The write of a sender is replaced at all positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

Base = Literal["clean", "corrupted"]
Pairs = dict[str, Tensor]
Metric = Callable[[Tensor, Pairs], Tensor]
"""From logits at the answer positions [n, d_vocab] and the pairs to one number a prompt [n]."""


def logit_diff(logits: Tensor, pairs: Pairs) -> Tensor:
    """Mean logit of the answers minus mean logit of the wrong answers, per prompt [n]."""
    return logits.gather(1, pairs["answers"]).mean(1) - logits.gather(1, pairs["wrong_answers"]).mean(1)


@dataclass(frozen=True)
class Block:
    """The submodules of one layer, and where each head's query, key and value lie in the projections' outputs."""

    attn_norm: nn.Module
    mlp_norm: nn.Module
    mlp: nn.Module
    out: nn.Module
    projection: dict[str, nn.Module]
    columns: Callable[[str, int], slice]


@dataclass(frozen=True)
class Anatomy:
    """What the oracle needs to know about a transformers module, by family."""

    blocks: tuple[Block, ...]
    final_norm: nn.Module
    unembed: nn.Module
    n_heads: int
    n_kv_heads: int
    d_head: int
    parallel: bool


def anatomy(module: Any) -> Anatomy:
    """Find the parts of a GPT-2, GPT-NeoX or Llama-like (Llama, Mistral, Qwen2, Qwen3) causal language model.

    A module of another kind says for itself: it has a method ``anatomy``.
    """
    if hasattr(module, "anatomy"):
        return module.anatomy()
    config = module.config
    n_heads = config.num_attention_heads
    n_kv_heads = getattr(config, "num_key_value_heads", None) or n_heads
    d_head = getattr(config, "head_dim", None) or config.hidden_size // n_heads
    blocks = []
    if config.model_type == "gpt2":  # one projection: all queries, then all keys, then all values
        offset = {"q": 0, "k": n_heads, "v": 2 * n_heads}
        for block in module.transformer.h:
            joined = block.attn.c_attn
            blocks.append(
                Block(
                    attn_norm=block.ln_1,
                    mlp_norm=block.ln_2,
                    mlp=block.mlp,
                    out=block.attn.c_proj,
                    projection={"q": joined, "k": joined, "v": joined},
                    columns=lambda kind, head: _columns(offset[kind] + head, d_head),
                )
            )
        final_norm = module.transformer.ln_f
    elif config.model_type == "gpt_neox":  # one projection: query, key, value of head 0, then of head 1, ...
        place = {"q": 0, "k": 1, "v": 2}
        for block in module.gpt_neox.layers:
            joined = block.attention.query_key_value
            blocks.append(
                Block(
                    attn_norm=block.input_layernorm,
                    mlp_norm=block.post_attention_layernorm,
                    mlp=block.mlp,
                    out=block.attention.dense,
                    projection={"q": joined, "k": joined, "v": joined},
                    columns=lambda kind, head: _columns(3 * head + place[kind], d_head),
                )
            )
        final_norm = module.gpt_neox.final_layer_norm
    else:
        for block in module.model.layers:
            attention = block.self_attn
            blocks.append(
                Block(
                    attn_norm=block.input_layernorm,
                    mlp_norm=block.post_attention_layernorm,
                    mlp=block.mlp,
                    out=attention.o_proj,
                    projection={"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj},
                    columns=lambda kind, head: _columns(head, d_head),
                )
            )
        final_norm = module.model.norm
    return Anatomy(
        blocks=tuple(blocks),
        final_norm=final_norm,
        unembed=module.get_output_embeddings(),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        parallel=config.model_type == "gpt_neox" and config.use_parallel_residual,
    )


def _columns(index: int, width: int) -> slice:
    return slice(index * width, (index + 1) * width)


def all_senders(module: nn.Module, upto: int | None = None) -> list[str]:
    """``input``, then per layer its heads and its MLP; ``upto`` stops in front of that layer."""
    parts = anatomy(module)
    names = ["input"]
    for layer in range(len(parts.blocks) if upto is None else upto):
        names += [f"a{layer}.h{head}" for head in range(parts.n_heads)] + [f"m{layer}"]
    return names


def all_edges(module: nn.Module) -> list[tuple[str, str]]:
    """Every edge: receivers in the order of computation, and for each receiver its senders in that order.

    A layer's attention reads everything in front of the layer. Its MLP also reads the layer's heads, unless attention
    and MLP stand in parallel. ``logits`` reads everything.
    """
    parts = anatomy(module)
    edges = []
    for layer in range(len(parts.blocks)):
        before = all_senders(module, upto=layer)
        kv = "h" if parts.n_kv_heads == parts.n_heads else "kv"
        receivers = [f"a{layer}.h{head}<q>" for head in range(parts.n_heads)]
        for kind in "kv":
            receivers += [f"a{layer}.{kv}{head}<{kind}>" for head in range(parts.n_kv_heads)]
        edges += [(sender, receiver) for receiver in receivers for sender in before]
        heads = [] if parts.parallel else [f"a{layer}.h{head}" for head in range(parts.n_heads)]
        edges += [(sender, f"m{layer}") for sender in before + heads]
    edges += [(sender, "logits") for sender in all_senders(module)]
    return edges


Hook = tuple[nn.Module, Literal["pre", "post"], Callable[..., Any]]


@contextmanager
def hooked(*hooks: Hook) -> Iterator[None]:
    """Register hooks for the time of a with block."""
    with ExitStack() as stack:
        for module, when, hook in hooks:
            register = module.register_forward_pre_hook if when == "pre" else module.register_forward_hook
            stack.callback(register(hook).remove)
        yield


class HookOracle:
    """Edge effects of one module on one set of pairs.

    Args:
        module: A causal language model of transformers, in eval mode.
        pairs: ``clean``, ``corrupted`` [n, pos], ``answer_positions`` [n] and whatever the metric reads.
        base: The run that is patched; the patch comes from the other one. ``clean`` is noising.
        metric: See :data:`Metric`.
    """

    def __init__(self, module: Any, pairs: Pairs, *, base: Base = "clean", metric: Metric = logit_diff) -> None:
        self.module, self.pairs, self.metric = module, pairs, metric
        self.parts = anatomy(module)
        self.tokens = {"clean": pairs["clean"], "corrupted": pairs["corrupted"]}[base]
        other = {"clean": pairs["corrupted"], "corrupted": pairs["clean"]}[base]
        self.base_writes, self.other_writes = self.writes(self.tokens), self.writes(other)
        self.base_value = self.run()

    @torch.no_grad()
    def writes(self, tokens: Tensor, extra: Sequence[Hook] = ()) -> dict[str, Tensor]:
        """What every sender writes to the residual stream [n, pos, d_model], on a plain run or with extra hooks."""
        found: dict[str, Tensor] = {}

        def keep_input(_module: nn.Module, args: tuple[Tensor]) -> None:
            found["input"] = args[0]

        def keep_heads(layer: int) -> Callable[..., None]:
            def hook(out: nn.Module, args: tuple[Tensor]) -> None:
                for head in range(self.parts.n_heads):
                    columns = _columns(head, self.parts.d_head)
                    alone = torch.zeros_like(args[0])  # z of this head only: the rest of the map sees zeros
                    alone[..., columns] = args[0][..., columns]
                    found[f"a{layer}.h{head}"] = out.forward(alone) - out.forward(torch.zeros_like(alone))

            return hook

        def keep_mlp(layer: int) -> Callable[..., None]:
            def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
                found[f"m{layer}"] = output

            return hook

        hooks: list[Hook] = [*extra, (self.parts.blocks[0].attn_norm, "pre", keep_input)]
        for layer, block in enumerate(self.parts.blocks):
            hooks += [(block.out, "pre", keep_heads(layer)), (block.mlp, "post", keep_mlp(layer))]
        with hooked(*hooks):
            self.module(tokens)
        return found

    @torch.no_grad()
    def run(self, *hooks: Hook) -> Tensor:
        """The metric [n] on the base prompts, with hooks."""
        with hooked(*hooks):
            logits = self.module(self.tokens).logits
        return self.metric(logits[torch.arange(len(logits)), self.pairs["answer_positions"]], self.pairs)

    def edge_effect(self, sender: str | Sequence[str], receiver: str) -> Tensor:
        """Effect [n] of one edge, or of several senders replaced together in what one receiver reads."""
        return self.run(*self.patch(sender, receiver)) - self.base_value

    def patch(self, sender: str | Sequence[str], receiver: str) -> list[Hook]:
        """Hooks that let one receiver, and no other reader, see the senders' writes of the other run."""
        senders = [sender] if isinstance(sender, str) else list(sender)
        delta = sum(self.other_writes[name] - self.base_writes[name] for name in senders)
        if receiver == "logits":
            return [(self.parts.final_norm, "pre", lambda _module, args: (args[0] + delta,))]

        head = re.fullmatch(r"a(\d+)\.(?:h|kv)(\d+)<([qkv])>", receiver)
        if head:
            block = self.parts.blocks[int(head[1])]
            kind = head[3]
            norm, reader, columns = block.attn_norm, block.projection[kind], block.columns(kind, int(head[2]))
        else:
            block = self.parts.blocks[int(receiver.removeprefix("m"))]
            norm, reader, columns = block.mlp_norm, block.mlp, slice(None)
        stream: list[Tensor] = []

        def remember(_module: nn.Module, args: tuple[Tensor]) -> None:
            stream.append(args[0])

        def reread(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            altered = reader.forward(norm.forward(stream[0] + delta))  # .forward: without firing hooks again
            output = output.clone()
            output[..., columns] = altered[..., columns]
            return output

        return [(norm, "pre", remember), (reader, "post", reread)]


def edge_effect(
    module: nn.Module,
    pairs: Pairs,
    sender: str,
    receiver: str,
    *,
    base: Base = "clean",
    metric: Metric = logit_diff,
) -> Tensor:
    """Effect [n] of one edge. For many edges make a :class:`HookOracle` once."""
    return HookOracle(module, pairs, base=base, metric=metric).edge_effect(sender, receiver)
