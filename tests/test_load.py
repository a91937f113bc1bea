"""Many visitors: memory and queue have limits, and nobody gets the answer of another visitor."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from ldvc.errors import LdvcError
from ldvc.predictor import PREDICTOR_DECODERS
from ldvc.web import page as page_module
from ldvc.web import temporary, texts
from ldvc.web.models import ModelRegistry
from ldvc.web.page import answers_limit
from ldvc.web.segmenter import Segmenter
from ldvc.web.session import Session, Visits, size_of
from tests.browsing import DOG, served_here
from tools import load_test
from tools.remote import PageError, Visitor

PATIENCE = 60  # seconds until a test fails


@pytest.fixture
def serve(registry: ModelRegistry, tmp_path: Path) -> Iterator[Callable]:
    """A function that serves a page from this process, with environment variables."""
    with ExitStack() as pages:
        yield lambda **variables: pages.enter_context(served_here(registry, tmp_path / "gradio", **variables))


def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "the condition did not become true"
        time.sleep(0.01)


def test_the_oldest_answers_are_forgotten(registry: ModelRegistry) -> None:
    segmenter = Segmenter(registry)
    sessions = [Session(segmenter.segment(str(DOG), names)) for names in ("dog, cat", "dog, sky", "dog, grass")]
    size = size_of(sessions[0].answer)
    assert size >= sessions[0].answer.image.picture.nbytes
    visits = Visits(int(2.5 * size))
    for session in sessions[:2]:
        visits.keep(session)
    assert visits.total == pytest.approx(2 * size, rel=0.05)
    visits.keep(sessions[0])  # now sessions[1] is the oldest
    visits.keep(sessions[2])
    assert [session.answer is None for session in sessions] == [False, True, False] == [each.expired for each in sessions]

    segmenter.results(sessions[2].answer, *PREDICTOR_DECODERS)
    assert size_of(sessions[2].answer) > size, "later results count"
    sessions[1].answer = segmenter.segment(str(DOG), "dog, sky")
    small = Visits(1)
    for session in sessions:
        small.keep(session)
        assert session.answer is not None and not session.expired, "the newest answer is kept at any size"
    del session, sessions
    assert small.total == visits.total == 0, "a deleted session no longer counts"


def test_limit_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers_limit() == 1_500_000_000
    monkeypatch.setenv("LDVC_ANSWERS_GB", "0.25")
    assert answers_limit() == 250_000_000
    for text in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("LDVC_ANSWERS_GB", text)
        with pytest.raises(LdvcError, match=f"a number of gigabytes, such as 1.5, not “{text}”"):
            answers_limit()


def test_an_expired_session_is_told_in_a_sentence(serve: Callable) -> None:
    """There is memory for one answer. The action that the sentence names restores the answer."""
    page = serve(LDVC_ANSWERS_GB="1e-9")
    first, second = Visitor(page.local_url), Visitor(page.local_url)
    for visitor in (first, second):
        answer = visitor.ask("dog, grass", DOG)["overlay"]["props"]["answer"]
    changes = first.trigger("tab-compare", "select")
    assert any(texts.EXPIRED in str(change.get("value")) for change in changes.values())
    assert texts.EXPIRED in first.trigger("download-data", "click")["download-problem"]["value"]
    first.trigger("tab-segment", "select")
    changes = first.trigger("run", "click")
    assert changes["overlay"]["props"]["answer"] == answer
    assert changes["space-file-problem"] == {"__type__": "update"}, "nothing is sent for an output that does not change"
    first.close(), second.close()


def test_a_closed_tab_frees_its_session(serve: Callable) -> None:
    page = serve()
    visitor = Visitor(page.local_url)
    with visitor.connected():
        visitor.ask("dog, grass", DOG)
        assert page.visits.total > 0
    until(lambda: page.visits.total == 0)
    visitor.close()


def test_components_of_a_session_do_not_add_up(serve: Callable, tmp_path: Path) -> None:
    """Gradio makes a new component for each update and keeps it in the session."""
    page = serve()
    guest = load_test.Guest(page.local_url, 0, tmp_path)
    for names in guest.names:
        guest.ask(names)
    (state,) = page.app.state_holder.session_data.values()
    assert state.blocks_config.blocks.keys() == page.blocks.keys() == state.config_values.keys()


def test_temporary_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(temporary.VARIABLE, str(tmp_path))
    for age, name in enumerate(("new", "middle", "old")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "photo.jpg").write_bytes(bytes(100))
        os.utime(tmp_path / name / "photo.jpg", (time.time() - 60 * age,) * 2)
    temporary.remove_oldest(200)
    assert sorted(path.parent.name for path in tmp_path.rglob("*.jpg")) == ["middle", "new"]
    os.utime(tmp_path / "middle" / "photo.jpg", (0, 0))
    temporary.remove_oldest()
    assert [path.parent.name for path in tmp_path.rglob("*.jpg")] == ["new"], "a file of 1970"
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=50))
    temporary.remove_oldest()
    assert not list(tmp_path.rglob("*.jpg")), "files take at most half of the available space"


class Waiting:
    """An event of an endpoint, and the messages of the queue about it."""

    def __init__(self, client: httpx.Client, name: str, session: str) -> None:
        config = client.get("config").json()
        (number,) = (each["id"] for each in config["dependencies"] if each["api_name"] == name)
        question = {"data": [""], "fn_index": number, "session_hash": session}
        self.joined = client.post("gradio_api/queue/join", json=question)
        self.messages: list[dict] = []
        self.client = httpx.Client(base_url=client.base_url, timeout=PATIENCE, trust_env=False)
        self.thread = threading.Thread(target=self._listen, args=(session,), daemon=True)
        if self.joined.status_code == 200:
            self.thread.start()

    def _listen(self, session: str) -> None:
        address = self.client.stream("GET", "gradio_api/queue/data", params={"session_hash": session})
        with suppress(httpx.TransportError), address as self.stream:  # raised after `leave`
            for line in self.stream.iter_lines():
                if line.startswith("data:"):
                    self.messages.append(json.loads(line[5:]))
                if self.kinds()[-1:] == ["process_completed"]:
                    return

    def leave(self) -> None:
        """Close the connection, as a closed tab does."""
        self.stream.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)

    def kinds(self) -> list[str]:
        return [each["msg"] for each in self.messages]

    def place(self) -> int | None:
        places = [each["rank"] for each in self.messages if each["msg"] == "estimation"]
        return places[-1] if places else None


def test_the_queue(serve: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A waiting visitor sees the place in the queue; a full queue refuses at once; a closed tab frees its place."""
    entered, go_on, real = threading.Event(), threading.Event(), page_module.api.class_lists

    def slow() -> dict:
        entered.set()
        assert go_on.wait(PATIENCE)
        return real()

    monkeypatch.setattr("ldvc.web.api.class_lists", slow)
    monkeypatch.setattr(page_module, "QUEUE_SIZE", 2)
    page = serve()
    with httpx.Client(base_url=page.local_url, timeout=PATIENCE, trust_env=False) as client:
        try:
            first = Waiting(client, "vocabulary", "a")
            assert entered.wait(PATIENCE)
            waiting = [Waiting(client, "vocabulary", session) for session in ("b", "c")]
            until(lambda: [each.place() for each in waiting] == [0, 1])
            refused = Waiting(client, "vocabulary", "d").joined
            assert refused.status_code == 503 and refused.json() == {"detail": texts.BUSY}
            waiting[1].leave()
            until(lambda: Waiting(client, "vocabulary", "e").joined.status_code == 200)
        finally:
            go_on.set()
        for each in (first, waiting[0]):
            each.thread.join(PATIENCE)
            assert each.kinds()[-1] == "process_completed" and each.messages[-1]["success"]


def test_nobody_gets_another_answer(serve: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    page = serve()
    arguments = Namespace(visitors=4, seconds=PATIENCE, requests=12)
    assert load_test.run(page.local_url, tmp_path, None, tmp_path / "gradio", arguments)
    assert "wrong 0, failed 0" in capsys.readouterr().out


def test_a_mixed_up_answer_is_found(serve: Callable, tmp_path: Path) -> None:
    page = serve()
    guests = [load_test.Guest(page.local_url, number, tmp_path) for number in range(2)]
    for guest in guests:
        guest.expected = {names: guest.ask(names) for names in guest.names}
    guests[0].visitor, guests[1].visitor = guests[1].visitor, guests[0].visitor
    load = load_test.Load(guests, PATIENCE, 4)
    for guest in guests:
        load.visit(guest)
    assert load.outcome.wrong == len(load.outcome.seconds) == 4 and not load.outcome.failures
    with pytest.raises(PageError, match="at least one class name"):
        guests[0].ask(" ")
