"""A capture in a folder: what it is made of, how it goes on, and everything that can befall it."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import workbench as wb
from families import tiny_module
from workbench.cache import Reduction
from workbench.cache.files import shard_file, writing
from workbench.errors import DataError, OutputError
from workbench.models import Model

LENGTHS = torch.tensor([9, 4, 9, 1, 8, 9, 7])
NAMES = ["z", "pattern"]
REDUCE = ["pattern.key_mean", "pattern.entropy"]


@cache
def tiny(seed: int = 0) -> Model:
    return wb.wrap_model(tiny_module("llama", seed=seed), name="tiny")


def tokens_of(seed: int = 0) -> Tensor:
    return torch.randint(101, (7, 9), generator=torch.Generator().manual_seed(seed))


def into(folder: Path, **options):
    """Seven prompts in four shards."""
    given = {"lengths": LENGTHS, "reduce": REDUCE, "batch_size": 2, "model": tiny(), "tokens": tokens_of(), **options}
    return wb.capture(given.pop("model"), given.pop("tokens"), given.pop("names", NAMES), store=folder, **given)


@pytest.fixture(scope="module")
def whole():
    """The same capture in memory, in the same batches."""
    return wb.capture(tiny(), tokens_of(), NAMES, lengths=LENGTHS, reduce=REDUCE, batch_size=2)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished capture to copy."""
    folder = tmp_path_factory.mktemp("made")
    into(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "cache")
    return tmp_path / "cache"


def assert_same(ours, theirs):
    assert ours.names == theirs.names
    for name, entry in ours.entries.items():
        for layer in entry.layers:
            assert torch.equal(ours[name, layer], theirs[name, layer]), (name, layer)


def stopped_after(n: int, monkeypatch, folder: Path, **options) -> list[str]:
    """Stop a capture when `n` shards are committed; returns the committed files."""
    said = []

    def stop(message):
        said.append(message)
        if sum(line.startswith("captured") for line in said) == n:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        into(folder, progress=stop, **options)
    manifest = json.loads((folder / "manifest.json").read_text())
    return [shard["file"] for shard in manifest["shards"] if shard]


def test_a_stored_cache_has_the_interface_and_the_numbers_of_one_in_memory(made, whole):
    stored = wb.open_cache(made)
    assert_same(stored, whole)
    assert (stored.nbytes, len(stored), stored.shards) == (whole.nbytes, 7, whole.shards)
    assert [(span.start, span.stop) for span in stored.shards] == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert torch.equal(stored.tokens, tokens_of())
    assert torch.equal(stored.lengths, LENGTHS)
    for prompts in (slice(None), slice(1, 5), slice(None, None, -3), [6, 0, 3, 3], 2, -1):
        for head in (None, 1):
            assert torch.equal(stored.get("z", 2, head, prompts), whole.get("z", 2, head, prompts))
        assert torch.equal(
            stored.get("pattern.key_mean", 0, prompts=prompts),
            whole["pattern.key_mean", 0][range(7)[prompts] if isinstance(prompts, slice) else prompts],
        )
    parts = [stored.get("pattern.entropy", 1, prompts=prompts) for prompts in stored.shards]
    assert torch.equal(torch.cat(parts), whole["pattern.entropy", 1])
    assert str(made) in repr(stored)
    stored.verify()


def test_one_head_lies_in_one_piece(made):
    path = made / shard_file(1)
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8 : 8 + size])["1/z"]["data_offsets"]
    per_head = (last - first) // 4
    raw = data[8 + size + first :][2 * per_head : 3 * per_head]
    found = wb.open_cache(made).get("z", 1, 2, prompts=slice(2, 4))
    assert found.numpy().tobytes() == raw


