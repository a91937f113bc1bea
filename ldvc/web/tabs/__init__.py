"""The tabs of the answer, one module each. How a tab is written:

    class AttentionTab(Tab):
        key, title = "attention", "Attention"

        def __init__(self, handlers: Handlers, visit: gr.State) -> None:
            super().__init__(handlers, visit)
            ...            # declare components here: it runs inside the tab's `gr.Tab` context
            self.outputs = [...]                    # everything that `update` may change

        def update(self, visit: Visit) -> dict:     # {component: its update}: draw this tab for the visit
            if visit.empty:                         # nothing segmented yet: one friendly sentence
                ...
            result, = self.handlers.results(visit, "ldvc")
            ...

        def wire(self) -> None:                     # events of the tab's own; called once, when the whole page is declared
            self.layer.input(self.redraw, [self.layer, self.visit], self.outputs, **self.quiet)

        def stamp(self, visit: Visit) -> tuple:     # what the drawing depends on; redrawn on opening when it has changed
            return visit.version, visit.chosen

Only the open tab is drawn when a visitor presses Segment; the others are drawn when they are opened (`Tab.open`), so that the
first overlay never waits for them.

What a visitor looks at is the `Visit` in `gr.State`: their own, never shared. Events may change it in place (the chosen class,
results that are kept, `visit.kept` for whatever a tab wants to remember until the next question); do not return it as an
output, or a slow event would overwrite a newer question. An event that draws starts from `visit.latest` and ends with
`unless_overtaken`, so that a slow one draws nothing over the answer to a newer question. What a script of the page says (a
spot, a threshold) goes into its event as an input, not as the event's data; `SAID` of the Segment tab says why. Everything
that needs the model goes through `handlers.results` or, for other computations, `handlers.compute(function, ...)` with a
function of a module's top level that gets the `Models` of the visit first: on ZeroGPU it runs in another process, so values go
in and come out, and changes in place stay there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from ldvc.web import html
from ldvc.web.handlers import Handlers
from ldvc.web.session import Visit
from ldvc.web.tabs import texts


class Tab:
    """What the page asks of a tab.

    Attributes:
        key, title: identifier ("segment") and what is written on the tab.
        handlers: the actions that need a model.
        empty: the `gr.HTML` that says what will be here, as long as there is nothing.
        visit: the `gr.State` with the visitor's `Visit`.
        outputs: the components that `update` may change.
        waiting: those that show that an answer is on its way.
        quiet: options for events that answer at once: no progress bars, no entry among the documented endpoints.
    """

    key = ""
    title = ""
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def __init__(self, handlers: Handlers, visit: gr.State) -> None:
        self.handlers = handlers
        self.visit = visit
        self.outputs: list[Any] = []
        self.waiting: list[Any] = []
        self.empty: gr.HTML

    def update(self, visit: Visit) -> dict[Any, Any]:
        """Draw the tab: {component: update} for components of `outputs`."""
        raise NotImplementedError

    def wire(self) -> None:
        """Connect the tab's own events."""

    def endpoints(self) -> None:
        """Declare the tab's documented API endpoints with `gr.api(function, api_name=...)`; called after `wire`."""

    def stamp(self, visit: Visit) -> tuple:
        """What the drawing depends on."""
        return visit.version, visit.chosen

    def announce(self, visit: Visit) -> dict[Any, Any]:
        """After a question that was answered on another tab: what stands here until this one is opened and drawn."""
        return {} if self.key in visit.drawn else {self.empty: html.empty(texts.DRAWING)}

    def draw(self, visit: Visit) -> dict[Any, Any]:
        """`update`, remembering what was drawn."""
        stamp = self.stamp(visit)
        drawing = self.update(visit)
        visit.drawn[self.key] = stamp
        return drawing

    def open(self, visit: Visit) -> dict[Any, Any]:
        """The visitor opened the tab: draw it unless it shows the present state already.

        If a newer question is answered before the drawing is done, the newer answer is drawn.
        """
        visit.open_tab = self.key
        while True:
            visit = visit.latest
            drawing = gr.skip() if visit.drawn.get(self.key) == self.stamp(visit) else self.draw(visit)
            if visit.successor is None:
                return drawing

    @staticmethod
    def unless_overtaken(visit: Visit, draw: Callable[[Visit], dict[Any, Any]]) -> dict[Any, Any]:
        """A drawing for a visit, or nothing if a newer question was answered meanwhile: its answer is on the page."""
        drawing = draw(visit)
        return drawing if visit.successor is None else gr.skip()
