"""The left column: photo, class names, model, "none of these", and the button."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from ldvc.web import html, texts
from ldvc.web.handlers import Handlers
from ldvc.web.visit import Problem, Visit

EXAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "examples"


def uploaded_file(payload: Any) -> str | None:
    """The path of what was uploaded, unopened.

    Gradio's own preprocessing opens the file, so that one which is no picture ends in an error before any of our code runs.
    """
    return None if payload is None or not payload.path else str(payload.path)


def read_examples(folder: Path = EXAMPLES_FOLDER) -> list[tuple[str, str, str]]:
    """(path, title, fitting names) of each example photo, from the folder's examples.json."""
    entries = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [(str(folder / entry["file"]), entry["title"], ", ".join(entry["names"])) for entry in entries]


class Question:
    """Declares the column; `asked` are the inputs of every action that segments, `outputs` what it may change."""

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        self.handlers, self.visit = handlers, visit
        self.examples = read_examples()
        gr.HTML(html.section(texts.PHOTO_LABEL))
        self.photo = gr.Image(
            label=texts.PHOTO_LABEL,
            show_label=False,
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard", "webcam"],
            height=230,
            placeholder=texts.PHOTO_HINT,
            buttons=["fullscreen"],
            elem_id="photo",
        )
        self.photo.preprocess = uploaded_file
        photo_problem = gr.HTML(visible=False, elem_id="photo-problem")
        gr.HTML(html.caption(texts.EXAMPLES_LABEL))
        self.gallery = gr.Gallery(
            [(path, title) for path, title, _ in self.examples],
            label=texts.EXAMPLES_LABEL,
            show_label=False,
            container=False,
            columns=4,
            object_fit="cover",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id="examples",
            elem_classes="ldvc-examples",
        )
        self.names = gr.Textbox(
            label=texts.NAMES_LABEL,
            info=texts.NAMES_INFO,
            placeholder=texts.NAMES_PLACEHOLDER,
            lines=1,
            max_lines=6,
            elem_id="names",
        )
        names_problem = gr.HTML(visible=False, elem_id="names-problem")
        with gr.Column(visible=False, elem_classes="ldvc-context") as self.context_row:
            gr.HTML(html.notice(texts.ONE_NAME_ADDED))
            self.remove_context = gr.Button(texts.REMOVE_CONTEXT, size="sm", elem_id="remove-context")
        self.use_background = gr.Checkbox(
            value=False, label=texts.BACKGROUND_LABEL, info=texts.BACKGROUND_INFO, elem_id="background"
        )
        self.threshold = gr.Slider(
            0.0, 1.0, value=0.5, step=0.01, label=texts.THRESHOLD_LABEL, visible=False, elem_id="threshold"
        )
        self.run = gr.Button(texts.RUN, variant="primary", size="lg", elem_id="run")
        run_problem = gr.HTML(visible=False, elem_id="run-problem")

        self.problems = {"photo": photo_problem, "names": names_problem, "run": run_problem}
        self.asked = [self.photo, self.names, self.use_background, self.threshold]
        self.outputs = [self.names, self.context_row, *self.problems.values()]

    def answered(self, visit: Visit) -> dict:
        """Updates after a question that was answered."""
        return {
            self.names: ", ".join(visit.asked),
            self.context_row: gr.Column(visible=visit.context_added),
            **self.no_problems(),
        }

    def no_problems(self) -> dict:
        """Take all sentences away."""
        return {component: gr.HTML("", visible=False) for component in self.problems.values()}

    def refused(self, problem: Problem) -> dict:
        """A sentence beside its field; all else stays as it is."""
        place = self.problems.get(problem.field, self.problems["run"])
        return {
            **self.no_problems(),
            place: gr.HTML(html.problem(str(problem)), visible=True),
            self.context_row: gr.Column(visible=False),
        }

    def wire(self) -> None:
        """Events that need no model."""

        def take_example(event: gr.SelectData) -> dict:
            path, _, fitting = self.examples[event.index]
            return {
                self.photo: path,
                self.names: fitting,
                **self.no_problems(),
                self.context_row: gr.Column(visible=False),
            }

        self.gallery.select(
            take_example, None, [self.photo, *self.outputs], show_progress="hidden", api_visibility="private"
        )
