from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from workbench.errors import DataError, OutputError
from workbench.models.store import CacheEntry, ensure_entry, list_entries, new_folder, read_entry, write_manifest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting a tmpfs takes root on Linux")
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def write_model(folder: Path) -> dict[str, str]:
    save_file({"w": torch.arange(6.0)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return {"source": "test"}


def everything_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "final"
    with new_folder(final, bytes_needed=1) as partial:
        (partial / "a").write_text("x")
        assert not final.exists()
    assert everything_in(final.parent) == ["final"]
    assert (final / "a").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_new_folder_leaves_nothing_behind_on_failure(tmp_path: Path, error: BaseException) -> None:
    def write(folder: Path) -> None:
        (folder / "a").write_text("x")
        raise error

    with pytest.raises(type(error)), new_folder(tmp_path / "final", bytes_needed=1) as partial:
        write(partial)
    assert everything_in(tmp_path) == []


def test_new_folder_does_not_overwrite(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "precious").write_text("x")
    with (
        pytest.raises(OutputError, match=r"final exists and is not an empty folder"),
        new_folder(tmp_path / "final", bytes_needed=1),
    ):
        pass
    assert everything_in(tmp_path / "final") == ["precious"]


def test_new_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(OutputError, match=r"cannot write to .*file"),
        new_folder(tmp_path / "file" / "final", bytes_needed=1),
    ):
        pass


def test_a_disk_that_is_too_small_is_refused_beforehand(small_disk: Path) -> None:
    with pytest.raises(OutputError) as caught, new_folder(small_disk / "final", bytes_needed=5_000_000):
        pytest.fail("nothing may be written")
    for part in (str(small_disk), "5,000,000 bytes", "WORKBENCH_CACHE"):
        assert part in str(caught.value)
    assert everything_in(small_disk) == []


@pytest.mark.parametrize("how", ["file", "safetensors"])
def test_a_disk_that_fills_up_leaves_no_half_made_folder(small_disk: Path, how: str) -> None:
    def write(folder: Path) -> None:
        (folder / "small").write_text("x")
        if how == "file":
            (folder / "a").write_bytes(bytes(2_000_000))
        else:
            save_file({"w": torch.zeros(500_000)}, folder / "model.safetensors")

    with (
        pytest.raises(OutputError, match=r"is full: making final takes 1,000 bytes"),
        new_folder(small_disk / "final", bytes_needed=1000) as partial,
    ):
        write(partial)
    assert everything_in(small_disk) == []


def test_a_quota_counts_as_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is full"), new_folder(tmp_path / "final", bytes_needed=1):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert everything_in(tmp_path) == []


def test_entry_is_built_once_and_carries_its_provenance(cache: Path) -> None:
    calls = []

    def build(folder: Path) -> dict[str, str]:
        calls.append(folder)
        return write_model(folder)

    first = ensure_entry("m", bytes_needed=1, build=build)
    second = ensure_entry("m", bytes_needed=1, build=build)
    assert len(calls) == 1
    assert first == second
    assert second.provenance == {"source": "test"}
    assert set(second.files) == {"config.json", "model.safetensors"}
    assert second.n_bytes == sum(
        path.stat().st_size for path in second.folder.iterdir() if path.name != "manifest.json"
    )
    assert list(list_entries()) == ["m"]
    second.verify()


def damage_cut(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20)


def damage_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"\xff" * 8)


def damage_missing(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 1')


def damage_format(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"format": 0}')


@pytest.mark.parametrize("damage", [damage_cut, damage_header, damage_missing, damage_manifest, damage_format])
def test_a_damaged_entry_is_noticed_and_made_again(damage, capfd: pytest.CaptureFixture[str]) -> None:
    entry = ensure_entry("m", bytes_needed=1, build=write_model)
    damage(entry.folder)
    assert isinstance(read_entry("m"), str)
    capfd.readouterr()
    again = ensure_entry("m", bytes_needed=1, build=write_model)
    assert "is damaged" in capfd.readouterr().err
    assert again == entry
    assert [path.name for path in entry.folder.parent.iterdir() if path.name != ".m.lock"] == ["m"]


def test_verify_finds_a_flipped_byte() -> None:
    entry = ensure_entry("m", bytes_needed=1, build=write_model)
    path = entry.folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"model\.safetensors has sha256 .* its manifest says"):
        entry.verify()


def test_leftovers_of_a_killed_process_are_cleared(cache: Path) -> None:
    left = cache / "models" / ".m.partial-dead"
    left.mkdir(parents=True)
    (left / "big").write_text("x")
    ensure_entry("m", bytes_needed=1, build=write_model)
    assert not left.exists()


def test_a_failed_build_leaves_no_entry_and_the_next_one_works() -> None:
    def fail(folder: Path) -> dict[str, str]:
        write_model(folder)
        raise DataError("no")

    with pytest.raises(DataError, match="no"):
        ensure_entry("m", bytes_needed=1, build=fail)
    assert read_entry("m") is None
    assert isinstance(ensure_entry("m", bytes_needed=1, build=write_model), CacheEntry)


def test_whoever_comes_second_waits_and_says_so(capfd: pytest.CaptureFixture[str]) -> None:
    building, calls = threading.Event(), []

    def slow(folder: Path) -> dict[str, str]:
        calls.append(folder)
        building.set()
        time.sleep(0.3)
        return write_model(folder)

    first = threading.Thread(target=ensure_entry, args=("m",), kwargs={"bytes_needed": 1, "build": slow})
    first.start()
    assert building.wait(10)
    entry = ensure_entry("m", bytes_needed=1, build=slow)
    first.join()
    assert len(calls) == 1
    assert isinstance(entry, CacheEntry)
    assert "another process is preparing m; waiting" in capfd.readouterr().err


def test_a_cache_that_cannot_be_written_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "file"))
    with pytest.raises(OutputError, match=r"cannot write to .*file.*WORKBENCH_CACHE"):
        ensure_entry("m", bytes_needed=1, build=write_model)


def test_manifest_lists_every_file_but_itself(tmp_path: Path) -> None:
    write_model(tmp_path)
    write_manifest(tmp_path, {"source": "x"})
    import json

    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}
    assert set(manifest["versions"]) == {"transformers", "torch", "safetensors", "gguf"}
