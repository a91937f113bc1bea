"""Buttons that make a file of the answer for the browser to save, and the lock of the page while a file is made."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

from ldvc.web import html, texts
from ldvc.web.session import Answer

log = logging.getLogger(__name__)

SAVE = """(file) => {
  const link = document.createElement("a");
  link.href = file.url;
  link.download = file.orig_name;
  link.click();
}"""
PRIVATE = {"api_visibility": "private"}  # option of events that are not endpoints
# While a question is answered or a file is made, the page takes no input, so that the result fits the screen.
LOCK = """(...values) => {
  const page = document.querySelector(".ldvc-columns");
  page.focused = document.activeElement;
  page.inert = true;
  return values;
}"""
UNLOCK = """() => {
  const page = document.querySelector(".ldvc-columns");
  page.inert = false;
  page.focused?.focus({ preventScroll: true });
}"""


def unlock_after(event: Any) -> None:
    """Declare that the page takes input again after an event that locked it."""
    event.success(None, js=UNLOCK, **PRIVATE)
    event.failure(None, js=UNLOCK, **PRIVATE)


class Downloads:
    """A row of buttons with the elem_ids "PREFIX-KIND", and a place for an error message.

    `make` returns the name and the content of a file, from its kind, the answer and the values of the tab's widgets.
    """

    def __init__(
        self, prefix: str, labels: Mapping[str, str], make: Callable[[str, Answer, dict[Any, Any]], tuple[str, bytes]]
    ) -> None:
        self.make = make
        with gr.Row(equal_height=True, elem_classes="ldvc-buttons"):
            self.buttons = {
                kind: gr.Button(label, size="sm", min_width=110, elem_id=f"{prefix}-{kind}") for kind, label in labels.items()
            }
        self.file = gr.DownloadButton(visible="hidden", elem_id=f"{prefix}-file")
        self.problem = gr.HTML(elem_classes="ldvc-message", elem_id=f"{prefix}-problem")

    def wire(self, session: gr.State, inputs: set[Any]) -> None:
        """Declare the events; `session` is one of the `inputs`."""
        for kind, button in self.buttons.items():
            options = {"show_progress": "minimal", "show_progress_on": button, "js": LOCK, **PRIVATE}
            click = button.click(self._maker(kind, session), inputs, [self.file, self.problem], **options)
            click.success(None, self.file, None, js=SAVE, **PRIVATE)
            unlock_after(click)

    def _maker(self, kind: str, session: gr.State) -> Callable[[dict[Any, Any]], list[Any]]:
        def make(values: dict[Any, Any]) -> list[Any]:
            answer, sentence = values[session].answer, texts.EXPIRED
            try:
                if answer is not None:
                    return [self.write(*self.make(kind, answer, values)), ""]
            except OSError as error:  # the disk is full
                log.error("a download could not be written: %s", error.strerror)
                sentence = texts.NO_SPACE
            except Exception:
                log.exception("a download failed")
                sentence = texts.UNEXPECTED
            return [gr.skip(), html.problem(sentence)]

        return make

    def write(self, name: str, content: bytes) -> str:
        """Write a file to a new folder inside Gradio's cache, which Gradio cleans, and return its path."""
        folder = Path(self.file.GRADIO_CACHE) / secrets.token_hex(16)
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        return str(folder / name)
