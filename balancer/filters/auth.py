"""Who sent a request: known by what it carries, or it goes no further.

A route names authenticators, of which one must say yes. What they have looked at does not reach backends, which are
told in X-Auth-Subject who it is; whatever a client says of itself there is not passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from balancer.errors import BalancerError, Forbidden, Unauthorized
from balancer.forwarding.answer import Answer
from balancer.forwarding.filter import Filter
from balancer.observe.record import Record
from balancer.observe.refusals import WHYS, Refusals, Why
from balancer.protocol.messages import CREDENTIALS, Line
from balancer.protocol.request import Request
from balancer.protocol.requestheads import HEADS_ROOM, RequestHead, weigh_made
from balancer.protocol.tables import Table

SUBJECT = b"x-auth-subject"
LONGEST_SUBJECT = 256  # characters


class Granted(NamedTuple):
    """Let in: `lines` are for backends, `cookies` for the client."""

    subject: str
    lines: tuple[Line, ...]
    cookies: tuple[Line, ...] = ()


class Refused(NamedTuple):
    """Not let in. `text` is for the operator; `challenge` goes with a 401, unless there is another `decision`."""

    why: Why
    text: str
    challenge: bytes = b""
    decision: Answer | BalancerError | None = None
    subject: str = ""


class Authenticator:
    """One way to know who sends a request. Many threads ask at the same time."""

    waits = False  # as a Filter's
    sets_cookies = False
    credentials = CREDENTIALS  # fields that backends do not get
    ours: frozenset[bytes] = frozenset()  # fields in which it alone tells backends something

    def __init__(self, name: str) -> None:
        self.name = name

    def check(self, request: Request) -> Granted | Refused:
        raise NotImplementedError

    def start(self) -> None:
        """Its thread, if it has one."""

    def stop(self) -> None:
        """And join it."""

    def refused(
        self, why: Why, text: str, challenge: str = "", decision: Answer | BalancerError | None = None
    ) -> Refused:
        return Refused(why, f"{self.name}: {text}", challenge.encode(), decision)


class Auth(Filter):
    """Lets in whom one of `authenticators` knows.

    `_answered` has, of requests that one of them has answered itself, why: put in and taken out in one step each.
    """

    def __init__(self, authenticators: Sequence[Authenticator], refusals: Refusals) -> None:
        self._authenticators = authenticators
        self._refusals = refusals
        gone = frozenset({SUBJECT}).union(*(each.credentials | each.ours for each in authenticators))
        self._heads: Table[tuple[RequestHead, tuple[Line, ...]], RequestHead] = Table(
            lambda given: given[0].replaced(gone, given[1]), HEADS_ROOM, weigh_made
        )
        self.waits = any(each.waits for each in authenticators)
        self._answered: dict[Request, str] = {}

    def admit(self, request: Request) -> Answer | None:
        if request.method == "OPTIONS" and _is_preflight(request):
            request.head = self._heads[request.head, ()]
            return None
        refused = []
        for each in self._authenticators:
            found = each.check(request)
            if isinstance(found, Granted):
                self._let_in(request, found)
                return None
            refused.append((each.name, found))
        name, decisive = max(refused, key=lambda one: (WHYS.index(one[1].why), one[1].decision is not None))
        self._refusals.count(name, decisive.why)
        request.subject = decisive.subject
        text = "; ".join(each.text for _, each in refused)
        if isinstance(decisive.decision, Answer):
            self._answered[request] = text
            return decisive.decision
        raise decisive.decision or Unauthorized(text, [each.challenge for _, each in refused if each.challenge])

    def _let_in(self, request: Request, granted: Granted) -> None:
        request.subject = granted.subject
        request.head = self._heads[request.head, granted.lines]

    def done(self, request: Request, record: Record) -> None:
        record.subject = request.subject or None
        if (text := self._answered.pop(request, None)) is not None:
            record.reason, record.error = Forbidden.reason, text


class AuthWithCookies(Auth):
    """One of its authenticators may have cookies for the client.

    `_cookies` has those of requests under way: each is put in, looked at and taken out in one step.
    """

    def __init__(self, authenticators: Sequence[Authenticator], refusals: Refusals) -> None:
        super().__init__(authenticators, refusals)
        self._cookies: dict[Request, tuple[Line, ...]] = {}

    def _let_in(self, request: Request, granted: Granted) -> None:
        super()._let_in(request, granted)
        if granted.cookies:
            self._cookies[request] = granted.cookies

    def answer(self, request: Request, record: Record, lines: list[Line]) -> list[Line]:
        cookies = self._cookies.get(request)
        return [*lines, *cookies, (b"cache-control", b"private")] if cookies else lines  # nobody else's

    def done(self, request: Request, record: Record) -> None:
        super().done(request, record)
        self._cookies.pop(request, None)


def _is_preflight(request: Request) -> bool:
    """A browser asks for a page of another origin whether it may send a request, and puts neither credentials nor a
    body into this one (Fetch standard, section "CORS-preflight fetch"). What has either, or asks a backend to take it
    for another method, is a request like others."""
    names = {name.lower() for name, _ in request.head.lines}
    return (
        {b"origin", b"access-control-request-method"} <= names
        and names.isdisjoint(CREDENTIALS | {b"cookie"})
        and not any(b"method-override" in name or name == b"x-http-method" for name in names)
        and b"transfer-encoding" not in request.head.fields
        and not request.head.length
    )


def granted(subject: str, lines: Sequence[Line] = (), cookies: Sequence[Line] = ()) -> Granted:
    return Granted(subject, (*lines, (SUBJECT, subject.encode())) if subject else (*lines,), (*cookies,))


def is_subject(text: object) -> bool:
    """It can go into a header line, a record and a line of the log."""
    return isinstance(text, str) and text.isprintable() and text == text.strip() and 0 < len(text) <= LONGEST_SUBJECT


def sent(request: Request, scheme: bytes) -> list[bytes]:
    """Credentials in `Authorization` of this scheme, whose name has no case (RFC 9110 section 11.1). Several lines of
    that count as such, whatever they say: who knows which one others would take."""
    values = request.values(b"authorization")
    found = [value.partition(b" ") for value in values]
    return [given.strip() for name, _, given in found if name.lower() == scheme or len(values) > 1]
