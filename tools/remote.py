"""The page from outside: start it as a process of its own, and visit it as a browser does, without a screen.

`Visitor` speaks the protocol of Gradio's own JavaScript: the photo is uploaded, an event joins the queue, its answer arrives
as a server-sent event, pictures are fetched. So it meets the very events of the page, which `gradio_client` must not call.
"""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).resolve().parents[1]


class PageError(RuntimeError):
    """The page did not start, or an event of it failed."""


@dataclass
class Served:
    """A page that is being served.

    Attributes:
        address: "http://127.0.0.1:7860/".
        log: file with what the process printed.
        seconds: from the start of the process to the first page.
        waited: how many of them it was kept waiting for a core by other processes (0 where the system does not say).
        process: the server.
    """

    address: str
    log: Path
    seconds: float
    waited: float
    process: subprocess.Popen


@contextlib.contextmanager
def serve(
    scratch: Path, *, folder: Path = ROOT, environment: Mapping[str, str] | None = None, patience: float = 120
) -> Iterator[Served]:
    """Run `python app.py` in a folder until the block is left.

    Args:
        scratch: for the log and uploaded files.
        folder: holds app.py.
        environment: of the process; None = this process's own. The port is added.
        patience: seconds to wait for the first page.

    Raises:
        PageError: it ended, or served nothing in time.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = scratch / "app.log"
    variables = {
        "GRADIO_TEMP_DIR": str(scratch / "gradio"),
        "HF_HUB_OFFLINE": "1",
        **(os.environ if environment is None else environment),
        "GRADIO_SERVER_PORT": str(port),
    }
    address = f"http://127.0.0.1:{port}/"
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while True:
            if process.poll() is not None:
                raise PageError(f"app.py ended before it served a page:\n{log.read_text()}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(address, timeout=30, trust_env=False).status_code == 200:
                    break
            if time.perf_counter() - start > patience:
                raise PageError(f"app.py served no page within {patience:.0f} seconds:\n{log.read_text()}")
            time.sleep(0.1)
        yield Served(address, log, time.perf_counter() - start, seconds_waited(process.pid), process)
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def seconds_waited(process: int) -> float:
    """How long the main thread of a process was ready to run and did not get a core (Linux: /proc/PID/schedstat)."""
    try:
        return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@dataclass
class Answer:
    """What an event changed.

    Attributes:
        seconds: from the click to the last answer, pictures not yet fetched.
        outputs: by id of the component, as sent (a value, or an update with "__type__").
        errors: what failed events said.
    """

    seconds: float = 0.0
    outputs: dict[int, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)


class Visitor:
    """One visitor with a session of their own.

    Args:
        address: of the page, with a slash at the end.
    """

    def __init__(self, address: str) -> None:
        self.http = httpx.Client(base_url=address, timeout=120, trust_env=False)
        config = self.http.get("config").raise_for_status().json()
        self._api = config["api_prefix"].strip("/")
        self._dependencies = config["dependencies"]
        self.session = secrets.token_hex(8)
        self.values = {each["id"]: each["props"].get("value") for each in config["components"]}
        self.ids = {
            each["props"]["elem_id"]: each["id"] for each in config["components"] if each["props"].get("elem_id")
        }
        self._kinds = {each["id"]: each["type"] for each in config["components"]}
        loading = [each for each in self._dependencies if any(event == "load" for _, event in each["targets"])]
        self._run(loading, Answer())

    def value(self, elem_id: str) -> Any:
        """What a component shows."""
        return self.values[self.ids[elem_id]]

    def has_event(self, elem_id: str, event: str) -> bool:
        """Whether the server answers this event; what the browser does alone is no business of the server."""
        return any(each["backend_fn"] for each in self._targeting(elem_id, event))

    def upload(self, path: str | Path) -> dict[str, Any]:
        """Send a file; the value of a picture component that holds it."""
        path = Path(path)
        answer = self.http.post(f"{self._api}/upload", files={"files": (path.name, path.read_bytes())})
        return {
            "path": answer.raise_for_status().json()[0],
            "orig_name": path.name,
            "meta": {"_type": "gradio.FileData"},
        }

    def set(self, elem_id: str, value: Any) -> None:
        """Put a value into a component, as typing or choosing does, without any event."""
        self.values[self.ids[elem_id]] = value

    def trigger(self, elem_id: str, event: str) -> Answer:
        """Do something to a component and wait for all that follows from it.

        Raises:
            PageError: the page has no such event.
        """
        dependencies = self._targeting(elem_id, event)
        if not dependencies:
            raise PageError(f"Nothing on the page listens to {event!r} of #{elem_id}.")
        answer, start = Answer(), time.perf_counter()
        self._run(dependencies, answer, trigger=self.ids[elem_id])
        answer.seconds = time.perf_counter() - start
        return answer

    def fetch(self, value: Any) -> bytes:
        """The file that a component's value names."""
        return self.http.get(value["url"]).raise_for_status().content

    def close(self) -> None:
        """Leave."""
        self.http.close()

    def _targeting(self, elem_id: str, event: str) -> list[dict[str, Any]]:
        component = self.ids.get(elem_id)
        return [each for each in self._dependencies if [component, event] in each["targets"]]

    def _run(self, dependencies: list[dict], answer: Answer, trigger: int | None = None) -> None:
        """Events of one action together, then what is chained to them."""
        waiting = {self._join(each, trigger): each for each in dependencies if each["backend_fn"]}
        follow: list[dict] = []
        while waiting:
            for event_id, message in self._messages():
                dependency = waiting.pop(event_id, None)
                if dependency is not None:
                    self._take(dependency, message, answer)
                    follow += self._chained(dependency, success=message["success"])
                if not waiting:
                    break
        if follow:
            self._run(follow, answer, trigger)

    def _join(self, dependency: dict, trigger: int | None) -> str:
        """Put an event into the queue; returns its id."""
        data = [None if self._kinds[each] == "state" else self.values[each] for each in dependency["inputs"]]
        question = {
            "data": data,
            "event_data": None,
            "fn_index": dependency["id"],
            "trigger_id": trigger,
            "session_hash": self.session,
        }
        return self.http.post(f"{self._api}/queue/join", json=question).raise_for_status().json()["event_id"]

    def _messages(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(event id, message) of events as they are completed; the page closes the stream when none is waiting."""
        with self.http.stream("GET", f"{self._api}/queue/data", params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[len("data:") :]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    yield message["event_id"], message
                elif message.get("msg") == "unexpected_error":
                    raise PageError(str(message.get("message")))

    def _take(self, dependency: dict, message: dict[str, Any], answer: Answer) -> None:
        """Show what an event answered."""
        if not message["success"]:
            answer.errors.append(str(message["output"].get("error")))
            return
        for component, output in zip(dependency["outputs"], message["output"]["data"], strict=True):
            is_update = isinstance(output, dict) and output.get("__type__") == "update"
            if not is_update:
                self.values[component] = output
            elif "value" in output:
                self.values[component] = output["value"]
            if not is_update or len(output) > 1:
                answer.outputs[component] = output

    def _chained(self, dependency: dict, *, success: bool) -> list[dict]:
        """Events that follow on this one."""
        return [
            each
            for each in self._dependencies
            if each["trigger_after"] == dependency["id"]
            and (success or not each["trigger_only_on_success"])
            and not (success and each.get("trigger_only_on_failure"))
        ]