def test_reading_one_head_touches_none_of_the_rest(folder):
    opened = wb.open_cache(folder, verify="size")
    before = opened["z", 1, 2]
    for path in folder.glob("shard-*"):
        with safe_open(path, framework="pt") as file:
            n = file.get_slice("1/z").get_shape()[1]
        data = bytearray(path.read_bytes())
        size = int.from_bytes(data[:8], "little")
        first = json.loads(data[8 : 8 + size])["1/z"]["data_offsets"][0] + 8 + size
        per_head = n * 9 * 8 * 4
        keep = slice(first + 2 * per_head, first + 3 * per_head)
        destroyed = bytearray(b"\xff" * (len(data) - 8 - size))
        path.write_bytes(
            bytes(data[: 8 + size])
            + bytes(destroyed[: keep.start - 8 - size])
            + bytes(data[keep])
            + bytes(destroyed[keep.stop - 8 - size :])
        )
    assert torch.equal(opened["z", 1, 2], before)
    assert opened["z", 1, 1].isnan().all()
    with pytest.raises(DataError, match=r"shard-00000.*shard-00003"):
        opened.verify()


def test_the_manifest_says_what_was_captured_and_how(made):
    manifest = wb.open_cache(made).manifest
    assert (manifest["kind"], manifest["schema_version"]) == ("workbench activation cache", 1)
    capture = manifest["capture"]
    assert capture["model"]["hash"] == tiny().model_hash
    assert [
        (each["name"], each["hook"], each["dtype"], each["shape"], each["heads"]) for each in capture["entries"]
    ] == [
        ("pattern.key_mean", "blocks.{layer}.attn.hook_pattern", "float32", [9], 4),
        ("pattern.entropy", "blocks.{layer}.attn.hook_pattern", "float32", [], 4),
        ("z", "blocks.{layer}.attn.hook_z", "float32", [9, 8], 4),
    ]
    assert {"torch", "safetensors", "mi-workbench"} <= set(manifest["sessions"][0]["versions"])
    assert manifest["provenance"]["model"]["name"] == "tiny"
    for index, shard in enumerate(manifest["shards"]):
        path = made / shard["file"]
        assert (shard["file"], shard["size"]) == (shard_file(index), path.stat().st_size)
        assert len(shard["sha256"]) == 64


def test_a_stopped_capture_goes_on_where_it_stopped(folder, tmp_path, monkeypatch, whole):
    committed = stopped_after(2, monkeypatch, tmp_path / "b")
    assert committed == ["shard-00000.safetensors", "shard-00001.safetensors"]
    with pytest.raises(DataError, match="is not finished: 2 of its 4 shards are committed"):
        wb.open_cache(tmp_path / "b")
    times = {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in committed}
    said: list[str] = []
    resumed = into(tmp_path / "b", progress=said.append)
    assert "2 of 4 shards are there" in said
    assert {name: (tmp_path / "b" / name).stat().st_mtime_ns for name in committed} == times
    assert_same(resumed, whole)
    for name in [shard_file(index) for index in range(4)] + ["prompts.safetensors"]:
        assert (tmp_path / "b" / name).read_bytes() == (folder / name).read_bytes()
    sessions = [shard["session"] for shard in wb.open_cache(tmp_path / "b").manifest["shards"]]
    assert sessions == [0, 0, 1, 1]


def test_the_batches_of_a_resumed_capture_are_those_it_began_with(tmp_path, monkeypatch, whole):
    stopped_after(1, monkeypatch, tmp_path)
    assert_same(into(tmp_path, batch_size=None, budget_bytes=10**8), whole)


