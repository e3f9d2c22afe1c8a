"""Two compiled programs whose circuits are known, as transformers modules and as workbench models.

``tracr_compile.py`` made the files beside this one. A compiled model has no layer norm and no causal mask; its residual
directions have names, so which node writes what and which node reads it can be checked by eye.

Two settings, because resample patching sees only what differs between prompts:

* ``tokens``: the model as compiled. Clean and corrupted prompts differ in their tokens and lengths (PAD on the right);
  positions are the same on both sides, so nothing that ``input`` contributes by position alone is an edge.
* ``slots``: the same function on a vocabulary of (token, position) pairs, with no learned positions. Without a causal
  mask a prompt is then a set, and a corrupted prompt is another set in another order: every variable that is not
  constant takes another value, positions and BOS too.

Ground truth (:func:`circuit`) comes from the weights alone: no activation, no patch.

* A sender can move its write along some directions: ``input`` along the differences between rows of its table that can
  stand at one place; a head along the image of ``W_V W_O``; an MLP along the rows of ``W_out`` of hidden units that
  are connected to something.
* It is *wired* to a receiver whose map (``W_Q``, ``W_K``, ``W_V``, ``W_in``, the unembedding) does not annihilate them
  all. :func:`wired_by_label` finds the same edges by the names of the residual directions.
* A wired edge is in the circuit if its sender depends on ``input``, and if what the edge moves reaches the output:
  what moves is the whole write of a head for its query and key, its share of ``W_V W_O`` for its value, and the
  ``W_out`` rows of the hidden units that it reaches for an MLP; that must be read again, and so on to ``logits``.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from oracle.hook_oracle import Anatomy, Block, all_edges

PROGRAMS = ("reverse", "xproportion")
Setting = Literal["tokens", "slots"]
LENGTH = 6  # BOS and five tokens


class TracrModule(nn.Module):
    """A compiled program in plain torch, with the parts that the hook oracle looks for.

    Args:
        program: One of :data:`PROGRAMS`.
        setting: See the top of this file. In ``slots``, token ``t`` at position ``p`` has the id ``6 t + p``.
        dtype: Type of the parameters.
    """

    def __init__(self, program: str, setting: Setting = "tokens", *, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        with np.load(Path(__file__).with_name(f"tracr_{program}.npz"), allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        self.program, self.setting = program, setting
        n_layers, self.n_heads, self.d_head, self.d_mlp = self.arrays["shape"].tolist()
        tokens, positions = (self._tensor(name, dtype) for name in ("token_embed", "position_embed"))
        if setting == "slots":
            self.token_embed = (tokens[:, None] + positions[None]).flatten(0, 1)
            self.position_embed = None
        else:
            self.token_embed, self.position_embed = tokens, positions
        self.blocks = nn.ModuleList(self._block(layer, dtype) for layer in range(n_layers))
        self.final_norm = nn.Identity()
        self.head = self._linear(self._tensor("unembed", dtype))
        self.requires_grad_(False)
        self.config = SimpleNamespace(vocab_size=len(self.token_embed))

    def _tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(self.arrays[name]).to(dtype)

    @staticmethod
    def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
        linear = nn.Linear(*weight.shape, bias=bias is not None, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight.T.contiguous())
        if bias is not None:
            linear.bias = nn.Parameter(bias.clone())
        return linear

    def _block(self, layer: int, dtype: torch.dtype) -> nn.Module:
        def linear(name: str) -> nn.Linear:
            return self._linear(*(self._tensor(f"{kind}_{name}", dtype)[layer] for kind in "Wb"))

        block = nn.Module()
        block.attn_norm, block.mlp_norm = nn.Identity(), nn.Identity()
        block.q_proj, block.k_proj, block.v_proj, block.o_proj = (linear(name) for name in "QKVO")
        block.mlp = nn.Sequential(linear("in"), nn.ReLU(), linear("out"))
        return block

    def forward(self, tokens: Tensor) -> SimpleNamespace:
        """Outputs [n, 6, n_outputs] as ``.logits``."""
        stream = self.token_embed[tokens]
        if self.position_embed is not None:
            stream = stream + self.position_embed[: tokens.shape[1]]
        for block in self.blocks:
            normed = block.attn_norm(stream)
            q, k, v = (
                getattr(block, f"{kind}_proj")(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
                for kind in "qkv"
            )
            z = (q @ k.mT * self.d_head**-0.5).softmax(-1) @ v
            stream = stream + block.o_proj(z.transpose(1, 2).flatten(2))
            stream = stream + block.mlp(block.mlp_norm(stream))
        return SimpleNamespace(logits=self.head(self.final_norm(stream)))

    def anatomy(self) -> Anatomy:
        """What the hook oracle asks for."""
        blocks = tuple(
            Block(
                attn_norm=b.attn_norm,
                mlp_norm=b.mlp_norm,
                mlp=b.mlp,
                out=b.o_proj,
                projection={"q": b.q_proj, "k": b.k_proj, "v": b.v_proj},
                columns=lambda kind, head: slice(head * self.d_head, (head + 1) * self.d_head),
            )
            for b in self.blocks
        )
        return Anatomy(
            blocks=blocks,
            final_norm=self.final_norm,
            unembed=self.head,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            d_head=self.d_head,
            parallel=False,
        )

    def ids(self, words: list[str], order: list[int] | None = None) -> list[int]:
        """Token ids of BOS and words, padded on the right; in ``slots``, in any order of positions."""
        place = {token: index for index, token in enumerate(self.arrays["tokens"].tolist())}
        plain = [place[w] for w in ["BOS", *words, *["PAD"] * (LENGTH - 1 - len(words))]]
        if self.setting == "tokens":
            return plain
        return [LENGTH * plain[p] + p for p in (order or range(LENGTH))]


def workbench_model(module: TracrModule) -> Any:
    """The same program as a workbench ``Model`` made of bare weights; logits of unused tokens are 0."""
    from workbench.models import Model, ModelSpec, ModelWeights
    from workbench.models.weights import QKV, LayerWeights, Linear, MLPWeights, Norm

    def linear(layer: nn.Linear) -> Linear:
        return Linear(matrix=layer.weight.detach().mT, bias=None if layer.bias is None else layer.bias.detach())

    none = Norm(kind="none")
    d_vocab, d_model = module.token_embed.shape
    spec = ModelSpec(
        architecture="tracr",
        n_layers=len(module.blocks),
        n_heads=module.n_heads,
        n_kv_heads=module.n_heads,
        d_model=d_model,
        d_head=module.d_head,
        d_mlp=module.d_mlp,
        d_vocab=d_vocab,
        n_ctx=LENGTH,
        norm="none",
        positions="none" if module.position_embed is None else "learned",
        attn_scale=module.d_head**-0.5,
        causal=False,
    )
    layers = tuple(
        LayerWeights(
            ln1=none,
            ln2=none,
            qkv=QKV(
                layout="separate",
                maps=(linear(b.q_proj), linear(b.k_proj), linear(b.v_proj)),
                n_heads=module.n_heads,
                n_kv_heads=module.n_heads,
                d_head=module.d_head,
            ),
            out=linear(b.o_proj),
            mlp=MLPWeights(w_in=linear(b.mlp[0]), w_out=linear(b.mlp[2]), act=torch.relu),
        )
        for b in module.blocks
    )
    unembed = module.token_embed.new_zeros(d_model, d_vocab)
    unembed[:, : module.head.out_features] = module.head.weight.mT
    weights = ModelWeights(
        spec=spec,
        embed=module.token_embed,
        position_embed=module.position_embed,
        rotary=None,
        layers=layers,
        ln_final=none,
        unembed=Linear(matrix=unembed),
    )
    return Model(name=f"tracr-{module.program}", module=None, weights=weights, provenance={"source": "tracr"})


def run_program(program: str, words: list[str]) -> list[Any]:
    """What a program says about words, computed in Python."""
    if program == "reverse":
        return words[::-1]
    return [sum(w == "x" for w in words[: i + 1]) / (i + 1) for i in range(len(words))]


def tracr_pairs(module: TracrModule, n: int = 15, seed: int = 0) -> dict[str, Tensor]:
    """Pairs of random prompts; each is read at every position that holds a word in the clean prompt.

    Clean prompts have five words down to three, corrupted ones one to five; in ``slots`` the corrupted ones also stand
    in another order. ``answers`` is the output column that is right in the clean prompt (the only one for
    ``xproportion``), ``wrong_answers`` are the other columns (for ``xproportion`` an unused token, whose logit is 0).
    """
    rng = np.random.default_rng(seed)
    vocabulary = [t for t in module.arrays["tokens"].tolist() if t not in ("BOS", "PAD")]
    outputs = module.arrays["outputs"].tolist()
    rows: dict[str, list[Any]] = {"clean": [], "corrupted": [], "answer_positions": [], "answers": []}
    rows["wrong_answers"] = []
    for index in range(n):
        clean = rng.choice(vocabulary, size=5 - index % 3).tolist()
        other = rng.choice(vocabulary, size=1 + index % 5).tolist()
        order = rng.permutation(LENGTH).tolist()
        says = run_program(module.program, clean)
        for position in range(len(clean)):
            right = outputs.index(says[position]) if module.program == "reverse" else 0
            wrong = [o for o in range(len(outputs)) if o != right] or [1]
            rows["clean"].append(module.ids(clean))
            rows["corrupted"].append(module.ids(other, order))
            rows["answer_positions"].append(position + 1)
            rows["answers"].append([right])
            rows["wrong_answers"].append(wrong)
    pairs = {name: torch.tensor(value) for name, value in rows.items()}
    return pairs | {"lengths": torch.full((len(pairs["clean"]),), LENGTH)}


def reading_map(module: TracrModule, receiver: str) -> Tensor:
    """Map [d_model, any] through which a receiver reads its stream."""
    if receiver == "logits":
        return module.head.weight.T
    if receiver.startswith("m"):
        return module.blocks[int(receiver[1:])].mlp[0].weight.T
    layer, head, kind = _split(receiver)
    return _per_head(module, layer, kind)[head]


def _split(receiver: str) -> tuple[int, int, str]:
    layer, rest = receiver[1:].split(".h")
    head, kind = rest.rstrip(">").split("<")
    return int(layer), int(head), kind


def _per_head(module: TracrModule, layer: int, kind: str) -> Tensor:
    """W_Q, W_K, W_V [head, d_model, d_head]."""
    weight = getattr(module.blocks[layer], f"{kind}_proj").weight
    return weight.unflatten(0, (module.n_heads, -1)).mT


def written_directions(module: TracrModule, sender: str) -> Tensor:
    """Directions [any, d_model] along which a sender's write can differ between two prompts."""
    if sender == "input":
        return _input_differences(module)
    if sender.startswith("m"):
        mlp = module.blocks[int(sender[1:])].mlp
        connected = mlp[0].weight.abs().sum(1) > 0
        return mlp[2].weight.T[connected]
    layer, head = (int(part) for part in sender[1:].split(".h"))
    w_o = module.blocks[layer].o_proj.weight.T.unflatten(0, (module.n_heads, -1))[head]
    return _per_head(module, layer, "v")[head] @ w_o


