"""The page, declared once from top to bottom."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from ldvc.errors import LdvcError
from ldvc.web import api, html, mcp, texts
from ldvc.web.downloads import LOCK, PRIVATE, unlock_after
from ldvc.web.examples import EXAMPLES_FOLDER, Example, read_link
from ldvc.web.inputs import InputPanel
from ldvc.web.models import ModelRegistry
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import OWN_THRESHOLD, Answer, Problem, Session, Visits
from ldvc.web.surface import Page, Surface
from ldvc.web.tabs import QUIET, Changes, Shared, Tab, Values
from ldvc.web.tabs.attention import AttentionTab, make_company
from ldvc.web.tabs.compare import CompareTab
from ldvc.web.tabs.routing import RoutingTab
from ldvc.web.tabs.segment import SegmentTab, make_viewer
from ldvc.web.tabs.space import SpaceTab

log = logging.getLogger(__name__)

TABS: tuple[type[Tab], ...] = (SegmentTab, AttentionTab, RoutingTab, SpaceTab, CompareTab)
SESSION_SECONDS = 3 * 3600  # a session is deleted this long after the visitor's last question
MAX_SESSIONS = 200  # about 1 MB each for the values of widgets; `Visits` limits the memory of the answers
ANSWERS_GB = 1.5  # memory for the answers of all visitors; default of the environment variable LDVC_ANSWERS_GB
QUEUE_SIZE = 60  # waiting events, about half a minute on two cores; further events get the answer "busy"
FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

# On a phone the answer is below the question: scroll to the answer, unless the question has a problem.
SCROLL = """() => {
  const tabs = document.querySelector("#tabs");
  const below = tabs.getBoundingClientRect().top > 0.6 * window.innerHeight;
  if (below && !document.querySelector(".ldvc-question .ldvc-problem")) tabs.scrollIntoView({ behavior: "smooth" });
}"""


def theme() -> gr.themes.Base:
    """The theme of the page, with system fonts only: the browser fetches nothing from other servers."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        secondary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=FONTS,
        font_mono=MONO,
    ).set(
        block_border_width="1px",
        block_shadow="none",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_600",
        button_primary_text_color="white",
        button_large_text_weight="600",
        checkbox_border_color="*neutral_500",  # contrast of 3:1, as WCAG 1.4.11 demands
        checkbox_border_color_dark="*neutral_400",
    )


def launch_options() -> dict[str, Any]:
    """Arguments of `Blocks.launch` for this page. Raises LdvcError if `mcp.is_wanted` does."""
    mcp_server = mcp.is_wanted()
    return {
        "mcp_server": mcp_server,
        "theme": theme(),
        "css": html.static("style.css"),
        "footer_links": ["api"],
        "state_session_capacity": MAX_SESSIONS,
        "allowed_paths": [str(EXAMPLES_FOLDER)],  # also if the page was started from another folder
        "max_file_size": "50mb",
        "show_error": False,
        "ssr_mode": False,
        "run_history": False,
        "enable_monitoring": False,
        "app_kwargs": {"middleware": [Middleware(Surface, folders=[EXAMPLES_FOLDER], mcp=mcp_server)]},
    }


def header() -> str:
    """Title and purpose of the page."""
    return (
        f'<header class="ldvc-header"><div><h1>{texts.TITLE}</h1><p class="ldvc-tagline">{texts.TAGLINE}</p></div>'
        f'<a class="ldvc-paper" href="{texts.PAPER}" target="_blank" rel="noopener">{texts.PAPER_LABEL}</a></header>'
    )


def answers_limit() -> int:
    """The limit for the answers of all visitors, in bytes.

    Raises:
        LdvcError: LDVC_ANSWERS_GB is not a positive number.
    """
    text = os.environ.get("LDVC_ANSWERS_GB") or ANSWERS_GB
    with contextlib.suppress(ValueError):
        if 0 < (gigabytes := float(text)) < float("inf"):
            return int(gigabytes * 1e9)
    raise LdvcError(f"LDVC_ANSWERS_GB is a number of gigabytes, such as 1.5, not “{text}”.")


def build_page(registry: ModelRegistry) -> Page:
    """Declare the page."""
    segmenter = Segmenter(registry)
    title = f"{texts.TITLE}: segment a photo by any names"
    visits = Visits(answers_limit())
    with Page(visits, title=title, analytics_enabled=False, delete_cache=(600, SESSION_SECONDS + 600)) as page:
        page.segmenter = segmenter
        session = page.session = gr.State(Session(), time_to_live=SESSION_SECONDS)
        shared = Shared(session, make_viewer(), make_company())
        gr.HTML(header())
        with gr.Row(equal_height=False, elem_classes="ldvc-columns"):
            with gr.Column(scale=4, min_width=320, elem_classes="ldvc-question"):
                panel = InputPanel(segmenter, session)
            tabs: dict[str, Tab] = {}
            with gr.Column(scale=9, min_width=320, elem_classes="ldvc-answer"):
                panel.stale.render()
                with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
                    for kind in TABS:
                        with gr.Tab(kind.title, id=kind.key, elem_id=f"tab-{kind.key}") as tab_item:
                            gr.HTML(f'<p class="ldvc-look">{texts.LOOK_FOR[kind.key]}</p>')
                            tab = tabs[kind.key] = kind(segmenter, shared)
                        options = {"show_progress_on": [tab.empty, tab.pictures[0]], "trigger_mode": "always_last", **PRIVATE}
                        tab_item.select(tab.open, tab.inputs, tab.outputs, **options)
        gr.HTML(f'<p class="ldvc-about">{texts.ABOUT}</p>', elem_classes="ldvc-later")

        panel.wire()
        for tab in tabs.values():
            tab.wire()
            tab.wire_files()
        Questions(segmenter, shared, panel, tabs).wire(page)
        api.declare(segmenter, panel, session, tabs["segment"])
    return page.queue(max_size=QUEUE_SIZE)


