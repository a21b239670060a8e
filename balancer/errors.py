"""What can go wrong, as decisions.

Every class carries the HTTP `status` the client sees and a `reason`: a token of RFC 9209 section 2.3 where one fits,
so that logs, `/status` and clients use the same words. Foreign errors (OSError, parser errors) are mapped to these at
the socket boundary (`connection`, `response`, `transport`); nothing above it needs to know them.

    BalancerError
      SettingsError         bad usage or configuration (exit code 2)
      ClientError           the request is at fault: 400, 403, 404, 405, 408, 411, 413, 417, 429, 431, 501, 508
        Unauthorized          who sent it is not known: 401
        Forbidden             who sent it is known, and may not: 403
        TooManyGuesses        wrong passwords came from its address: 429
      ClientGone            the client left before its answer was complete: 499 in logs, never sent
        ClientStalled         it read too slowly, and was cut off
      AuthUnavailable       who sent it cannot be found out now: 503
      Unavailable           no backend: 503 with Retry-After
        NoRoom                all are full, and nothing became free in time
        OutOfDescriptors      this process may open no more sockets
      BackendError          the backend is at fault: 502, 504; also a requests exception
        ConnectFailed         nothing was sent: any method may go elsewhere
        ConnectTimedOut       the same, after the connect time-out
        ConnectionLost        died before the response head was complete
        InvalidResponse       answered something that is not HTTP, or not safe to pass on
        ResponseTimedOut      no response head, or no further body bytes, in time
        BodyTruncated         the body ended before its announced end
        BackendRemoved        the operator has ended it, so nobody is at fault
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Self

import requests.exceptions as requests_errors

from balancer.protocol.texts import shown


class BalancerError(Exception):
    """Base of all errors of this package; `str(error)` is one line for a person."""

    status: ClassVar[int] = 500
    reason: str = "proxy_internal_error"
    public: ClassVar[str] = ""  # what a client is told instead of the text, if that names things inside
    headers: tuple[tuple[bytes, bytes], ...] = ()  # of the answer, names in lower case
    is_problem: ClassVar[bool] = False  # answered in the problem details of RFC 9457
    members: Mapping[str, object] = {}  # of these, beside the usual ones

    def to_keep(self) -> Self:
        """Itself, without the traceback and what came before it: these refer to whoever keeps it and to all that they
        hold, such as an answer of 64 KiB. Only the garbage collector would free that, some time later, and a hostile
        backend could pile it up."""
        self.__context__ = self.__cause__ = None
        return self.with_traceback(None)


class SettingsError(BalancerError, ValueError):
    """A setting is wrong: the text names the setting, the value and what is expected. A validator may raise it."""


class ClientError(BalancerError):
    """The request cannot be accepted. `status` 400 unless a subclass says otherwise."""

    status = 400
    reason = "http_request_error"


class ClientTooSlow(ClientError):
    """The request body did not come in time: a pause of `idle_timeout`, or less than `min_body_rate`."""

    status = 408
    reason = "client_too_slow"


class ExpectationFailed(ClientError):
    """The client waits for a 100 (Continue) that cannot be sent: it is to try without (RFC 9110 section 15.5.18)."""

    status = 417


class CodingUnsupported(ClientError):
    """A transfer coding other than chunked (RFC 9112 section 6.1)."""

    status = 501


class MethodRefused(ClientError):
    """CONNECT and TRACE are not for a gateway (RFC 9110 sections 9.3.6 and 9.3.8)."""

    status = 405

    def __init__(self, message: str, allowed: bytes) -> None:
        super().__init__(message)
        self.headers = ((b"allow", allowed),)  # RFC 9110 section 15.5.6


class NoRoute(ClientError):
    """No route matches, and the pool `default` has no backends."""

    status = 404
    reason = "no_route"


class AmbiguousPath(ClientError):
    """A backend could read the path in another way than the routes do, and go round what guards another path."""

    reason = "ambiguous_path"


class TooManyHeaders(ClientError):
    """The request has more header lines than `max_header_count` (RFC 6585 section 5)."""

    status = 431


class LimitReached(ClientError):
    """The client has sent more than the limits of these `names` allow; it may come again in `seconds`."""

    status = 429
    reason = "limit_reached"
    is_problem = True

    def __init__(self, names: Sequence[str], seconds: int) -> None:
        super().__init__(f"{', '.join(names)}: the limit is reached, try again in {seconds} s")
        self.headers = ((b"retry-after", b"%d" % seconds),)
        # draft-ietf-httpapi-ratelimit-headers-10, section "Quota Exceeded"
        kind = "https://iana.org/assignments/http-problem-types#quota-exceeded"
        self.members = {"type": kind, "violated-policies": names}


class WorkerRefused(ClientError):
    """The script of a service worker that could take over the pages of the control API."""

    status = 403
    reason = "http_request_denied"


class Unauthorized(ClientError):
    """No credentials, or wrong ones (RFC 9110 section 15.5.2); `challenges` say which would do."""

    status = 401
    reason = "http_request_denied"
    public = "this needs valid credentials"
    is_problem = True

    def __init__(self, message: str, challenges: Iterable[bytes] = ()) -> None:
        super().__init__(message)
        self.headers = tuple((b"www-authenticate", challenge) for challenge in challenges)


class Forbidden(Unauthorized):
    """Valid credentials of somebody who may not do this."""

    status = 403
    public = "these credentials do not allow this"


class TooManyGuesses(ClientError):
    """So many wrong passwords came from this address that not even a right one is looked at for `seconds`."""

    status = 429
    reason = "http_request_denied"
    public = "too many wrong passwords came from here; wait, then send the right one"
    is_problem = True

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.headers = ((b"retry-after", b"%d" % math.ceil(seconds)),)


class AuthUnavailable(BalancerError):
    """Whether these credentials are valid cannot be found out now; so they count for nothing."""

    status = 503
    reason = "auth_unavailable"
    public = "credentials cannot be checked now, try again"
    is_problem = True
    headers = ((b"retry-after", b"1"),)


class BodyTooLarge(ClientError):
    """The request body is larger than `max_request_body`."""

    status = 413


class LengthRequired(ClientError):
    """The body has no Content-Length, and the backend may not find its end without one (RFC 9112 section 6.1)."""

    status = 411
    public = "the request body needs a Content-Length"


class LoopDetected(ClientError):
    """Our own pseudonym stands in `Via`: the request came from ourselves (RFC 9110 section 7.6.3)."""

    status = 508
    reason = "proxy_loop_detected"


class ClientGone(BalancerError):
    """The client left; 499 is nginx's code for it. Never the backend's fault."""

    status = 499
    reason = "client_gone"


class ClientStalled(ClientGone):
    """The client did not read its answer: not for `idle_timeout`, or at less than `min_body_rate`."""

    reason = "client_too_slow"


class Unavailable(BalancerError):
    """No backend can take the request now, or the balancer is full. Answered with `Retry-After`.

    `excluded` says why of each backend.
    """

    status = 503
    reason = "destination_unavailable"
    headers = ((b"retry-after", b"1"),)

    def __init__(self, message: str, excluded: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.excluded = excluded or {}


class NoRoom(Unavailable):
    """All that could take the request are full, and so is the queue, or the wait was too long."""

    reason = "connection_limit_reached"


class OutOfDescriptors(Unavailable):
    """This process may open no more files: nobody else's fault."""


