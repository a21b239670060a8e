"""A control request that a worker has accepted, and its master answers.

It goes as the environ of WSGI: its texts, header lines and whole body, and comes back as status, header lines, body.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from typing import TYPE_CHECKING, Any

from balancer.control.paths import MAX_BODY
from balancer.errors import ClientError, ClientGone
from balancer.processes.link import Link
from balancer.protocol.request import HEADER_LINES

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("balancer.processes")

ANSWER_SECONDS = 60.0  # a reload may try out a certificate on a busy machine
THREADS = 8  # that answer: each keeps the interpreter busy
GONE = "503 Service Unavailable"

Answer = tuple[str, list[tuple[str, str]], bytes]


class AskingMaster:
    """The control API of a worker. `_asked` has who waits, by a number: each step on it needs no lock."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._numbers = count()
        self._asked: dict[int, Future[Answer]] = {}
        self._is_alone = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        body: bytes | Exception
        try:
            body = environ["wsgi.input"].read(MAX_BODY + 2)  # one more than may be, to be refused as anywhere
        except (ClientError, ClientGone) as error:
            body = error
        told = {name: value for name, value in environ.items() if isinstance(value, str | bool) or name == HEADER_LINES}
        number, waiting = next(self._numbers), Future[Answer]()
        self._asked[number] = waiting
        try:
            if self._is_alone:
                raise TimeoutError
            self._link.tell("ask", number, told, body)
            status, lines, content = waiting.result(ANSWER_SECONDS)
        except TimeoutError:
            status, lines, content = GONE, [("Content-Length", "0"), ("Retry-After", "1")], b""
        finally:
            del self._asked[number]
        start_response(status, lines)
        return [content]

    # The thread of the link.

    def answered(self, number: int, answer: Answer) -> None:
        waiting = self._asked.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)

    def give_up(self) -> None:
        """Nobody answers any more."""
        self._is_alone = True
        for waiting in list(self._asked.values()):
            if not waiting.done():  # it has its answer, and its thread has not gone on yet
                waiting.set_exception(TimeoutError())


class AnsweringWorkers:
    """The control API of the master, as workers ask for it."""

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="control")

    def ask(self, told: dict[str, Any], body: bytes | Exception, answer: Callable[[Answer], None]) -> None:
        self._threads.submit(self._run, told, body, answer)

    def stop(self) -> None:
        self._threads.shutdown(cancel_futures=True)

    def _run(self, told: dict[str, Any], body: bytes | Exception, answer: Callable[[Answer], None]) -> None:
        from werkzeug.test import run_wsgi_app  # which workers do without

        given = io.BytesIO(body) if isinstance(body, bytes) else Broken(body)
        environ = told | {"wsgi.version": (1, 0), "wsgi.input": given, "wsgi.errors": sys.stderr}
        try:
            chunks, status, headers = run_wsgi_app(self._app, environ, buffered=True)
            answer((status, list(headers), b"".join(chunks)))
        except Exception:  # whoever asked must not wait for ever
            log.exception("control request failed")
            answer(("500 Internal Server Error", [("Content-Length", "0")], b""))


class Broken(io.RawIOBase):
    """A body that did not come: whoever reads it hears why."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        raise self._error