class Questions:
    """Answers the question in the panel, an example, or a link, and shows the answer."""

    def __init__(self, segmenter: Segmenter, shared: Shared, panel: InputPanel, tabs: dict[str, Tab]) -> None:
        self.segmenter, self.shared, self.panel, self.tabs = segmenter, shared, panel, tabs

    def answer_question(self, values: Values) -> Changes:
        """Answer the question in the panel, after a press of the button."""
        return self.answered(values, self.segmenter.segment)

    def choose_example(self, values: Values) -> Iterator[Changes]:
        """Answer an example, after a click on it."""
        example = self.panel.examples[values[self.panel.gallery]]
        yield from self.answer_example(values, example, example.names)

    def open_page(self, values: Values, request: gr.Request) -> Iterator[Changes]:
        """Answer the link in the page's address; without a link, show the opening example if its answer exists already."""
        panel = self.panel
        link = read_link(request.query_params, panel.examples, self.segmenter.registry)
        link_changes = {self.shared.session: values[self.shared.session]}
        if link.model:
            link_changes[panel.model] = values[panel.model] = link.model
        if link.notice:
            link_changes[panel.problems["run"]] = html.notice(link.notice)
        if link.is_explicit or self.segmenter.is_kept(link.example.fingerprint, values[panel.model]):
            for changes in self.answer_example(values, link.example, link.names, opens=True):
                yield {**changes, **link_changes}
        else:
            yield link_changes

    def answer_example(self, values: Values, example: Example, names: str, *, opens: bool = False) -> Iterator[Changes]:
        """Show an example with its answer, or before the answer if that must be computed; for `opens` see `answered`."""
        panel, example_changes = self.panel, self.panel.example(example, names)
        values |= {panel.photo: example_changes[panel.photo], panel.names: names}
        if self.segmenter.is_kept(example.fingerprint, values[panel.model]):
            yield {**example_changes, **self.answered(values, self.segmenter.segment_example, opens=opens)}
            return
        yield example_changes
        changes = self.answered(values, self.segmenter.segment_example, opens=opens)
        changes.pop(panel.names, None)  # the visitor may have changed the names in the meantime
        yield changes

    def answered(self, values: Values, segment: Callable[..., Answer], *, opens: bool = False) -> Changes:
        """Segment, and show the answer. A problem only changes the sentence beside its field.

        `opens` is true when the page opens. Then nothing changes if the visitor asks a question in the meantime.
        """
        panel, previous = self.panel, values[self.shared.session].answer
        options = {"model": values[panel.model], "company": values[self.shared.company], "previous": previous}
        try:
            answer = segment(values[panel.photo], values[panel.names], **options)
            return self.show(answer, previous, values, opens=opens)
        except Problem as problem:
            return panel.refused(problem)
        except gr.Error:  # a sentence about ZeroGPU and the visitor's time
            raise
        except Exception:
            log.exception("a question could not be answered")
            return panel.refused(Problem("run", texts.UNEXPECTED))

    def show(self, answer: Answer, previous: Answer | None, values: Values, *, opens: bool) -> Changes:
        """Show an answer in the panel and the open tab, blank tabs with the previous answer, and set the session's answer."""
        session, viewer = values[self.shared.session], values[self.shared.viewer]
        background, thresholds = answer.background(viewer["background"]), viewer["thresholds"]
        if previous is not None and previous.model != answer.model:  # thresholds belong to the scores of one checkpoint
            background, thresholds = None if background is None else OWN_THRESHOLD, {}
        values[self.shared.viewer] = {**viewer, "background": background, "thresholds": thresholds}
        drawn_tabs = {session.open_tab}
        changes = self.panel.answered(answer) | self.tabs[session.open_tab].show(answer, values)
        if opens and session.answer is not previous:
            return {}
        session.answer = answer
        drawn_tabs.add(session.open_tab)  # a tab that was opened in the meantime draws the new answer itself
        for key in self.tabs.keys() - drawn_tabs:
            # Other tabs are blank already, but the viewer needs the settings that the answer changed.
            if previous is None or key in previous.drawn or values[self.shared.viewer] != viewer:
                changes |= self.tabs[key].blank(values)
        return {self.shared.session: session, **changes}

    def wire(self, page: Page) -> None:
        """Declare the events."""
        panel, shared, tabs = self.panel, self.shared, self.tabs.values()
        inputs = {*panel.inputs, *(widget for tab in tabs for widget in tab.inputs)}
        outputs = [shared.session, *panel.outputs, *(component for tab in tabs for component in tab.outputs)]
        example_outputs = [panel.photo, panel.vocabulary, panel.model, *outputs]
        options = {"show_progress_on": [panel.run, self.tabs["segment"].empty, shared.viewer], **PRIVATE}
        # One question after the other, so that the page shows the answer of the session.
        question = {"concurrency_id": "question", **options}
        pressed = gr.on([panel.run.click, panel.names.submit], self.answer_question, inputs, outputs, js=LOCK, **question)
        unlock_after(pressed)
        question |= {"show_progress": "minimal", "trigger_mode": "always_last"}
        chosen = panel.gallery.choose(self.choose_example, {panel.gallery, *inputs}, example_outputs, **question)
        opened = page.load(self.open_page, inputs, example_outputs, show_progress="minimal", **options)
        for event in (pressed, chosen, opened):
            # Runs after events of the panel that had already started.
            event.success(panel.outdated, {*panel.inputs, shared.session}, panel.stale, queue=False, **QUIET)
        for event in (pressed, chosen):
            event.success(None, js=SCROLL, **PRIVATE)
