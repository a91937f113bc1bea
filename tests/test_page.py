"""The page as a visitor meets it: app.py as a process of its own, a real Chromium, and a program that uses the API."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldvc.checkpoint import available_arms
from ldvc.errors import LdvcError
from tests.tiny import save_tiny_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DOG = ROOT / "assets" / "examples" / "dog.jpg"
EVIL = "<img src=x onerror=alert(1)>"
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60_000  # milliseconds to wait for an answer, on a busy machine


def model_to_serve(folder: Path) -> str:
    """The bundled model, which knows a dog; while it is being rebuilt, one of random weights."""
    try:
        if available_arms("lite"):
            return "lite"
    except LdvcError:
        pass
    return str(save_tiny_checkpoint(folder / "tiny"))


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of app.py, started as anybody starts it, without network."""
    folder = tmp_path_factory.mktemp("app")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_TEMP_DIR": str(folder / "gradio"),
        "HF_HUB_OFFLINE": "1",
        "LDVC_MODEL": model_to_serve(folder),
    }
    log = folder / "log.txt"
    with log.open("w") as output:
        app = subprocess.Popen([sys.executable, "app.py"], cwd=ROOT, env=environment, stdout=output, stderr=output)
    address = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + 120
        while True:
            if app.poll() is not None:
                pytest.fail(f"app.py ended before it served a page:\n{log.read_text()}")
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                if time.monotonic() > deadline:
                    pytest.fail(f"app.py served no page within two minutes:\n{log.read_text()}")
                time.sleep(0.5)
        yield address
        assert "Traceback" not in log.read_text(), f"the page met an error:\n{log.read_text()}"
    finally:
        app.terminate()
        try:
            app.wait(timeout=10)
        except subprocess.TimeoutExpired:
            app.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A real Chromium; where there is none, the run is red and says what to install."""
    path = os.environ.get("LDVC_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if path is None:
        pytest.fail(
            "Chromium is missing on this machine, and the page is tested in a real browser. Install it "
            "(Debian or Ubuntu: apt-get install chromium) or name it in the environment variable LDVC_CHROMIUM."
        )
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("The Python package playwright is missing. Install it: pip install -r requirements-dev.txt")
    with sync_playwright() as playwright:
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


class Visitor:
    """A visitor with a browser window of their own, who notes what should never happen."""

    def __init__(self, browser, url: str, *, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(SECONDS)
        self.foreign: list[str] = []
        self.dialogs: list[str] = []
        self.page.on("request", self._note_request)
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(url)
        self.page.get_by_role("button", name="Segment", exact=True).wait_for()
        self.own = url

    def _note_request(self, request) -> None:
        if not request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            self.foreign.append(request.url)

    def upload(self, path: Path) -> None:
        """Choose a file and wait until it has arrived."""
        with self.page.expect_response(lambda response: "/upload" in response.url):
            self.page.locator("#photo input[type=file]").set_input_files(path)
        self.page.locator("#photo img").wait_for()

    def type_names(self, names: str) -> None:
        self.page.get_by_label("Class names").fill(names)

    def segment(self) -> None:
        """Press the button and wait for the answer."""
        with self.page.expect_response(lambda response: "/queue/data" in response.url):
            self.page.get_by_role("button", name="Segment", exact=True).click()

    def picture(self, selector: str, *, other_than: str | None = None) -> tuple[np.ndarray, str]:
        """Pixels of the picture that is shown there, and its address."""
        image = self.page.locator(f"{selector} img").first
        image.wait_for()
        deadline = time.monotonic() + 30
        while image.get_attribute("src") == other_than and time.monotonic() < deadline:
            self.page.wait_for_timeout(50)
        source = image.get_attribute("src")
        assert source != other_than, f"{selector} did not change"
        body = self.page.request.get(source).body()
        return np.asarray(Image.open(io.BytesIO(body)).convert("RGB")).astype(int), source

    def close(self) -> None:
        self.context.close()


def differ(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two pictures differ in more than a few stray pixels."""
    return bool((np.abs(first - second).max(axis=2) > 0).mean() > 0.05)


@pytest.fixture
def visitor(browser, url: str) -> Iterator[Visitor]:
    visitor = Visitor(browser, url)
    yield visitor
    assert not visitor.foreign, "the page fetched something from elsewhere"
    assert not visitor.dialogs, "a class name ran as a script"
    visitor.close()


def test_segmenting_a_photo(visitor: Visitor) -> None:
    """Upload, type, press, and see: painted photo, legend, maps, attention with and without LCSA, and that they differ."""
    visitor.upload(DOG)
    visitor.type_names(f"dog, grass, {EVIL}")
    visitor.segment()

    painted, _ = visitor.picture("#overlay")
    original = np.asarray(Image.open(DOG).convert("RGB")).astype(int)
    assert painted.shape == original.shape
    assert np.abs(painted - original).mean() > 5

    with_lcsa, address = visitor.picture("#attention-with-lcsa")
    without_lcsa, _ = visitor.picture("#attention-without-lcsa")
    assert with_lcsa.shape == without_lcsa.shape
    assert with_lcsa.shape[0] / with_lcsa.shape[1] == pytest.approx(original.shape[0] / original.shape[1], abs=0.01)
    assert differ(with_lcsa, without_lcsa), "attention with and without LCSA must not be the same picture"

    legend = visitor.page.locator("#legend")
    assert legend.locator("li").count() == 3
    assert EVIL in legend.inner_text() and legend.locator("img").count() == 0
    assert "unseen" in legend.inner_text()
    assert visitor.page.locator("#class-maps img").count() == 3

    visitor.page.locator("#attended").get_by_label("grass").click()
    other, _ = visitor.picture("#attention-with-lcsa", other_than=address)
    assert differ(other, with_lcsa)


