"""`workbench capture`: activations of a text or of token ids, into a folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from workbench.errors import DataError, OutputError, PromptError

if TYPE_CHECKING:
    from torch import Tensor

    from workbench.models import Model

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*")
_ITEM = re.compile(r"[^,(]+(?:\([^)]*\))?")


def register(app: typer.Typer) -> None:
    """Add the verb."""

    @app.command("capture")
    def capture(
        out: Annotated[Path, typer.Option(help="Folder for the shards and their manifest.")],
        names: Annotated[
            str, typer.Option(help="Sites or TransformerLens hooks, separated by commas, for example z,pattern.")
        ],
        text: Annotated[list[Path] | None, typer.Option(help="Text file in UTF-8; may be given several times.")] = None,
        tokens: Annotated[
            Path | None, typer.Option(help="Token ids instead: a .npy of integers [n, pos], or text, a prompt a line.")
        ] = None,
        length: Annotated[int, typer.Option(min=2, help="Tokens of each prompt that a text is cut into.")] = 256,
        reduce: Annotated[
            list[str] | None,
            typer.Option(
                help="What to keep of a site instead of all of it, for example pattern.key_mean,pattern.entropy; "
                "of the others everything is kept."
            ),
        ] = None,
        layers: Annotated[str | None, typer.Option(help="Only these layers, for example 0,3,8-11.")] = None,
        budget: Annotated[str, typer.Option(help="Memory beside the model, for example 1GB or 512MiB.")] = "1GB",
        batch_size: Annotated[
            int | None, typer.Option(min=1, help="Prompts that run together; default: what fits.")
        ] = None,
        store_dtype: Annotated[
            str | None, typer.Option(help="Element type of what is kept whole, for example float16.")
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with a capture that was stopped.")] = False,
        model: Annotated[
            str | None,
            typer.Option(help="Name, Hugging Face id, folder or .gguf file; default: SmolLM2-135M-Instruct."),
        ] = None,
        device: Annotated[str | None, typer.Option(help="For example cpu or cuda.")] = None,
        dtype: Annotated[str | None, typer.Option(help="Of the model, for example float32 or bfloat16.")] = None,
    ) -> None:
        """Keep activations of a model in a folder, whole or reduced; a stopped capture goes on with --resume."""
        budget_bytes = bytes_of(budget)
        chosen_layers = None if layers is None else layers_of(layers)
        folder = out.expanduser().absolute()
        if (text is None) == (tokens is None):
            raise PromptError("give either --text FILE or --tokens FILE")
        if (folder / "manifest.json").exists() and not resume:
            raise OutputError(
                f"{folder} holds a capture already: add --resume to go on with it, or choose another --out"
            )

        import time

        from workbench.cache import capture as run
        from workbench.cli.console import element_type, open_model, progress
        from workbench.cli.patch import peak_bytes

        kept = None if store_dtype is None else element_type(store_dtype, "--store-dtype")
        say = progress()
        loaded = open_model(model, device=device, dtype=dtype, say=say)
        ids, lengths = _windows(loaded, text, length) if text is not None else _ids(tokens)
        said: list[str] = []

        def tell(message: str) -> None:
            said.append(message)
            say(message)

        begun = time.monotonic()
        cache = run(
            loaded,
            ids,
            [name.strip() for name in names.split(",") if name.strip()],
            lengths=lengths,
            layers=chosen_layers,
            reduce=[item.strip() for each in reduce or [] for item in _ITEM.findall(each)] or None,
            store=folder,
            budget_bytes=budget_bytes,
            batch_size=batch_size,
            dtype=kept,
            progress=tell,
        )
        print(f"estimate: {said[0]}")
        print(cache)
        print(
            f"{int(cache.lengths.sum()):,} tokens in {time.monotonic() - begun:.1f} s; "
            f"{peak_bytes() / 1e9:.2f} GB of memory at the peak, the model included"
        )


def bytes_of(text: str) -> int:
    """Bytes that `1GB`, `512MiB` or `100000` stands for.

    Raises:
        PromptError: if it is none of these.
    """
    match = _SIZE.fullmatch(text)
    if not match or float(match[1]) <= 0:
        raise PromptError(f"--budget {text!r} is not a size: write for example 1GB, 512MiB or 800MB")
    power = " KMGT".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def layers_of(text: str) -> list[int]:
    """Layers that `0,3,8-11` stands for.

    Raises:
        PromptError: if it does not parse.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise PromptError(f"--layers {text!r} does not parse: write for example 0,3,8-11")
        layers += range(int(match[1]), int(match[2] or match[1]) + 1)
    return layers


def _windows(model: Model, paths: list[Path], length: int) -> tuple[Tensor, Tensor]:
    """Prompts cut from each text by itself."""
    import torch

    from workbench.cache import windows

    parts = []
    for path in paths:
        try:
            parts.append(windows(model, path.expanduser().read_text(encoding="utf-8"), length))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read --text {path}: {error}") from error
    return torch.cat([ids for ids, _ in parts]), torch.cat([lengths for _, lengths in parts])


def _ids(path: Path | None) -> tuple[Tensor, Tensor | None]:
    """Ids from a file: `.npy`, or text with the ids of one prompt on each line."""
    import numpy as np
    import torch

    assert path is not None
    try:
        if path.suffix == ".npy":
            array = np.load(path.expanduser(), allow_pickle=False)
            if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
                raise DataError(
                    f"--tokens {path} holds {array.dtype} of shape {array.shape}: expected integers [n, pos]"
                )
            return torch.from_numpy(array.astype(np.int64)), None
        rows = [[int(word) for word in line.split()] for line in path.expanduser().read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read --tokens {path}: {error}; give a .npy or ids separated by spaces") from error
    rows = [row for row in rows if row]
    if not rows:
        raise DataError(f"--tokens {path} has no ids: write the ids of one prompt on each line")
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
    return ids, lengths
