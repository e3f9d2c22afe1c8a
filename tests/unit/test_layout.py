"""What lives where: importing one thing must not load another."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter with the repository root as working directory, and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_does_not_take_our_kernels_folder_for_the_library_of_that_name() -> None:
    output = run_python(
        "import sys\n"
        "from transformers import LlamaForCausalLM\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available())\n"
        "ours = ('workbench', 'workbench_kernels', 'workbench_circuits')\n"
        "print([name for name in sys.modules if name.split('.')[0] in ours])\n"
        "probed = sys.modules.get('kernels')\n"
        "print(probed is None or (probed.__file__ is None and not [n for n in vars(probed) if n[0] != '_']))\n"
    )
    available, ours, empty = output.split("\n")[:3]
    assert available == "False", "transformers believes that the library `kernels` is installed"
    assert ours == "[]"
    assert empty == "True", "probing for the library ran code of ours"


@pytest.mark.parametrize("folder", ["kernels", "circuits"])
def test_source_roots_are_not_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in memory after `statement`."""
    return set(run_python(f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})").split())


def test_import_workbench_loads_nothing_heavy() -> None:
    heavy = {"torch", "transformers", "transformer_lens", "plotly", "pandas", "scipy", "workbench_circuits"}
    assert loaded_by("import workbench; dir(workbench)") & heavy == set()


def test_the_engine_runs_without_transformer_lens_and_plotly() -> None:
    found = loaded_by("import workbench; workbench.edge_effects; workbench.wrap_model; workbench.PromptPairs")
    assert found & {"transformer_lens", "plotly", "workbench_circuits"} == set()


def test_workbench_never_imports_the_circuits_package() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "workbench").rglob("*.py")]
    assert len(sources) > 20
    assert not [text for text in sources if "import workbench_circuits" in text or "from workbench_circuits" in text]


def test_every_public_name_resolves() -> None:
    output = run_python(
        "import workbench\nprint(all(getattr(workbench, name) is not None for name in workbench.__all__))"
    )
    assert output.strip() == "True"


@pytest.mark.parametrize("package", ["workbench", "workbench_circuits"])
def test_no_module_takes_the_place_of_a_public_name(package: str) -> None:
    output = run_python(
        f"import pkgutil, types, importlib, {package} as p\n"
        "names = [m.name for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.') if '._data' not in m.name]\n"
        "for name in names:\n    importlib.import_module(name)\n"
        "print(len(names), [n for n in p.__all__ if isinstance(getattr(p, n), types.ModuleType)])"
    )
    count, taken = output.strip().split(" ", 1)
    assert int(count) > 10
    assert taken == "[]"
