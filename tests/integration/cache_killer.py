"""Kill captures at random moments and let them go on; writes what happened to stdout as JSON.

A process of its own, with one thread: it imports and makes the model once and forks a worker for each capture.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

import workbench as wb  # noqa: E402
from families import tiny_module  # noqa: E402

N_SHARDS = 16
PROMPTS = 4 * N_SHARDS - 1


def work(model: wb.Model, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(101, (PROMPTS, 64), generator=generator)
    lengths = torch.randint(1, 65, (PROMPTS,), generator=generator)
    reduce = {"pattern": ["raw", "key_mean", "entropy"]}
    wb.capture(model, tokens, ["z", "pattern"], lengths=lengths, reduce=reduce, store=folder, batch_size=4)


def fork(model: wb.Model, folder: Path) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(model, folder)
            code = 0
        finally:
            os._exit(code)
    return pid


def committed(folder: Path) -> int:
    try:
        shards = json.loads((folder / "manifest.json").read_text())["shards"]
    except FileNotFoundError:
        return 0
    return sum(shard is not None for shard in shards)


def kill_once(model: wb.Model, folder: Path, chance: random.Random, pace: float) -> dict | None:
    """Start or resume a capture and kill it; None if it was not between its first new and its last shard."""
    before = committed(folder)
    pid = fork(model, folder)
    target = chance.randint(max(1, before), N_SHARDS - 1)
    deadline = time.monotonic() + 60
    while committed(folder) < target and time.monotonic() < deadline:
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 1.5 * pace))
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    done = committed(folder)
    if not (os.WIFSIGNALED(status) and 1 <= done < N_SHARDS):
        return None
    files = {path.name for path in folder.glob("shard-*")}
    return {
        "committed": done,
        "half_written": len(list(folder.glob(".*.part"))),
        "uncommitted": len(files) - done,
    }


def finish(model: wb.Model, folder: Path) -> None:
    _, status = os.waitpid(fork(model, folder), 0)
    if status != 0:
        raise SystemExit(f"a capture that nobody killed ended with status {status}")


def main(root: Path, kills: int, seed: int) -> None:
    model = wb.wrap_model(tiny_module("llama"))
    whole = root / "whole"
    begun = time.monotonic()
    finish(model, whole)
    pace = (time.monotonic() - begun) / N_SHARDS
    expected = {path.name: path.read_bytes() for path in whole.glob("*.safetensors")}
    reference = wb.open_cache(whole)
    chance, moments, attempts, resumes = random.Random(seed), [], 0, 0
    while resumes < kills and attempts < 10 * kills:
        attempts += 1
        folder = root / f"run-{attempts}"
        moment = kill_once(model, folder, chance, pace)
        if moment is None:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        moments.append(moment)
        if moment["committed"] < N_SHARDS - 1 and chance.random() < 0.3:
            again = kill_once(model, folder, chance, pace)  # the resume is killed too
            if again is not None:
                moments.append({**again, "of_a_resume": True})
        finish(model, folder)
        found = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        if found != expected:
            raise SystemExit(
                f"files differ after {moments[-1]}: {[k for k in expected if found.get(k) != expected[k]]}"
            )
        opened = wb.open_cache(folder)
        for name, entry in reference.entries.items():
            for layer in entry.layers:
                if not torch.equal(opened[name, layer], reference[name, layer]):
                    raise SystemExit(f"{name} of layer {layer} differs after {moments[-1]}")
        if list(folder.glob(".*.part")):
            raise SystemExit("half-written files are left")
        resumes += 1
        shutil.rmtree(folder)
    json.dump({"moments": moments, "attempts": attempts, "resumes": resumes, "shards": N_SHARDS}, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
