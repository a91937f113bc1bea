"""What the server exposes to the internet: headers, files, routes. Wrong requests and failures give a sentence."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import gradio as gr
import httpx
import pytest

from ldvc.errors import LdvcError
from ldvc.web import surface, temporary, texts
from ldvc.web.photos import HOW_TO_SEND
from ldvc.web.surface import content_security_policy
from tests.browsing import DOG, EVIL
from tools.remote import ROOT, PageError, Visitor, serve

GOOD: dict[str, list[Any]] = {
    "segment": ["photo", "dog, cat", True, None, None],
    "attention": ["photo", "dog, cat", "dog", 0, 0, True, 0, 0, None],
    "routing": ["photo", "dog, cat", 0, 0, 0, 0, None],
    "space": ["photo", "dog, cat", None],
    "compare": ["photo", "dog, cat", True, None, None],
    "vocabulary": ["voc20"],
    "download": ["photo", "dog, cat", True, None, "mask", None],
}
OWN = {"segment": range(5), "attention": (2, 3, 4), "routing": range(2, 6), "space": (2,), "compare": (3,), "vocabulary": (0,),
       "download": (4,)}  # indices of inputs that only this endpoint checks  # fmt: skip
WRONG = (5, 1e308, ["a", None], {"a": [1]}, "x" * 200_000, EVIL)
RAW = ("NaN", "-Infinity", "1e400", "9" * 4000, "9" * 5000, "true", "-1", "[" * 500 + "]" * 500, "[" * 5000 + "]" * 5000,
       r'"\ud800"', r'"dog\udfff"', r'"\u0000"', r'"\u202edog"', '"🐕"', '"{value}"',
       '{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}')  # as JSON  # fmt: skip
FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture(scope="module")
def client(page: gr.Blocks) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=page.local_url, timeout=60, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def photo(client: httpx.Client, photo: str) -> dict[str, Any]:
    """An uploaded photo, as the value of a component."""
    path = client.post("gradio_api/upload", files={"files": ("photo.png", Path(photo).read_bytes())}).json()[0]
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def call(client: httpx.Client, endpoint: str, data: Any, raw: bool = False) -> tuple[int, Any]:
    """Status of an endpoint, and its data or error message. `raw`: the values are JSON texts, possibly invalid."""
    body = f'{{"data": [{", ".join(data)}]}}' if raw else json.dumps({"data": data})
    headers = {"content-type": "application/json"}
    answer = client.post(f"gradio_api/run/{endpoint}", content=body.encode(), headers=headers)
    content = answer.json()
    return answer.status_code, content.get("error") or content.get("detail") or content


def is_sentence(text: Any) -> bool:
    """Whether a text is a sentence that a visitor may read."""
    is_short = isinstance(text, str) and 0 < len(text) < 600
    return is_short and text.rstrip()[-1] in ".…" and text[0] not in "[{" and "Error" not in text and "Traceback" not in text


@pytest.mark.parametrize("endpoint", GOOD)
def test_wrong_kinds_of_input_get_a_sentence(
    client: httpx.Client, photo: dict[str, Any], endpoint: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture
) -> None:
    good = [photo if each == "photo" else each for each in GOOD[endpoint]]
    state = [None] * (endpoint != "vocabulary")  # for the session, which a client cannot set
    assert call(client, endpoint, [*good, *state])[0] == 200
    refused = 0
    for place in OWN[endpoint]:
        for wrong in WRONG:
            status, sentence = call(client, endpoint, [*good[:place], wrong, *good[place + 1 :], *state])
            refused += status != 200
            assert status == 200 or is_sentence(sentence)
    assert refused >= len(OWN[endpoint]) * (len(WRONG) - 2)
    for data in ([], good[:-1], [good], None, 5, "dog", {"photo": photo}):
        status, sentence = call(client, endpoint, data)
        assert is_sentence(sentence) if status >= 400 else endpoint == "vocabulary", data
    assert not any(record.exc_info for record in caplog.records) and "Traceback" not in capfd.readouterr().err


PLACES = [*(("segment", place) for place in range(1, 5)), ("attention", 2), ("routing", 2), ("download", 4), ("vocabulary", 0)]


@pytest.mark.parametrize(("endpoint", "place"), PLACES)
def test_json_of_every_kind_gets_a_sentence(
    client: httpx.Client, photo: dict[str, Any], endpoint: str, place: int, caplog: pytest.LogCaptureFixture
) -> None:
    good = [json.dumps(photo if each == "photo" else each) for each in GOOD[endpoint]] + ["null"] * (endpoint != "vocabulary")
    for wrong in RAW:
        status, sentence = call(client, endpoint, [*good[:place], wrong, *good[place + 1 :]], raw=True)
        assert status == 200 or is_sentence(sentence), wrong[:40]
        assert sentence not in (texts.UNEXPECTED, texts.NO_SPACE)
    assert not caplog.records


@pytest.mark.parametrize("wrong", ["true", "NaN", "1e400", "9" * 4000])
def test_a_threshold_is_a_number(client: httpx.Client, photo: dict[str, Any], wrong: str) -> None:
    _, sentence = call(client, "segment", [json.dumps(photo), '"dog"', "true", wrong, "null", "null"], raw=True)
    assert sentence.startswith("The threshold is a number from 0 to 1, not ")


def test_long_bodies_are_refused_before_they_are_read(page: gr.Blocks, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the length in the header, otherwise as soon as too many bytes have arrived. A photo as a data URL fits."""
    assert surface.MAX_BODY > 50_000_000 * 4 / 3
    monkeypatch.setattr(surface, "MAX_BODY", 300_000)
    read = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal read
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="dog.jpg"\r\n\r\n'
        for _ in range(1000):
            read += 100_000
            yield b" " * 100_000

    async def post(path: str, **headers: str) -> tuple[int, Any]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(page.app), base_url="http://page/gradio_api/") as client:
            answer = await client.post(path, content=body(), headers=headers)
            return answer.status_code, answer.json()

    form = "multipart/form-data; boundary=x"
    for path, kind in (("run/vocabulary", "application/json"), ("queue/join", "application/json"), ("upload", form)):
        for stated, most in (({"content-length": "100000000"}, 0), ({}, 400_000)):
            read = 0
            with ThreadPoolExecutor(1) as thread:  # Playwright has an event loop in this one
                status, sentence = thread.submit(asyncio.run, post(path, **{"content-type": kind}, **stated)).result()
            assert (status, sentence) == (413, {"detail": texts.REQUEST_TOO_LARGE}) and read <= most, (path, stated)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"data": 5}', b'{"data": [], "fn_index": 99999, "session_hash": "a"}'])