class BackendError(BalancerError, requests_errors.RequestException):
    """A backend failed. `requests` users can catch it as they catch any of its exceptions.

    Its text goes into records, reasons, events and logs, and much of it comes from the backend: so it is cut and made
    printable here, for all of them.
    """

    status = 502
    reason = "destination_unavailable"
    public = "the backend failed"

    def __init__(self, message: str) -> None:
        super().__init__(shown(message))


class ConnectFailed(BackendError, requests_errors.ConnectionError):
    """No connection, so nothing was sent; `refused` tells a closed port from every other cause."""

    public = "the backend could not be reached"

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused
        if refused:
            self.reason = "connection_refused"


class ConnectTimedOut(ConnectFailed, requests_errors.ConnectTimeout):
    """No connection within `connect_timeout`."""

    public = "the backend did not accept the connection in time"

    status = 504
    reason = "connection_timeout"


class ConnectionLost(BackendError, requests_errors.ConnectionError):
    """The connection ended before the response head; `stale` if it had been reused and no byte had come back."""

    reason = "connection_terminated"
    public = "the backend closed the connection without a response"

    def __init__(self, message: str, *, stale: bool = False) -> None:
        super().__init__(message)
        self.stale = stale


class InvalidResponse(BackendError, requests_errors.InvalidHeader):
    """The response is malformed, or framed in a way that must not be passed on."""

    reason = "http_protocol_error"
    public = "the backend's response is invalid"


class ResponseTimedOut(BackendError, requests_errors.ReadTimeout):
    """Nothing came within `response_timeout` (head) or `idle_timeout` (between two pieces of a body)."""

    status = 504
    reason = "http_response_timeout"
    public = "the backend did not respond in time"


class BodyTruncated(BackendError, requests_errors.ChunkedEncodingError):
    """The body stopped before its Content-Length or its last chunk (RFC 9112 section 8)."""

    reason = "http_response_incomplete"


class BackendRemoved(BackendError):
    """The backend was to end what it had in flight: it was removed at once, or its `drain_timeout` is over."""

    reason = "backend_removed"
    public = "the backend was taken out of service"
