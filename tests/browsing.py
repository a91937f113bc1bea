"""The page, as a separate process or in this one, and a visitor in a real Chromium."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools.remote import ROOT, serve

DOG = ROOT / "assets" / "examples" / "dog.jpg"
EVIL = "<img src=x onerror=alert(1)>"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OWN = ("http://127.0.0.1", "data:", "blob:")  # prefixes of the addresses that the page may fetch
SECONDS = 60_000  # timeout in milliseconds for an answer on a busy machine


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of app.py, started once as a user starts it, without network."""
    with serve(tmp_path_factory.mktemp("app"), environment={**os.environ, "LDVC_MODEL": "lite"}) as served:
        served.wait_for_examples()
        yield served.address
        log = served.log.read_text()
        assert "Traceback" not in log, f"the page met an error:\n{log}"


@pytest.fixture(scope="session")
def registry(tiny_checkpoint: Path):
    """The models of a page with the tiny checkpoint."""
    from ldvc.web.models import ModelRegistry  # here, because it loads Gradio

    return ModelRegistry(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def segmenter(registry):
    from ldvc.web.segmenter import Segmenter

    return Segmenter(registry)


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a small photo whose sides are not multiples of the patch size."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (6, 9, 3), dtype=np.uint8))
    path = tmp_path_factory.mktemp("photos") / "my photo.v2.png"
    small.resize((215, 130), Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.fixture(scope="module")
def page(registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """The page, served by this process, with a new folder for temporary files."""
    with served_here(registry, tmp_path_factory.mktemp("gradio")) as page:
        yield page


@contextmanager
def served_here(registry, folder: Path, **variables: str) -> Iterator:
    """Serve a page from this process, with a folder for temporary files and environment variables."""
    from ldvc.web.page import build_page, launch_options

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"GRADIO_TEMP_DIR": str(folder), "HF_HUB_OFFLINE": "1", **variables}.items():
            patch.setenv(name, value)
        page = build_page(registry)
        page.launch(**launch_options(), prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
        yield page
        page.close()


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """A real Chromium; without one, the tests fail and say what to install."""
    path = os.environ.get("LDVC_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        pytest.fail(
            "Chromium is missing on this machine, and the page is tested in a real browser. Install it "
            "(Debian or Ubuntu: apt-get install chromium) or name it in the environment variable LDVC_CHROMIUM."
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


def pixels(file: bytes) -> np.ndarray:
    """The pixels of a picture file, int (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


def percent(text: str) -> float:
    """The number in a percentage of the page; "<1" gives 0.5."""
    return float(text.strip().split("\u202f")[0].replace("<1", "0.5"))


class Visitor:
    """A visitor with a new browser window. `close` fails if the page did something that it must never do.

    Args:
        opening: whether the page opens with an answer, as it does with app.py.
    """

    def __init__(self, browser, url: str, *, width: int = 1280, dark: bool = False, opening: bool = True) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme="dark" if dark else "light", accept_downloads=True
        )
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.note("fetched", request.url, not request.url.startswith(OWN)))
        self.page.on("pageerror", lambda error: self.note("a script failed", str(error)))
        self.page.on("console", lambda message: self.note("console", message.text, "Content Security Policy" in message.text))
        self.page.on("dialog", lambda dialog: (self.note("a name ran as a script", dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.page.get_by_role("button", name="Segment", exact=True).wait_for()
        self.opening_answers = 0
        if opening:
            self.wait_for_answer()
            self.opening_answers = self.answers()

    def note(self, kind: str, text: str, is_fault: bool = True) -> None:
        self.faults += [f"{kind}: {text}"] if is_fault else []

    def upload(self, path: Path) -> None:
        """Replace the present photo by a file and wait until the upload has finished."""
        if self.page.locator("#photo img").count():
            self.remove_photo()
        with self.page.expect_response(lambda response: "/upload" in response.url):
            self.page.locator("#photo input[type=file]").set_input_files(path)
        self.page.locator("#photo img").wait_for()

    def remove_photo(self) -> None:
        self.page.get_by_label("Remove Image").or_(self.page.get_by_label("Clear")).first.click()
        self.page.locator("#photo img").wait_for(state="detached")

    def type_names(self, names: str) -> None:
        self.page.locator("#names textarea").fill(names)

    def segment(self) -> None:
        """Press the button and wait until the page takes input again."""
        with self.page.expect_response("**/queue/join*"):  # the page is locked by then
            self.page.get_by_role("button", name="Segment", exact=True).click()
        self.wait_until_unlocked()

    def wait_until_unlocked(self) -> None:
        """Wait until no question is being answered and no file is being made."""
        self.page.wait_for_function("!document.querySelector('.ldvc-columns').inert")

    def ask(self, names: str) -> None:
        """Type names, press the button, and wait until the answer is painted."""
        before = self.answers()
        self.type_names(names)
        self.segment()
        self.wait_for_answer(before)

    def answers(self) -> int:
        """The number of answers that the viewer has painted."""
        return int(self.page.evaluate("document.querySelector('[data-drawn]')?.dataset.drawn ?? 0"))

    def wait_for_answer(self, more_than: int | None = None) -> None:
        """Wait until the viewer has painted more than `more_than` answers; None: more than when the page opened."""
        self.page.wait_for_function(
            "count => Number(document.querySelector('[data-drawn]')?.dataset.drawn ?? 0) > count",
            arg=self.opening_answers if more_than is None else more_than,
        )

    def painted(self) -> np.ndarray:
        """Pixels of the painted photo, int (H, W, 3)."""
        uri = self.page.evaluate("document.querySelector('#overlay canvas').toDataURL()")
        return pixels(base64.b64decode(uri.partition(",")[2]))

    def changed_by(self, action) -> np.ndarray:
        """Call `action`, wait until the browser has painted the photo again, and return its pixels."""
        before = self.page.evaluate("document.querySelector('#overlay canvas').toDataURL()")
        action()
        self.page.wait_for_function("before => document.querySelector('#overlay canvas').toDataURL() !== before", arg=before)
        return self.painted()

    def legend(self) -> list[str]:
        return [each.strip() for each in self.page.locator("#legend li:not([hidden]) .ldvc-name").all_inner_texts()]

    def shares(self) -> list[float]:
        """The area in percent in each line of the legend."""
        return [percent(each) for each in self.page.locator("#legend li:not([hidden]) .ldvc-share").all_inner_texts()]

    def download(self, kind: str) -> tuple[str, bytes]:
        """Press a download button and return name and content of the saved file."""
        with self.page.expect_download() as download:
            self.page.locator(f"#download-{kind}").click()
        self.wait_until_unlocked()
        return download.value.suggested_filename, Path(download.value.path()).read_bytes()

    def close(self) -> None:
        assert not self.faults
        self.context.close()


@pytest.fixture(scope="module")
def dog_visitor(request: pytest.FixtureRequest, browser, url: str) -> Iterator[Visitor]:
    """A visitor who has segmented the photo of the dog by `NAMES` of the test module."""
    visitor = Visitor(browser, url)
    visitor.upload(DOG)
    visitor.ask(request.module.NAMES)
    yield visitor
    assert "Traceback" not in visitor.page.locator("body").inner_text()
    visitor.close()


def set_range(page, selector: str, value: float) -> None:
    """Move a slider with the events of a mouse: input while it moves, change at the end."""
    page.locator(selector).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input', {bubbles: true}));"
        " slider.dispatchEvent(new Event('change', {bubbles: true})); }",
        value,
    )


def open_tab(visitor: Visitor, name: str, expected: str) -> None:
    """Click a tab and wait for its content."""
    visitor.page.get_by_role("tab", name=name, exact=True).click()
    visitor.page.locator(expected).first.wait_for()


@contextmanager
def held_back(page, pattern: str = "**/queue/join*") -> Iterator[list]:
    """Hold back the requests of the block. At its end they are sent in reverse order, each after the previous answer."""
    routes, is_over = [], False
    page.route(pattern, lambda route: route.continue_() if is_over else routes.append(route))
    yield routes
    is_over = True
    for route in reversed(routes):
        with page.expect_response(lambda response, sent=route.request: response.request == sent):
            route.continue_()
    page.unroute(pattern)
