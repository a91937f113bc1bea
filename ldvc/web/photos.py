"""Photos from the page and from programs: an uploaded file or a data URL. Any other value is answered with a sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import unquote

import gradio as gr
from gradio.data_classes import ImageData
from gradio.processing_utils import save_base64_to_cache
from pydantic import ValidationError

from ldvc.web.api_data import refusal

MAX_FILE_BYTES = 50_000_000
HOW_TO_SEND = (
    "Send the photo as an uploaded file (in Python: gradio_client.handle_file with a path) or as "
    '{"url": "data:image/png;base64,..."}.'
)
TOO_LARGE = f"The file of the photo is larger than {MAX_FILE_BYTES // 1_000_000} MB; make it smaller and try again."


class SentPhoto(ImageData):
    """The value of a photo in a request."""

    @classmethod
    def model_validate(cls, value: Any, **options: Any) -> SentPhoto:
        """Validate a value; a text counts as a URL, and other values are refused with a sentence."""
        try:
            return super().model_validate({"url": value} if isinstance(value, str) else value, **options)
        except ValidationError as error:
            raise refusal(HOW_TO_SEND) from error


def accept_photos(component: gr.Image) -> None:
    """Let a widget return the path of a photo without opening it.

    Gradio would decode the photo without our limits, and fail with a stack trace on a file that is not a picture.
    """

    async def keep(path: str | Path | None) -> str | None:
        if str(path).startswith(("http://", "https://")):
            uploaded = unquote(str(path).partition("/gradio_api/file=")[2])  # the form that agents' tools send
            if not uploaded:  # Gradio would load the file at this address into memory at any size
                raise refusal("Photos are not fetched from the web. " + HOW_TO_SEND)
            return uploaded  # `path_of` refuses other files
        return await type(component).async_move_resource_to_block_cache(component, path)

    def path_of(payload: SentPhoto | None) -> str | None:
        if payload is None or not (payload.path or payload.url):
            return None
        path = payload.path
        if path is None:
            path = _save_data_url(payload.url, component.GRADIO_CACHE)
            component.temp_files.add(path)  # Gradio removes these files when they are old
        if not Path(path).resolve().is_relative_to(Path(component.GRADIO_CACHE).resolve()):  # not an uploaded file
            raise refusal(HOW_TO_SEND)
        if Path(path).is_file() and Path(path).stat().st_size > MAX_FILE_BYTES:
            raise refusal(TOO_LARGE)
        return path

    component.data_model = SentPhoto
    component.async_move_resource_to_block_cache = keep
    component.preprocess = path_of


def _save_data_url(url: str, folder: str) -> str:
    """Write the bytes of a data URL to a file in a folder, and return its path."""
    if not url.startswith("data:") or ";base64," not in url[:200]:
        raise refusal(HOW_TO_SEND)
    if len(url) > MAX_FILE_BYTES * 4 / 3 + 200:
        raise refusal(TOO_LARGE)
    try:
        return save_base64_to_cache(url, cache_dir=folder)
    except ValueError as error:  # not base64
        raise refusal(HOW_TO_SEND) from error
