"""A Hub that cannot be reached, is slow, or fails once: the Hub's own client, and a server of this machine in its place."""

from __future__ import annotations

import hashlib
import http.server
import inspect
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from ldvc.errors import WeightsNotFoundError
from ldvc.modeling import clip_weights
from ldvc.web import texts
from ldvc.web.models import ModelRegistry
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import Problem
from ldvc.weights import hub_reachable
from tests.tiny import save_tiny_checkpoint
from tools.publish_space import ROOT

DOG = str(ROOT / "assets" / "examples" / "dog.jpg")
NAME, COMMIT = "ann/model", "a" * 40


class Hub(http.server.ThreadingHTTPServer):
    """Serves the files of a folder as the repository `NAME`.

    Attributes:
        status: of the answers; another one than 200 comes without a file.
        go_on: is awaited before each answer.
        asked: is set by the first request for the repository.
        requests: paths.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.status, self.requests = folder, 200, []
        self.go_on, self.asked = threading.Event(), threading.Event()
        self.go_on.set()


class Answer(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        if NAME not in self.path:
            self.reply(404, b"{}")
            return
        self.server.requests.append(self.path)
        self.server.asked.set()
        self.server.go_on.wait(60)
        files = {str(path.relative_to(self.server.folder)): path for path in self.server.folder.rglob("*") if path.is_file()}
        if self.server.status != 200:
            self.reply(self.server.status, b"{}")
        elif "/tree/" in self.path:
            listed = [{"type": "file", "path": name, "size": path.stat().st_size, "oid": name} for name, path in files.items()]
            self.reply(200, json.dumps(listed).encode())
        elif self.path.startswith("/api/"):
            self.reply(200, json.dumps({"id": NAME, "sha": COMMIT}).encode())
        else:
            self.reply(200, files[self.path.partition(f"/resolve/{COMMIT}/")[2]].read_bytes())

    do_HEAD = do_GET

    def reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        headers = {"content-length": len(content), "etag": f'"{hashlib.sha256(content).hexdigest()}"', "x-repo-commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""


def point_to(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an address the Hub."""
    for name in ("HF_HUB_OFFLINE", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub(save_tiny_checkpoint(tmp_path / "repository", decoders=("ldvc",)))
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    point_to(f"http://127.0.0.1:{hub.server_port}", tmp_path / "cache", monkeypatch)
    yield hub
    hub.go_on.set()
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def segmenter(tiny_checkpoint: Path) -> Segmenter:
    """A checkpoint of this machine in place of lite; that of the choice "full" is on the Hub."""
    return Segmenter(ModelRegistry(str(tiny_checkpoint), NAME))


def test_a_hub_that_fails_once(segmenter: Segmenter, hub: Hub) -> None:
    hub.status = 403
    assert segmenter.registry.download("full").wait(60)
    with pytest.raises(Problem, match=f"{texts.FULL_FAILED} {NAME} "):
        segmenter.segment(DOG, "dog", model="full")
    assert segmenter.segment(DOG, "dog").model == segmenter.registry.default
    hub.status = 200
    assert segmenter.registry.download("full").wait(60)
    assert segmenter.segment(DOG, "dog", model="full").model == "full"
    assert segmenter.registry.get("full").name == "model"


def test_nobody_waits_for_a_slow_hub(segmenter: Segmenter, hub: Hub) -> None:
    """A question that has to wait for it would keep those of the others from the queue."""
    hub.go_on.clear()
    with pytest.raises(Problem, match="being downloaded: .* choose lite until then"):
        segmenter.segment(DOG, "dog", model="full")
    assert hub.asked.wait(60)
    with pytest.raises(Problem, match="being downloaded: "):
        segmenter.segment(DOG, "dog", model="full")
    assert len(hub.requests) == 1 and segmenter.segment(DOG, "dog").model == segmenter.registry.default
    hub.go_on.set()
    assert segmenter.registry.download("full").wait(60)
    assert segmenter.segment(DOG, "dog", model="full").model == "full"


def test_a_hub_that_cannot_be_reached(segmenter: Segmenter, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        point_to(f"http://127.0.0.1:{closed.getsockname()[1]}", tmp_path / "other", monkeypatch)
        with pytest.raises(Problem, match=f"{NAME} is not a folder here, and the Hub cannot be reached for it: connect to"):
            segmenter.segment(DOG, "dog", model="full")
        assert segmenter.segment(DOG, "dog").model == segmenter.registry.default and not hub.requests
    point_to(f"http://127.0.0.1:{hub.server_port}", tmp_path / "other", monkeypatch)
    assert segmenter.registry.download("full").wait(60)
    assert segmenter.segment(DOG, "dog", model="full").model == "full"


def test_a_checkpoint_in_the_cache_needs_no_hub(segmenter: Segmenter, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert segmenter.registry.download("full").wait(60)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    count = len(hub.requests)
    again = Segmenter(ModelRegistry(segmenter.registry.get(None), NAME))
    assert again.segment(DOG, "dog", model="full").model == "full" and len(hub.requests) == count


def test_whether_the_hub_can_be_reached(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that is not made within three seconds is none."""
    assert hub_reachable()
    limits, signature = [], inspect.signature(socket.create_connection)

    def slow(*arguments: Any, **options: Any) -> socket.socket:
        limits.append(signature.bind(*arguments, **options).arguments["timeout"])
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", slow)
    assert not hub_reachable() and limits == [3]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_reachable() and len(limits) == 1


def test_weights_are_not_asked_for_as_a_pickle_because_the_hub_is_slow(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's error after its time limits is also one of "no such file"."""
    signature, asked = inspect.signature(huggingface_hub.hf_hub_download), []

    def download(*arguments: Any, **options: Any) -> str:
        asked.append(signature.bind(*arguments, **options).arguments["filename"])
        raise LocalEntryNotFoundError("Cannot reach the Hub.")

    monkeypatch.delenv("LDVC_CLIP_WEIGHTS", raising=False)
    monkeypatch.setattr(clip_weights, "hf_hub_download", download)
    with pytest.raises(WeightsNotFoundError, match="cannot be downloaded: connect to the network once"):
        clip_weights.find_pretrained("ViT-B-16-quickgelu", "openai")
    assert asked == ["open_clip_model.safetensors"]
