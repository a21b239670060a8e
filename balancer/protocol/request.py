"""Requests as they come in, and their bodies: from our own server as they are, from any other through WSGI.

Our own server puts into environ what PEP 3333 has no place for; under any other, `Request.of` makes do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote_from_bytes

from balancer.errors import BalancerError, BodyTooLarge, ClientGone
from balancer.protocol.addresses import plain
from balancer.protocol.client import UNWATCHED, Client
from balancer.protocol.messages import HeaderLines, Line, check_method, check_target, new_request_id
from balancer.protocol.requestheads import RequestHead, RequestHeads

if TYPE_CHECKING:
    from _typeshed.wsgi import InputStream, WSGIEnvironment

# What our own server puts into environ beyond PEP 3333; under any other server they are missing.
HEADER_LINES = "balancer.header_lines"  # list of (lower-case name, value) as received, in bytes
CLIENT = "balancer.client"  # its `protocol.client.Client`
READ_SIZE = 65536


class Request:
    """A request as it came, whichever server brought it: what strategies, filters and the access log see of it.

    `target` is raw, `lines` are as they came with names in lower case, `head` is what follows from them. `refusal` is
    what speaks against it before anybody has looked at the body. `id` is X-Request-ID, the client's if it is a sane
    one. `is_ended` says that the server tells where a body without a length ends. `preferred` is the id of the backend
    that it is bound to, `subject` who sent it, where that was proved, `limited` what the limits of its route made
    of it: filters set them.
    """

    __slots__ = (
        *("method", "path", "target", "version", "peer", "lines", "head"),
        *("refusal", "id", "is_ended", "stream", "client", "preferred", "subject", "limited"),
    )

    def __init__(
        self,
        heads: RequestHeads,
        method: str,
        path: str,
        target: bytes,
        version: str,
        scheme: str,
        peer: str,
        lines: Sequence[Line],
    ) -> None:
        self.method = method
        self.path = path
        self.target = target
        self.version = version
        self.peer = peer
        self.lines = lines
        self.head: RequestHead = heads.of(lines, peer, scheme, version)
        self.refusal: BalancerError | None = self.head.refusal
        try:
            check_method(method)
            check_target(method, target)
        except BalancerError as error:
            self.refusal = error.to_keep()
        self.id = self.head.request_id or new_request_id()
        self.is_ended = False
        self.stream: InputStream | None = None
        self.client: Client = UNWATCHED
        self.preferred = self.subject = ""
        self.limited: Any = None

    @classmethod
    def of(cls, environ: WSGIEnvironment, heads: RequestHeads) -> Request:
        """From what WSGI gives, which is all there is under another server than our own."""
        version = environ["SERVER_PROTOCOL"].removeprefix("HTTP/")
        made = cls(
            heads,
            environ["REQUEST_METHOD"],
            environ["PATH_INFO"],
            raw_target(environ),
            version,
            environ["wsgi.url_scheme"],
            plain(environ.get("REMOTE_ADDR") or "unknown"),
            header_lines(environ),
        )
        made.is_ended = bool(environ.get("wsgi.input_terminated"))
        made.stream = environ["wsgi.input"]
        made.client = environ.get(CLIENT, UNWATCHED)
        return made

    @property
    def headers(self) -> HeaderLines:
        """As backends get them, but for X-Request-ID: with what we tell, without claims of whom nobody trusts."""
        return HeaderLines(self.head.lines)

    def values(self, name: bytes) -> Sequence[bytes]:
        """Of a field that means something to a gateway, one for each line."""
        return self.head.fields.get(name, ())

    @property
    def is_prompt(self) -> bool:
        """Whether the client sends more of the body within a moment, or all has come. Another server than ours does not
        tell."""
        return not isinstance(self.stream, RequestBody) or self.stream.is_prompt()

    def read(self, length: int | None, limit: int | None) -> Iterator[list[bytes]]:
        """The body in pieces, those together that are here together.

        Raises ClientGone if it ends early, BodyTooLarge past `limit` bytes.
        """
        received = 0
        while pieces := self._next(length, received):
            received += sum(map(len, pieces))
            if limit is not None and received > limit:
                raise BodyTooLarge(f"the request body has more than {limit} bytes")
            yield pieces
            if received == length:
                return
        if length:
            raise ClientGone(f"the client sent {received} of {length} bytes")

    def _next(self, length: int | None, received: int) -> list[bytes]:
        """[] at the end. Another server than ours is not asked for more than there is: it might wait for it for ever
        (PEP 3333)."""
        assert self.stream is not None  # there is none only for an empty body
        if isinstance(self.stream, RequestBody):
            return self.stream.receive()
        data = self.stream.read(READ_SIZE if length is None else min(READ_SIZE, length - received))
        return [data] if data else []


def header_lines(environ: WSGIEnvironment) -> list[Line]:
    """Header lines as received; under a server that does not give them, what WSGI left of them."""
    lines: list[Line] | None = environ.get(HEADER_LINES)
    if lines is None:
        lines = [
            (key[5:].replace("_", "-").lower().encode("latin-1"), value.encode("latin-1"))
            for key, value in environ.items()
            if key.startswith("HTTP_")
        ]
        for key in ("CONTENT_TYPE", "CONTENT_LENGTH"):
            if environ.get(key):
                lines.append((key.replace("_", "-").lower().encode(), environ[key].encode("latin-1")))
    return lines


def raw_target(environ: WSGIEnvironment) -> bytes:
    """The request target byte for byte; under a server that does not give it, the path is quoted again."""
    target: str = environ.get("REQUEST_URI") or environ.get("RAW_URI") or ""
    if target.startswith("/") or target == "*":
        return target.encode("latin-1")
    path = quote_from_bytes(environ["PATH_INFO"].encode("latin-1"), safe="/:@!$&'()*+,;=~-._")
    query = environ.get("QUERY_STRING", "")
    return f"{path}?{query}".encode("latin-1") if query else path.encode("latin-1")


class RequestBody:
    """`wsgi.input` over `receive`, which gives the next pieces, [] at the end: waits only for what is asked for.
    `is_prompt` says whether these come within a moment.

    Use either that or the methods of `wsgi.input`.
    """

    def __init__(self, receive: Callable[[], list[bytes]], is_prompt: Callable[[], bool] = lambda: True) -> None:
        self.receive = receive
        self.is_prompt = is_prompt
        self._pending: bytes | memoryview = b""

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, fewer if fewer are here; all of the body if `size` is negative."""
        if size is None or size < 0:
            return b"".join(iter(lambda: self.read(65536), b""))
        if not self._pending:
            piece = b"".join(self.receive())
            if len(piece) <= size:
                return piece
            self._pending = memoryview(piece)  # each byte of it is copied once, however small the parts
        data, self._pending = bytes(self._pending[:size]), self._pending[size:]
        return data

    def readline(self, size: int = -1) -> bytes:
        """Up to and with the next line feed, as PEP 3333 asks."""
        line = b""
        while not line.endswith(b"\n") and (size < 0 or len(line) < size):
            piece = self.read(65536 if size < 0 else size - len(line))
            if not piece:
                break
            end = piece.find(b"\n") + 1
            if end:
                self._pending = piece[end:] + self._pending
                piece = piece[:end]
            line += piece
        return line

    def readlines(self, hint: int = -1) -> list[bytes]:
        return list(self)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")
