"""The endpoints for programs: one function for each of them (see "Use via API" on the page).

Gradio documents an endpoint by its docstring, its parameter names, and one widget for each parameter. The widgets are hidden.
`ldvc.web.mcp` offers the same functions to agents. A client has a session, so a photo is encoded once for several questions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr
import numpy as np

from ldvc.class_names import class_lists
from ldvc.export import KINDS, OverlayStyle
from ldvc.predictor import PLAIN_CLIP
from ldvc.visualize import colours_for, fit_size, heat_map, resize_picture
from ldvc.web import texts
from ldvc.web.api_data import layer_and_head, names_of, patch_data, place, refusal, rounded, space_data
from ldvc.web.inputs import InputPanel, unchecked
from ldvc.web.segmenter import LCSA_OFF, MAIN_DECODER, Segmenter, checked_background
from ldvc.web.session import Answer, Problem, Session
from ldvc.web.tabs import attention as attention_tab
from ldvc.web.tabs import compare as compare_tab
from ldvc.web.tabs import routing as routing_tab
from ldvc.web.tabs import space as space_tab
from ldvc.web.tabs.segment import SegmentTab

Number = float | None
PICTURE_SIDE = 1280
HEAT_SIDE = 896
ARGUMENTS = {  # descriptions of the endpoints' arguments
    "photo": "an uploaded file, or a data URL.",
    "names": 'class names, separated by commas; "sofa | couch" are two words for one class.',
    "name": "one of the names.",
    "use_background": "whether a pixel is none of these if the score of its best name is low.",
    "threshold": "score from 0 to 1 below which a pixel is none of these; default: the threshold of the decoder.",
    "layer": "decoder layer, counted from 1; 0 is the last.",
    "head": "attention head, counted from 1; 0 is the mean of all heads.",
    "use_company": "whether a single name shares the attention with a few words for stuff.",
    "row": "row of the patch, counted from 1; 0 is the middle.",
    "column": "column of the patch, counted from 1; 0 is the middle.",
    "kind": '"overlay", "mask", "masks", "cutouts", "data", "coco" or "yolo".',
    "vocabulary": 'household, voc20, coco80, context59 or coco_stuff171; "" for the keys and titles of all lists.',
    "model": '"lite" or "full"; default: the model that the page opens with.',
}


def documented(endpoint: Callable) -> Callable:
    """Add the section "Args", which Gradio reads, to the docstring of an endpoint."""
    lines = (f"    {name}: {ARGUMENTS[name]}" for name in inspect.signature(endpoint).parameters if name in ARGUMENTS)
    endpoint.__doc__ = "\n".join([inspect.cleandoc(endpoint.__doc__), "", "Args:", *lines])
    return endpoint


class Api:
    """The endpoints as functions without widgets. The session is their last output; `write` is `SegmentTab.write`."""

    def __init__(self, segmenter: Segmenter, write: Callable[..., str]) -> None:
        self.segmenter, self.write = segmenter, write

    def ask(
        self, session: Session | None, photo: str | None, names: Any, use_background: Any = True,
        threshold: Any = None, company: Any = True, model: Any = None,
    ) -> tuple[Session, Answer, float | str | None]:  # fmt: skip
        """Return the session, its answer and the threshold. A `Problem` is raised again as a `gr.Error` with its sentence."""
        session = session or Session()
        try:
            background = checked_background(use_background, threshold)
            model = str(model).strip() if model else None
            answer = self.segmenter.segment(photo, names, model=model, company=bool(company), previous=session.answer)
        except Problem as problem:
            raise refusal(str(problem)) from problem
        if answer.notice:
            gr.Warning(answer.notice)
        session.answer = answer
        return session, answer, answer.background(background)

    @documented
    def segment(
        self, photo: str | None, names: str, use_background: bool = True, threshold: Number = None,
        model: str | None = None, session: Session | None = None,
    ) -> tuple:  # fmt: skip
        """Segment a photo by class names.

        The names may also be a list. "background", "other" and similar words are not classes: they allow none of these.
        Returns the photo painted by class, a label map (grey value 0 is none of these, i is class i of the data), and
        data: names, seen or unseen in training, area shares, colours, and groups of words that the model cannot tell apart
        ("alike").
        """
        session, answer, background = self.ask(session, photo, names, use_background, threshold, model=model)
        (result,) = self.segmenter.results(answer, answer.decoder, background=background)
        painted = compare_tab.Painted(result, long_side=PICTURE_SIDE)
        areas = [round(share, 4) for share in painted.shares]
        rows = zip(result.names, result.seen, areas, colours_for(result.names), strict=True)
        data = {
            "model": self.segmenter.model(answer).name,
            "decoder": result.decoder,
            "size": {"width": result.size[1], "height": result.size[0]},
            "classes": [dict(zip(("name", "seen", "area", "colour"), row, strict=True)) for row in rows],
            "alike": result.indistinguishable_words,
            "threshold": result.background,
            "none_of_these": None if result.background is None else round(max(0.0, 1 - sum(painted.shares)), 4),
        }
        return painted.overlay, (painted.labels + 1).astype(np.uint8), data, session

    @documented
    def attention(
        self, photo: str | None, names: str, name: str, layer: Number = 0, head: Number = 0, use_company: bool = True,
        row: Number = 0, column: Number = 0, model: str | None = None, session: Session | None = None,
    ) -> tuple:  # fmt: skip
        """Cross-attention of a decoder layer to one of the names, on one fixed scale from 0 to 1.

        Returns three heat maps over the photo (LDVC with LCSA, LDVC trained without LCSA, ZegCLIP's decoder; null for a decoder
        that the checkpoint does not have) and data. The data cover these decoders and LDVC with LCSA switched off in the same
        weights (an intervention). "attention": the share of each patch's attention that goes to the name, row by row. "inside"
        and "outside": the mean of these shares inside and outside the decoder's mask of the name (null: no such pixel).
        "company": the words, and the attention to all of them together. "none_of_these": the attention to none of these in
        the last layer. "missing": how to get each missing decoder. "patch": the attention of one patch to all patches in the
        last block of CLIP, row by row; only for models with dense plain CLIP, such as "full".
        """
        session, answer, background = self.ask(session, photo, names, company=use_company, model=model)
        wanted = (name or "").strip().casefold()
        title = next((title for title in answer.names if title.casefold() == wanted), None)
        if title is None:
            raise refusal(f"“{name}” is not among the names; ask about one of them.")
        decoders = (*attention_tab.DECODERS, LCSA_OFF)
        results = self.segmenter.results(answer, *decoders, background=background)
        (main,), index = self.segmenter.results(answer, answer.decoder), answer.names.index(title)
        indices = layer_and_head(main, layer, head) if any(results) else (-1, None)
        columns = [attention_tab.Column(*pair, *indices) for pair in zip(decoders, results, strict=True)]
        picture = resize_picture(main.picture, fit_size(*main.size, long_side=HEAT_SIDE))
        maps = [
            None if column.maps is None else heat_map(column.enlarged(column.maps[index], HEAT_SIDE), picture)
            for column in columns[: len(attention_tab.DECODERS)]
        ]
        available = {column.decoder: column for column in columns if column.maps is not None}
        shares = {decoder: column.inside_outside(index) for decoder, column in available.items()}
        none = {decoder: rounded(column.none) for decoder, column in available.items() if column.none is not None}
        company = {decoder: rounded(column.company) for decoder, column in available.items() if column.company is not None}
        data = {
            "name": title,
            **(names_of(*indices) if any(results) else {}),
            "grid": {"rows": main.grid[0], "columns": main.grid[1]},
            "attention": {decoder: rounded(column.maps[index]) for decoder, column in available.items()},
            "inside": {decoder: inside for decoder, (inside, _) in shares.items()},
            "outside": {decoder: outside for decoder, (_, outside) in shares.items()},
            "missing": self.segmenter.missing(answer, *decoders),
            "none_of_these": none,
            "company": {"words": main.company, "attention": company},
        }
        if self.segmenter.model(answer).has_dense_clip:
            (result,) = self.segmenter.results(answer, PLAIN_CLIP)
            row, column = place(result, row, column)
            data["patch"] = {"row": row + 1, "column": column + 1, "attention": rounded(result.patch_attention(row, column), 5)}
        return *maps, data, session

    @documented
    def routing(
        self, photo: str | None, names: str, row: Number = 0, column: Number = 0, layer: Number = 0, head: Number = 0,
        model: str | None = None, session: Session | None = None,
    ) -> tuple:  # fmt: skip
        """The regions to which local-consensus self-attention (LCSA) routed one patch, and the attention of the patch in them.

        Returns data: the patch and the grid, the class of the patch and its score, the regions to which the patch's own region
        was routed (best first; box as left, top, width, height in patches of the photo; affinity; share of the token
        attention inside the region), the affinity of all regions row by row, the token attention of all patches row by row
        (0 outside the chosen regions), and the patch's attention to the names. A single name shares this attention with the
        words of "company". In the last layer "none_of_these" has a share, too.
        """
        session, answer, background = self.ask(session, photo, names, model=model)
        (result,) = self.segmenter.results(answer, MAIN_DECODER, background=background)
        if result is None or not result.has_routing:
            raise refusal(self.segmenter.missing(answer, MAIN_DECODER).get(MAIN_DECODER, routing_tab.MISSING))
        indices = layer_and_head(result, layer, head)
        patch = routing_tab.RoutedPatch(result, *place(result, row, column), *indices)
        return {**patch_data(patch), **names_of(*indices)}, session

    @documented
    def space(self, photo: str | None, names: str, model: str | None = None, session: Session | None = None) -> tuple:
        """How far LDVC and ZegCLIP's decoder moved the patches and the class names.

        Returns data. The plane is one principal component analysis of the points of both decoders, before and after; the data
        have the share of variance of its two axes. Each decoder has its drift (mean 1 - cosine between before and after, for
        classes and for patches), its similarity (mean cosine of a patch and its class, before and after), and points in the
        plane: those of the class names (with the drift of each name) and those of the patches (with the class of each patch).
        """
        session, answer, _ = self.ask(session, photo, names, model=model)
        results = self.segmenter.results(answer, *space_tab.DECODERS)
        if not any(results):
            raise refusal(self.segmenter.missing(answer, MAIN_DECODER)[MAIN_DECODER])
        return space_data(*space_tab.space_of(results), answer.names), session

    @documented
    def compare(
        self, photo: str | None, names: str, use_background: bool = True, threshold: Number = None,
        model: str | None = None, session: Session | None = None,
    ) -> tuple:  # fmt: skip
        """Segment a photo by plain CLIP similarity, ZegCLIP's decoder, and LDVC without and with LCSA, in the same colours.

        Returns the painted photos with captions, and data: which names are seen, and for each of the four the area share of
        every name and the share of the photo that differs from LDVC with LCSA. "missing" says how to get each missing decoder.
        """
        session, answer, background = self.ask(session, photo, names, use_background, threshold, model=model)
        results = self.segmenter.results(answer, *compare_tab.DECODERS, background=background)
        painted = {decoder: each for decoder, each in compare_tab.paint_all(results).items() if each is not None}
        main = painted.get(MAIN_DECODER)
        data = {
            "seen": dict(zip(answer.names, painted[answer.decoder].result.seen, strict=True)),
            "decoders": {
                decoder: {
                    "area": {name: round(share, 4) for name, share in zip(answer.names, each.shares, strict=True)},
                    "differs_from_ldvc": main and round(each.differing_share(main), 4),
                }
                for decoder, each in painted.items()
            },
            "missing": self.segmenter.missing(answer, *compare_tab.DECODERS),
        }
        return [(each.overlay, texts.DECODER_TITLES[decoder]) for decoder, each in painted.items()], data, session

    @documented
    def vocabulary(self, vocabulary: str) -> dict:
        """A ready list of class names, and whether the model saw masks of each in training.

        Returns {"title", "source", "classes": [{"name", "seen"}]}, or {"vocabularies": {key: title}}.
        """
        lists, key = class_lists(), (vocabulary or "").strip()
        if not key:
            return {"vocabularies": {each.key: each.title for each in lists.values()}}
        if key not in lists:
            raise refusal(f"There is no vocabulary “{key}”; choose one of {', '.join(lists)}.")
        seen = self.segmenter.registry.get(None).main.seen_names
        classes = [{"name": name, "seen": name in seen} for name in lists[key].classes]
        return {"title": lists[key].title, "source": lists[key].source, "classes": classes}

    @documented
    def download(
        self, photo: str | None, names: str, use_background: bool = True, threshold: Number = None,
        kind: str = "overlay", model: str | None = None, session: Session | None = None,
    ) -> tuple[str, Session]:  # fmt: skip
        """A file of the segmentation.

        The kind is "overlay" (PNG of the painted photo), "mask" (palette PNG: 0 is none of these, i is class i), "masks" (ZIP
        with a black-and-white PNG for each class and classes.json), "cutouts" (ZIP with a PNG of the photo for each class,
        transparent outside the class), "data" (JSON: names, seen or unseen, scores, areas, thresholds, the model, and the
        SHA-256 of its weights), "coco" (COCO JSON, one RLE mask for each class) or "yolo" (ZIP: labels for YOLO
        segmentation, a polygon for each part of a class, and data.yaml).
        """
        if kind not in KINDS:
            raise refusal(f"There is no file of the kind “{kind}”; choose one of {', '.join(KINDS)}.")
        session, answer, background = self.ask(session, photo, names, use_background, threshold, model=model)
        return self.write(kind, answer, background, OverlayStyle()), session


def declare(segmenter: Segmenter, panel: InputPanel, session: gr.State, segment_tab: SegmentTab) -> None:
    """Declare the endpoints. Call it inside the context of the page."""
    api = Api(segmenter, segment_tab.write)
    with gr.Column(visible=False):
        widgets = {  # by the name of the argument
            "photo": panel.photo,
            "names": panel.names,
            "use_background": unchecked(gr.Checkbox(True, label="Allow none of these")),
            "threshold": unchecked(gr.Number(label="Threshold from 0 to 1; without one, the checkpoint's own")),
            "name": gr.Textbox(label="One of the class names"),
            "layer": unchecked(gr.Number(0, precision=0, label="Layer from 1; 0 = last")),
            "head": unchecked(gr.Number(0, precision=0, label="Head from 1; 0 = mean")),
            "row": unchecked(gr.Number(0, precision=0, label="Row of the patch from 1; 0 = middle")),
            "column": unchecked(gr.Number(0, precision=0, label="Column of the patch from 1; 0 = middle")),
            "use_company": gr.Checkbox(True, label="Company for a single name"),
            "model": unchecked(gr.Textbox(label="Model")),
            "kind": gr.Textbox("overlay", label="Kind of file"),
            "vocabulary": gr.Textbox(label="Vocabulary"),
            "session": session,
        }
        painted, labels = gr.Image(label="Overlay", format="png"), gr.Image(label="Label map", format="png")
        maps = [gr.Image(label=each, format="jpeg") for each in ("LDVC with LCSA", "LDVC without LCSA", "ZegCLIP's decoder")]
        gallery = gr.Gallery(label="Painted photos", format="jpeg")
        data, file, call = gr.JSON(label="Data"), gr.File(label="File"), gr.Button()
    for function, outputs in (
        (api.segment, [painted, labels, data, session]),
        (api.attention, [*maps, data, session]),
        (api.routing, [data, session]),
        (api.space, [data, session]),
        (api.compare, [gallery, data, session]),
        (api.vocabulary, [data]),
        (api.download, [file, session]),
    ):
        inputs = [widgets[name] for name in inspect.signature(function).parameters]
        call.click(function, inputs, outputs, api_name=function.__name__, show_progress="hidden")