def test_problems_are_sentences_and_nothing_is_lost(visitor: Visitor, tmp_path: Path) -> None:
    page = visitor.page
    visitor.type_names("dog, grass")
    visitor.segment()
    assert "Choose a photo first" in page.locator("#photo-problem [role=alert]").inner_text()

    visitor.upload(DOG)
    visitor.type_names(" , ,")
    visitor.segment()
    assert "at least one class name" in page.locator("#names-problem [role=alert]").inner_text()
    page.locator("#photo-problem [role=alert]").wait_for(state="detached")

    visitor.type_names("dog, grass")
    visitor.segment()
    _, before = visitor.picture("#overlay")
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"this is no picture")
    page.get_by_label("Remove Image").or_(page.get_by_label("Clear")).first.click()
    page.locator("#photo input[type=file]").set_input_files(broken)
    page.wait_for_timeout(1000)
    visitor.segment()
    assert "not a picture" in page.locator("#photo-problem [role=alert]").inner_text()
    assert page.get_by_label("Class names").input_value() == "dog, grass"
    assert page.locator("#overlay img").get_attribute("src") == before
    assert "Traceback" not in page.locator("body").inner_text()


def test_example_one_name_and_none_of_these(visitor: Visitor) -> None:
    page = visitor.page
    page.locator("#examples button").first.click()
    page.locator("#photo img").wait_for()
    assert page.get_by_label("Class names").input_value() == "dog, grass, cat"

    visitor.type_names("dog")
    page.get_by_label("Class names").press("Enter")
    page.locator("#overlay img").wait_for()
    assert page.get_by_label("Class names").input_value() == "dog, background"
    page.get_by_role("button", name="Remove “background”").click()
    page.locator("#attention-note [role=status]").wait_for()
    assert page.get_by_label("Class names").input_value() == "dog"
    assert page.locator("#legend li").count() == 1

    _, before = visitor.picture("#overlay")
    page.locator("#background input").check()
    page.locator("#threshold").wait_for()
    visitor.picture("#overlay", other_than=before)
    assert "none of these" in page.locator("#legend").inner_text()


def test_two_visitors_see_their_own(browser, url: str) -> None:
    """Both are on the page at once, press at the same time, and go on: neither sees the other's photo or names."""
    visitors = [Visitor(browser, url), Visitor(browser, url)]
    photos = [DOG, DOG.with_name("coffee.jpg")]
    questions = ["dog, grass", "cup, spoon"]
    for visitor, photo, names in zip(visitors, photos, questions, strict=True):
        visitor.upload(photo)
        visitor.type_names(names)
    for visitor in visitors:
        visitor.page.get_by_role("button", name="Segment", exact=True).click()
    for visitor, photo, names in zip(visitors, photos, questions, strict=True):
        painted, before = visitor.picture("#overlay")
        assert painted.shape[1::-1] == Image.open(photo).size
        assert [each.strip() for each in visitor.page.locator("#legend .ldvc-name").all_inner_texts()] == names.split(", ")
        visitor.page.locator("#background input").check()  # drawn again from what the server remembers of this visitor
        again, _ = visitor.picture("#overlay", other_than=before)
        assert again.shape == painted.shape
    for visitor in visitors:
        visitor.close()


def test_narrow_window(browser, url: str) -> None:
    """At the width of a phone nothing sticks out, and both attention maps stand side by side."""
    visitor = Visitor(browser, url, width=390)
    visitor.page.locator("#examples button").nth(2).click()
    visitor.page.locator("#photo img").wait_for()
    visitor.segment()
    visitor.picture("#attention-without-lcsa")
    assert visitor.page.evaluate("document.documentElement.scrollWidth") <= 390
    left, right = (
        visitor.page.locator(f"#attention-{which}-lcsa").bounding_box() for which in ("with", "without")
    )
    assert left["x"] + left["width"] <= right["x"] and abs(left["y"] - right["y"]) < 2
    visitor.close()


def test_program(url: str) -> None:
    """The same through gradio_client, which needs no browser."""
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(url, verbose=False)
    overlay, label_map, data = client.predict(
        photo=handle_file(str(DOG)), names="dog, grass, cat", use_background=True, threshold=0.5, api_name="/segment"
    )
    size = Image.open(DOG).size
    labels = np.asarray(Image.open(label_map).convert("L"))
    assert Image.open(overlay).size == size and labels.shape == size[::-1]
    assert [each["name"] for each in data["classes"]] == ["dog", "grass", "cat"]
    for index, each in enumerate(data["classes"], start=1):
        assert each["area"] == pytest.approx((labels == index).mean(), abs=1e-3)
        assert isinstance(each["seen"], bool)
    assert data["none_of_these"] == pytest.approx((labels == 0).mean(), abs=1e-3)
    if data["model"] == "lite":
        assert data["classes"][0]["area"] > 0.1 and data["classes"][2]["area"] < data["classes"][0]["area"]

    with_lcsa, without_lcsa = client.predict(
        photo=handle_file(str(DOG)), names="dog, grass, cat", name="dog", api_name="/attention"
    )
    first, second = (np.asarray(Image.open(path).convert("RGB")).astype(int) for path in (with_lcsa, without_lcsa))
    assert first.shape == second.shape and differ(first, second)

    with pytest.raises(AppError, match="at least one class name"):
        client.predict(photo=handle_file(str(DOG)), names=" ", api_name="/segment")
    with pytest.raises(AppError, match="not a picture"):
        client.predict(photo=handle_file(str(ROOT / "app.py")), names="dog", api_name="/segment")
