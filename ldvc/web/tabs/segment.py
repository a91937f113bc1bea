"""The Segment tab: the photo painted by class, legend, maps of every class, downloads."""

from __future__ import annotations

import gradio as gr

from ldvc.visualize import colours_for, fit_size, overlay, resize_picture
from ldvc.web import html, texts
from ldvc.web.handlers import Handlers
from ldvc.web.tabs import Tab
from ldvc.web.visit import Visit

OVERLAY_SIDE = 1280


class SegmentTab(Tab):
    """See the module."""

    key, title = "segment", "Segment"

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        super().__init__(handlers, visit)
        self.empty = gr.HTML(html.empty_result(), elem_id="empty")
        self.overlay = gr.Image(
            show_label=False,
            container=False,
            interactive=False,
            visible=False,
            alt_text=texts.OVERLAY_ALT,
            elem_id="overlay",
        )
        self.legend = gr.HTML(visible=False, elem_id="legend")
        self.outputs = [self.empty, self.overlay, self.legend]

    def update(self, visit: Visit) -> dict:
        """Overlay and legend."""
        if visit.empty:
            return {self.empty: gr.HTML(visible=True)}
        (result,) = self.handlers.results(visit, "ldvc")
        size = fit_size(*result.size, long_side=OVERLAY_SIDE)
        labels = result.labels_at(size)
        shares = result.area_shares(labels)
        colours = colours_for(result.names)
        painted = overlay(resize_picture(result.picture, size), labels, colours, striped=[not s for s in result.seen])
        rows = zip(result.names, result.seen, colours, shares, strict=True)
        entries = [html.LegendEntry(name, seen, colour, share) for name, seen, colour, share in rows]
        none_share = None if result.background is None else max(0.0, 1 - sum(shares))
        return {
            self.empty: gr.HTML(visible=False),
            self.overlay: gr.Image(painted, visible=True),
            self.legend: gr.HTML(html.legend(entries, none_share), visible=True),
        }
