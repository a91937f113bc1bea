"""The Compare tab (the paper's Figure 4): the same photo segmented in four ways."""

from __future__ import annotations

import gradio as gr

from ldvc.visualize import colours_for
from ldvc.web import html
from ldvc.web.handlers import Handlers
from ldvc.web.inputs import BACKGROUND_INPUTS
from ldvc.web.session import OWN_THRESHOLD, Visit
from ldvc.web.tabs import Tab, program, texts
from ldvc.web.views.compare import Painted, compare_view

DECODERS = ("clip", "zegclip", "ldvc_without_lcsa", "ldvc")


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
        self.waiting = [self.empty, self.view]

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
            self.view: compare_view(
                pictures,
                visit.names,
                seen,
                colours_for(visit.names),
                own_thresholds=visit.threshold == OWN_THRESHOLD,
            ),
        }

    def pictures(self, visit: Visit) -> tuple[list[Painted | str], list[bool]]:
        """Each decoder's answer, or its key where the checkpoint has no such decoder; and which names are seen."""
        results = self.handlers.results(visit, *DECODERS)
        colours = colours_for(visit.names)
        painted = [
            decoder if result is None else Painted.of(decoder, result, colours)
            for decoder, result in zip(DECODERS, results, strict=True)
        ]
        return painted, results[-1].seen

    def endpoints(self) -> None:
        """/compare."""

        def compare(
            photo: str | None,
            names: str,
            use_background: bool = True,
            threshold: float | None = None,
            visit: Visit | None = None,
        ) -> tuple:
            """One photo by plain CLIP similarity, ZegCLIP's decoder, and LDVC without and with LCSA, in the same colours.

            With use_background, pixels where no name's score reaches the threshold (without one, each decoder's own) are
            none of these. Returns the painted photos, captioned, and the data: for each of the four the area share of every
            name and the share of the photo on which it differs from LDVC with LCSA; and which names are seen. What the
            checkpoint does not have is left out.
            """
            visit = program.ask(self, photo, names, visit, use_background=use_background, threshold=threshold)
            pictures, seen = self.pictures(visit)
            painted = [each for each in pictures if isinstance(each, Painted)]
            data = {
                "seen": dict(zip(visit.names, seen, strict=True)),
                "decoders": {
                    each.decoder: {
                        "area": {name: round(share, 4) for name, share in zip(visit.names, each.shares, strict=True)},
                        "differs_from_ldvc": round(float((each.labels != painted[-1].labels).mean()), 4),
                    }
                    for each in painted
                },
            }
            return [(each.overlay, texts.DECODER_TITLES[each.decoder]) for each in painted], data, visit

        program.declare(
            self,
            compare,
            BACKGROUND_INPUTS,
            [lambda: gr.Gallery(label="Painted photos", format="jpeg"), lambda: gr.JSON(label="Data")],
            "compare",
        )
