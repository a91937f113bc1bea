"""The Space tab."""

from __future__ import annotations

import gradio as gr

from ldvc.web import html
from ldvc.web.handlers import Handlers
from ldvc.web.tabs import Tab
from ldvc.web.visit import Visit


class SpaceTab(Tab):
    """See the module."""

    key, title = "space", "Space"

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        super().__init__(handlers, visit)
        self.place = gr.HTML(html.empty("Segment a photo first."))
        self.outputs = [self.place]

    def update(self, visit: Visit) -> dict:
        """Draw for the visit."""
        return {}
