"""The dashboard in Firefox: one journey through all of it, over WebDriver BiDi, which needs no other program."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from support import running, wait_until
from websockets.sync.client import ClientConnection, connect

from tests.dashboard_stub import Stub, event, serving, status
from tests.dashboard_tab import three

PREFERENCES = {
    "app.update.enabled": False,
    "browser.aboutwelcome.enabled": False,
    "datareporting.policy.dataSubmissionEnabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "services.settings.server": "data:,#remote-settings-dummy/v1",
    "toolkit.telemetry.enabled": False,
}


class Firefox:
    """A page in it, and what went wrong there."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._numbers = socket, count(1)
        self.errors: list[str] = []
        self.call("session.new", capabilities={})
        self.call("session.subscribe", events=["log.entryAdded"])
        self._page = self.call("browsingContext.getTree")["contexts"][0]["context"]

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("method") == "log.entryAdded" and answer["params"]["level"] in ("error", "warn"):
                self.errors.append(answer["params"]["text"])
            if answer.get("id") == number:
                assert answer["type"] == "success", answer
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("browsingContext.navigate", context=self._page, url=url, wait="complete")

    def run(self, expression: str) -> Any:
        """The value of an expression, which is text, a number or a truth."""
        answer = self.call("script.evaluate", expression=expression, target={"context": self._page}, awaitPromise=True)
        assert answer["type"] == "success", answer
        return answer["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({selector!r})?.innerText ?? ''"))

    def shows(self, selector: str, words: str) -> None:
        wait_until(lambda: re.search(words, self.text(selector)), f"{selector} shows {words}")

    def is_visible(self, selector: str) -> None:
        wait_until(lambda: self.run(f"document.querySelector({selector!r})?.checkVisibility() === true"), selector)

    def click(self, selector: str) -> None:
        wait_until(lambda: self.run(f"document.querySelector({selector!r}) !== null"), selector)
        self.run(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        self.run(f"document.querySelector({selector!r}).dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")


@pytest.fixture
def firefox(tmp_path: Path) -> Iterator[Firefox]:
    lines = [f'user_pref("{name}", {json.dumps(value)});' for name, value in PREFERENCES.items()]
    (tmp_path / "user.js").write_text("\n".join(lines), encoding="ascii")
    program = shutil.which("firefox-esr") or "firefox"
    command = [program, "--headless", "--no-remote", "--profile", str(tmp_path), "--remote-debugging-port", "0"]
    with running(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines_of_it = (line.partition("listening on ")[2].strip() for line in process.stderr)
        address = next(filter(None, lines_of_it))
        with connect(f"{address}/session", max_size=None) as socket:
            yield Firefox(socket)


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serving(three()) as made:
        made.tell(event(1, "backend_up", "backend_1"), event(2, "backend_down", "backend_3", "error"))
        yield made


def test_a_journey(firefox: Firefox, stub: Stub) -> None:
    stub.page_token = None
    firefox.open(f"{stub.url}/dashboard")
    firefox.shows("#pill", "Live")
    firefox.shows("#sentence", "backend_3 down for .* Its traffic goes to 2 others")
    assert firefox.run("document.querySelectorAll('#flow .node').length") == 3
    firefox.click("#send")
    firefox.shows("#traffic-result", "10 ok, 0 failed")

    firefox.click("#backend-rows tr:nth-child(2) .c-menu button")
    firefox.shows("#menu", "backend_2")
    firefox.run("document.activeElement.click()")  # the first entry has the focus
    firefox.shows("#toasts", "backend_2 gets no new requests.")
    firefox.shows("#backend-rows tr:nth-child(2)", "Draining")
    firefox.click("#toasts .undo")
    wait_until(lambda: stub.writes[-1:] == [("PATCH /backends/backend_2", {"admin_state": "ready"})], "undone")

    firefox.click("#backend-rows tr:nth-child(1) .name")
    firefox.shows("#drawer", "http://127.0.0.1:5001")
    assert "backend=backend_1" in firefox.run("location.hash")
    firefox.run("document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))")
    wait_until(lambda: firefox.run("document.getElementById('drawer').hidden"), "closed by Escape")

    for view, selector in (("traffic", "#recent-rows tr"), ("lab", "#mix-rows li"), ("system", "#event-rows li")):
        firefox.click(f"#tabs a[data-view={view}]")
        firefox.is_visible(selector)
    stub.answer = status([])
    firefox.shows("#sentence", "No backends are configured.")
    assert firefox.errors == []
