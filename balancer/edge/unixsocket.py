"""Unix sockets that we listen on: the file of each, whom it lets in, and clients that do not read.

Their clients have no addresses, so nothing that goes by address finds them. HTTP/1.1 alone is spoken there: hyper
itself ends those that are silent, slow with a head, or idle.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from balancer.edge import accepted
from balancer.errors import SettingsError


class UnixListener(socket.socket):
    """Takes its file away when it is closed, unless that is another's by then."""

    _path = ""
    _file: tuple[int, int] | None = None

    def bind(self, path: str) -> None:  # type: ignore[override]
        super().bind(path)
        self._path, self._file = path, _file_at(path)

    def leave(self) -> None:
        """The file is another process's from now on."""
        self._file = None

    def take(self) -> None:
        """The file is ours, which another process has made."""
        self._path = self.getsockname()
        self._file = _file_at(self._path)

    def close(self) -> None:
        if self._file is not None and _file_at(self._path) == self._file:
            with suppress(OSError):
                os.unlink(self._path)
        self._file = None
        super().close()


def listen(path: str, mode: str, owner: str | None, backlog: int) -> socket.socket:
    """Listen there, for those whom `mode` (octal) and `owner` (`USER:GROUP`, either may be missing) let in. Raises
    SettingsError if it cannot be, or if somebody else does; a file that a dead process left is replaced."""
    listener = UnixListener(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_room(path)
        listener.bind(path)
        os.chmod(path, int(mode, 8))  # before it listens, and until then nobody can connect
        if owner:
            _give(path, owner)
        listener.listen(backlog)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise SettingsError(f"cannot listen on unix:{path}: {error.strerror}") from None
    except SettingsError:
        listener.close()
        raise
    return listener


def _make_room(path: str) -> None:
    """Raises SettingsError unless nothing is there, or what a dead process left."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise SettingsError(f"cannot listen on unix:{path}: what is there is no socket; choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.setblocking(False)
        try:
            other.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError:  # its queue is full, or it is of another kind: somebody has it
            pass
    raise SettingsError(f"unix:{path} is in use; stop what uses it or choose another path")


def _file_at(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        found = os.lstat(path)
        return found.st_dev, found.st_ino
    return None


def _give(path: str, owner: str) -> None:
    """Raises SettingsError for an owner that this machine does not know, or that we may not name."""
    user, _, group = owner.partition(":")
    try:
        if user:
            shutil.chown(path, user=_known(user))
        if group:
            shutil.chown(path, group=_known(group))
    except LookupError as error:
        raise SettingsError(f"unix_socket_owner = {owner!r}: {error.args[0]}; expected USER:GROUP") from None
    except OSError as error:
        raise SettingsError(f"cannot give unix:{path} to {owner}: {error.strerror}") from None


def _known(name: str) -> int | str:
    """As chown(1) has it, a number is an id."""
    return int(name) if re.fullmatch("[0-9]{1,9}", name) else name


class Unread:
    """Connections to the socket at `path` whose clients leave unread what they were sent.

    The kernel tells how much that is, not how much was read before. But it lets tokio write again only when three
    quarters are free, so that with a client that reads it differs from one pass to the next.

    `_known` has, by inode, how much it was and since when.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._known: dict[int, tuple[int, float]] = {}

    def close(self, seconds: float) -> Iterator[None]:
        """One pass, a slice at each step. Shut down those that have read nothing for so many seconds."""
        open_now: dict[int, tuple[int, float]] = {}
        for connections in accepted.slices(self._path):
            for connection in connections:
                with suppress(OSError):  # no more
                    now, unread = self._clock(), _unread(connection)
                    key = os.fstat(connection.fileno()).st_ino
                    before, since = self._known.get(key, (0, now))
                    if unread != before or not unread:
                        since = now
                    open_now[key] = unread, since
                    if now - since >= seconds:
                        connection.shutdown(socket.SHUT_RDWR)
            yield
        self._known = open_now


def _unread(connection: socket.socket) -> int:
    """Bytes of the kernel's that wait to be read at the other end."""
    import fcntl  # neither is there on Windows
    import termios

    found: int = struct.unpack("i", fcntl.ioctl(connection, termios.TIOCOUTQ, b"\0" * 4))[0]
    return found
