"""What programs can ask about a segmentation: named endpoints (see "Use via API" on the page); the tabs declare their own.

A client that asks again about the same photo does not wait for it to be encoded again: each has a session of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gradio as gr
import numpy as np

from ldvc.class_names import class_lists
from ldvc.result import Segmentation
from ldvc.visualize import colours_for, fit_size, overlay, resize_picture
from ldvc.web import texts
from ldvc.web.downloads import KINDS, Look
from ldvc.web.handlers import Handlers, checked_background
from ldvc.web.inputs import BACKGROUND_INPUTS, Question
from ldvc.web.session import Problem, Visit
from ldvc.web.tabs.segment import SegmentTab

OVERLAY_SIDE = 1280


def declare(handlers: Handlers, question: Question, visit: gr.State, segment_tab: SegmentTab) -> None:
    """Declare the endpoints; called inside the page's context."""

    def ask(photo: str | None, names: Any, use_background: Any, threshold: Any, visit: Visit | None) -> Visit:
        """Segment for a program: a problem becomes an error with the same sentence."""
        try:
            background = checked_background(use_background, threshold)
            return handlers.segment(photo, names, background, replace(visit or Visit(), company=True))
        except Problem as problem:
            raise gr.Error(str(problem), print_exception=False) from problem

    def api_segment(
        photo: str | None,
        names: str,
        use_background: bool = True,
        threshold: float | None = None,
        visit: Visit | None = None,
    ) -> tuple[np.ndarray, np.ndarray, dict, Visit]:
        """Segment a photo by class names.

        Names are separated by commas, or a list; "sofa | couch" are two words for one class; "background", "other" and the
        like are no classes and allow none of these. With use_background, pixels whose best name has a score below the
        threshold (0 to 1; without one, the checkpoint's own) are none of these. Returns the photo painted by class, a label
        map (grey value 0 is none of these, i is class i of the data), and the data: names, seen or unseen in training, area
        shares, colours, and groups of words that the model cannot tell apart ("alike").
        """
        visit = ask(photo, names, use_background, threshold, visit)
        (result,) = handlers.results(visit, "ldvc")
        size = fit_size(*result.size, long_side=OVERLAY_SIDE)
        labels, colours = result.labels_at(size), colours_for(result.names)
        picture = resize_picture(result.picture, size)
        painted = overlay(picture, labels, colours, striped=[not seen for seen in result.seen])
        summary = summarise(result, labels, colours, model=handlers.models(visit).name)
        return painted, (labels + 1).astype(np.uint8), summary, visit

    def api_vocabulary(vocabulary: str) -> dict:
        """A ready list of class names, and whether the model saw masks of each in training.

        Give the key of a list (household, voc20, coco80, context59, coco_stuff171), or nothing to be told the lists.
        Returns {"title", "source", "classes": [{"name", "seen"}]}, or {"vocabularies": {key: title}}.
        """
        lists, key = class_lists(), (vocabulary or "").strip()
        if not key:
            return {"vocabularies": {each.key: each.title for each in lists.values()}}
        if key not in lists:
            raise gr.Error(texts.NO_SUCH_VOCABULARY.format(name=key, names=", ".join(lists)), print_exception=False)
        seen = handlers.catalogue.get(None).main.seen_names
        classes = [{"name": name, "seen": name in seen} for name in lists[key].classes]
        return {"title": lists[key].title, "source": lists[key].source, "classes": classes}

    def api_download(
        photo: str | None,
        names: str,
        use_background: bool = True,
        threshold: float | None = None,
        kind: str = "overlay",
        visit: Visit | None = None,
    ) -> tuple[str, Visit]:
        """A file of the segmentation; question as of /segment.

        kind is "overlay" (PNG of the painted photo), "mask" (palette PNG: 0 is none of these, i is class i), "masks" (ZIP
        with a black-and-white PNG for each class and classes.json) or "data" (JSON: names, seen or unseen, scores, areas,
        threshold, and which model answered, with the SHA-256 of its weights).
        """
        if kind not in KINDS:
            raise gr.Error(texts.NO_SUCH_FILE.format(name=kind, names=", ".join(KINDS)), print_exception=False)
        visit = ask(photo, names, use_background, threshold, visit)
        return segment_tab.write(kind, visit, Look()), visit

    with gr.Column(visible=False):  # what programs give and get
        use_background, threshold = (make() for make in BACKGROUND_INPUTS)
        key = gr.Textbox(label="Vocabulary")
        kind = gr.Textbox("overlay", label="Kind of file")
        painted, labels = gr.Image(label="Overlay", format="png"), gr.Image(label="Label map", format="png")
        data = gr.JSON(label="Data")
        listed = gr.JSON(label="Vocabulary")
        file = gr.File(label="File")
        call = gr.Button()

    asked = [question.photo, question.names, use_background, threshold]

    def endpoint(function: Callable, inputs: list[Any], outputs: list[Any]) -> None:
        call.click(function, inputs, outputs, api_name=function.__name__.removeprefix("api_"))

    endpoint(api_segment, [*asked, visit], [painted, labels, data, visit])
    endpoint(api_vocabulary, [key], [listed])
    endpoint(api_download, [*asked, kind, visit], [file, visit])


def summarise(result: Segmentation, labels: np.ndarray, colours: list[str], *, model: str) -> dict[str, Any]:
    """The data of /segment: what each class is and how much of the photo it covers."""
    shares = result.area_shares(labels)
    rows = zip(result.names, result.seen, shares, colours, strict=True)
    none = None if result.background is None else round(max(0.0, 1 - sum(shares)), 4)
    return {
        "model": model,
        "decoder": result.decoder,
        "size": {"width": result.size[1], "height": result.size[0]},
        "classes": [
            {"name": name, "seen": seen, "area": round(share, 4), "colour": colour} for name, seen, share, colour in rows
        ],
        "alike": result.indistinguishable_words,
        "threshold": result.background,
        "none_of_these": none,
    }
