"""What is known of the clients of one port: their requests in flight, how long they may take, how much may be held.

`Bridge` is the one that takes requests; this is what a request itself and its body know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

from balancer.edge.accepted import MOST_OWED, Address
from balancer.edge.promise import when_done
from balancer.forwarding.forwarding import WHOLE_STREAM
from balancer.protocol.addresses import Network, is_in_networks, network_of
from balancer.protocol.requestheads import RequestHeads
from balancer.upstream.transport import SMALL_BODY

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

GRACE_SECONDS = 5.0  # what a client may keep us waiting before `min_body_rate` counts
BRIEF_SECONDS = 0.05  # a worker waits so long for its client; then it leaves the call to whoever hears of it
MANY_DOWNLOADS = 64  # that are under way: from then on less is held, and no thread waits for any of them
MAX_LINGERING = 64  # worker threads that read on after an answer at the same time; lingering is a courtesy
FRAME_BYTES, READ_BYTES = 16384, 65536  # what hyper gives at a time at most, by default, in HTTP/2 and before
AHEAD_BYTES = 8 * READ_BYTES  # of a request body that is asked for, and handed on, at the same time
# Bytes that all requests in flight share, so that with many of them each has less: what is asked for ahead, and small
# bodies that are kept until the answer comes, without a thread, of which there are only so many.
AHEAD_IN_ALL, SMALL_IN_ALL = 8 * 1024 * 1024, 32 * 1024 * 1024
# Of one HTTP/2 connection: the bytes that may be unread, of one stream and of all. What a client can make us hold
# follows from the latter twice: h2 takes as much as half of it again for keeping account of frames of a few bytes, and
# ends the connection beyond that. So 16 uploads whose backends do not read stop the others of their connection, which
# get more time for that; Envoy advises these two for the edge.
STREAM_WINDOW, CONNECTION_WINDOW = 64 * 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What clients are held to, by the names of the settings. `networks` of proxies have many clients behind each."""

    idle_timeout: float
    min_body_rate: int
    max_websockets: int
    websocket_max_message: int
    websocket_idle_timeout: float
    websocket_ping_interval: float
    websocket_max_age: float
    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class PortOptions:
    """What clients may take, by the names of the settings."""

    max_clients: int
    header_timeout: float
    max_header_bytes: int


