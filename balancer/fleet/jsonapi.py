"""A server that answers in JSON, once or with news as it comes. One time limit holds for the whole of either."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from balancer.errors import BalancerError
from balancer.fleet.discovery import SourceFailed
from balancer.protocol.client import Caller
from balancer.protocol.messages import Line
from balancer.protocol.origin import Origin
from balancer.protocol.texts import SHOWN, shown
from balancer.upstream.dialer import Dialer
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import ResponseBody
from balancer.upstream.transport import BackendAdapter, Timeouts

CONNECT_SECONDS, ANSWER_SECONDS = 3.0, 10.0
MOST_BYTES = 16_777_216  # of one answer, or of one line of news
JSON = b"application/json"


class Refused(SourceFailed):
    """It answered, but with another status than 2xx, and maybe said why."""

    def __init__(self, origin: Origin, status: int, why: bytes = b"") -> None:
        hint = ": it is not allowed" if status in (401, 403) else ""
        super().__init__(f"{origin.url} answered {status}{hint} {shown(why.strip())}".rstrip())
        self.status = status


class JsonApi:
    """Asks for one thing at a time; `stop` ends that from another thread, at once, and all that is asked later. What
    `lines` are and how to speak TLS is asked for each time, so that their files may change."""

    def __init__(
        self,
        origin: Origin,
        tls: Callable[[], ssl.SSLContext | None] = lambda: None,
        lines: Callable[[], Sequence[Line]] = lambda: (),
    ) -> None:
        self.origin = origin
        self._tls = tls
        self._lines = lines
        self._caller = Caller()

    def stop(self) -> None:
        self._caller.disconnect()

    def get(self, target: str) -> Any:
        """Raises SourceFailed, ValueError."""
        return json.loads(self.send("GET", target))

    def send(self, method: str, target: str, told: object = None, kind: bytes = JSON) -> bytes:
        """Its answer, when it was `told` something, if that is not None. Raises SourceFailed."""
        deadline = time.monotonic() + ANSWER_SECONDS
        body = self._ask(method, target, ANSWER_SECONDS, told, kind)
        data = body.read_out(MOST_BYTES, deadline)
        if not body.is_complete:
            raise SourceFailed(f"{self.origin.url}: no whole answer of at most {MOST_BYTES} bytes in time")
        return data

    @contextmanager
    def watch(self, target: str, seconds: float) -> Iterator[Iterator[list[Any]]]:
        """What comes, a line each, several if they come together; it ends when the server ends it, or after so many
        seconds. Raises SourceFailed at once if it is refused; later ValueError."""
        body = self._ask("GET", target, seconds)
        try:
            yield self._news(body, time.monotonic() + seconds)
        finally:
            body.close()

    def _news(self, body: ResponseBody, deadline: float) -> Iterator[list[Any]]:
        rest = b""
        try:
            while time.monotonic() < deadline and (data := body.read_chunk()):
                *whole, rest = (rest + data).split(b"\n")
                if len(rest) > MOST_BYTES:
                    raise SourceFailed(f"{self.origin.url}: a line of more than {MOST_BYTES} bytes")
                if news := [json.loads(line) for line in whole if line.strip()]:
                    yield news
        except BalancerError:
            pass  # cut off, or silent for as long as it may: whoever asks again will see

    def _ask(self, method: str, target: str, seconds: float, told: object = None, kind: bytes = JSON) -> ResponseBody:
        timeouts = Timeouts(CONNECT_SECONDS, ANSWER_SECONDS, seconds, pool_idle_timeout=0)
        adapter = BackendAdapter(timeouts, max_idle=0, dialer=Dialer(self._tls()))
        lines = [(b"host", self.origin.authority.encode("ascii")), (b"accept", b"application/json")]
        lines += [(b"connection", b"close"), *self._lines()]
        request = OutgoingRequest(method, target.encode("ascii"), lines)
        if told is not None:
            request.lines = [*lines, (b"content-type", kind)]
            request.set_body(json.dumps(told).encode())
        request.client, request.deadline = self._caller, time.monotonic() + ANSWER_SECONDS
        try:
            response = adapter.exchange(request, self.origin)
        except BalancerError as error:
            raise SourceFailed(str(error)) from None
        assert isinstance(response.body, ResponseBody)
        if response.status_code not in range(200, 300):
            why = response.body.read_out(SHOWN, request.deadline)
            response.body.close()
            raise Refused(self.origin, response.status_code, why)
        return response.body
