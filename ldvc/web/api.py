"""What programs can ask: one function for each named endpoint (see "Use via API" on the page).

Gradio documents an endpoint by the docstring, by the names of the function's parameters, and by the widgets that stand for
them; those are hidden here. `ldvc.web.mcp` offers the same functions to agents. A client has a session: it may ask again about
the same photo without waiting for it to be encoded again.
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
ARGUMENTS = {  # of the endpoints
    "photo": "an uploaded file, or a data URL.",
    "names": 'class names, separated by commas; "sofa | couch" are two words for one class.',
    "name": "one of the names.",
    "use_background": "whether pixels whose best name has a low score are none of these.",
    "threshold": "scores below it are low, from 0 to 1; without one, the decoder's own.",
    "layer": "counts from 1; 0 is the last.",
    "head": "counts from 1; 0 is the mean of all.",
    "use_company": "whether a single name shares the attention with a few words for stuff.",
    "row": "row of the patch, counts from 1; 0 is the middle.",
    "column": "column of the patch, counts from 1; 0 is the middle.",
    "kind": '"overlay", "mask", "masks", "cutouts", "data", "coco" or "yolo".',
    "vocabulary": 'household, voc20, coco80, context59 or coco_stuff171; "" for the keys and titles of all lists.',
    "model": '"lite" or "full"; without one, the one that the page opens with.',
}


def documented(endpoint: Callable) -> Callable:
    """Add the section "Args" to a docstring, which Gradio reads."""
    lines = (f"    {name}: {ARGUMENTS[name]}" for name in inspect.signature(endpoint).parameters if name in ARGUMENTS)
    endpoint.__doc__ = "\n".join([inspect.cleandoc(endpoint.__doc__), "", "Args:", *lines])
    return endpoint


class Api:
    """The endpoints, as functions that need no widgets; `write` is `SegmentTab.write`. Each returns the session last."""

    def __init__(self, segmenter: Segmenter, write: Callable[..., str]) -> None:
        self.segmenter, self.write = segmenter, write

    def ask(
        self, session: Session | None, photo: str | None, names: Any, use_background: Any = True,
        threshold: Any = None, company: Any = True, model: Any = None,
    ) -> tuple[Session, Answer, float | str | None]:  # fmt: skip
        """The session, its answer and the threshold; a problem becomes an error with the same sentence."""
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

        Programs may send the names as a list, too; "background", "other" and the like are no classes and allow none of these.
        Returns the photo painted by class, a label map (grey value 0 is none of these, i is class i of the data), and the
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

        Returns three heat maps over the photo (LDVC with LCSA, LDVC trained without it, ZegCLIP's decoder; none where the
        checkpoint has no such decoder) and the data. For each of these decoders, and for LDVC with LCSA switched off in the
        same weights (an intervention): "attention", the share of each patch's attention that goes to the name, row by row;
        "inside" and "outside", its mean inside the name's mask of that decoder and outside (null: no such pixel). "company"
        has the words and the attention that goes to all of them together, "none_of_these" what goes there in the last layer.
        Of a decoder that is missing, "missing" says how to get it. Where plain CLIP is read densely, as of "full", "patch"
        has the attention of one patch to all patches in the last block of CLIP, row by row.
        """
        session, answer, background = self.ask(session, photo, names, company=use_company, model=model)
        title = next((each for each in answer.names if each.casefold() == (name or "").strip().casefold()), None)
        if title is None:
            raise refusal(f"“{name}” is not among the names; ask about one of them.")
        decoders = (*attention_tab.DECODERS, LCSA_OFF)
        results = self.segmenter.results(answer, *decoders, background=background)
        (main,), index = self.segmenter.results(answer, answer.decoder), answer.names.index(title)
        at, which = layer_and_head(main, layer, head) if any(results) else (-1, None)
        columns = [attention_tab.Column(*each, at, which) for each in zip(decoders, results, strict=True)]
        picture = resize_picture(main.picture, fit_size(*main.size, long_side=HEAT_SIDE))
        maps = [
            None if column.maps is None else heat_map(column.enlarged(column.maps[index], HEAT_SIDE), picture)
            for column in columns[: len(attention_tab.DECODERS)]
        ]
        there = {column.decoder: column for column in columns if column.maps is not None}
        shares = {decoder: column.inside_outside(index) for decoder, column in there.items()}
        data = {
            "name": title,
            **(names_of(at, which) if any(results) else {}),
            "grid": {"rows": main.grid[0], "columns": main.grid[1]},
            "attention": {decoder: rounded(column.maps[index]) for decoder, column in there.items()},
            "inside": {decoder: inside for decoder, (inside, _) in shares.items()},
            "outside": {decoder: outside for decoder, (_, outside) in shares.items()},
            "missing": self.segmenter.missing(answer, *decoders),
            "none_of_these": {each: rounded(column.none) for each, column in there.items() if column.none is not None},
            "company": {
                "words": main.company,
                "attention": {each: rounded(column.company) for each, column in there.items() if column.company is not None},
            },
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
        """Where local-consensus self-attention (LCSA) routed one patch of the photo, and to what the patch attended there.

        Returns data: the patch and the grid, the class that it got and its score, the regions that
        its own region was routed to (best first; box as left, top, width, height in patches of the photo; affinity;
        share of the token attention that falls into it), the affinity of all regions row by row, the token attention
        of all patches row by row (0 outside those regions), and the patch's attention to the names. A single name shares
        it with the words of "company", in the last layer also with "none_of_these".
        """
        session, answer, background = self.ask(session, photo, names, model=model)
        (result,) = self.segmenter.results(answer, MAIN_DECODER, background=background)
        if result is None or not result.has_routing:
            raise refusal(self.segmenter.missing(answer, MAIN_DECODER).get(MAIN_DECODER, routing_tab.MISSING))
        at, which = layer_and_head(result, layer, head)
        patch = routing_tab.RoutedPatch(result, *place(result, row, column), at, which)
        return {**patch_data(patch), **names_of(at, which)}, session

    @documented
    def space(self, photo: str | None, names: str, model: str | None = None, session: Session | None = None) -> tuple:
        """Which of the two a decoder moved, patches or class names: for LDVC and for ZegCLIP's decoder.

        Returns data. Of the plane, one principal component analysis of all points of both decoders before and after:
        the share of variance of its two axes. Of each decoder: drift (mean 1 - cosine between before and after, of
        classes and of patches), similarity (mean cosine of a patch and its class, before and after), and in the plane
        the points of the class names (with the drift of each) and of the patches (with the class that each got).
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
        """One photo by plain CLIP similarity, ZegCLIP's decoder, and LDVC without and with LCSA, in the same colours.

        Returns the painted photos, captioned, and the data: for each of the four the area share of every name and the share
        of the photo on which it differs from LDVC with LCSA; and which names are seen. Of a decoder that is missing,
        "missing" says how to get it.
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

        Its kind is "overlay" (PNG of the painted photo), "mask" (palette PNG: 0 is none of these, i is class i), "masks" (ZIP
        with a black-and-white PNG for each class and classes.json), "cutouts" (ZIP with a PNG of the photo for each class,
        transparent outside of it), "data" (JSON: names, seen or unseen, scores, areas, thresholds, and which model answered,
        with the SHA-256 of its weights), "coco" (COCO JSON, one RLE mask for each class) or "yolo" (ZIP: labels of YOLO
        segmentation, a polygon for each part of a class, and data.yaml).
        """
        if kind not in KINDS:
            raise refusal(f"There is no file of the kind “{kind}”; choose one of {', '.join(KINDS)}.")
        session, answer, background = self.ask(session, photo, names, use_background, threshold, model=model)
        return self.write(kind, answer, background, OverlayStyle()), session


def declare(segmenter: Segmenter, panel: InputPanel, session: gr.State, segment_tab: SegmentTab) -> None:
    """Declare the endpoints; called inside the page's context."""
    api = Api(segmenter, segment_tab.write)
    with gr.Column(visible=False):
        widgets = {  # by the argument that they stand for
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
