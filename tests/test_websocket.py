"""WebSockets through the balancer, with real clients and a real backend."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any

import pytest
from support import Balancer, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server, ServerConnection, serve


class Echo:
    """A backend that sends back what it gets, and closes when asked to: `close CODE REASON`."""

    def __init__(self) -> None:
        self.closes: list[tuple[int | None, str]] = []
        self.requests: list[Request] = []
        self._server: Server = serve(
            self._handle,
            "127.0.0.1",
            0,
            process_request=self._process,
            subprotocols=["chat", "other"],  # type: ignore[list-item]
            select_subprotocol=lambda connection, offered: next((each for each in offered if each == "chat"), None),
            max_size=None,
            compression=None,
        )
        self.url = f"http://127.0.0.1:{self._server.socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="echo")
        self._thread.start()

    def _process(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == "/health":
            return connection.respond(HTTPStatus.OK, "")
        self.requests.append(request)
        return connection.respond(HTTPStatus.UNAUTHORIZED, "who?\n") if request.path == "/secret" else None

    def _handle(self, connection: ServerConnection) -> None:
        try:
            for message in connection:
                if isinstance(message, str) and message.startswith("close "):
                    _, code, reason = message.split(" ", 2)
                    connection.close(int(code), reason)
                connection.send(message)
        except ConnectionClosed:
            pass
        finally:
            self.closes.append((connection.close_code, connection.close_reason or ""))

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()


@pytest.fixture(scope="module")
def echo() -> Iterator[Echo]:
    started = Echo()
    yield started
    started.stop()


@pytest.fixture(scope="module")
def balancer(echo: Echo) -> Iterator[Balancer]:
    with Balancer(f"--backend=only={echo.url}") as started:
        yield started


def ws(balancer: Balancer, path: str = "/x") -> str:
    return balancer.url.replace("http", "ws", 1) + path


@contextmanager
def opened(balancer: Balancer, path: str = "/x", **options: Any) -> Iterator[ClientConnection]:
    with connect(ws(balancer, path), max_size=None, **options) as client:
        yield client


def newest(balancer: Balancer) -> Any:
    """The record of a socket that has just ended."""
    wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 0, "no socket is open")
    return balancer.status(1)["recent_requests"][0]


def test_messages_pass_both_ways_as_they_are(balancer: Balancer) -> None:
    messages = ["text", "", b"", b"\x00\xff", "\N{SNOWMAN}" * 1000, b"x" * 1_000_000]
    with opened(balancer) as client:
        for message in messages:
            client.send(message)
        client.send(["in ", "three ", "fragments"])
        assert [client.recv() for _ in [*messages, ...]] == [*messages, "in three fragments"]
