"""The Segment tab: the photo painted by class, a legend that isolates classes, maps of every class, downloads."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from ldvc.web import html, texts
from ldvc.web.downloads import KINDS, Identity, Look, make_file
from ldvc.web.handlers import Handlers, weights_digest
from ldvc.web.session import Visit
from ldvc.web.tabs import Tab
from ldvc.web.views.inline import photo_uri
from ldvc.web.views.segmentation import VIEW_SIDE, class_maps, viewer_data

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parents[1]
# What is set in the viewer when an event is sent, as its second input. An event's own data would not do: one that waits for its
# turn (`trigger_mode="always_last"`) is sent with the data of the event before it, and only inputs are read anew.
SAID = """() => [null, document.querySelector("#overlay .ldvc-viewer").said()]"""
SAVE = """(file) => {
    const link = document.createElement("a");
    link.href = file.url;
    link.download = file.orig_name;
    link.click();
}"""


class SegmentTab(Tab):
    """See the module. What the visitor set (opacity, outlines, the class alone) is a `Look` in `visit.settings`."""

    key, title = "segment", "Segment"

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        super().__init__(handlers, visit)
        self.empty = gr.HTML(html.empty_result(), elem_id="empty")
        self.viewer = gr.HTML(
            html_template=(HERE / "viewer.html").read_text(encoding="utf-8"),
            js_on_load=(HERE / "viewer.js").read_text(encoding="utf-8"),
            apply_default_css=False,
            elem_id="overlay",
        )
        self.said = gr.JSON(visible=False, elem_id="overlay-said")  # see `SAID`; None = nothing is set there
        with gr.Column(visible=False, elem_classes="ldvc-downloads") as self.downloads:
            gr.HTML(html.caption(texts.DOWNLOADS_TITLE))
            with gr.Row(elem_classes="ldvc-buttons"):
                self.buttons = {
                    kind: gr.Button(label, size="sm", min_width=110, elem_id=f"download-{kind}")
                    for kind, label in texts.DOWNLOADS.items()
                }
            self.file = gr.DownloadButton(visible="hidden", elem_id="download-file")
            self.problem = gr.HTML(visible=False, elem_id="download-problem")
        with gr.Column(visible=False, elem_classes="ldvc-later") as self.maps_part:
            gr.HTML(html.section(texts.MAPS_TITLE, texts.MAPS_HELP))
            self.maps = gr.HTML(elem_id="class-maps")
            gr.HTML(html.scale_bar())
        self.outputs = [self.empty, self.viewer, self.downloads, self.maps_part, self.maps, self.problem]
        self.waiting = [self.empty, self.viewer]

    def update(self, visit: Visit) -> dict:
        """Viewer and maps."""
        if visit.empty:
            return {self.empty: gr.HTML(visible=True)}
        return {
            self.empty: gr.HTML(visible=False),
            self.viewer: self._painted(visit),
            self.downloads: gr.Column(visible=True),
            self.maps_part: gr.Column(visible=True),
            self.maps: class_maps(self._result(visit)),
            self.problem: gr.HTML(visible=False),
        }

    def repaint(self, visit: Visit) -> dict:
        """What a new threshold changes."""
        visit.drawn[self.key] = self.stamp(visit)
        return {self.viewer: self._painted(visit), self.problem: gr.HTML(visible=False)}

    def hear(self, visit: Visit, said: dict[str, Any] | None) -> None:
        """Take over what is set in the viewer, in place.

        Args:
            visit: the latest.
            said: opacity 0..1, outline, alone (a name or None), and background (threshold of "none of these" or None).
        """
        if visit.empty or said is None:
            return
        opacity = min(max(float(said["opacity"]), 0.0), 1.0)
        visit.settings[self.key] = Look(opacity, bool(said["outline"]), said["alone"])
        self.handlers.choose(said["alone"], visit)
        self.handlers.rethreshold(said["background"], visit)

    def stamp(self, visit: Visit) -> tuple:
        """The chosen class is shown without drawing anew."""
        return (visit.version,)

    def wire(self) -> None:
        """The viewer paints by itself; the server is told what it shows, and makes files."""
        options = {"js": SAID, "trigger_mode": "always_last", **self.quiet}
        self.viewer.look(self._look, [self.visit, self.said], None, queue=False, **options)
        self.viewer.threshold(self._move_threshold, [self.visit, self.said], self.outputs, **options)
        for kind, button in self.buttons.items():
            button.click(
                self._maker(kind),
                [self.visit, self.said],
                [self.file, self.problem],
                js=SAID,
                show_progress="minimal",
                show_progress_on=button,
                api_visibility="private",
            ).success(None, self.file, None, js=SAVE, api_visibility="private")

    def look_of(self, visit: Visit) -> Look:
        """How the visitor likes the overlay."""
        return visit.settings.get(self.key) or Look()

    def _result(self, visit: Visit) -> Any:
        return self.handlers.results(visit, "ldvc")[0]

    def _painted(self, visit: Visit) -> dict[str, Any]:
        result, look = self._result(visit), self.look_of(visit)
        kept = visit.kept.get("segment.photo")
        if kept is None:
            kept = visit.kept["segment.photo"] = photo_uri(result.picture, long_side=VIEW_SIDE, quality=88)
        own = self.handlers.models(visit).main.calibration.threshold
        return viewer_data(result, photo=kept, own_threshold=own, opacity=look.opacity, outline=look.outline)

    def _look(self, visit: Visit, said: dict[str, Any]) -> None:
        self.hear(visit.latest, said)

    def _move_threshold(self, visit: Visit, said: dict[str, Any]) -> Any:
        visit = visit.latest
        if visit.empty:
            return {self.problem: gr.HTML(html.problem(texts.FORGOTTEN), visible=True)}
        self.hear(visit, said)
        if visit.drawn.get(self.key) == self.stamp(visit):
            return gr.skip()
        return self.unless_overtaken(visit, self.repaint)

    def _maker(self, kind: str) -> Any:
        def make(visit: Visit, said: dict[str, Any] | None) -> list[Any]:
            visit = visit.latest  # an answer that is being drawn has the threshold that was set meanwhile
            if visit.empty:
                return [gr.skip(), gr.HTML(html.problem(texts.FORGOTTEN), visible=True)]
            try:
                self.hear(visit, said)  # a file holds what is on the screen, even if the event that said so is under way
                return [self.write(kind, visit), gr.HTML(visible=False)]
            except Exception:
                log.exception("a download failed")
                return [gr.skip(), gr.HTML(html.problem(texts.UNEXPECTED), visible=True)]

        return make

    def write(self, kind: str, visit: Visit, look: Look | None = None) -> str:
        """Path of a new file of a kind in `KINDS`, in a folder of its own where Gradio keeps what it serves for a while."""
        assert kind in KINDS, kind
        result, look = self._result(visit), look or self.look_of(visit)
        if look.alone not in result.names:
            look = replace(look, alone=None)
        digest = self.handlers.compute(visit, weights_digest, result.decoder)
        identity = Identity(self.handlers.models(visit).name, digest)
        name, content = make_file(kind, result, look=look, identity=identity, photo=visit.photo_name)
        folder = Path(self.file.GRADIO_CACHE) / secrets.token_hex(16)
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        return str(folder / name)
