"""Photos that programs send: what is taken, and the sentences for the rest."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image

from ldvc.web.photos import HOW_TO_SEND, MAX_FILE_BYTES

FILE = {"_type": "gradio.FileData"}


def data_url(size: tuple[int, int] = (48, 32)) -> str:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def segment(page: gr.Blocks, photo: Any) -> tuple[str, Any]:
    """("complete", data) or ("error", what a program is told) of the endpoint /segment."""
    address = f"{page.local_url}gradio_api/call/segment"
    others = page.get_api_info()["named_endpoints"]["/segment"]["parameters"][2:]
    values = [photo, "dog, cat", *(each["parameter_default"] for each in others)]
    event = httpx.post(address, json={"data": values}, timeout=120).json()
    lines = httpx.get(f"{address}/{event['event_id']}", timeout=120).text.splitlines()
    kind = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")][-1]
    return kind, json.loads([line.removeprefix("data: ") for line in lines if line.startswith("data: ")][-1])


@pytest.mark.parametrize(
    "photo",
    [
        {"url": data_url()},
        {"path": None, "url": data_url(), "meta": FILE},
        {"url": data_url(), "orig_name": "../../x.png", "meta": FILE},
        data_url(),
    ],
)
def test_a_data_url_is_a_photo(page: gr.Blocks, photo: Any) -> None:
    kind, answer = segment(page, photo)
    assert kind == "complete" and answer[2]["size"] == {"width": 48, "height": 32}


@pytest.mark.parametrize(
    ("photo", "sentence"),
    [
        (None, "Choose a photo first"),
        ({"path": None, "url": None, "meta": FILE}, "Choose a photo first"),
        ({"url": "data:image/png;base64,AAAA"}, "not a picture"),
        ({"url": "data:image/png;base64,A"}, HOW_TO_SEND),
        ({"url": "data:text/plain,hello"}, HOW_TO_SEND),
        ({"url": "data:image/png;base64," + "A" * (MAX_FILE_BYTES * 4 // 3 + 400)}, "larger than 50 MB"),
        ({"url": "https://example.org/dog.jpg"}, HOW_TO_SEND),
        ({"path": "https://example.org/dog.jpg", "meta": FILE}, HOW_TO_SEND),
        ({"path": "http://127.0.0.1/dog.jpg", "meta": FILE}, HOW_TO_SEND),
        ({"path": "http://127.0.0.1/gradio_api/file=/etc/passwd", "meta": FILE}, HOW_TO_SEND),
        ({"path": "http://127.0.0.1/gradio_api/file=http://127.0.0.1/dog.jpg", "meta": FILE}, HOW_TO_SEND),
        ({"path": {"dog": 1}, "meta": FILE}, HOW_TO_SEND),
        ({"url": 7}, HOW_TO_SEND),
        (7, HOW_TO_SEND),
        (["dog.jpg"], HOW_TO_SEND),
        ("dog.jpg", HOW_TO_SEND),
        *(({"path": path, "meta": FILE}, "") for path in ("/etc/passwd", "../../etc/passwd", data_url(), "a" * 5000)),
    ],
)
def test_other_values_get_a_sentence(page: gr.Blocks, photo: Any, sentence: str, capfd: pytest.CaptureFixture) -> None:
    kind, answer = segment(page, photo)
    assert kind == "error" and sentence in str(answer["error"]) and "root:" not in str(answer), answer
    assert "Traceback" not in capfd.readouterr().err