class Listener:
    """Each call is a `Call`, which this module does not know.

    `calls` holds what is in flight, oldest first: Granian's thread adds, whoever answers takes out, the loop thread
    looks at a copy; each of these is one step that needs no lock. So are those on `downloads`: who is answered in
    pieces, with the bytes of an answer that was ended and that hyper keeps until its client reads them; and on
    `open_sockets`: those of `calls` that are WebSockets, or ask for one.
    `_begun` has who sent a request since the loop thread last replaced it, `_handed` how many bytes they were handed.
    """

    def __init__(self, app: WSGIApplication, limits: ClientLimits) -> None:
        self.app = app
        self.limits = limits  # may be replaced at any time
        self.heads = RequestHeads()  # for what the app answers; whoever forwards has its own
        self.is_draining = False  # set by the server: each answer asks its client to close
        self.most_read = READ_BYTES  # bytes of a body that hyper gives at a time; set by the server
        self.lingering = BoundedSemaphore(MAX_LINGERING)
        self.calls: dict[Any, None] = {}
        self.open_sockets: dict[Any, None] = {}
        self.downloads: dict[Any, int] = {}
        self._begun: dict[Address, None] = {}
        self._handed: dict[Address, int] = {}
        # Bytes of an answer that may be taken in whole, and seconds that a worker waits for its client before it parks
        # the call: less with many downloads under way.
        self.most_held, self.patience = SMALL_BODY, BRIEF_SECONDS

    # What a call asks for; `Bridge` does it.

    def connect(self, call: Any) -> bool:
        """Called by a worker: True if the express way has the call from now on."""
        return False

    def park(self, call: Any) -> None:
        """Its client has to read first. From here on the call may be somebody else's."""
        raise NotImplementedError

    # How much each may take.

    @property
    def active(self) -> int:
        return len(self.calls)

    @property
    def ahead_bytes(self) -> int:
        """Of one request body: what may be asked for before it is needed."""
        return min(AHEAD_BYTES, AHEAD_IN_ALL // max(self.active - len(self.open_sockets), 1))

    @property
    def small_bytes(self) -> int:
        """Of a request body that may be kept without a thread."""
        return SMALL_IN_ALL // max(self.active - len(self.open_sockets), 1)

    def patience_left(self, before: float, waited: float, size: int) -> float:
        """Seconds, of GRACE_SECONDS at first, after so many `waited` and `size` bytes: each pays for 1/`min_body_rate`,
        and no more than `idle_timeout` are saved up. So a client that was fast may pause, and may not trickle for
        ever."""
        rate, most = self.limits.min_body_rate, max(self.limits.idle_timeout, GRACE_SECONDS)
        return min(max(0.0, before - waited) + size / rate, most) if rate else before

    def longest_wait(self, patience: float) -> float:
        """Seconds for which a client may keep us waiting now."""
        limits = self.limits
        return min(limits.idle_timeout, patience) if limits.min_body_rate else limits.idle_timeout

    def begin_download(self, call: Any) -> None:
        self.downloads[call] = 0
        self._note_downloads()

    def leave(self, call: Any, unread: int) -> bool:
        """End a stream of HTTP/2 whose client does not read it. It can be told so only once it reads on: what was
        handed over before lies with hyper, so each connection may leave no more than MOST_OWED bytes like that."""
        client = call.scope["client"]
        left = sum(size for other, size in list(self.downloads.items()) if other.scope["client"] == client)
        if left + unread > MOST_OWED:
            return False
        self.downloads[call] = unread
        return True

    def end_download(self, call: Any, unread: int, promise: Any) -> None:
        """`promise` is of the newest piece of one that leaves `unread` bytes."""
        if self.downloads.get(call):
            when_done(promise, lambda _: self._forget_download(call))
            return
        if call.is_gone and call.is_http2:  # what its client has not read, nobody keeps any more
            self.hand_over(call.scope["client"], -unread)
        self._forget_download(call)

    def _forget_download(self, call: Any) -> None:
        self.downloads.pop(call, None)
        self._note_downloads()

    def _note_downloads(self) -> None:
        few = len(self.downloads) < MANY_DOWNLOADS
        self.most_held, self.patience = (SMALL_BODY, BRIEF_SECONDS) if few else (WHOLE_STREAM, 0.0)

    # Whose they are.

    def source_of(self, host: str) -> str:
        """Whose requests share the worker threads: an address, in IPv6 the network that one customer has. "" for a
        proxy that is trusted, and for the clients of a Unix socket, whom nobody can tell apart."""
        return "" if is_in_networks(host, self.limits.networks) else network_of(host)

    def is_held_up(self, address: Address) -> bool:
        """The streams of an HTTP/2 connection share a window (RFC 9113 section 5.2): those for whose backends this
        client has to pause may have used it up, and then no other stream can send."""
        paused: int = sum(call.is_paused for call in list(self.calls) if call.scope["client"] == address)
        return paused * STREAM_WINDOW >= CONNECTION_WINDOW

    def used(self) -> Callable[[Address], bool]:
        """What tells of a client whether it has a request in flight, or had one since `used` was last asked for."""
        begun, self._begun = self._begun, {}
        known = begun.keys() | {call.scope["client"] for call in list(self.calls)}
        return lambda address: address in known or address in self._begun

    def hand_over(self, address: Address, size: int) -> None:
        """So many bytes of an answer went to hyper, for a client of HTTP/2, which may leave many unread. Two at once
        may count as one, to the client's good."""
        self._handed[address] = self._handed.get(address, 0) + size

    def handed(self) -> dict[Address, int]:
        """What was handed over since this was last asked for."""
        handed, self._handed = self._handed, {}
        return handed
