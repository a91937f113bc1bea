"""What the server exposes to the internet: the routes that the page needs, security headers, and sentences for failures."""

from __future__ import annotations

import copy
import errno
import gc
import logging
import os
import re
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse

from ldvc.web import temporary, texts
from ldvc.web.api_data import refusal
from ldvc.web.photos import HOW_TO_SEND, MAX_FILE_BYTES
from ldvc.web.segmenter import Segmenter, return_memory
from ldvc.web.session import Visits

log = logging.getLogger(__name__)

ROUTES = re.compile(
    r"/(|config/?|theme\.css|favicon\.ico|robots\.txt|manifest\.json|pwa_icon(/\d+)?|(static|assets)/.+"
    r"|gradio_api/(info/?|openapi\.json|app_id/?|startup-events|theme\.css|login_check/?|user/?|heartbeat/\w+|upload|upload_progress"
    r"|queue/(join|data)|cancel|reset/?|(call|run|api)/.+))",
    re.DOTALL,
)
MCP_ROUTES = re.compile(r"/gradio_api/mcp(/|/http/?|/schema)?")  # without the older transport SSE
FILES = "/gradio_api/file="
UPLOAD = "/gradio_api/upload"
MAX_SENTENCE = 500  # characters
MAX_BODY = MAX_FILE_BYTES * 4 // 3 + 1_000_000  # bytes of a request: a photo as a data URL and the other inputs
SENTENCES = {  # by status; they replace Gradio's messages
    400: texts.BAD_REQUEST,
    413: texts.REQUEST_TOO_LARGE,
    422: texts.BAD_REQUEST,
    503: texts.BUSY,
}
HUB = "https://huggingface.co https://*.hf.space"


def content_security_policy() -> str:
    """The content security policy of the page: all content comes from this server.

    Gradio needs inline scripts and `eval`. A Space is embedded in pages of the Hugging Face Hub, and Gradio asks the Hub
    whether the Space runs.
    """
    hub = f" {HUB}" if os.environ.get("SPACE_ID") else ""
    return (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        f"img-src 'self' data: blob:{hub}; media-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; "
        f"connect-src 'self' data: blob:{hub}; object-src 'none'; base-uri 'self'; form-action 'self'; "
        f"frame-ancestors 'self' {HUB}"
    )


class BodyTooLarge(Exception):
    """A request has more than `MAX_BODY` bytes."""


def first_error(error: BaseException) -> BaseException:
    """The original error, from the causes and contexts of an error that Gradio raises."""
    visited = {error}
    while (cause := error.__cause__ or error.__context__) is not None and cause not in visited:
        visited.add(error := cause)
    return error


class Surface:
    """ASGI middleware that filters routes and files, limits request bodies, and adds headers and sentences.

    Args:
        app: the server.
        folders: folders whose files may be fetched, in addition to Gradio's temporary folder.
        mcp: whether the server also offers the endpoints as tools of the Model Context Protocol.
    """

    def __init__(self, app: Any, *, folders: Sequence[Path], mcp: bool = False) -> None:
        self.app = app
        self.mcp = mcp
        self.folders = [folder.resolve() for folder in folders]
        self.headers = {
            "content-security-policy": content_security_policy(),
            "x-content-type-options": "nosniff",
            "referrer-policy": "same-origin",
        }

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        started = replaced = full = False
        received = 0

        async def read() -> dict[str, Any]:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY:
                raise BodyTooLarge
            return message

        async def answer(message: dict[str, Any]) -> None:
            nonlocal started, replaced
            if message["type"] == "http.response.start":
                started = True
                status = 413 if received > MAX_BODY else message["status"]  # Gradio would report an unreadable body
                replaceable = path.startswith("/gradio_api/") and not MCP_ROUTES.fullmatch(path)  # MCP has its own errors
                if replaceable and status in SENTENCES:
                    replaced = True
                    await reply(status, SENTENCES[status])
                else:
                    MutableHeaders(scope=message).update(self.headers)
                    await send(message)
            elif not replaced:
                await send(message)

        async def reply(status: int, sentence: str) -> None:
            await JSONResponse({"detail": sentence}, status, self.headers)(scope, receive, send)

        if not (
            ROUTES.fullmatch(path)
            or (self.mcp and MCP_ROUTES.fullmatch(path))
            or (path.startswith(FILES) and self._may_be_fetched(path.removeprefix(FILES)))
        ):
            await reply(404, texts.NOTHING_HERE)
            return
        if int(dict(scope["headers"]).get(b"content-length", 0)) > MAX_BODY:
            await reply(413, texts.REQUEST_TOO_LARGE)
            return
        try:
            if path == UPLOAD:
                await anyio.to_thread.run_sync(temporary.remove_oldest)
            await self.app(scope, read, answer)
        except Exception as error:
            log.error("%s of a request: %s", type(error).__name__, path.split("/")[1:3])
            if started:
                await answer({"type": "http.response.body", "body": b""})
            elif received > MAX_BODY:
                await reply(413, texts.REQUEST_TOO_LARGE)
            elif isinstance(error, OSError):
                full = True
                await reply(507, texts.NO_SPACE)
            else:
                await reply(400, texts.BAD_REQUEST)
        if full:  # close the file that was being written, so that it can be removed
            await anyio.to_thread.run_sync(gc.collect)
            await anyio.to_thread.run_sync(temporary.remove_oldest)

    def _may_be_fetched(self, path: str) -> bool:
        try:
            real, folders = Path(path).resolve(), (temporary.folder().resolve(), *self.folders)
            return Path(path).is_absolute() and any(real.is_relative_to(folder) for folder in folders)
        except (OSError, ValueError, RuntimeError):  # for example a null byte, or a loop of links
            return False


