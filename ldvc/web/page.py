"""The page, declared once from top to bottom, and the wires between its widgets and `Handlers`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import gradio as gr

from ldvc.web import api, html, texts
from ldvc.web.handlers import Handlers
from ldvc.web.inputs import EXAMPLES_FOLDER, Question
from ldvc.web.models import Catalogue
from ldvc.web.session import Problem, Visit
from ldvc.web.tabs import Tab
from ldvc.web.tabs.attention import AttentionTab
from ldvc.web.tabs.compare import CompareTab
from ldvc.web.tabs.routing import RoutingTab
from ldvc.web.tabs.segment import SegmentTab
from ldvc.web.tabs.space import SpaceTab

log = logging.getLogger(__name__)

TABS: tuple[type[Tab], ...] = (SegmentTab, AttentionTab, RoutingTab, SpaceTab, CompareTab)
STYLES = [Path(__file__).with_name(name) for name in ("style.css", "tabs.css")]
VISIT_SECONDS = 3 * 3600  # an encoded photo is forgotten so long after the visitor's last question
MAX_VISITS = 100  # each keeps a photo, its features and answers: 20 to 100 MB, of the 16 GB of a free Space

FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """Calm, with system fonts only: nothing is fetched from elsewhere."""
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
        checkbox_border_color="*neutral_500",  # 3:1 against what is around it, as WCAG 1.4.11 wants
        checkbox_border_color_dark="*neutral_400",
    )


def launch_options() -> dict[str, Any]:
    """What `Blocks.launch` needs to show the page as it is meant."""
    return {
        "theme": theme(),
        "css": "\n".join(path.read_text(encoding="utf-8") for path in STYLES),
        "footer_links": ["api"],
        "state_session_capacity": MAX_VISITS,
        "allowed_paths": [str(EXAMPLES_FOLDER)],  # wherever the page was started from
        "max_file_size": "50mb",
        "show_error": False,
        "ssr_mode": False,
        "run_history": False,
    }


def build_page(catalogue: Catalogue) -> gr.Blocks:
    """Declare the page."""
    handlers = Handlers(catalogue)

    with gr.Blocks(
        title=f"{texts.TITLE}: segment a photo by any names", analytics_enabled=False, delete_cache=(3600, VISIT_SECONDS + 3600)
    ) as page:
        visit = gr.State(Visit(), time_to_live=VISIT_SECONDS)
        gr.HTML(html.header())
        with gr.Row(equal_height=False, elem_classes="ldvc-columns"):
            with gr.Column(scale=4, min_width=320, elem_classes="ldvc-question"):
                question = Question(handlers, visit)
            tabs: dict[str, Tab] = {}
            places: dict[str, gr.Tab] = {}
            with gr.Column(scale=9, min_width=320, elem_classes="ldvc-answer"):
                question.stale.render()
                with gr.Tabs(elem_id="tabs", overflow_behavior="wrap"):
                    for kind in TABS:
                        with gr.Tab(kind.title, id=kind.key, elem_id=f"tab-{kind.key}") as places[kind.key]:
                            tabs[kind.key] = kind(handlers, visit)
        gr.HTML(f'<p class="ldvc-about">{texts.ABOUT}</p>', elem_classes="ldvc-later")

        wire(handlers, question, tabs, places, visit)
    return page


def wire(
    handlers: Handlers, question: Question, tabs: dict[str, Tab], places: dict[str, gr.Tab], visit: gr.State
) -> None:
    """Connect the question with the tabs."""
    drawn = [component for tab in tabs.values() for component in tab.outputs]

    def press_segment(photo: str | None, names: str, model: str, before: Visit) -> dict:
        """Segment; a problem becomes a sentence beside its field and changes nothing else."""
        background = before.background
        try:
            after = handlers.segment(photo, names, background, before, model=model)
            # What the visitor set while this was computed counts, and from now on it is set in the new visit.
            if before.background != background:
                after.background = before.background
            handlers.keep_company(before.company, after)
            handlers.choose(before.chosen, after)
            before.successor = after
            drawing, shown = {}, ""
            while shown != after.open_tab or after.drawn.get(shown) != tabs[shown].stamp(after):
                shown = after.open_tab  # another tab may be opened meanwhile, another threshold set
                drawing |= tabs[shown].draw(after)
            for tab in tabs.values():
                drawing |= tab.announce(after)
            return {visit: after, **question.answered(after, names), **drawing}
        except Exception as error:
            before.successor = None  # what is shown stays, and so does what is set in it
            if isinstance(error, Problem):
                return question.refused(error)
            if isinstance(error, gr.Error):  # a sentence of ZeroGPU's, about the visitor's quota
                raise
            log.exception("an action of the page failed")
            return question.refused(Problem("run", texts.UNEXPECTED))

    private = {"api_visibility": "private"}
    asked, changed = [*question.asked, visit], [*question.outputs, visit, *drawn]
    pressed = gr.on(
        [question.run.click, question.names.submit],
        press_segment,
        asked,
        changed,
        show_progress_on=[question.run, *tabs["segment"].outputs[:2]],
        trigger_mode="always_last",  # names that were changed while the last ones were asked for are not forgotten
        **private,
    )
    question.after(pressed)
    for key, tab in tabs.items():
        places[key].select(
            tab.open, visit, tab.outputs, show_progress_on=tab.waiting, trigger_mode="always_last", **private
        )
    question.wire()
    for tab in tabs.values():
        tab.wire()
    api.declare(handlers, question, visit, tabs["segment"])
    for tab in tabs.values():
        tab.endpoints()
