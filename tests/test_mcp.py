"""The endpoints as tools of the Model Context Protocol, asked by its own client."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest

from ldvc.errors import LdvcError
from ldvc.web import mcp, texts
from ldvc.web.models import ModelRegistry
from ldvc.web.page import launch_options
from tests.browsing import DOG, served_here

TOOLS = {"segment", "attention", "routing", "space", "compare", "vocabulary", "download"}


@pytest.fixture(scope="module")
def page(registry: ModelRegistry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[gr.Blocks]:
    pytest.importorskip("mcp")
    folder = tmp_path_factory.mktemp("mcp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gradio.mcp.DEFAULT_TEMP_DIR", str(folder))
        with served_here(registry, folder, GRADIO_MCP_SERVER="True") as page:
            yield page


def ask(page: gr.Blocks, question: Callable) -> Any:
    """The answer of a coroutine function that gets a session of a client."""
    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def run() -> Any:
        address = f"{page.local_url}gradio_api/mcp/"
        async with streamable_http_client(address) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            return await question(session)

    return asyncio.run(run())


def call(page: gr.Blocks, tool: str, arguments: dict[str, Any], progress: bool = False) -> Any:
    async def reported(*_: Any) -> None:
        pass

    options = {"progress_callback": reported} if progress else {}
    return ask(page, lambda session: session.call_tool(tool, arguments, **options))


def uploaded(page: gr.Blocks) -> str:
    """The address of an uploaded photo, as Gradio's tool for uploads gives it."""
    path = httpx.post(f"{page.local_url}gradio_api/upload", files={"files": ("dog.jpg", DOG.read_bytes())}).json()[0]
    return f"{page.local_url}gradio_api/file={path}"


def test_every_endpoint_is_a_tool_and_nothing_else_is(page: gr.Blocks) -> None:
    tools = ask(page, lambda session: session.list_tools()).tools
    assert {tool.name for tool in tools} == TOOLS
    for tool in tools:
        assert len(tool.description) > 60 and "Args:" not in tool.description
        arguments = tool.inputSchema["properties"]
        assert arguments and "session" not in arguments
        assert all(each["description"] for each in arguments.values()), (tool.name, arguments)
    segment = next(tool for tool in tools if tool.name == "segment").inputSchema
    assert segment["required"] == ["photo", "names"] and segment["properties"]["threshold"]["type"] == "number"


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("kind", ["data URL", "uploaded"])
def test_segment(page: gr.Blocks, kind: str, progress: bool) -> None:
    """Pictures, and the data as JSON, with and without reports of progress."""
    data_url = f"data:image/jpeg;base64,{base64.b64encode(DOG.read_bytes()).decode()}"
    photo = data_url if kind == "data URL" else uploaded(page)
    answer = call(page, "segment", {"photo": photo, "names": "dog, grass"}, progress)
    assert not answer.isError, answer
    assert [each.type for each in answer.content] == ["image", "text", "image", "text", "text"]
    assert base64.b64decode(answer.content[0].data).startswith(b"\x89PNG")
    data = json.loads(answer.content[-1].text)
    assert [each["name"] for each in data["classes"]] == ["dog", "grass"]
    assert sum(each["area"] for each in data["classes"]) + data["none_of_these"] == pytest.approx(1, abs=1e-3)


def test_the_other_tools(page: gr.Blocks) -> None:
    question = {"photo": uploaded(page), "names": "dog, grass"}
    for tool, arguments, key in (
        ("attention", {**question, "name": "dog"}, "attention"),
        ("routing", question, "regions"),
        ("space", question, "decoders"),
        ("compare", question, "decoders"),
        ("vocabulary", {"vocabulary": "voc20"}, "classes"),
    ):
        assert json.loads(call(page, tool, arguments).content[-1].text)[key], tool
    (file,) = call(page, "download", {**question, "kind": "data"}).content
    assert [each["name"] for each in httpx.get(file.text).json()["classes"]] == ["dog", "grass"]


@pytest.mark.parametrize(
    "photo",
    ["https://example.org/dog.jpg", "http://127.0.0.1/gradio_api/file=/etc/passwd", f"http://127.0.0.1/gradio_api/file={DOG}",
     "http://127.0.0.1/gradio_api/file=", "data:image/png;base64,AAAA", "data:image/png;base64,A", "/etc/passwd"],
)  # fmt: skip
def test_what_is_no_photo_gets_a_sentence(page: gr.Blocks, photo: str) -> None:
    answer = call(page, "segment", {"photo": photo, "names": "dog"})
    (said,) = answer.content
    assert answer.isError and 0 < len(said.text) < 600 and "Traceback" not in said.text and "root:" not in said.text


def test_routes_of_the_tools(page: gr.Blocks) -> None:
    """The schema, which the Hub reads, and no other transport."""
    assert {tool["name"] for tool in httpx.get(f"{page.local_url}gradio_api/mcp/schema").json()} == TOOLS
    for path in ("sse", "messages/", "other"):
        answer = httpx.post(f"{page.local_url}gradio_api/mcp/{path}")
        assert answer.status_code == 404 and answer.json() == {"detail": texts.NOTHING_HERE}


def test_off_without_the_switch(registry: ModelRegistry, tmp_path: Path) -> None:
    with served_here(registry, tmp_path, GRADIO_MCP_SERVER="False") as page:
        for path in ("mcp", "mcp/", "mcp/schema", "mcp/sse"):
            assert httpx.get(f"{page.local_url}gradio_api/{path}").status_code == 404
            assert httpx.post(f"{page.local_url}gradio_api/{path}", json={}).status_code == 404


def test_the_switch_without_the_package_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(mcp.VARIABLE, "true")
    monkeypatch.setattr("ldvc.web.mcp.find_spec", lambda name: None)
    with pytest.raises(LdvcError, match=r'install it with pip install -e "\.\[mcp\]"'):
        launch_options()
