"""Where the files of `data/` are, in a checkout and in an installed wheel."""

from pathlib import Path

from workbench.errors import DataError

_INSTALLED = Path(__file__).parent / "_data"
_CHECKOUT = Path(__file__).parent.parent / "data"


def data_path(relative: str) -> Path:
    """Path of a file or folder that ships with the workbench.

    Args:
        relative: path below `data/`, with forward slashes, for example `texts/prose.txt`.

    Raises:
        DataError: if neither the installed wheel nor the checkout has it.
    """
    for root in (_INSTALLED, _CHECKOUT):
        path = root / relative
        if path.exists():
            return path
    raise DataError(
        f"data file {relative!r} is neither in {_INSTALLED} nor in {_CHECKOUT}: reinstall mi-workbench, "
        "or check the spelling against data/README.md"
    )
