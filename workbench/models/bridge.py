"""The one place where TransformerLens is asked for a bridge.

A bridge rewires the module that it wraps. It therefore gets a copy of the module's structure that shares every
parameter: the wrapped module stays as it was and no weight is held twice.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from workbench.errors import ModelError
from workbench.models.forward import SITES, Editor, Observer, edited
from workbench.models.spec import ModelSpec
from workbench.models.weights import at_least_float32

HOOKS: dict[str, tuple[str, ...]] = {
    "resid_pre": ("hook_resid_pre",),
    "q": ("attn.hook_rot_q", "attn.hook_q"),
    "k": ("attn.hook_rot_k", "attn.hook_k"),
    "v": ("attn.hook_v",),
    "pattern": ("attn.hook_pattern",),
    "z": ("attn.hook_z",),
    "attn_out": ("hook_attn_out",),
    "resid_mid": ("hook_resid_mid",),
    "mlp_out": ("hook_mlp_out",),
    "resid_post": ("hook_resid_post",),
}
"""Bridge hooks that show a site of `workbench.models.forward.SITES`, the first that exists."""


def sharing_copy(module: nn.Module) -> nn.Module:
    """Copy a module's structure; parameters and buffers are shared, not copied."""
    shared = {id(p): p for p in module.parameters()} | {id(b): b for b in module.buffers()}
    return copy.deepcopy(module, shared)


def make_bridge(module: Any, tokenizer: Any = None) -> Any:
    """TransformerBridge over a sharing copy of a transformers module.

    Raises:
        ModelError: if transformer_lens is missing or has no adapter for the architecture.
    """
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError as error:
        raise ModelError(
            "this model or call needs TransformerLens hooks: install it with `pip install 'transformer-lens>=4.3,<5'`"
        ) from error
    architecture = type(module).__name__
    copied: Any = sharing_copy(module)
    if hasattr(copied, "set_attn_implementation"):
        copied.set_attn_implementation("eager")  # fused attention never forms the pattern that hooks are to show
    try:
        bridge = build_bridge_from_module(
            copied,
            architecture,
            hf_config=module.config,
            tokenizer=tokenizer,
            device=next(module.parameters()).device,
            model_name=architecture,
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"TransformerLens cannot bridge {architecture}: {error}") from error
    return bridge.eval()


def spec_from_bridge(bridge: Any, architecture: str) -> ModelSpec:
    """Spec of a model that only the hook path serves, as far as the bridge knows it."""
    cfg = bridge.cfg
    return ModelSpec(
        architecture=architecture,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=cfg.d_mlp or 0,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
        norm="rmsnorm" if "RMS" in str(cfg.normalization_type) else "layernorm",
        positions="rotary" if cfg.positional_embedding_type == "rotary" else "learned",
        rotary_dim=getattr(cfg, "rotary_dim", None) or 0,
        gated=bool(getattr(cfg, "gated_mlp", False)),
        parallel=bool(getattr(cfg, "parallel_attn_mlp", False)),
        attn_scale=cfg.d_head**-0.5,
    )


@torch.no_grad()
def forward_with_hooks(
    bridge: Any,
    tokens: Int[Tensor, "n pos"],
    observe: Mapping[str, Observer],
    edit: Mapping[str, Editor] | None = None,
) -> Tensor:
    """Logits `[n, pos, d_vocab]` of a bridge; sites are shown to `observe` and replaced by `edit` on the way.

    Raises:
        ModelError: if a site is asked for that the bridge of this architecture does not show, or an edit of
            `resid_mid`: what that hook returns reaches the MLP but not the stream beside it.
    """
    editors = dict(edit or {})
    if "resid_mid" in editors:
        raise ModelError(
            "TransformerLens hooks cannot edit 'resid_mid' (the stream past the MLP keeps the old value): "
            "edit 'attn_out' by the difference instead"
        )
    sites = [site for site in SITES if site in observe or site in editors]
    hooks = []
    shown: set[tuple[str, int]] = set()
    for site in sites:
        for layer in range(bridge.cfg.n_layers):
            names = [f"blocks.{layer}.{name}" for name in HOOKS[site]]
            name = next((name for name in names if name in bridge.hook_dict), None)
            rotary = bridge.cfg.positional_embedding_type == "rotary"
            if name is None or (site in {"q", "k"} and rotary and not name.endswith(("rot_q", "rot_k"))):
                raise ModelError(
                    f"site {site!r} is not shown by the TransformerLens bridge of {bridge.cfg.model_name} "
                    f"(looked for {' or '.join(names)}); the fast path has it for the architectures it serves"
                )

            def at(value: Tensor, hook: Any, layer: int = layer, site: str = site) -> Tensor | None:
                shown.add((site, layer))
                dtype = value.dtype
                if site == "pattern":
                    value = value.to(at_least_float32(dtype))
                new = edited(editors[site], site, layer, value) if site in editors else value
                if site in observe:
                    observe[site](layer, new)
                return new.to(dtype) if site in editors else None

            hooks.append((name, at))
    with bridge.hooks(fwd_hooks=hooks):
        logits = bridge(tokens, return_type="logits")
    for site in sites:  # some adapters list hooks that never fire
        if {layer for name, layer in shown if name == site} != set(range(bridge.cfg.n_layers)):
            raise ModelError(
                f"site {site!r} is listed but not shown by the TransformerLens bridge of {bridge.cfg.model_name}; "
                "the fast path has it for the architectures it serves"
            )
    return logits
