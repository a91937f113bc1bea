"""The left column: photo, class names with their chips, class lists, the choice of model, and the button."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from ldvc.class_names import ClassName, SeenNames, class_lists, parse_names, plain
from ldvc.errors import InvalidNamesError
from ldvc.web import html, texts
from ldvc.web.examples import Example, link_to, read_examples
from ldvc.web.photos import accept_photos
from ldvc.web.segmenter import Segmenter, check_photo
from ldvc.web.session import Answer, Problem
from ldvc.web.tabs import QUIET, Changes, Values, message

OWN = "own"  # key of "My own names" among the class lists
MANY_CHIPS = 12  # above this number of chips, a line shows their count
THUMBNAIL_SIDE = 240
PROGRESS_SECONDS = 0.5  # between two updates of the progress of a download


def unchecked(component: Any) -> Any:
    """Remove Gradio's check of a widget's input; the user of the value checks it and answers errors in one sentence.

    Gradio's check writes a stack trace to the log and turns a list into a text.
    """
    component.preprocess = lambda payload: payload
    return component


def thumbnails(examples: Sequence[Example]) -> str:
    """One button with a small picture for each example."""
    buttons = []
    for index, example in enumerate(examples):
        photo, title = np.asarray(Image.open(example.path).convert("RGB")), html.escape(example.title)
        picture = f'<img src="{html.photo_uri(photo, long_side=THUMBNAIL_SIDE, quality=75)}" alt="">'
        buttons.append(f'<button type="button" data-index="{index}" title="{title}" aria-label="{title}">{picture}</button>')
    return f'<div class="ldvc-examples">{"".join(buttons)}</div>'


def parsed(names: str) -> list[ClassName]:
    """The parsed class names; [] if the list is not valid. The button "Segment" shows the error."""
    try:
        return parse_names(names or "")
    except InvalidNamesError:
        return []


def chips(names: Sequence[ClassName], seen: SeenNames) -> str:
    """One chip per class, seen or unseen, with a button that removes it. A long list also gets the count of seen classes."""
    if not names:
        return ""
    items, sources = [], []
    for name in names:
        source, title, text = seen.source(name), "", html.escape(name.text)
        if name.means_none:
            kind, tag = "none", texts.NONE_OF_THESE
        else:
            kind = tag = texts.UNSEEN if source is None else texts.SEEN
            sources.append(source)
            if source is not None and plain(source) not in name.keys:
                title = f' title="The model saw masks of it under the name “{html.escape(source)}”."'
        items.append(
            f'<li class="ldvc-chip"><span class="ldvc-name">{text}</span>'
            f'<span class="ldvc-tag ldvc-{kind}"{title}>{tag}</span><button type="button" data-name="{text}" '
            f'aria-label="{html.escape(texts.REMOVE.format(name=name.text))}">×</button></li>'
        )
    summary = ""
    if len(names) > MANY_CHIPS:
        count = sum(source is not None for source in sources)
        summary = f'<p class="ldvc-footnote">{texts.CHIPS_COUNT.format(all=len(sources), seen=count)}</p>'
    return f'{summary}<ul class="ldvc-chips" aria-label="{texts.CHIPS_LABEL}">{"".join(items)}</ul>'


def copy_link(link: str) -> str:
    """The button that copies the link to an answer. Without a link it is disabled, and a sentence gives the reason."""
    attribute, sentence = (f'data-link="{html.escape(link)}"', "") if link else ("disabled", texts.NO_LINK)
    return (
        f'<div class="ldvc-link"><button type="button" {attribute}>{texts.COPY_LINK}</button><span role="status" '
        f'data-copied="{texts.LINK_COPIED}" data-blocked="{texts.LINK_BLOCKED}">{sentence}</span></div>'
    )


class InputPanel:
    """The left column of the page."""

    def __init__(self, segmenter: Segmenter, session: gr.State) -> None:
        self.segmenter, self.session = segmenter, session
        self.examples = read_examples()
        self.own_names = gr.State("")  # names that the visitor typed before choosing a class list
        gr.HTML(html.section(texts.PHOTO_LABEL))
        self.photo = gr.Image(
            label=texts.PHOTO_LABEL, show_label=False, type="filepath", image_mode=None, height=220, elem_id="photo",
            sources=["upload", "clipboard", "webcam"], placeholder=texts.PHOTO_HINT, buttons=["fullscreen"],
        )  # fmt: skip
        accept_photos(self.photo)
        photo_problem = message(elem_id="photo-problem")
        gr.HTML(html.caption(texts.EXAMPLES_LABEL))
        options = {"elem_id": "examples", "apply_default_css": False, "js_on_load": html.static("examples.js")}
        self.gallery = gr.HTML(html_template=thumbnails(self.examples), **options)
        with gr.Group(elem_classes="ldvc-names"):
            options = {"placeholder": texts.NAMES_PLACEHOLDER, "lines": 1, "max_lines": 5, "elem_id": "names"}
            self.names = unchecked(gr.Textbox(label=texts.NAMES_LABEL, info=texts.NAMES_INFO, **options))
            options = {"elem_id": "chips", "apply_default_css": False, "js_on_load": html.static("chips.js")}
            self.chips = gr.HTML([], html_template="${chips}", chips="", **options)
        names_problem = message(elem_id="names-problem")
        self.run = gr.Button(texts.RUN, variant="primary", size="lg", elem_id="run")
        run_problem = message(elem_id="run-problem")
        self.share = gr.HTML(js_on_load=html.static("share.js"), apply_default_css=False, elem_id="share")
        with gr.Row(elem_classes="ldvc-choices"):
            lists = [(texts.OWN_NAMES, OWN), *((each.title, key) for key, each in class_lists().items())]
            options = {"min_width": 150, "scale": 3, "elem_id": "vocabulary"}
            self.vocabulary = gr.Dropdown(lists, value=OWN, label=texts.VOCABULARY_LABEL, **options)
            choices, options = segmenter.registry.choices, {"min_width": 90, "scale": 2, "elem_id": "model"}
            self.model = gr.Dropdown(choices, value=choices[0], label=texts.MODEL_LABEL, **options)
        if segmenter.registry.needs_download():
            gr.HTML(f'<p class="ldvc-footnote">{texts.FULL_DOWNLOAD}</p>', elem_id="model-download")
        model_problem = message(elem_id="model-problem")
        self.problems = {"photo": photo_problem, "names": names_problem, "run": run_problem, "model": model_problem}
        self.stale = message(elem_id="stale", render=False)  # a notice, rendered above the answer
        # The parts of a question, and the components that `answered` and `refused` may change.
        self.inputs = {self.photo, self.names, self.model}
        self.outputs = [self.names, self.stale, self.share, *self.problems.values()]

    def example(self, example: Example, names: str) -> Changes:
        """Updates that put an example and its class names into the column."""
        path = self.photo.move_resource_to_block_cache(example.path)  # the path that the browser will send back
        os.utime(path)  # the copy has the age of the original, and old files are removed
        return {self.photo: path, self.names: names, self.vocabulary: OWN, **self.sentences()}

    def answered(self, answer: Answer) -> Changes:
        """Updates after an answer: the parsed names, and remarks about them."""
        remarks = []
        if none_words := [name.text for name in answer.parsed_names if name.means_none]:
            remark = texts.NONE_NAMED if len(none_words) == 1 else texts.NONE_NAMED_MANY
            remarks.append(remark.format(names=html.quoted(none_words)))
        (result,) = self.segmenter.results(answer, answer.decoder)
        if groups := result.indistinguishable_words:
            remarks.append(texts.INDISTINGUISHABLE.format(names=", nor ".join(map(html.quoted, groups))))
        return {
            self.names: ", ".join(name.text for name in answer.parsed_names),
            self.stale: "",
            self.share: copy_link(link_to(answer, self.examples, self.segmenter.registry)),
            **self.sentences(names=html.notice(" ".join(remarks)), model=html.notice(answer.notice)),
        }

    def sentences(self, **sentences: str) -> Changes:
        """Updates that show sentences (HTML) beside the given fields and remove those beside all other fields."""
        return {component: sentences.get(field, "") for field, component in self.problems.items()}

    def refused(self, problem: Problem) -> Changes:
        """Updates that show a problem beside its field."""
        return self.sentences(**{problem.field: html.problem(str(problem))})

    def outdated(self, values: Values) -> str:
        """HTML of a notice if the answer belongs to another question than the one in the column, otherwise ""."""
        answer = values[self.session].answer
        if answer is None:
            return ""
        question = (values[self.photo], values[self.model], parsed(values[self.names]))
        same = question == (answer.photo, answer.chosen or answer.model, answer.parsed_names)
        return html.notice("" if same else texts.STALE)

    def question_changed(self, values: Values) -> Changes:
        """Updates after a change of names or model: one chip per class (seen or unseen by the model), and `outdated`."""
        seen = self.segmenter.registry.present(values[self.model]).main.seen_names
        return {self.chips: gr.HTML(chips=chips(parsed(values[self.names]), seen)), self.stale: self.outdated(values)}

    def wire(self) -> None:
        """Declare the events that need no inference."""
        state = {*self.inputs, self.session}

        def change_photo(values: Values) -> Changes:
            """Show at once that a file is not a picture. Only the header is read."""
            sentence = ""
            try:
                if values[self.photo]:
                    check_photo(values[self.photo])
            except Problem as problem:
                sentence = html.problem(str(problem))
            return {self.problems["photo"]: sentence, self.stale: self.outdated(values)}

        def change_names(values: Values) -> Changes:
            answer, changes = values[self.session].answer, self.question_changed(values)
            if answer is None or answer.parsed_names != parsed(values[self.names]):  # the sentence belongs to other names
                changes[self.problems["names"]] = ""
            return changes

        def choose_vocabulary(key: str, names: str, own_names: str) -> tuple[str, str]:
            """Replace the names by a class list, or restore the visitor's own names."""
            lists = {", ".join(class_list.classes) for class_list in class_lists().values()}
            own_names = own_names if names in lists else names
            return (own_names if key == OWN else ", ".join(class_lists()[key].classes)), own_names

        def remove(names: str, removed: list[str]) -> tuple[str, str]:
            listed = [name.text for name in parsed(names)]
            return ", ".join(name for name in listed if name not in removed) if listed else names, OWN

        def choose_model(values: Values) -> Iterator[Changes]:
            """Load the model. Show the progress of a download of its weights, until the visitor makes another choice."""
            registry, key, session = self.segmenter.registry, values[self.model], values[self.session]
            session.choice, notice = (choice := object()), ""
            try:
                while (download := registry.download(key)) is not None:
                    yield {self.problems["model"]: html.progress(download.sentence, download.share)}
                    download.wait(PROGRESS_SECONDS)
                    if session.choice is not choice:
                        return
                if not registry.is_loaded(key):
                    yield {self.problems["model"]: html.notice(texts.LOADING.format(model=key))}
                    registry.get(key).prepare()
            except Problem as problem:
                notice = html.notice(str(problem))
            yield {self.problems["model"]: notice, **self.question_changed(values)}

        unqueued = {"queue": False, **QUIET}
        last_only = {"trigger_mode": "always_last", **unqueued}
        self.photo.change(change_photo, state, [self.problems["photo"], self.stale], **last_only)
        name_widgets = [self.vocabulary, self.names, self.own_names]
        self.vocabulary.input(choose_vocabulary, name_widgets, name_widgets[1:], **unqueued)
        self.names.change(change_names, state, [self.chips, self.problems["names"], self.stale], **last_only)
        self.names.input(None, None, self.vocabulary, js=f"() => {OWN!r}", **unqueued)  # an edited list is the visitor's own
        self.chips.remove(remove, [self.names, self.chips], [self.names, self.vocabulary], **last_only)
        outputs = [self.problems["model"], self.chips, self.stale]
        self.model.input(choose_model, state, outputs, trigger_mode="multiple", concurrency_limit=None, **QUIET)