class Page(gr.Blocks):
    """`gr.Blocks` that limits the memory of visitors after each event and answers failures with a sentence.

    Args:
        visits: the memory of all visitors.
        options: arguments of `gr.Blocks`.

    Attributes:
        session: the component with the visitor's `Session`.
        segmenter: the `Segmenter` of the page.
    """

    session: gr.State
    segmenter: Segmenter

    def __init__(self, visits: Visits, **options: Any) -> None:
        super().__init__(**options)
        self.visits = visits
        self._returned = 0.0
        self.unload(self.leave)

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *rest: Any, **options: Any) -> Any:
        """Turn the inputs of a request into the arguments of the function; answer bad inputs with a sentence."""
        try:
            return await super().preprocess_data(block_fn, inputs, *rest, **options)
        except gr.Error:
            raise
        except Exception as error:
            if isinstance(first := first_error(error), OSError) and first.errno != errno.ENAMETOOLONG:
                raise OSError(first.errno, first.strerror) from None
            count, wanted = len(inputs), len(block_fn.inputs)
            if count < wanted:
                raise refusal(texts.TOO_FEW_INPUTS.format(wanted=wanted, count=count)) from error
            sent = zip(block_fn.inputs, inputs, strict=False)
            photo = any(isinstance(component, gr.Image) and value is not None for component, value in sent)
            raise refusal(HOW_TO_SEND if photo else texts.BAD_REQUEST) from error

    async def process_api(self, block_fn: Any, inputs: list[Any], state: Any = None, **options: Any) -> dict[str, Any]:
        """Answer an event, and turn every failure into a sentence."""
        try:
            return await super().process_api(block_fn, inputs, state, **options)
        except gr.Error as error:
            sentence = str(error.message).encode(errors="replace").decode()  # it may quote an unpaired surrogate
            error.message = sentence if len(sentence) <= MAX_SENTENCE else f"{sentence[:MAX_SENTENCE]}…"
            raise
        except Exception as error:
            if isinstance(first := first_error(error), OSError):
                log.error("an event could not be answered: %s", first.strerror)
                raise refusal(texts.NO_SPACE) from error
            # Without the message, which may quote the visitor's data.
            trace = "".join(traceback.format_tb(first.__traceback__))
            log.error("an event could not be answered: %s\n%s", type(first).__name__, trace)
            raise refusal(texts.UNEXPECTED) from error
        finally:
            if state is not None:
                self._drop_copies(state)
                if self.session in block_fn.inputs:
                    self.visits.keep(state[self.session._id])
                    await self._return_memory()

    async def postprocess_data(self, block_fn: Any, predictions: Any, state: Any) -> list[Any]:
        """Turn the changes of an event into data for the browser. Gradio would make a component for each unchanged output."""
        outputs = block_fn.outputs
        if not isinstance(predictions, dict) or not predictions or not predictions.keys() <= set(outputs):
            return await super().postprocess_data(block_fn, predictions, state)
        reduced = copy.copy(block_fn)
        reduced.outputs = [output for output in outputs if output in predictions]
        changes = iter(await super().postprocess_data(reduced, predictions, state))
        return [next(changes) if output in predictions else None if output.stateful else gr.skip() for output in outputs]

    def _drop_copies(self, state: Any) -> None:
        """Remove the components that Gradio makes to apply updates. It would keep all of them: 0.5 MB for each answer."""
        for key in state.blocks_config.blocks.keys() - self.blocks.keys():
            del state.blocks_config.blocks[key]
            state.config_values.pop(key, None)

    async def _return_memory(self) -> None:
        """Call `return_memory`, at most once a second."""
        if time.monotonic() - self._returned > 1:
            self._returned = time.monotonic()
            await anyio.to_thread.run_sync(return_memory)

    def leave(self, request: gr.Request) -> None:
        """Forget the answer of a visitor who closed the page."""
        state = self.app.state_holder.session_data.get(request.session_hash)
        if state is not None:
            self.visits.forget(state[self.session._id])
