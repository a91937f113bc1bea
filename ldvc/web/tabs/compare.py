"""The Compare tab (the paper's Figure 4): the same photo segmented in four ways."""

from __future__ import annotations

import gradio as gr

from ldvc.visualize import colours_for
from ldvc.web import html
from ldvc.web.handlers import Handlers
from ldvc.web.tabs import Tab, texts
from ldvc.web.views.compare import Painted, compare_view
from ldvc.web.visit import Visit

ARMS = ("clip", "zegclip", "ldvc_without_lcsa", "ldvc")


class CompareTab(Tab):
    """See the module."""

    key, title = "compare", "Compare"

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        super().__init__(handlers, visit)
        self.empty = gr.HTML(html.empty(texts.COMPARE_EMPTY))
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section(texts.COMPARE_TITLE, texts.COMPARE_HELP))
            self.view = gr.HTML(elem_id="compare-view", apply_default_css=False)
        self.outputs = [self.empty, self.body, self.view]

    def stamp(self, visit: Visit) -> tuple:
        """The class that other tabs show plays no part here."""
        return (visit.version,)

    def update(self, visit: Visit) -> dict:
        """Draw for the visit."""
        if visit.empty:
            return {self.empty: gr.HTML(visible=True), self.body: gr.Column(visible=False)}
        pictures, seen = self.pictures(visit)
        return {
            self.empty: gr.HTML(visible=False),
            self.body: gr.Column(visible=True),
            self.view: compare_view(pictures, visit.names, seen, colours_for(visit.names)),
        }

    def pictures(self, visit: Visit) -> tuple[list[Painted | str], list[bool]]:
        """Each arm's answer, or its key where the checkpoint has no such arm; and which names are seen."""
        results = self.handlers.results(visit, *ARMS)
        colours = colours_for(visit.names)
        painted = [
            arm if result is None else Painted.of(arm, result, colours)
            for arm, result in zip(ARMS, results, strict=True)
        ]
        return painted, results[-1].seen