def test_broken_requests(client: httpx.Client, body: bytes) -> None:
    answer = client.post("gradio_api/queue/join", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422) and answer.json() == {"detail": texts.BAD_REQUEST}


@pytest.mark.parametrize(
    "path",
    [str(DOG), "/etc/passwd", "/dev/zero", "../dog.jpg", "link", "x" * 5000, "dog\0.jpg", "dog\ud800.jpg", "file:///etc/passwd",
     "ftp://127.0.0.1/dog.jpg", "data:image/png;base64,AAAA"],
)  # fmt: skip
def test_a_photo_is_what_was_uploaded(client: httpx.Client, photo: dict[str, Any], path: str) -> None:
    """A path names a file of the server. Only uploaded files are accepted, also in requests without "meta"."""
    if path == "link":
        path = str(Path(photo["path"]).with_name("link.jpg"))
        os.symlink(DOG, path)
    for sent in ({"path": path}, {"path": path, "meta": photo["meta"]}, {"path": path, "url": "data:,"}):
        status, sentence = call(client, "segment", [sent, *GOOD["segment"][1:], None])
        assert status >= 400 and sentence == HOW_TO_SEND


def test_unexpected_errors_are_a_sentence_for_programs(
    client: httpx.Client, photo: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The operator finds the reason in the log."""
    monkeypatch.setattr("ldvc.web.api.names_of", lambda *_: 1 / 0)
    assert call(client, "routing", [photo, *GOOD["routing"][1:], None])[1] == texts.UNEXPECTED
    assert "ZeroDivisionError" in caplog.text and "in routing" in caplog.text and "division by zero" not in caplog.text


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd", "//etc/passwd", "/etc/%70asswd", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "%252e%252e/passwd",
        "app.py", "file:///etc/passwd", "http://127.0.0.1/", "https://huggingface.co/", "/proc/self/environ", "%00",
        str(ROOT / "app.py"), f"{DOG.parent}/../../app.py", f"{DOG.parent}/%2e%2e/%2e%2e/app.py", "x" * 5000,
    ],
)  # fmt: skip
def test_other_files_are_not_served(client: httpx.Client, path: str) -> None:
    answer = client.get(f"gradio_api/file={path}")
    assert answer.status_code == 404 and answer.json() == {"detail": texts.NOTHING_HERE}


def test_files_that_are_served(client: httpx.Client, photo: dict[str, Any]) -> None:
    """Uploaded files and the examples are served; links to other files are not."""
    assert client.get(f"gradio_api/file={photo['path']}").content == Path(photo["path"]).read_bytes()
    assert client.get(f"gradio_api/file={DOG}").content == DOG.read_bytes()
    link = Path(photo["path"]).with_name("outside.jpg")
    link.symlink_to(ROOT / "app.py")
    assert client.get(f"gradio_api/file={link}").status_code == 404


@pytest.mark.parametrize(
    "path",
    ["monitoring", "monitoring/summary", "monitoring/x", "gradio_api/proxy=http://127.0.0.1", "gradio_api/deep_link", "docs",
     "openapi.json", "gradio_api/vibe-code", "gradio_api/dev/reload", "gradio_api/stream/a/b/c/playlist.m3u8", ".git/config",
     "gradio_api/runs", "file=/etc/passwd", "gradio_api/file//etc/passwd", "static/../app.py", "custom_component/a/b/c/d"],
)  # fmt: skip
def test_routes_that_the_page_does_not_need(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


def test_headers(client: httpx.Client, photo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ("", "config", "theme.css", "app.py", "gradio_api/info", f"gradio_api/file={photo['path']}")
    answers = [client.get(path) for path in paths]
    for answer in [*answers, client.post("gradio_api/queue/join", json={})]:
        assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "same-origin"
        policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["base-uri"] == "'self'" and policy["object-src"] == "'none'"
        assert policy["frame-ancestors"] == "'self' https://huggingface.co https://*.hf.space"
        assert "x-frame-options" not in answer.headers and "http" not in policy["connect-src"] + policy["script-src"]
    monkeypatch.setenv("SPACE_ID", "ann/ldvc")
    assert "connect-src 'self' data: blob: https://huggingface.co" in content_security_policy()


def test_names_and_file_names_are_text(page: gr.Blocks, tmp_path: Path) -> None:
    """Names are escaped in the HTML of every tab; the viewer writes them as text in the browser."""
    (tmp_path / f"{EVIL}.jpg").write_bytes(DOG.read_bytes())
    visitor = Visitor(page.local_url)
    shown = [visitor.ask(f"dog, {EVIL}, cat | {EVIL}s", tmp_path / f"{EVIL}.jpg"), visitor.trigger("names", "change")]
    shown += [visitor.trigger(f"tab-{tab}", "select") for tab in ("attention", "routing", "space", "compare", "segment")]
    pieces = [text for changes in shown for change in changes.values() for text in texts_of(change)]
    html = [text for text in pieces if text.lstrip().startswith("<") and text != EVIL]
    assert any("&lt;img src=x onerror=alert(1)&gt;" in text for text in html)
    assert not any(EVIL in text for text in html if not text.startswith(EVIL))
    made = visitor.trigger("download-data", "click")["download-file"]["value"]
    assert "<" not in made["orig_name"] and "<" not in Path(made["path"]).name
    visitor.close()


def texts_of(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from texts_of(each)


def test_disk_full(
    page: gr.Blocks, client: httpx.Client, photo: dict, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """During an upload, a photo as data, and a download, from the page or an endpoint."""
    visitor = Visitor(page.local_url)
    visitor.ask("dog", DOG)
    with monkeypatch.context() as patch:
        patch.setattr("gradio.routes.upload_fn", Mock(side_effect=FULL))
        answer = client.post("gradio_api/upload", files={"files": ("dog.jpg", b"1")})
        assert answer.status_code == 507 and answer.json() == {"detail": texts.NO_SPACE}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", Mock(side_effect=FULL))
        assert texts.NO_SPACE in visitor.trigger("download-mask", "click")["download-problem"]["value"]
        assert call(client, "download", [photo, *GOOD["download"][1:], None])[1] == texts.NO_SPACE
    with monkeypatch.context() as patch:
        patch.setattr("gradio.processing_utils.save_pil_to_cache", Mock(side_effect=FULL))
        assert call(client, "segment", [photo, *GOOD["segment"][1:], None])[1] == texts.NO_SPACE
    with monkeypatch.context() as patch:
        patch.setattr("ldvc.web.photos.save_base64_to_cache", Mock(side_effect=FULL))
        sent = {"url": "data:image/png;base64,AAAA"}
        assert call(client, "segment", [sent, *GOOD["segment"][1:], None])[1] == texts.NO_SPACE
    assert not any(record.exc_info for record in caplog.records)
    assert visitor.trigger("download-mask", "click")["download-problem"]["value"] == "", "it works again"
    visitor.close()


def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(temporary.VARIABLE, str(tmp_path / "file" / "folder"))
    with pytest.raises(LdvcError, match=r"temporary files \(.*file/folder\) cannot be written: .*Set GRADIO_TEMP_DIR"):
        temporary.check_folder()


def test_sigterm_during_an_answer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The system's folder `gradio` belongs to another user. The server makes a new folder and removes it at its end."""
    system = tmp_path / "tmp"
    system.mkdir()
    (system / "gradio").write_text("not a folder of ours")
    environment = {key: value for key, value in os.environ.items() if key != temporary.VARIABLE}
    environment |= {"LDVC_MODEL": str(tiny_checkpoint), "TMPDIR": str(system), "HF_HUB_OFFLINE": "1"}
    with serve(tmp_path, environment={**environment, temporary.VARIABLE: ""}) as served:
        visitor = Visitor(served.address)
        visitor.set("photo", visitor.upload(DOG))
        visitor.set("names", ", ".join(f"thing {number}" for number in range(200)))
        assert len(list(system.glob("ldvc-*"))) == 1
        visitor.send("run", "click")
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(timeout=10) == 0
        with pytest.raises((PageError, httpx.TransportError)):
            visitor.trigger("run", "click")
        visitor.close()
        assert (system / "gradio").is_file() and not list(system.glob("ldvc-*"))  # PyTorch 2.8 leaves another folder
        assert "Traceback" not in served.log.read_text()
