"""A model as the workbench sees it: the wrapped module, its tokenizer, and the fast path where it is served."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.errors import ModelError, PromptError, UnsupportedModelError
from workbench.models.bridge import forward_with_hooks, make_bridge, spec_from_bridge
from workbench.models.forward import SITES, Editor, Observer, forward
from workbench.models.serve import serve
from workbench.models.ungroup import ungrouped
from workbench.models.weights import ModelWeights


class Model:
    """A language model, ready to be taken apart.

    Attributes:
        name: what results call it.
        module: the wrapped transformers module, or None for a model made of bare weights.
        tokenizer: its tokenizer, or None.
        spec: shape and kind.
        weights: canonical per-head view; None on the hook path.
        refusal: why the fast path was refused; None when it is taken.
        provenance: where the weights came from.
    """

    def __init__(
        self,
        *,
        name: str,
        module: nn.Module | None,
        tokenizer: Any = None,
        weights: ModelWeights | None = None,
        refusal: str | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.module = module
        self.tokenizer = tokenizer
        self.weights = weights
        self.refusal = refusal
        self.provenance = dict(provenance or {})
        if weights is not None:
            self.spec = weights.spec
        else:
            assert module is not None
            self.spec = spec_from_bridge(self.bridge, str(module.config.model_type))  # type: ignore[union-attr]

    def __repr__(self) -> str:
        spec = self.spec
        heads = f"{spec.n_layers} layers x {spec.n_heads} heads"
        return f"Model({self.name!r}, {spec.architecture}, {heads}, {self.path} path, {self.dtype}, {self.device})"

    @property
    def path(self) -> Literal["fast", "hooks"]:
        """Which path serves this model."""
        return "hooks" if self.weights is None else "fast"

    @property
    def fast_weights(self) -> ModelWeights:
        """The canonical weights.

        Raises:
            UnsupportedModelError: if the model is on the hook path; the message says why.
        """
        if self.weights is None:
            raise UnsupportedModelError(
                f"{self.name} is not served by the fast path: {self.refusal}. "
                "Analyses that only observe the model run on the hook path; this one needs the fast path."
            )
        return self.weights

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.weights.device if self.weights is not None else next(self.module.parameters()).device  # type: ignore[union-attr]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.weights.dtype if self.weights is not None else next(self.module.parameters()).dtype  # type: ignore[union-attr]

    @cached_property
    def bridge(self) -> Any:
        """TransformerBridge over the same parameters, made when first asked for."""
        if self.module is None:
            raise ModelError(f"{self.name} has no transformers module, so TransformerLens cannot bridge it")
        return make_bridge(self.module, self.tokenizer if getattr(self.tokenizer, "name_or_path", "") else None)

    @cached_property
    def model_hash(self) -> str:
        """SHA-256 over names, shapes, dtypes and bytes of all parameters."""
        digest = hashlib.sha256()
        named = self.module.state_dict() if self.module is not None else {"embed": self.fast_weights.embed}
        if self.module is None:
            for index, layer in enumerate(self.fast_weights.layers):
                named |= {f"{index}.{n}": getattr(layer, n) for n in ("W_Q", "W_K", "W_V", "W_O")}
                if layer.mlp is not None:
                    named |= {f"{index}.in": layer.mlp.w_in.matrix, f"{index}.out": layer.mlp.w_out.matrix}
        for key in sorted(named):
            value = named[key].detach().cpu().contiguous()
            digest.update(f"{key}:{tuple(value.shape)}:{value.dtype};".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @cached_property
    def prepends_bos(self) -> bool:
        """Whether the tokenizer itself puts a beginning-of-sequence token in front of a text."""
        if self.tokenizer is None or self.tokenizer.bos_token_id is None:
            return False
        ids = self.tokenizer("a")["input_ids"]
        return bool(ids) and ids[0] == self.tokenizer.bos_token_id

    def _tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise PromptError(
                f"{what} needs a tokenizer and {self.name} has none: give one to wrap_model(module, tokenizer), "
                "or pass token ids"
            )
        return self.tokenizer

    def to_tokens(
        self, texts: str | Sequence[str], *, bos: bool | None = None
    ) -> tuple[Int[Tensor, "n pos"], Int[Tensor, "n"]]:
        """Tokenise texts, padded on the right.

        Args:
            texts: one text or several.
            bos: put a beginning-of-sequence token in front; None does what the tokenizer does by itself.

        Returns:
            Token ids and the number of real tokens of each text.

        Raises:
            PromptError: without a tokenizer, for no texts or an empty text, or if `bos` is asked of a tokenizer
                that has no such token.
        """
        tokenizer = self._tokenizer("to_tokens")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise PromptError("texts is empty: give at least one text")
        if bos and tokenizer.bos_token_id is None:
            raise PromptError(f"bos=True, but the tokenizer of {self.name} has no beginning-of-sequence token")
        rows = []
        for text in texts:
            ids = list(tokenizer(text, add_special_tokens=bos is None)["input_ids"])
            rows.append([tokenizer.bos_token_id, *ids] if bos else ids)
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if not row:
                raise PromptError(f"text {index} ({text!r}) has no tokens")
            if len(row) > self.spec.n_ctx:
                raise PromptError(
                    f"text {index} has {len(row)} tokens and the context of {self.name} is {self.spec.n_ctx}: cut it"
                )
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.full((len(rows), int(lengths.max())), int(pad))
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = torch.tensor(row)
        return tokens.to(self.device), lengths.to(self.device)

    def single_token(self, word: str) -> int | None:
        """Id of `word` (written with its leading space) if it is exactly one token that decodes to it, else None."""
        tokenizer = self._tokenizer("single_token")
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and tokenizer.decode(ids) == word else None

    def to_str_tokens(self, ids: Int[Tensor, "pos"] | Sequence[int]) -> list[str]:
        """The text of each token by itself."""
        tokenizer = self._tokenizer("to_str_tokens")
        return [tokenizer.decode([int(i)]) for i in ids]

    @torch.no_grad()
    def forward(
        self,
        tokens: Int[Tensor, "n pos"],
        *,
        observe: Mapping[str, Observer] | None = None,
        edit: Mapping[str, Editor] | None = None,
        unembed_positions: Int[Tensor, "n"] | None = None,
    ) -> Tensor:
        """Logits, with raw numerics; every row is padded on the right.

        Args:
            tokens: token ids.
            observe: callbacks by site, called with the layer and the tensor (see `workbench.models.forward.SITES`);
                the same sites on both paths.
            edit: by site, a function of the layer and the tensor whose result takes the tensor's place.
            unembed_positions: unembed only this position of each prompt.

        Returns:
            `[n, pos, d_vocab]`, or `[n, d_vocab]` with `unembed_positions`.

        Raises:
            PromptError: for tokens that are not `[n, pos]` ids of the vocabulary within the context.
        """
        for name, sites in (("observe", observe), ("edit", edit)):
            unknown = set(sites or {}) - set(SITES)
            if unknown:
                raise PromptError(f"{name} has unknown sites {sorted(unknown)}; there are {', '.join(SITES)}")
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise PromptError(f"tokens must be a non-empty [n, pos] tensor of ids, not of shape {tuple(tokens.shape)}")
        if tokens.shape[1] > self.spec.n_ctx:
            raise PromptError(f"{tokens.shape[1]} tokens do not fit the context of {self.name}, {self.spec.n_ctx}")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.spec.d_vocab:
            raise PromptError(f"token id {low if low < 0 else high} is outside the vocabulary of {self.spec.d_vocab}")
        tokens = tokens.to(self.device)
        if self.weights is not None:
            return forward(self.weights, tokens, observe=observe, edit=edit, unembed_positions=unembed_positions)
        logits = forward_with_hooks(self.bridge, tokens, observe or {}, edit)
        if unembed_positions is None:
            return logits
        return logits[torch.arange(len(tokens), device=logits.device), unembed_positions.to(logits.device)]


def wrap_model(
    module: nn.Module,
    tokenizer: Any = None,
    *,
    name: str | None = None,
    ungroup: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Model:
    """Wrap a transformers causal language model that is already in memory.

    The module is put into evaluation mode and otherwise left as it is.

    Args:
        module: for example a `LlamaForCausalLM`.
        tokenizer: needed for texts; token ids work without.
        name: what results call the model; the module's `name_or_path` or class by default.
        ungroup: give every query head a key and a value head of its own, with the same outputs.
        provenance: recorded with results.

    Raises:
        ModelError: if the module is not a transformers model, or cannot be ungrouped.
    """
    config = getattr(module, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise ModelError(
            f"wrap_model takes a transformers causal language model; {type(module).__name__} has no config.model_type"
        )
    module.eval()
    record = dict(provenance or {"source": "in memory"})
    if ungroup:
        module = ungrouped(module)
        record["ungrouped"] = True
    weights, reason = serve(module)
    label = name or getattr(config, "_name_or_path", "") or type(module).__name__
    return Model(name=label, module=module, tokenizer=tokenizer, weights=weights, refusal=reason, provenance=record)
