"""`workbench model`: what a model is, which ones are cached, and converting a `.gguf` file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from workbench.models import Model


def register(app: typer.Typer) -> None:
    """Add the verb."""
    verb = typer.Typer(no_args_is_help=True, help="Look at, list and convert models.")
    app.add_typer(verb, name="model")

    @verb.command("info")
    def info(
        source: Annotated[
            str | None,
            typer.Argument(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="For example float32 or bfloat16.")] = None,
    ) -> None:
        """Print a model's architecture, the path that serves it and why, its size, hash and tokenizer."""
        from workbench.cli.console import open_model, progress

        facts = describe(open_model(source, device=device, dtype=dtype, say=progress()))
        if as_json:
            import json

            print(json.dumps(facts, indent=1))
            return
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name.replace('_', ' '):<{width}}  {_shown(value)}")

    @verb.command("list")
    def list_cached(
        verify: Annotated[bool, typer.Option("--verify", help="Hash every file against its manifest.")] = False,
    ) -> None:
        """List the models in the workbench's cache with their sizes; exit code 1 if one is damaged."""
        from workbench.errors import DataError
        from workbench.models.store import list_entries, models_folder

        entries = list_entries()
        print(f"{len(entries)} in {models_folder()}")
        damaged = False
        for name, entry in entries.items():
            if isinstance(entry, str):
                size, state, sound = "", f"damaged: {entry}", False
            else:
                size, state, sound = f"{entry.n_bytes / 1e6:,.1f} MB", str(entry.provenance.get("source", "")), True
                if verify:
                    try:
                        entry.verify()
                        state += " (verified)"
                    except DataError as error:
                        state, sound = f"damaged: {error}", False
            damaged |= not sound
            print(f"{name:<32} {size:>12}  {state}")
        if damaged:
            raise typer.Exit(1)

    @verb.command("convert")
    def convert(
        gguf: Annotated[Path, typer.Argument(help="A .gguf file.")],
        out: Annotated[Path, typer.Option(help="Folder to make: config, safetensors in float32, tokenizer.")],
    ) -> None:
        """Convert a .gguf file into a folder that `load_model` and transformers read."""
        from workbench.models.convert import convert_gguf

        print(convert_gguf(gguf.expanduser(), out.expanduser()))


def describe(model: Model) -> dict[str, Any]:
    """The facts about a model that `workbench model info` prints; values that JSON can hold."""
    spec, tokenizer = model.spec, model.tokenizer
    parameters = list(model.module.parameters()) if model.module is not None else []
    return {
        "name": model.name,
        "architecture": f"{type(model.module).__name__} ({spec.architecture})",
        "layers": spec.n_layers,
        "heads": spec.n_heads,
        "kv_heads": spec.n_kv_heads,
        "d_model": spec.d_model,
        "d_head": spec.d_head,
        "vocabulary": spec.d_vocab,
        "context": spec.n_ctx,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "path": model.path,
        "refusal": model.refusal,
        "hash": model.model_hash,
        "tokenizer": None if tokenizer is None else f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens",
        "bos_token": None if tokenizer is None else tokenizer.bos_token,
        "prepends_bos": model.prepends_bos,
        **{f"provenance_{key}": value for key, value in model.provenance.items()},
    }


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
