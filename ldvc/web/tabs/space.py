"""The Space tab (the paper's Figure 2): which of the two moved, the patches or the names."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ldvc.embedding_space import Space, movement_of, shared_space
from ldvc.visualize import colours_for
from ldvc.web import html
from ldvc.web.handlers import Handlers
from ldvc.web.session import Visit
from ldvc.web.tabs import Tab, program, texts
from ldvc.web.views.space import space_view

DECODERS = ("ldvc", "zegclip")

# The slider moves all points at once by one variable on the element, which stays when its content is drawn anew.
SLIDER_SCRIPT = """
const show = (t) => element.style.setProperty('--t', t);
element.addEventListener('input', (event) => { if (event.target.type === 'range') show(event.target.value / 100); });
element.addEventListener('click', (event) => {
    if (!event.target.classList.contains('ldvc-play')) return;
    const slider = element.querySelector('input[type=range]');
    const set = (t) => { show(t); slider.value = Math.round(100 * t); };
    if (matchMedia('(prefers-reduced-motion: reduce)').matches) { set(slider.value > 50 ? 0 : 1); return; }
    let start = null;
    const frame = (now) => {
        start = start ?? now;
        const t = Math.min((now - start - 300) / 1500, 1);
        set(t < 0 ? 0 : t * t * (3 - 2 * t));
        if (t < 1) requestAnimationFrame(frame);
    };
    requestAnimationFrame(frame);
});
"""


class SpaceTab(Tab):
    """See the module."""

    key, title = "space", "Space"

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        super().__init__(handlers, visit)
        self.empty = gr.HTML(html.empty(texts.SPACE_EMPTY))
        with gr.Column(visible=False, elem_classes="ldvc-tab") as self.body:
            gr.HTML(html.section(texts.SPACE_TITLE, texts.SPACE_HELP))
            self.note = gr.HTML(visible=False, elem_id="space-note")
            self.view = gr.HTML(elem_id="space-view", apply_default_css=False, js_on_load=SLIDER_SCRIPT)
            gr.HTML(
                f'<details class="ldvc-exactly"><summary>{texts.SPACE_EXACTLY}</summary>{texts.SPACE_EXACTLY_TEXT}</details>',
                apply_default_css=False,
            )
        self.outputs = [self.empty, self.body, self.note, self.view]
        self.waiting = [self.empty, self.view]

    def stamp(self, visit: Visit) -> tuple:
        """The class that other tabs show plays no part here."""
        return (visit.version,)

    def update(self, visit: Visit) -> dict:
        """Draw for the visit."""
        if visit.empty:
            return {self.empty: gr.HTML(visible=True), self.body: gr.Column(visible=False)}
        space, words, missing = self.space(visit)
        note = " ".join(f"{texts.DECODER_TITLES[decoder]}: {texts.DECODER_MISSING}" for decoder in missing)
        return {
            self.empty: gr.HTML(visible=False),
            self.body: gr.Column(visible=True),
            self.note: gr.HTML(html.notice(note) if note else "", visible=bool(note)),
            self.view: space_view(space, words, visit.names, colours_for(visit.names)),
        }

    def space(self, visit: Visit) -> tuple[Space, list[str], list[str]]:
        """The plane, the word of each class embedding, and the decoders that this checkpoint does not have."""
        results = dict(zip(DECODERS, self.handlers.results(visit, *DECODERS), strict=True))
        there = {decoder: result for decoder, result in results.items() if result is not None}
        words = [word for group in there["ldvc"].synonyms for word in group]
        space = shared_space({decoder: movement_of(result) for decoder, result in there.items()})
        return space, words, [decoder for decoder in DECODERS if decoder not in there]

    def endpoints(self) -> None:
        """/space."""

        def space(photo: str | None, names: str, visit: Visit | None) -> tuple:
            """Which of the two a decoder moved, patches or class names: for LDVC and for ZegCLIP's decoder.

            Returns data. Of the plane, one principal component analysis of all points of both decoders before and after:
            the share of variance of its two axes. Of each decoder: drift (mean 1 - cosine between before and after, of
            classes and of patches), similarity (mean cosine of a patch and its class, before and after), and in the plane
            the points of the class names (with the drift of each) and of the patches (with the class that each got).
            """
            visit = program.ask(self, photo, names, visit)
            found, words, _ = self.space(visit)
            return space_data(found, words, visit.names), visit

        program.declare(self, space, [], [lambda: gr.JSON(label="Data")], "space")


def space_data(space: Space, words: list[str], names: list[str]) -> dict[str, Any]:
    """The plane and the decoders as numbers; see the endpoint."""
    decoders = {}
    for decoder, part in space.decoders.items():
        moved = part.movement
        decoders[decoder] = {
            "drift": part.drift,
            "similarity": part.similarity,
            "names": [
                {
                    "name": word,
                    "class": names[moved.class_of_embedding[index]],
                    "before": program.rounded(part.embeddings_before[index]),
                    "after": program.rounded(part.embeddings_after[index]),
                    "drift": float(moved.embedding_drift[index]),
                }
                for index, word in enumerate(words)
            ],
            "patches": {
                "class": [names[label] for label in moved.class_of_patch],
                "before": program.rounded(part.patches_before),
                "after": program.rounded(part.patches_after),
            },
        }
    return {"explained_variance": list(space.plane.explained), "decoders": decoders}
