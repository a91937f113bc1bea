"""What programs get from the explaining tabs: named endpoints with numbers and pictures.

Gradio derives an endpoint's documented inputs and outputs from widgets, so each has a few hidden ones. A client's `Visit`
is kept as a visitor's is: asking again about the same photo does not encode it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from ldvc.result import Segmentation
from ldvc.web.handlers import checked_background
from ldvc.web.inputs import unchecked, uploaded_file
from ldvc.web.session import Problem, Visit
from ldvc.web.tabs import Tab, texts


def declare(
    tab: Tab, function: Callable, inputs: Sequence[Callable[[], Any]], outputs: Sequence[Callable[[], Any]], name: str
) -> None:
    """Declare an endpoint.

    Args:
        tab: whose visit is used.
        function: of photo, names, the further inputs, and the visit; returns the outputs and the visit. Its docstring becomes
            the documentation, its parameter names those of the endpoint.
        inputs, outputs: make the widgets, which are hidden.
        name: of the endpoint.
    """
    with gr.Column(visible=False):
        photo = gr.Image(type="filepath", image_mode=None, label="Photo")
        photo.preprocess = uploaded_file
        names = unchecked(gr.Textbox(label="Class names, separated by commas, or a list"))
        further, returned = [make() for make in inputs], [make() for make in outputs]
        gr.Button().click(
            function, [photo, names, *further, tab.visit], [*returned, tab.visit], api_name=name, show_progress="hidden"
        )


def ask(
    tab: Tab,
    photo: str | None,
    names: Any,
    visit: Visit | None,
    *,
    use_background: Any = True,
    threshold: Any = None,
    company: bool = True,
) -> Visit:
    """Segment for a program: a problem becomes an error with the same sentence."""
    try:
        background = checked_background(use_background, threshold)
        return tab.handlers.segment(photo, names, background, replace(visit or Visit(), company=bool(company)))
    except Problem as problem:
        raise refusal(str(problem)) from problem


def refusal(sentence: str) -> gr.Error:
    """An error that a program receives as one sentence."""
    return gr.Error(sentence, print_exception=False)


def layer_and_head(result: Segmentation, layer: float | None, head: float | None) -> tuple[int, int | None]:
    """Layers and heads are counted from 1; 0 is the last layer and the mean of all heads.

    Returns:
        (index of the layer, index of the head or None).

    Raises:
        gr.Error: there is no such layer or head.
    """
    layers, heads = result.attention_shape
    layer, head = whole(layer, "layer"), whole(head, "head")
    if not 0 <= layer <= layers:
        raise refusal(texts.NO_SUCH_LAYER.format(layer=layer, layers=layers))
    if not 0 <= head <= heads:
        raise refusal(texts.NO_SUCH_HEAD.format(head=head, heads=heads))
    return (layer or layers) - 1, head - 1 if head else None


def whole(value: Any, name: str) -> int:
    """A whole number that a program gave, nothing counting as 0.

    Raises:
        gr.Error: it is none.
    """
    try:
        number = float(value or 0)
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise refusal(texts.NO_WHOLE_NUMBER.format(name=name, value=value))


def rounded(values: Any, digits: int = 4) -> list:
    """An array as nested lists that are short to send."""
    return values.round(digits).tolist()
