"""Another server says who sent a request, and whether it may go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from http import HTTPStatus
from threading import BoundedSemaphore

from balancer.errors import AuthUnavailable, BackendError, ClientGone, OutOfDescriptors
from balancer.filters.auth import SUBJECT, Authenticator, Granted, Refused, granted, is_subject
from balancer.forwarding.answer import whole
from balancer.observe.refusals import Why
from balancer.protocol.messages import CREDENTIALS, Line
from balancer.protocol.origin import Endpoint
from balancer.protocol.request import Request
from balancer.upstream.dialer import Dialer
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import BackendResponse, ResponseBody
from balancer.upstream.transport import BackendAdapter, Timeouts

ANSWER_SECONDS = 0.2  # for all of it: a turn, a connection, the whole answer
AT_ONCE = 64
LARGEST_ANSWER = 65536  # bytes of a body that goes to the client
KEPT_SECONDS = 4.0  # for which an idle connection is
# What a decision must not depend on, for its answer would be a part of another one or none (RFC 9110 sections 13, 14).
_CONDITIONS = frozenset(
    {b"range", b"if-range", b"if-match", b"if-none-match", b"if-modified-since", b"if-unmodified-since"}
)
_TOLD = frozenset({b"host", b"x-forwarded-method", b"x-forwarded-uri"})
_OURS = frozenset({b"content-length", b"server"})  # of an answer that goes to a client


class ForwardAuth(Authenticator):
    """Asks `url` with the head of each request: 2xx lets it through with the fields in `copied`, which backends get
    from nobody else; a redirect or a refusal goes to the client; anything else, or nothing in time, is a 503."""

    waits = True
    sets_cookies = True
    credentials = frozenset()  # they are not ours, so backends may want them too

    def __init__(self, name: str, url: Endpoint, copied: Sequence[bytes], dialer: Dialer) -> None:
        super().__init__(name)
        self.ours = frozenset(copied)
        self._url = url
        timeouts = Timeouts(ANSWER_SECONDS, ANSWER_SECONDS, ANSWER_SECONDS, KEPT_SECONDS)
        self._adapter = BackendAdapter(timeouts, max_idle=AT_ONCE, dialer=dialer)
        self._turns = BoundedSemaphore(AT_ONCE)

    def stop(self) -> None:
        self._adapter.close()

    def check(self, request: Request) -> Granted | Refused:
        deadline = time.monotonic() + ANSWER_SECONDS
        if not self._turns.acquire(timeout=ANSWER_SECONDS):
            return self._unavailable(f"{AT_ONCE} requests are being asked about")
        try:
            response = self._adapter.exchange(self._question(request, deadline), self._url.origin)
            assert isinstance(response.body, ResponseBody)
            body = response.body.read_out(LARGEST_ANSWER, deadline)
            return self._understood(response, body)
        except (BackendError, OutOfDescriptors) as error:
            if request.client.is_gone:
                raise ClientGone("the client left while somebody was asked who it is") from None
            return self._unavailable(str(error))
        finally:
            self._turns.release()

    def _question(self, request: Request, deadline: float) -> OutgoingRequest:
        """A GET with the head that backends would get, but for what the operator tells them in place of credentials."""
        lines = [line for line in request.head.lines if line[0] not in _CONDITIONS | _TOLD | CREDENTIALS]
        lines += [(name, value) for name in CREDENTIALS for value in request.values(name)]
        told: list[Line] = [
            (b"host", self._url.origin.authority.encode("ascii")),
            (b"x-forwarded-method", request.method.encode("latin-1")),
            (b"x-forwarded-uri", request.target),
            (b"x-request-id", request.id),
        ]
        question = OutgoingRequest("GET", self._url.target, [*told, *lines])
        question.client, question.deadline = request.client, deadline
        return question

    def _understood(self, response: BackendResponse, body: bytes) -> Granted | Refused:
        status, lines = response.status_code, response.head.for_client
        cookies = [line for line in lines if line[0] == b"set-cookie"]
        if 200 <= status < 300:
            subject = next((value.decode("utf-8", "replace") for name, value in lines if name == SUBJECT), "")
            if subject and not is_subject(subject):
                return self._unavailable("its X-Auth-Subject cannot be a header value")
            return granted(subject, [line for line in lines if line[0] in self.ours and line[0] != SUBJECT], cookies)
        if status not in range(300, 500) or status == HTTPStatus.NOT_MODIFIED or status not in list(HTTPStatus):
            return self._unavailable(f"it answered {status}")
        if not response.body.is_complete:
            return self._unavailable(f"no whole answer of at most {LARGEST_ANSWER} bytes within {ANSWER_SECONDS:g} s")
        why: Why = "forbidden" if status == HTTPStatus.FORBIDDEN else "invalid"
        answer = whole(status, body, *(line for line in lines if line[0] not in _OURS))
        return self.refused(why, f"{self._url} answered {status}", decision=answer)

    def _unavailable(self, text: str) -> Refused:
        return self.refused("unavailable", text, decision=AuthUnavailable(f"{self.name}: {self._url}: {text}"))
