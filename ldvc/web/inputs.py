"""The left column: photo, class names with their chips, ready vocabularies, the choice of model, and the button."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gradio as gr

from ldvc.class_names import class_lists, clean_names, without_none_words
from ldvc.errors import InvalidNamesError
from ldvc.web import html, texts
from ldvc.web.handlers import Handlers
from ldvc.web.models import MAIN_DECODER
from ldvc.web.session import Problem, Visit

EXAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "examples"
OWN = "own"  # key of the visitor's own names among the class_lists

# A chip's button says which name goes; the list is redrawn by the server. Names that were removed are sent until they are gone,
# so that several buttons may be pressed faster than answers come.
CHIPS_JS = """
let removed = [];
const say = () => { element.dataset.removed = JSON.stringify(removed); };
element.addEventListener("click", (event) => {
  const button = event.target.closest("button[data-name]");
  if (!button) return;
  removed.push(button.dataset.name);
  button.closest("li").hidden = true;
  say();
  trigger("remove");
});
watch("value", () => {
  const buttons = [...element.querySelectorAll("button[data-name]")];
  removed = removed.filter((name) => buttons.some((button) => button.dataset.name === name));
  for (const button of buttons) button.closest("li").hidden = removed.includes(button.dataset.name);
  say();
});
"""
REMOVED = """(names) => [names, JSON.parse(document.querySelector("#chips [data-removed]").dataset.removed)]"""


# Gradio reads the examples out as "Thumbnail 1 of 8"; they have titles.
TITLES_JS = """
const titles = %s;
const name = () => document.querySelectorAll("#examples button.thumbnail-item").forEach((button, index) => {
  if (button.title) return;
  button.title = titles[index];
  button.setAttribute("aria-label", titles[index]);
});
name(); // before or after Gradio has drawn them, which it may do again
new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
"""

# The example that was clicked last, whatever was clicked first and waited; see `SAID` of the Segment tab.
TAKEN = """() => {
  const examples = [...document.querySelectorAll("#examples button.thumbnail-item")];
  return [examples.findIndex((each) => each.matches(".selected"))];
}"""

# Names as they were asked, tidied: written into the field unless something else was typed meanwhile.
TIDY_JS = """(pair, names) => {
  const [asked, tidy] = pair ? JSON.parse(pair) : [names, names];
  return names === asked ? tidy : names;
}"""
# On a phone the answer is below the question: show it, unless something was wrong with the question.
REVEAL_JS = """() => {
  const tabs = document.querySelector("#tabs");
  const below = tabs.getBoundingClientRect().top > 0.6 * window.innerHeight;
  if (below && !document.querySelector(".ldvc-question .ldvc-problem")) tabs.scrollIntoView({ behavior: "smooth" });
}"""


def uploaded_file(payload: Any) -> str | None:
    """The path of what was uploaded, unopened.

    Gradio's own preprocessing opens the file, so that one which is no picture ends in an error before any of our code runs.
    """
    return None if payload is None or not payload.path else str(payload.path)


def unchecked(component: Any) -> Any:
    """A widget that hands over whatever a program sends; whoever uses it says what is wrong in one sentence.

    Gradio's own check of numbers ends in a stack trace in the log, and for what is no number in no sentence at all; a list that
    should be a text becomes one.
    """
    component.preprocess = lambda payload: payload
    return component


def read_examples(folder: Path = EXAMPLES_FOLDER) -> list[tuple[str, str, str]]:
    """(path, title, fitting names) of each example photo, from the folder's examples.json."""
    entries = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [(str(folder / entry["file"]), entry["title"], ", ".join(entry["names"])) for entry in entries]


# Make the hidden widgets for what a program says about "none of these"; see `checked_background`.
BACKGROUND_INPUTS = (
    lambda: unchecked(gr.Checkbox(True, label="Allow none of these")),
    lambda: unchecked(gr.Number(label="Threshold from 0 to 1; without one, the checkpoint's own")),
)


def means_none(name: str) -> bool:
    """Whether a cleaned name is no class but means "none of these"."""
    try:
        without_none_words([name])
    except InvalidNamesError:
        return True
    return False


def same_names(names: str, visit: Visit) -> bool:
    """Whether a list of names is that of a visit's question, however it is written."""
    try:
        return clean_names(names or "") == visit.asked
    except InvalidNamesError:
        return False


