"""One socket to a backend, in blocking mode, and the time limits the kernel keeps for it."""

from __future__ import annotations

import select
import socket
import ssl
import struct
import sys
from collections.abc import Sequence

from balancer.errors import ConnectionLost, ResponseTimedOut
from balancer.protocol.origin import Origin
from balancer.upstream.servers import Server
from balancer.upstream.tcpinfo import ESTABLISHED, IS_TOLD, OPTION, SIZE, state_and_received

DONTWAIT = int(getattr(socket, "MSG_DONTWAIT", 0))
_PEEK = int(getattr(socket, "MSG_PEEK", 0)) | DONTWAIT
# Bytes per receive: 128 KiB of body and a head. Each piece is handed on by a switch of threads, so larger is cheaper;
# and a slow client has up to six of them in flight, so larger is more memory: `download` says how much is asked for.
CHUNK = 135168
FIRST = 33792  # of an answer, 32 KiB of body and a head: how fast its client reads is not known yet
TLS_RECORD = 16384  # bytes; a send of more may wait in its middle
CLOSE_ENOUGH = 0.99  # of a time limit


class Connection:
    """Receives and sends with a time-out set by SO_RCVTIMEO: Python's own time-outs poll before every receive."""

    __slots__ = (
        *("sock", "descriptor", "is_watched", "origin", "server", "idle_since", "is_tls", "received"),
        *("received_before", "_timeout", "_is_told", "is_aborted"),
    )

    def __init__(self, sock: socket.socket, origin: Origin) -> None:
        self.sock = sock
        self.descriptor = sock.fileno()
        self.is_watched = False  # whoever sees what comes on it says so, and takes that back once something has
        self.origin = origin
        self.server = Server()  # what is known of it, by whoever keeps it
        self.idle_since = 0.0
        self.is_tls = isinstance(sock, ssl.SSLSocket)
        self.received = 0  # bytes
        self.received_before: int | None = None  # it was kept and taken again; None: it is new
        self._timeout = 0.0
        self.is_aborted = False
        self._is_told = IS_TOLD and not self.is_tls and sock.family in (socket.AF_INET, socket.AF_INET6)

    @property
    def is_stale(self) -> bool:
        """It was kept, and no byte has come since: if it has ended, then before the request that it has now."""
        return self.received == self.received_before and not self.is_aborted

    def set_timeout(self, seconds: float) -> None:
        """For sends and receives from now on. What is left of a limit is hardly less at each step of a request: that is
        not worth two system calls."""
        if seconds == self._timeout or self._timeout * CLOSE_ENOUGH <= seconds < self._timeout:
            return
        self._timeout = seconds
        if self.is_tls:  # the ssl module retries a receive that the kernel timed out, so Python must do the timing
            self.sock.settimeout(seconds)
            return
        if sys.platform == "win32":
            value = struct.pack("@L", int(seconds * 1000))
        else:
            value = struct.pack("@ll", int(seconds), int(seconds % 1 * 1_000_000))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)

    def receive(self, most: int = CHUNK) -> bytes:
        """Up to `most` bytes, b"" at EOF. Raises ResponseTimedOut, ConnectionLost."""
        try:
            data = self.sock.recv(most)
        except (TimeoutError, BlockingIOError):
            raise ResponseTimedOut(f"{self.origin.url} sent nothing for {self._timeout:g} s") from None
        except OSError as error:
            raise self.lost(error.strerror or str(error)) from error
        self.received += len(data)
        return data

    def lost(self, why: str) -> ConnectionLost:
        return ConnectionLost(f"{self.origin.url}: {why}", stale=self.is_stale)

    def receive_now(self, most: int = CHUNK) -> bytes | None:
        """What is here already, None if nothing is. Raises ConnectionLost."""
        if not DONTWAIT or self.is_tls:
            return self._receive_readable(most)
        try:
            data = self.sock.recv(most, DONTWAIT)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self.lost(error.strerror or str(error)) from error
        self.received += len(data)
        return data

    def _receive_readable(self, most: int) -> bytes | None:
        if not self.is_tls:  # Windows
            return self.receive(most) if self.has_input() else None
        # A readable TLS socket may hold a session ticket only, and no byte for us.
        self.sock.settimeout(0)
        try:
            data = self.sock.recv(most)
        except (ssl.SSLWantReadError, BlockingIOError):
            return None
        except OSError as error:
            raise self.lost(error.strerror or str(error)) from error
        finally:
            self.sock.settimeout(self._timeout)
        self.received += len(data)
        return data

    def send_now(self, pieces: Sequence[bytes | memoryview]) -> int:
        """As many bytes as go without waiting. Raises OSError. What TLS has not taken, it must get again first."""
        if not self.is_tls:
            try:
                return self.sock.sendmsg(pieces, (), DONTWAIT)
            except BlockingIOError:
                return 0
        data, done = memoryview(b"".join(pieces)), 0
        self.sock.settimeout(0)
        try:
            while done < len(data):
                done += self.sock.send(data[done : done + TLS_RECORD])
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            pass
        finally:
            self.sock.settimeout(self._timeout)
        return done

    def wait_for_room(self, *, or_input: bool) -> None:
        """Until more can be sent, or something has come if that matters. Raises ResponseTimedOut."""
        poller = select.poll()
        poller.register(self.sock, select.POLLOUT | (select.POLLIN if or_input else 0))
        if not poller.poll(self._timeout * 1000):
            raise ResponseTimedOut(f"{self.origin.url} stopped reading the request")

    def has_input(self) -> bool:
        """True if a receive would not block: while idle, that means EOF, an alert, or bytes nobody asked for."""
        if not self._is_told:
            return self._peek()
        # Asks the kernel instead of the socket: a system call that receives lets the interpreter lock go, and with it
        # comes a switch of threads.
        info = self.sock.getsockopt(socket.IPPROTO_TCP, OPTION, SIZE)
        try:
            if state_and_received(info) == (ESTABLISHED, self.received):
                return False
        except struct.error:  # a kernel that tells less, as that of a sandbox may
            pass
        return self._peek()

    def _peek(self) -> bool:
        if isinstance(self.sock, ssl.SSLSocket) and self.sock.pending():
            return True
        if self.is_tls or not DONTWAIT:  # neither can peek without blocking
            return self._is_readable()
        try:
            self.sock.recv(1, _PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _is_readable(self) -> bool:
        if sys.platform == "win32":
            return bool(select.select([self.sock], [], [], 0)[0])
        poller = select.poll()  # not select(): it cannot take descriptors above 1023, and those are common here
        poller.register(self.sock, select.POLLIN)
        return bool(poller.poll(0))

    def abort(self) -> None:
        """Wake whoever blocks on this socket, from any thread. The owner still has to close it."""
        self.is_aborted = True
        try:
            # Not SSLSocket's own: it would turn the socket into a plain one under the thread that uses it.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)
        except OSError:
            pass  # already down

    def close(self) -> None:
        self.sock.close()