def test_a_finished_capture_is_not_made_again(folder, monkeypatch, whole):
    monkeypatch.setattr("workbench.cache.store.collect", None)
    assert_same(into(folder), whole)


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped": (flip, "does not have the sha256"),
    "truncated": (
        lambda path: os.truncate(path, path.stat().st_size - 100),
        r"has [\d,]+ bytes where the manifest says",
    ),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes where"),
    "missing": (lambda path: path.unlink(), "is missing"),
    "another of this capture": (
        lambda path: shutil.copy(path.with_name(shard_file(2)), path),
        "is a copy of shard 2 of this capture",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_shard_is_named_refused_and_computed_again(folder, whole, made, kind):
    harm, message = DAMAGE[kind]
    harm(folder / shard_file(1))
    with pytest.raises(DataError, match=rf"is damaged: shard-00001\.safetensors {message}") as refused:
        wb.open_cache(folder)
    assert "shard-00000" not in str(refused.value)
    said: list[str] = []
    repaired = into(folder, progress=said.append)
    assert any(re.match(rf"shard-00001\.safetensors {message}", line) for line in said)
    assert_same(repaired, whole)
    assert_same(wb.open_cache(folder), whole)
    assert (folder / shard_file(1)).read_bytes() == (made / shard_file(1)).read_bytes()
    assert [each["file"] for each in repaired.manifest["repaired"]] == ["shard-00001.safetensors"]


def test_a_shard_of_another_capture_is_never_mixed_in(folder, tmp_path, whole):
    other = into(tmp_path / "other", model=tiny(seed=1))
    assert not torch.equal(other["z", 1], whole["z", 1])
    shutil.copy(tmp_path / "other" / shard_file(1), folder / shard_file(1))
    assert (folder / shard_file(1)).stat().st_size == (tmp_path / "other" / shard_file(1)).stat().st_size
    with pytest.raises(DataError, match=r"shard-00001\.safetensors is a shard of another capture"):
        wb.open_cache(folder)
    assert_same(into(folder), whole)
    shutil.copy(tmp_path / "other" / shard_file(1), folder / "shard-00004.safetensors")
    with pytest.raises(DataError, match=r"not its own: shard-00004\.safetensors"):
        wb.open_cache(folder)
    with pytest.raises(DataError, match=r"not this capture's: shard-00004\.safetensors"):
        into(folder)


def test_a_foreign_shard_in_the_place_of_one_to_come_is_overwritten(tmp_path, monkeypatch, whole):
    stopped_after(2, monkeypatch, tmp_path / "b")
    into(tmp_path / "other", model=tiny(seed=1))
    shutil.copy(tmp_path / "other" / shard_file(3), tmp_path / "b" / shard_file(3))
    said: list[str] = []
    assert_same(into(tmp_path / "b", progress=said.append), whole)
    assert "shard-00003.safetensors lies in the folder but was not committed: computing it again" in said


def test_quick_opening_compares_sizes_alone(folder):
    flip(folder / shard_file(0))
    opened = wb.open_cache(folder, verify="size")
    with pytest.raises(DataError, match="shard-00000"):
        opened.verify()
    os.truncate(folder / shard_file(0), 10)
    with pytest.raises(DataError, match="has 10 bytes"):
        wb.open_cache(folder, verify="size")
    with pytest.raises(DataError, match="expected 'full' or 'size'"):
        wb.open_cache(folder, verify="none")


@pytest.mark.parametrize("name", ["manifest.json", "prompts.safetensors"])
@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing"])
def test_a_damaged_manifest_or_prompt_file_is_refused(folder, name, harm, whole):
    if harm == "flipped" and name == "manifest.json":
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace('"batch_size": 2', '"batch_size": 3'))
    else:
        DAMAGE[harm][0](folder / name)
    with pytest.raises(DataError, match=name):
        wb.open_cache(folder)
    if name == "prompts.safetensors":
        assert_same(into(folder), whole)
        assert_same(wb.open_cache(folder), whole)
    else:
        with pytest.raises(DataError, match=r"manifest\.json|holds no capture"):
            into(folder)


def mine(version: str) -> Reduction:
    return Reduction(name="mine", version=version, compute=lambda x, lengths: x.amax((-1, -2)), on=("z",))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": 1}, "model hash .* there and .* here"),
        ({"tokens": 1}, "prompts hash"),
        ({"lengths": None}, "prompts hash"),
        ({"labels": {"input": ["a"] * 7}}, "prompts hash"),
        ({"names": ["z", "pattern", "q"]}, "names pattern.key_mean, .* there and q, .* here"),
        ({"layers": [0, 1]}, r"layers of z \[0, 1, 2\] there and \[0, 1\] here"),
        ({"reduce": ["pattern.entropy"]}, "names pattern.key_mean, pattern.entropy, z there"),
        ({"dtype": torch.float16}, "dtype of z float32 there and float16 here"),
        ({"batch_size": 3}, "batch_size 2 there and 3 here"),
    ],
)
def test_another_capture_is_refused_with_what_differs(folder, options, message):
    if "model" in options:
        options = {"model": tiny(seed=1)}
    if "tokens" in options:
        options = {"tokens": tokens_of(1)}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DataError, match=f"holds another capture: .*{message}"):
        into(folder, **options)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_capture_killed_before_its_first_manifest_begins_anew(made, tmp_path, whole):
    shutil.copy(made / "prompts.safetensors", tmp_path)
    for name in (".lock", ".manifest.json.part", ".prompts.safetensors.part"):
        (tmp_path / name).write_text("half")
    assert_same(into(tmp_path), whole)
    assert not list(tmp_path.glob(".*.part"))
    assert_same(wb.open_cache(tmp_path), whole)


