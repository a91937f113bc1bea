"""Pieces of HTML. Every text that a visitor can influence goes through `escape`, here and in the views."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from html import escape

from ldvc.class_names import plain, synonyms_of
from ldvc.visualize import heat_gradient
from ldvc.web import texts

MANY_CHIPS = 12  # from here on, a line says how many there are


def header() -> str:
    """Title and what the page is for."""
    return (
        f'<header class="ldvc-header"><div><h1>{texts.TITLE}</h1><p class="ldvc-tagline">{texts.TAGLINE}</p></div>'
        f'<a class="ldvc-paper" href="{texts.PAPER}" target="_blank" rel="noopener">{texts.PAPER_LABEL}</a></header>'
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


def listed(words: Sequence[str]) -> str:
    """["dog", "cat", "cow"] -> “dog”, “cat” and “cow”; not escaped."""
    *others, last = [f"“{word}”" for word in words]
    return f"{', '.join(others)} and {last}" if others else last


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


def chips(entries: Sequence[tuple[str, str | None]], none: Collection[str] = ()) -> str:
    """One chip per class, each with a button to remove it, and how many were seen where there are many.

    Args:
        entries: (name, the learned name that makes it seen, or None: unseen).
        none: those of the names that are no classes but mean "none of these".
    """
    if not entries:
        return ""
    items = []
    for name, source in entries:
        kind = texts.UNSEEN if source is None else texts.SEEN
        tag, kind = (texts.NONE_OF_THESE, "none") if name in none else (kind, kind)
        elsewhere = kind == texts.SEEN and plain(source) not in map(plain, synonyms_of(name))
        title = f' title="{escape(texts.SEEN_AS.format(name=source))}"' if elsewhere else ""
        items.append(
            f'<li class="ldvc-chip"><span class="ldvc-name">{escape(name)}</span>'
            f'<span class="ldvc-tag ldvc-{kind}"{title}>{tag}</span>'
            f'<button type="button" data-name="{escape(name)}" aria-label="{escape(texts.REMOVE.format(name=name))}">×</button>'
            "</li>"
        )
    classes = [source for name, source in entries if name not in none]
    summary = ""
    if len(entries) > MANY_CHIPS:
        count = sum(source is not None for source in classes)
        summary = f'<p class="ldvc-footnote">{texts.CHIPS_COUNT.format(all=len(classes), seen=count)}</p>'
    return f'{summary}<ul class="ldvc-chips" aria-label="{texts.CHIPS_LABEL}">{"".join(items)}</ul>'


def scale_bar() -> str:
    """The colour bar of all heat maps."""
    ticks = "".join(f"<span>{tick}</span>" for tick in ("0", "0.25", "0.5", "0.75", "1"))
    return (
        f'<div class="ldvc-scale" role="img" aria-label="{texts.SCALE_LABEL}: dark violet is 0, pale yellow is 1">'
        f'<div class="ldvc-gradient" style="background:{heat_gradient()}"></div>'
        f'<div class="ldvc-ticks">{ticks}</div></div>'
    )
