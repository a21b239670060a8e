"""What goes to the client of what a WSGI app gives, and what is said of an app that breaks the rules."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from stub_granian import Client
from support import options

from balancer.edge.bridge import Bridge
from balancer.edge.listener import ClientLimits
from bench.guard import SameThread

App = Callable[[list[str]], Iterable[Any]]


def answer_of(body: App, length: int = 5) -> tuple[Client, list[str]]:
    """The client, and what the app has noted."""
    noted: list[str] = []

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[Any]:
        start_response("200 OK", [("Content-Length", str(length))])
        return body(noted)

    client, workers = Client(), SameThread()
    bridge = Bridge(app, workers, options(ClientLimits))  # type: ignore[arg-type]
    bridge.accept(client)
    assert client.is_done and bridge.active == 0
    return client, noted


def whole(noted: list[str]) -> Iterator[bytes]:
    yield b"12345"
    noted.append("after the last chunk")


def in_parts(noted: list[str]) -> Iterator[bytes]:
    yield b""
    yield b"123"
    yield b"45"
    noted.append("after the last chunk")


@pytest.mark.parametrize("body", [whole, in_parts])
def test_an_app_is_run_to_its_end(body: App) -> None:
    client, noted = answer_of(body)
    assert (client.status, client.received, noted) == (200, b"12345", ["after the last chunk"])


def raising(noted: list[str]) -> Iterator[bytes]:
    yield b"12345"
    raise RuntimeError("surprise")


def exiting(noted: list[str]) -> Iterator[bytes]:
    yield b"12345"
    sys.exit("surprise")


class RaisesOnClose(list[bytes]):
    def close(self) -> None:
        raise RuntimeError("surprise")


@pytest.mark.parametrize("body", [raising, exiting, lambda noted: RaisesOnClose([b"12345"])])
def test_an_error_after_a_whole_answer_is_logged_and_spoils_nothing(
    body: App, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[Any] = []
    monkeypatch.setattr("balancer.edge.accepted.cut_all", cut.append)
    client, _ = answer_of(body)
    assert (client.status, client.received, cut) == (200, b"12345", [])
    assert "failed after the answer" in caplog.text and "surprise" in caplog.text


def test_text_for_a_body_is_not_passed_off_as_an_empty_one() -> None:
    """PEP 3333 wants bytes. Granian refuses anything else, and answers 500 for what was not."""
    client, _ = answer_of(lambda noted: ["12345"])
    assert client.received == b"" and not client.is_whole
