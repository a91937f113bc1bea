"""The page, declared once from top to bottom, and the wires between its widgets and `Handlers`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import gradio as gr

from ldvc.web import html, texts
from ldvc.web.gpu import on_gpu
from ldvc.web.handlers import Handlers, Models, Problem, View, Visit

log = logging.getLogger(__name__)

EXAMPLES_FOLDER = Path(__file__).resolve().parents[2] / "assets" / "examples"
STYLE = Path(__file__).with_name("style.css")
VISIT_SECONDS = 3600  # an encoded photo is forgotten after an hour without use
MAX_VISITS = 200  # each keeps a photo of up to 6 MB and its features

FONTS = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def uploaded_file(payload: Any) -> str | None:
    """The path of what was uploaded, unopened.

    Gradio's own preprocessing opens the file, so that one which is no picture ends in an error before any of our code runs.
    """
    return None if payload is None or not payload.path else str(payload.path)


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
    )


def launch_options() -> dict[str, Any]:
    """What `Blocks.launch` needs to show the page as it is meant."""
    return {
        "theme": theme(),
        "css": STYLE.read_text(encoding="utf-8"),
        "footer_links": ["api"],
        "state_session_capacity": MAX_VISITS,
        "allowed_paths": [str(EXAMPLES_FOLDER)],  # wherever the page was started from
        "max_file_size": "50mb",
        "show_error": False,
        "ssr_mode": False,
        "run_history": False,
    }


def read_examples(folder: Path = EXAMPLES_FOLDER) -> list[tuple[str, str, str]]:
    """(path, title, fitting names) of each example photo, from the folder's examples.json."""
    entries = json.loads((folder / "examples.json").read_text(encoding="utf-8"))
    return [(str(folder / entry["file"]), entry["title"], ", ".join(entry["names"])) for entry in entries]


def attention_image(label: str, elem_id: str) -> gr.Image:
    """A picture that only shows."""
    return gr.Image(
        label=label,
        show_label=False,
        container=False,
        interactive=False,
        buttons=["fullscreen"],
        alt_text=f"Attention to the chosen name: {label}",
        elem_id=elem_id,
    )


