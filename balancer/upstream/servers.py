"""What is known of the servers behind origins: learnt from how they answer, and from how long they keep connections."""

from __future__ import annotations

from balancer.protocol.origin import Origin

# Seconds. Of common servers gunicorn closes idle connections first, after 2 s; a request that cannot be repeated must
# not meet that. Until a longer pause is known to be safe, it gets a new connection after one of this length.
SAFE_IDLE = 0.5
MOST_SERVERS = 10_000  # that are remembered; above that all are learnt again, from their next answers


class Server:
    """One of them. Plain values, each of which any thread may read or replace."""

    __slots__ = ("is_old", "safe_idle")

    def __init__(self) -> None:
        self.is_old = False  # it has answered in HTTP/1.0, so it may not know chunks (RFC 9112 section 6.1)
        self.safe_idle = SAFE_IDLE  # seconds for which it keeps an idle connection for certain

    def note_idle(self, seconds: float, has_ended: bool) -> None:
        """A connection was found ended, or still good, after so long. Half of that is safe: the time differs from one
        connection to the next, as servers look at them now and then."""
        known = seconds / 2
        if (known < self.safe_idle) is has_ended:
            self.safe_idle = known


class Servers:
    """By origin; whoever asks for one that is not known begins with nothing. Any thread may call."""

    def __init__(self) -> None:
        self._servers: dict[Origin, Server] = {}

    def at(self, origin: Origin) -> Server:
        if origin not in self._servers and len(self._servers) >= MOST_SERVERS:
            self._servers.clear()
        return self._servers.setdefault(origin, Server())
