"""While a question is answered or a file is made, the page takes no input, so that both belong to what is on the screen."""

from __future__ import annotations

from typing import Any

PRIVATE = {"api_visibility": "private"}  # option of events that are no endpoints
LOCK = """(...values) => {
  const page = document.querySelector(".ldvc-columns");
  page.focused = document.activeElement;
  page.inert = true;
  return values;
}"""
UNLOCK = """() => {
  const page = document.querySelector(".ldvc-columns");
  page.inert = false;
  page.focused?.focus({ preventScroll: true });
}"""


def unlock_after(event: Any) -> None:
    """Declare that the page takes input again after an event that locked it."""
    event.success(None, js=UNLOCK, **PRIVATE)
    event.failure(None, js=UNLOCK, **PRIVATE)