def _input_differences(module: TracrModule) -> Tensor:
    table = module.token_embed
    if module.setting == "tokens":  # BOS stands at position 0 in every prompt, and positions cancel
        table = table[[i for i, token in enumerate(module.arrays["tokens"]) if token != "BOS"]]
    else:  # only what prompts hold: BOS at position 0, anything else elsewhere
        names = module.arrays["tokens"].tolist()
        table = table[[i for i in range(len(table)) if (names[i // LENGTH] == "BOS") == (i % LENGTH == 0)]]
    return torch.stack([a - b for a, b in itertools.combinations(table, 2)])


def wired(module: TracrModule) -> set[str]:
    """Edges whose sender can write, by itself, what their receiver reads."""
    found = set()
    for sender, receiver in all_edges(module):
        directions = written_directions(module, sender)
        if bool(((directions @ reading_map(module, receiver)).abs() > 1e-6).any()):
            found.add(f"{sender}->{receiver}")
    return found


def wired_by_label(module: TracrModule) -> set[str]:
    """The same by the names of residual directions: sender and receiver share a variable that is not a constant.

    A one-hot variable that a receiver reads with the same weight for each of its values is a constant to it. In the
    setting ``tokens``, so are the position and the fact that a token is BOS, which no two prompts have differently.
    """
    labels = module.arrays["residual_labels"].tolist()
    constant = {"one"} if module.setting == "slots" else {"one", "indices", "tokens:BOS"}
    variables: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        if not {label, label.split(":")[0]} & constant:
            variables.setdefault(label.split(":")[0], []).append(index)

    def written(sender: str) -> set[str]:
        if sender == "input":
            return {"tokens", "indices"} & set(variables)
        used = written_directions(module, sender).abs().sum(0) > 1e-6
        return {name for name, dims in variables.items() if bool(used[dims].any())}

    found = set()
    for sender, receiver in all_edges(module):
        for name in written(sender):
            rows = reading_map(module, receiver)[variables[name]]
            if len(rows) > 1:
                rows = rows - rows[0]
            if bool((rows.abs() > 1e-6).any()):
                found.add(f"{sender}->{receiver}")
    return found


def circuit(module: TracrModule) -> set[str]:
    """Ground truth: the wired edges through which ``input`` reaches ``logits``, by the rule at the top of this file."""
    edges = [edge.split("->") for edge in wired(module)]
    reached = {"input"}
    for _ in edges:
        reached |= {_node(receiver) for sender, receiver in edges if sender in reached}
    return {
        f"{sender}->{receiver}"
        for sender, receiver in edges
        if sender in reached and _gets_out(module, edges, written_directions(module, sender), receiver)
    }


def _node(receiver: str) -> str:
    return receiver.split("<", maxsplit=1)[0]


def _gets_out(module: TracrModule, edges: list[list[str]], directions: Tensor, receiver: str) -> bool:
    """Whether moving a receiver's stream along directions [any, d_model] can move the output."""
    reading = reading_map(module, receiver)
    reached = ((directions @ reading).abs() > 1e-6).any(0)
    if receiver == "logits" or not reached.any():
        return bool(reached.any())
    if receiver.startswith("m"):
        moved = module.blocks[int(receiver[1:])].mlp[2].weight.T[reached]
    elif receiver.endswith("<v>"):
        layer, head, _ = _split(receiver)
        moved = directions @ reading @ module.blocks[layer].o_proj.weight.T.unflatten(0, (module.n_heads, -1))[head]
    else:
        moved = written_directions(module, _node(receiver))
    return any(_gets_out(module, edges, moved, after) for sender, after in edges if sender == _node(receiver))