class Question:
    """Declares the column; `asked` are the inputs of every action that segments, `outputs` what it may change."""

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        self.handlers, self.visit = handlers, visit
        self.examples = read_examples()
        self.own_names = gr.State("")  # what the visitor had typed before taking a vocabulary
        gr.HTML(html.section(texts.PHOTO_LABEL))
        self.photo = gr.Image(
            label=texts.PHOTO_LABEL,
            show_label=False,
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard", "webcam"],
            height=220,
            placeholder=texts.PHOTO_HINT,
            buttons=["fullscreen"],
            elem_id="photo",
        )
        self.photo.preprocess = uploaded_file
        photo_problem = gr.HTML(visible=False, elem_id="photo-problem")
        titles = json.dumps([title for _, title, _ in self.examples])
        gr.HTML(html.caption(texts.EXAMPLES_LABEL), js_on_load=TITLES_JS % titles)
        self.taken = gr.Number(visible=False, precision=0)  # see `TAKEN`
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
        with gr.Group(elem_classes="ldvc-names"):
            self.names = unchecked(
                gr.Textbox(
                    label=texts.NAMES_LABEL,
                    info=texts.NAMES_INFO,
                    placeholder=texts.NAMES_PLACEHOLDER,
                    lines=1,
                    max_lines=5,
                    elem_id="names",
                )
            )
            self.chips = gr.HTML(js_on_load=CHIPS_JS, apply_default_css=False, elem_id="chips")
            self.removed = gr.JSON(visible=False)  # see `REMOVED`
        names_problem = gr.HTML(visible=False, elem_id="names-problem")
        self.run = gr.Button(texts.RUN, variant="primary", size="lg", elem_id="run")
        run_problem = gr.HTML(visible=False, elem_id="run-problem")
        with gr.Row(elem_classes="ldvc-choices"):
            lists = [(each.title, key) for key, each in class_lists().items()]
            self.vocabulary = gr.Dropdown(
                [(texts.OWN_NAMES, OWN), *lists],
                value=OWN,
                label=texts.VOCABULARY_LABEL,
                min_width=150,
                scale=3,
                elem_id="vocabulary",
            )
            choices = handlers.catalogue.choices
            self.model = gr.Dropdown(
                choices, value=choices[0], label=texts.MODEL_LABEL, min_width=90, scale=2, elem_id="model"
            )
        model_problem = gr.HTML(visible=False, elem_id="model-problem")

        self.problems = {"photo": photo_problem, "names": names_problem, "run": run_problem, "model": model_problem}
        self.tidied = gr.Textbox(visible=False)
        self.stale = gr.HTML(visible=False, elem_id="stale", render=False)  # rendered above the answer
        self.asked = [self.photo, self.names, self.model]
        self.outputs = [self.names, self.chips, self.tidied, self.stale, *self.problems.values()]

    def answered(self, visit: Visit, names: str) -> dict:
        """Updates after a question about these names was answered."""
        updates = {
            self.tidied: json.dumps([names, ", ".join(visit.asked)]),
            **self.no_problems(),
        }
        remarks = []
        none_words = [name for name in visit.asked if means_none(name)]
        if none_words:
            said = texts.NONE_NAMED if len(none_words) == 1 else texts.NONE_NAMED_MANY
            remarks.append(said.format(names=html.listed(none_words)))
        groups = [html.listed(words) for words in self.handlers.results(visit, MAIN_DECODER)[0].indistinguishable_words]
        if groups:
            remarks.append(texts.ALIKE.format(names=", nor ".join(groups)))
        if remarks:
            updates[self.problems["names"]] = gr.HTML(html.notice(" ".join(remarks)), visible=True)
        return updates

    def after(self, event: Any) -> None:
        """What the browser does after an event that segments: tidy the list of names, show the answer."""
        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        tidy = event.then(None, [self.tidied, self.names], self.names, js=TIDY_JS, **quiet)
        tidy.then(self.outdated, [*self.asked, self.visit], self.stale, queue=False, **quiet)
        event.then(None, js=REVEAL_JS, **quiet)

    def outdated(self, photo: str | None, names: str, model: str, visit: Visit) -> Any:
        """Above the answer: whether it is that of another question than the one that stands on the left."""
        visit = visit.latest
        same = same_names(names, visit) and (photo, model) == (visit.photo, visit.model)
        return gr.HTML(html.notice(texts.STALE), visible=not visit.empty and not same)

    def no_problems(self) -> dict:
        """Take all sentences away."""
        return {component: gr.HTML("", visible=False) for component in self.problems.values()}

    def refused(self, problem: Problem) -> dict:
        """A sentence beside its field; all else stays as it is."""
        place = self.problems.get(problem.field, self.problems["run"])
        return {
            **self.no_problems(),
            place: gr.HTML(html.problem(str(problem)), visible=True),
            self.tidied: "",
        }

    def chips_for(self, names: str, model: str | None) -> str:
        """A chip for each class: seen or unseen by the model, and a button that removes it."""
        try:
            seen = self.handlers.catalogue.get(model).main.seen_names
        except Problem:  # said where the model is chosen
            seen = self.handlers.catalogue.get(None).main.seen_names
        try:
            cleaned = clean_names(names or "")
        except InvalidNamesError:  # said when the button is pressed: while one types, a list is rarely complete
            return ""
        return html.chips([(name, seen.source(name)) for name in cleaned], none=set(filter(means_none, cleaned)))

    def wire(self) -> None:
        """Events that need no computing."""
        light = {"show_progress": "hidden", "api_visibility": "private", "queue": False}

        def take_example(index: int) -> dict:
            path, _, fitting = self.examples[index]
            return {
                self.photo: path,
                self.names: fitting,
                self.vocabulary: OWN,
                **self.no_problems(),
            }

        def look_at(photo: str | None, names: str, model: str, visit: Visit) -> dict:
            """A file that is no picture is told at once, not only when the button is pressed."""
            sentence = ""
            try:
                if photo:
                    self.handlers.read_photo(photo)
            except Problem as problem:
                sentence = html.problem(str(problem))
            return {
                self.problems["photo"]: gr.HTML(sentence, visible=bool(sentence)),
                self.stale: self.outdated(photo, names, model, visit),
            }

        def read_names(photo: str | None, names: str, model: str, visit: Visit) -> dict:
            updates = {self.chips: self.chips_for(names, model), self.stale: self.outdated(photo, names, model, visit)}
            if not same_names(names, visit.latest):  # a sentence about names that are not there any more
                updates[self.problems["names"]] = gr.HTML("", visible=False)
            return updates

        def take_vocabulary(key: str, names: str, own: str) -> tuple[str, str]:
            """A list replaces the names; one's own come back when they are chosen again."""
            lists = {", ".join(each.classes) for each in class_lists().values()}
            own = own if names in lists else names
            return (own if key == OWN else ", ".join(class_lists()[key].classes)), own

        def remove(names: str, removed: list[str]) -> tuple[str, str]:
            try:
                cleaned = clean_names(names or "")
            except InvalidNamesError:
                return names, OWN
            return ", ".join(name for name in cleaned if name not in removed), OWN

        def choose_model(photo: str | None, names: str, key: str, visit: Visit) -> tuple[Any, str, Any]:
            outdated = self.outdated(photo, names, key, visit)
            try:
                self.handlers.catalogue.get(key)
            except Problem as problem:
                return gr.HTML(html.notice(str(problem)), visible=True), self.chips_for(names, None), outdated
            return gr.HTML("", visible=False), self.chips_for(names, key), outdated

        self.gallery.select(
            take_example,
            self.taken,
            [self.photo, self.vocabulary, *self.outputs],
            js=TAKEN,
            trigger_mode="always_last",
            **light,
        )
        self.photo.change(
            look_at,
            [*self.asked, self.visit],
            [self.problems["photo"], self.stale],
            trigger_mode="always_last",
            **light,
        )
        self.vocabulary.input(
            take_vocabulary, [self.vocabulary, self.names, self.own_names], [self.names, self.own_names], **light
        )
        self.names.change(
            read_names,
            [*self.asked, self.visit],
            [self.chips, self.problems["names"], self.stale],
            trigger_mode="always_last",
            **light,
        )
        # a list that is changed by hand is one's own
        self.names.input(None, None, self.vocabulary, js=f"() => {OWN!r}", **light)
        self.chips.remove(
            remove,
            [self.names, self.removed],
            [self.names, self.vocabulary],
            js=REMOVED,
            trigger_mode="always_last",
            **light,
        )
        self.model.input(
            choose_model,
            [*self.asked, self.visit],
            [self.problems["model"], self.chips, self.stale],
            show_progress="minimal",
            api_visibility="private",
        )
