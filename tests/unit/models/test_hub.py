"""Fetching from the hub, against a server on this machine that answers as the hub does."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch

from families import tiny_module
from workbench.errors import ModelError, OutputError
from workbench.models import sources
from workbench.models.hub import fetch_from_hub
from workbench.models.sources import resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by id: file contents, or the error code that the hub answers with."""

    repositories: dict[str, dict[str, bytes] | tuple[int, str]]
    address: str = ""
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(path)
        hub_id = next((name for name in self.repositories if f"/{name}/" in f"{path}/"), None)
        held = self.repositories.get(hub_id or "", (404, "RepoNotFound"))
        if isinstance(held, tuple):
            return held[0], {"X-Error-Code": held[1]}, b"{}"
        if "/tree/" in path:
            files = [{"type": "file", "path": name, "size": len(held[name]), "oid": "0" * 40} for name in held]
            return 200, {}, json.dumps(files).encode()
        if path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in held]
            return 200, {}, json.dumps({"id": hub_id, "sha": COMMIT, "siblings": siblings}).encode()
        name = path.rpartition("/")[2]
        if f"/{hub_id}/resolve/" not in path or name not in held:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        etag = hashlib.sha256(held[name]).hexdigest()
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}, held[name]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    tiny_module("llama").save_pretrained(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    served = Hub(
        {
            "owner/tiny": {**files, "README.md": b"x", "pytorch_model.bin": b"x", "onnx/model.safetensors": b"x"},
            "owner/pickled": {"config.json": b"{}", "pytorch_model.bin": b"x"},
            "owner/ggufs": {"README.md": b"x", "tiny.Q4_0.gguf": b"x"},
            "owner/dataset": {"README.md": b"x"},
            "owner/gated": (403, "GatedRepo"),
            "owner/broken": (400, "Nonsense"),
        }
    )

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = served.answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    served.address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_model_is_fetched_once_without_what_is_not_needed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fetched = fetch_from_hub("owner/tiny", endpoint=hub.address)
    assert fetched.revision == COMMIT
    held = {path.relative_to(fetched.folder).as_posix() for path in fetched.folder.rglob("*") if path.is_file()}
    assert held == {"config.json", "generation_config.json", "model.safetensors"}
    assert capfd.readouterr() == ("", "workbench: fetching owner/tiny from the Hugging Face hub\n")

    hub.asked.clear()
    source = resolve("owner/tiny")
    assert hub.asked == []
    assert capfd.readouterr() == ("", "")
    assert source.name == "owner/tiny"
    assert source.provenance == {"source": "owner/tiny", "revision": COMMIT, "attention": "sdpa"}
    expected = tiny_module("llama").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in source.module.state_dict().items())


@pytest.mark.parametrize(
    ("hub_id", "why"),
    [
        ("owner/unknown", r"knows no model 'owner/unknown': check the spelling.*HF_TOKEN.*'smollm2-135m-instruct'"),
        ("owner/gated", r"owner/gated is gated: accept its terms.*HF_TOKEN"),
        ("owner/broken", r"hub refused 'owner/broken'"),
        ("owner/pickled", r"owner/pickled .* has no safetensors weights; pickled ones .* can run code"),
        ("owner/ggufs", r"owner/ggufs .* has no config\.json: it holds GGUF files: download one \(tiny\.Q4_0\.gguf\)"),
        ("owner/dataset", r"owner/dataset .* has no config\.json: is it a model\?"),
    ],
)
def test_what_cannot_be_had_says_why_and_what_to_do(hub: Hub, hub_id: str, why: str) -> None:
    with pytest.raises(ModelError, match=why):
        fetch_from_hub(hub_id, endpoint=hub.address)
    assert not any("/resolve/" in path for path in hub.asked), "nothing of it may be fetched"


@pytest.mark.usefixtures("hub")
def test_a_hub_out_of_reach_is_reported() -> None:
    with pytest.raises(ModelError, match=r"owner/tiny is not in the local .* cannot be reached .* the network"):
        fetch_from_hub("owner/tiny", endpoint="http://127.0.0.1:1")


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"HF_HUB_OFFLINE forbids asking the hub: unset it, or give a local folder"):
        resolve("owner/tiny")
    assert hub.asked == []


@pytest.mark.usefixtures("hub")
def test_a_full_disk_is_no_network_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", full)
    with pytest.raises(OutputError, match=r"Hugging Face cache .* is full, owner/tiny does not fit.*HF_HOME"):
        fetch_from_hub("owner/tiny")


def test_a_half_fetched_model_is_not_taken_for_a_whole_one(hub: Hub) -> None:
    folder = fetch_from_hub("owner/tiny", endpoint=hub.address).folder
    (folder / "model.safetensors").unlink()
    hub.asked.clear()
    again = fetch_from_hub("owner/tiny", endpoint=hub.address)
    assert hub.asked
    assert (again.folder / "model.safetensors").is_file()
    assert sources.resolve("owner/tiny").module is not None
