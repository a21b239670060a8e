"""Servers that are told something and answer in JSON, such as those of Docker and Kubernetes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from balancer.errors import BalancerError
from balancer.fleet.scaling import ScalingError
from balancer.protocol.messages import Line
from balancer.protocol.origin import Endpoint
from balancer.protocol.texts import shown
from balancer.upstream.dialer import Dialer
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import ResponseBody
from balancer.upstream.transport import BackendAdapter, Timeouts

ANSWER_SECONDS = 10.0  # for a whole answer
MOST_BYTES = 4_194_304
JSON = b"application/json"


class JsonApi:
    """One of them. `lines` are header lines that go with each request."""

    def __init__(self, dialer: Dialer, lines: Callable[[], Sequence[Line]] = lambda: ()) -> None:
        timeouts = Timeouts(ANSWER_SECONDS, ANSWER_SECONDS, ANSWER_SECONDS, pool_idle_timeout=0)
        self._adapter = BackendAdapter(timeouts, max_idle=0, dialer=dialer)
        self._lines = lines

    def ask(self, method: str, url: Endpoint, body: object = None, content_type: bytes = JSON) -> Any:
        """What it answers, None for nothing. Raises ScalingError, as `send` does."""
        data = self.send(method, url, body, content_type).strip()
        try:
            return json.loads(data) if data else None
        except (ValueError, RecursionError):
            raise ScalingError(f"{url} answered something else than JSON: {shown(data)}") from None

    def send(
        self,
        method: str,
        url: Endpoint,
        body: object = None,
        content_type: bytes = JSON,
        tolerated: Collection[int] = (),
    ) -> bytes:
        """Its answer. Raises ScalingError for one that is neither 2xx nor `tolerated`, and if there is none in time."""
        deadline = time.monotonic() + ANSWER_SECONDS
        lines = [(b"host", url.origin.authority.encode("ascii")), (b"connection", b"close"), *self._lines()]
        if body is not None:
            lines.append((b"content-type", content_type))
        request = OutgoingRequest(method, url.target, lines)
        request.deadline = deadline
        if body is not None:
            request.set_body(json.dumps(body).encode())
        try:
            response = self._adapter.exchange(request, url.origin)
            assert isinstance(response.body, ResponseBody)
            data = response.body.read_out(MOST_BYTES, deadline)
        except BalancerError as error:
            raise ScalingError(str(error)) from None
        if response.status_code not in range(200, 300) and response.status_code not in tolerated:
            raise ScalingError(f"{url} answered {response.status_code} {shown(data.strip())}".rstrip())
        if not response.body.is_complete:
            raise ScalingError(f"{url}: no whole answer of at most {MOST_BYTES} bytes within {ANSWER_SECONDS:g} s")
        return data