def test_another_version_of_a_reduction_is_another_capture(tmp_path):
    into(tmp_path, reduce=[mine("1")])
    into(tmp_path, reduce=[mine("1")])
    with pytest.raises(DataError, match=r"reduction of z\.mine .*'version': '1'.* there and .*'version': '2'"):
        into(tmp_path, reduce=[mine("2")])


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    with pytest.raises(DataError, match=r"is not empty and holds no capture \(thesis.tex\)"):
        into(tmp_path)
    with pytest.raises(DataError, match=r"there is no .*manifest\.json: give a folder"):
        wb.open_cache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file is in the way"):
        into(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot write"):
        into(Path("/proc/nowhere"))


def test_a_cache_of_another_schema_version_is_refused(folder):
    from workbench.cache.files import read_manifest, write_manifest

    write_manifest(folder, {**read_manifest(folder), "schema_version": 2})
    with pytest.raises(DataError, match="schema version 2 and this program reads 1"):
        wb.open_cache(folder)
    write_manifest(folder, {"kind": "something else"})
    with pytest.raises(DataError, match="not the manifest of an activation cache"):
        wb.open_cache(folder)


def test_a_second_writer_is_told_so(folder):
    with writing(folder), pytest.raises(OutputError, match="another process is writing the cache"):
        into(folder)
    code = (
        "import sys, pathlib\nfrom workbench.cache.files import writing\n"
        f"with writing(pathlib.Path({str(folder)!r})):\n    print('mine', flush=True)\n    sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(OutputError, match="another process is writing the cache"):
            into(folder)
        other.stdin.close()
    into(folder)


def test_a_disk_that_fills_up_keeps_what_is_committed(tmp_path, monkeypatch, whole):
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []

    def fills_up(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 4:  # the prompts, two shards, and half of the third
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", fills_up)
    with pytest.raises(OutputError, match=r"no room for shard-00002\.safetensors \(3 of 4\)") as refused:
        into(tmp_path)
    assert "The 2 committed shards stay, and the same call goes on from there. Free some space" in str(refused.value)
    assert not list(tmp_path.glob(".*.part"))
    assert_same(into(tmp_path), whole)


def test_too_little_room_is_refused_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 10**6 - 1000, 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match=r"it takes 27.\d kB and 1 kB are free"):
        into(tmp_path)


def test_a_file_size_limit_is_named(tmp_path, whole):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (7000, hard))  # the prompts fit, a shard does not
    try:
        with pytest.raises(OutputError, match=r"shard-00000\.safetensors \(1 of 4\) .* is larger than a file may be"):
            into(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(into(tmp_path), whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB, where the tests may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)]
    if (
        os.geteuid() != 0
        or not shutil.which("mount")
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_real_full_disk(small_disk, monkeypatch, whole):
    """What fits is committed; with more room the same call finishes."""
    ballast = small_disk.parent / "disk" / "ballast"
    ballast.write_bytes(bytes(20_000))
    target = small_disk / "cache"
    free = namedtuple("usage", "total used free")(10**9, 0, 10**9)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: free)
        with pytest.raises(OutputError, match="no room") as refused:
            into(target)
    assert "committed shards stay" in str(refused.value)
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    assert_same(into(target), whole)
    assert_same(wb.open_cache(target), whole)
