"""Start the page as a process, and send it the events of a visitor without a browser."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 300  # seconds to wait for the first page


class PageError(RuntimeError):
    """The page did not start, or an event failed."""


@dataclass
class Served:
    """A running page."""

    address: str  # "http://127.0.0.1:7860/"
    log: Path  # output of the process
    seconds: float  # from the start of the process to the first page
    process: subprocess.Popen

    def wait_for_examples(self) -> None:
        """Wait until the shared answers about the examples are computed, so that later questions do not compete with them."""
        while "The examples are answered." not in self.log.read_text():
            if self.process.poll() is not None:
                raise PageError(f"app.py ended:\n{self.log.read_text()}")
            time.sleep(0.1)


@contextlib.contextmanager
def serve(scratch: Path, *, folder: Path = ROOT, environment: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Run `python app.py` in a folder while the block runs. Raises PageError if it ends or serves no page in time.

    Args:
        scratch: folder for the log and uploaded files.
        folder: folder of app.py.
        environment: variables of the process, without the port; None = those of this process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address, log = f"http://127.0.0.1:{port}/", scratch / "app.log"
    variables = {"GRADIO_TEMP_DIR": str(scratch / "gradio"), "HF_HUB_OFFLINE": "1"}
    variables |= {**(os.environ if environment is None else environment), "GRADIO_SERVER_PORT": str(port)}
    start = time.perf_counter()
    with log.open("w") as output:
        options = {"cwd": folder, "env": variables, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen([sys.executable, "app.py"], **options)
    try:
        while not _answers(address):
            if process.poll() is not None:
                raise PageError(f"app.py ended before it served a page:\n{log.read_text()}")
            if time.perf_counter() - start > PATIENCE:
                raise PageError(f"app.py served no page within {PATIENCE} seconds:\n{log.read_text()}")
            time.sleep(0.1)
        yield Served(address, log, time.perf_counter() - start, process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(address: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(address, timeout=30, trust_env=False).status_code == 200
    return False


class Visitor:
    """A visitor without a browser, with a new session.

    It sends the events of the page's widgets over HTTP, as Gradio's JavaScript does. `gradio_client` checks for answers only
    every 50 ms, which is too slow to measure waiting times.

    Args:
        address: address of the page, with a slash at the end.
    """

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=120, trust_env=False)
        config = self.http.get("config").raise_for_status().json()
        self._api = config["api_prefix"].strip("/")
        self._events = config["dependencies"]
        self._session = secrets.token_hex(8)
        self._kinds = {each["id"]: each["type"] for each in config["components"]}
        self._props = {each["id"]: dict(each["props"]) for each in config["components"]}
        self._ids = {props["elem_id"]: number for number, props in self._props.items() if props.get("elem_id")}

    def value(self, elem_id: str, prop: str = "value") -> Any:
        """The value of a component, or another of its properties."""
        return self._props[self._ids[elem_id]].get(prop)

    def set(self, elem_id: str, value: Any) -> None:
        """Set the value of a component, as typing does, without an event."""
        self._props[self._ids[elem_id]]["value"] = value

    def upload(self, path: str | Path) -> dict[str, Any]:
        """Upload a file and return the value of a picture component with this file."""
        path = Path(path)
        answer = self.http.post(f"{self._api}/upload", files={"files": (path.name, path.read_bytes())}).raise_for_status()
        return {"path": answer.json()[0], "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}

    def send(self, elem_id: str, event: str) -> dict[str, Any]:
        """Send an event of a component, without waiting for the answer, and return Gradio's description of the event.

        Raises PageError if the page has no such event, and httpx.HTTPStatusError if it is refused (503: the queue is full).
        """
        source = self._ids[elem_id]
        handlers = (each for each in self._events if [source, event] in each["targets"] and each["backend_fn"])
        if (handler := next(handlers, None)) is None:
            raise PageError(f"The server has no event {event!r} of #{elem_id}.")
        question = {
            "data": [None if self._kinds[each] == "state" else self._props[each].get("value") for each in handler["inputs"]],
            "event_data": None,
            "fn_index": handler["id"],
            "trigger_id": source,
            "session_hash": self._session,
        }
        self.http.post(f"{self._api}/queue/join", json=question).raise_for_status()
        return handler

    def trigger(self, elem_id: str, event: str) -> dict[str, Any]:
        """Send an event (see `send`) and return its changes by the elem_id of the component. Raises PageError if it failed."""
        outputs = self.send(elem_id, event)["outputs"]
        names = {component: name for name, component in self._ids.items()}
        changes = {}
        for component, change in zip(outputs, self._answer(), strict=True):
            if not (isinstance(change, dict) and change.get("__type__") == "update"):
                change = {"value": change}
            self._props[component] |= {**change, **change.get("props", {})}
            changes[names.get(component, str(component))] = change
        return changes

    def ask(self, names: str, photo: str | Path | None = None) -> dict[str, Any]:
        """Choose a photo (None = the last one), type names, and press the button; see `trigger`."""
        if photo is not None:
            self.set("photo", self.upload(photo))
        self.set("names", names)
        return self.trigger("run", "click")

    def _answer(self) -> list[Any]:
        """Wait for the event of the session and return its outputs."""
        with self.http.stream("GET", f"{self._api}/queue/data", params={"session_hash": self._session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[len("data:") :]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    if not message["success"]:
                        raise PageError(str(message["output"].get("error")))
                    return message["output"]["data"]
        raise PageError("The page closed the connection before it answered.")

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Keep the tab open while the block runs; at its end, the server notices that the tab is closed."""
        with self.http.stream("GET", f"{self._api}/heartbeat/{self._session}") as stream:
            lines = stream.iter_lines()  # a reference, without which httpx closes the connection
            next(lines)
            yield

    def close(self) -> None:
        """Close the connection."""
        self.http.close()