def build_page(models: Models) -> gr.Blocks:
    """Declare the page for one checkpoint."""
    handlers = Handlers(models)
    examples = read_examples()

    with gr.Blocks(
        title=f"{texts.TITLE}: segment a photo by any names", analytics_enabled=False, delete_cache=(3600, 7200)
    ) as page:
        visit = gr.State(None, time_to_live=VISIT_SECONDS)  # a Visit, once there is something to remember
        gr.HTML(html.header(models.name))

        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320, elem_classes="ldvc-question"):
                gr.HTML(html.section(texts.PHOTO_LABEL))
                photo = gr.Image(
                    label=texts.PHOTO_LABEL,
                    show_label=False,
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=230,
                    placeholder=texts.PHOTO_HINT,
                    buttons=["fullscreen"],
                    elem_id="photo",
                )
                photo.preprocess = uploaded_file
                photo_problem = gr.HTML(visible=False, elem_id="photo-problem")
                gr.HTML(html.caption(texts.EXAMPLES_LABEL))
                gallery = gr.Gallery(
                    [(path, title) for path, title, _ in examples],
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
                names = gr.Textbox(
                    label=texts.NAMES_LABEL,
                    info=texts.NAMES_INFO,
                    placeholder=texts.NAMES_PLACEHOLDER,
                    lines=1,
                    max_lines=6,
                    elem_id="names",
                )
                names_problem = gr.HTML(visible=False, elem_id="names-problem")
                with gr.Column(visible=False, elem_classes="ldvc-context") as context_row:
                    gr.HTML(html.notice(texts.ONE_NAME_ADDED))
                    remove_context = gr.Button(texts.REMOVE_CONTEXT, size="sm", elem_id="remove-context")
                use_background = gr.Checkbox(
                    value=False, label=texts.BACKGROUND_LABEL, info=texts.BACKGROUND_INFO, elem_id="background"
                )
                threshold = gr.Slider(
                    0.0, 1.0, value=0.5, step=0.01, label=texts.THRESHOLD_LABEL, visible=False, elem_id="threshold"
                )
                run = gr.Button(texts.RUN, variant="primary", size="lg", elem_id="run")
                run_problem = gr.HTML(visible=False, elem_id="run-problem")

            with gr.Column(scale=7, min_width=320, elem_classes="ldvc-answer"):
                gr.HTML(html.section(texts.RESULT_TITLE))
                empty = gr.HTML(html.empty_result(), elem_id="empty")
                overlay = gr.Image(
                    show_label=False,
                    container=False,
                    interactive=False,
                    visible=False,
                    buttons=["download", "fullscreen"],
                    alt_text=texts.OVERLAY_ALT,
                    elem_id="overlay",
                )
                legend = gr.HTML(visible=False, elem_id="legend")

        with gr.Column(visible=False, elem_classes="ldvc-later") as attention_part:
            gr.HTML(html.section(texts.ATTENTION_TITLE, texts.ATTENTION_HELP))
            attended = gr.Radio([], label=texts.ATTENTION_NAME, elem_id="attended")
            attention_note = gr.HTML(visible=False, elem_id="attention-note")
            with gr.Row(elem_classes="ldvc-pair"):
                with gr.Column(min_width=140):
                    gr.HTML(html.caption(texts.ATTENTION_WITH))
                    with_lcsa = attention_image(texts.ATTENTION_WITH, "attention-with-lcsa")
                with gr.Column(min_width=140):
                    gr.HTML(html.caption(texts.ATTENTION_WITHOUT))
                    without_lcsa = attention_image(texts.ATTENTION_WITHOUT, "attention-without-lcsa")
            gr.HTML(html.scale_bar())

        with gr.Column(visible=False, elem_classes="ldvc-later") as maps_part:
            gr.HTML(html.section(texts.MAPS_TITLE, texts.MAPS_HELP))
            maps = gr.Gallery(
                show_label=False,
                container=False,
                columns=4,
                object_fit="contain",
                interactive=False,
                buttons=["download", "fullscreen"],
                elem_id="class-maps",
            )
            gr.HTML(html.scale_bar())

        gr.HTML(f'<p class="ldvc-about">{texts.ABOUT}</p>', elem_classes="ldvc-later")
        with gr.Column(visible=False):  # what programs get; see `api_segment` and `api_attention`
            api_call = gr.Button()
            api_overlay = gr.Image(label="Overlay", format="png")
            api_labels = gr.Image(label="Label map", format="png")
            api_data = gr.JSON(label="Data")
            api_name = gr.Textbox(label="Name")
            api_with = gr.Image(label="With LCSA", format="png")
            api_without = gr.Image(label="Without LCSA", format="png")

        # ---- wires ----

        problems = {"photo": photo_problem, "names": names_problem, "run": run_problem}
        segmentation_outputs = [overlay, legend]
        attention_outputs = [with_lcsa, without_lcsa, attended, attention_note]
        all_outputs = [
            *segmentation_outputs,
            *attention_outputs,
            maps,
            names,
            *problems.values(),
            context_row,
            empty,
            attention_part,
            maps_part,
            visit,
        ]

        def show(view: View) -> dict:
            return {
                overlay: gr.Image(view.overlay, visible=True),
                legend: gr.HTML(html.legend(view.legend, view.none_share), visible=True),
            }

        def show_attention(view: Any) -> dict:
            return {
                with_lcsa: view.with_lcsa,
                without_lcsa: view.without_lcsa,
                attended: gr.Radio(view.names, value=view.name),
                attention_note: gr.HTML(html.notice(view.note) if view.note else "", visible=bool(view.note)),
            }

        def hide_problems() -> dict:
            return {component: gr.HTML("", visible=False) for component in problems.values()}

        @on_gpu
        def compute(action: str, *arguments: Any, **options: Any) -> tuple[View, Visit] | Problem:
            """Run a method of `Handlers`. ZeroGPU does so in another process: only values go in and come out, no widgets."""
            try:
                return getattr(handlers, action)(*arguments, **options)
            except Problem as problem:
                return problem

        def answer(action: str, *arguments: Any) -> dict:
            """Run an action that segments; a problem becomes a sentence beside its field and changes nothing else."""
            try:
                found = compute(action, *arguments)
            except Exception:
                log.exception("an action of the page failed")
                return {**hide_problems(), run_problem: gr.HTML(html.problem(texts.UNEXPECTED), visible=True)}
            if isinstance(found, Problem):
                beside = {problems[found.field]: gr.HTML(html.problem(str(found)), visible=True)}
                return {**hide_problems(), **beside, context_row: gr.Column(visible=False)}
            view, after = found
            return {
                **show(view),
                **show_attention(view.attention),
                **hide_problems(),
                maps: view.maps,
                names: view.names,
                context_row: gr.Column(visible=view.context_added),
                empty: gr.HTML(visible=False),
                attention_part: gr.Column(visible=True),
                maps_part: gr.Column(visible=True),
                visit: after,
            }

        def ask(*arguments: Any) -> tuple[View, Visit]:
            """Segment for a program: a problem becomes an error with the same sentence."""
            found = compute("segment", *arguments, add_context=False)
            if isinstance(found, Problem):
                raise gr.Error(str(found), print_exception=False)
            return found

        def press_segment(photo: str | None, names: str, use_background: bool, threshold: float, visit: Visit | None) -> dict:
            return answer("segment", photo, names, use_background, threshold, visit or Visit())

        def press_remove(
            photo: str | None, names: str, use_background: bool, threshold: float, visit: Visit | None
        ) -> dict:
            return answer("remove_context", photo, names, use_background, threshold, visit or Visit())

        def move_threshold(use_background: bool, threshold_value: float, visit_value: Visit | None) -> dict:
            found = handlers.rethreshold(use_background, threshold_value, visit_value or Visit())
            changes = {threshold: gr.Slider(visible=use_background)}
            return changes if found is None else {**changes, **show(found[0]), visit: found[1]}

        def choose_attended(name: str, visit_value: Visit | None) -> dict:
            found = handlers.attend(name, visit_value or Visit())
            if found is None:
                return {attention_note: gr.HTML(visible=False)}
            return {**show_attention(found[0]), visit: found[1]}

        def take_example(event: gr.SelectData) -> dict:
            path, _, fitting = examples[event.index]
            return {photo: path, names: fitting, **hide_problems(), context_row: gr.Column(visible=False)}

        def api_segment(
            photo: str | None, names: str, use_background: bool, threshold: float, visit: Visit | None
        ) -> tuple:
            """Segment a photo by class names, separated by commas.

            With use_background, pixels where no name's score reaches the threshold are none of these. Returns the photo
            painted by class, a label map (grey value 0 is none of these, i is class i of the data), and the data: names,
            seen or unseen, area shares, colours. A client that asks again about the same photo does not wait for it to be
            encoded again.
            """
            view, visit = ask(photo, names, use_background, threshold, visit or Visit())
            return view.overlay, view.label_map, view.summary, visit

        def api_attention(photo: str | None, names: str, name: str, visit: Visit | None) -> tuple:
            """Cross-attention of the last decoder block to one of the names, with and without LCSA.

            Colours are the page's heat scale from 0 to 1.
            """
            _, visit = ask(photo, names, False, 0.5, visit or Visit())
            found = handlers.attend((name or "").strip(), visit)
            if found is None:
                raise gr.Error(texts.NOT_ASKED_FOR.format(name=name), print_exception=False)
            return found[0].with_lcsa, found[0].without_lcsa, visit

        question = [photo, names, use_background, threshold, visit]
        private = {"api_visibility": "private"}
        gr.on([run.click, names.submit], press_segment, question, all_outputs, show_progress_on=[run, overlay], **private)
        remove_context.click(
            press_remove, question, all_outputs, show_progress_on=[remove_context, overlay], **private
        )
        gr.on(
            [use_background.input, threshold.release],
            move_threshold,
            [use_background, threshold, visit],
            [*segmentation_outputs, threshold, visit],
            show_progress="hidden",
            **private,
        )
        attended.input(choose_attended, [attended, visit], [*attention_outputs, visit], show_progress="hidden", **private)
        api_call.click(api_segment, question, [api_overlay, api_labels, api_data, visit], api_name="segment")
        api_call.click(
            api_attention, [photo, names, api_name, visit], [api_with, api_without, visit], api_name="attention"
        )
        gallery.select(
            take_example,
            None,
            [photo, names, *problems.values(), context_row],
            show_progress="hidden",
            **private,
        )

    return page
