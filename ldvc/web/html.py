"""Pieces of HTML. Every text that a visitor can influence goes through `escape` here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from ldvc.visualize import NONE_COLOUR, heat_gradient
from ldvc.web import texts


@dataclass(frozen=True)
class LegendEntry:
    """One line of the legend; `share` of the picture's area in 0..1."""

    name: str
    seen: bool
    colour: str
    share: float


def header(model: str) -> str:
    """Title, what the page is for, and which model answers."""
    return (
        f'<header class="ldvc-header"><div><h1>{texts.TITLE}</h1><p class="ldvc-tagline">{texts.TAGLINE}</p></div>'
        f'<span class="ldvc-model" title="The checkpoint that answers">model: {escape(model)}</span></header>'
    )


def section(title: str, help_text: str = "") -> str:
    """Heading of a part of the page."""
    paragraph = f"<p>{help_text}</p>" if help_text else ""
    return f'<div class="ldvc-section"><h2>{title}</h2>{paragraph}</div>'


def caption(text: str) -> str:
    """A small heading over one field or picture."""
    return f'<h3 class="ldvc-caption">{text}</h3>'


def problem(sentence: str) -> str:
    """A sentence beside the field it concerns; read out at once by screen readers."""
    return f'<p class="ldvc-problem" role="alert">{escape(sentence)}</p>'


def notice(sentence: str) -> str:
    """A remark that is not an error."""
    return f'<p class="ldvc-notice" role="status">{escape(sentence)}</p>'


def empty(sentence: str) -> str:
    """What stands where a result will be, and how to get it."""
    return f'<p class="ldvc-empty">{escape(sentence)}</p>'


def empty_result() -> str:
    """What stands where the painted photo will be."""
    return empty(texts.RESULT_EMPTY)


def percent(share: float) -> str:
    """0.3456 -> "35 %"; a little is "<1 %", not "0 %"."""
    if 0 < share < 0.01:
        return "&lt;1&#8239;%"
    return f"{share * 100:.0f}&#8239;%"


def legend(entries: Sequence[LegendEntry], none_share: float | None) -> str:
    """Colour, name, seen or unseen, and share of the area of every class."""
    lines = [_legend_line(entry.name, entry.colour, entry.share, entry.seen) for entry in entries]
    if none_share is not None:
        lines.append(_legend_line(texts.NONE_OF_THESE, NONE_COLOUR, none_share, None))
    return (
        f'<ul class="ldvc-legend" aria-label="Legend">{"".join(lines)}</ul>'
        f'<p class="ldvc-footnote">{texts.SEEN_HELP}</p>'
    )


def _legend_line(name: str, colour: str, share: float, seen: bool | None) -> str:
    kind = {True: texts.SEEN, False: texts.UNSEEN, None: ""}[seen]
    tag = f'<span class="ldvc-tag ldvc-{kind}">{kind}</span>' if kind else "<span></span>"
    stripes = " ldvc-striped" if seen is False else ""
    return (
        f'<li><span class="ldvc-swatch{stripes}" style="--c:{colour}"></span>'
        f'<span class="ldvc-name" title="{escape(name)}">{escape(name)}</span>{tag}'
        f'<span class="ldvc-bar"><i style="width:{min(max(share, 0), 1) * 100:.1f}%;--c:{colour}"></i></span>'
        f'<span class="ldvc-share">{percent(share)}</span></li>'
    )


def scale_bar() -> str:
    """The colour bar of all heat maps."""
    ticks = "".join(f"<span>{tick}</span>" for tick in ("0", "0.25", "0.5", "0.75", "1"))
    return (
        f'<div class="ldvc-scale" role="img" aria-label="{texts.SCALE_LABEL}: dark violet is 0, pale yellow is 1">'
        f'<div class="ldvc-gradient" style="background:{heat_gradient()}"></div>'
        f'<div class="ldvc-ticks">{ticks}</div></div>'
    )
