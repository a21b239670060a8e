"""Names and passwords, kept as bcrypt hashes: slow to check by design, so it is done rarely and never in a hurry."""

from __future__ import annotations

import re
import time
from base64 import b64decode
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from hashlib import blake2b
from secrets import token_bytes
from threading import BoundedSemaphore, Lock

import bcrypt

from balancer.errors import AuthUnavailable, TooManyGuesses
from balancer.filters.auth import Authenticator, Granted, Refused, granted, is_subject, sent
from balancer.protocol.addresses import Network
from balancer.protocol.guesses import Guesses
from balancer.protocol.request import Request
from balancer.protocol.requestkey import request_key

LONGEST_PASSWORD = 72  # bytes; bcrypt takes no more
LONGEST_SENT = 1024  # characters of Base64
KEPT_SECONDS = 60.0  # for which a check counts
MOST_KEPT = 1000
CHECKS_AT_ONCE = 2  # each takes a quarter of a second of a CPU
QUEUE_SECONDS, QUEUE_PLACES = 5.0, 64  # to wait for one of these; each takes a thread
_HASH = re.compile(rb"\$2[aby]\$(0[4-9]|1[0-6])\$[./A-Za-z0-9]{53}")


@dataclass(frozen=True, slots=True)
class Check:
    """Of a name and a password. `is_right` is None if none could be made; good until `until`, of the clock."""

    is_right: Future[bool | None]
    until: float


class Basic(Authenticator):
    """RFC 7617; `hashes` are by name. So many wrong passwords from one address, and it has to wait.

    `_lock` guards `_checks`: those made lately and those under way, by a keyed digest, the oldest first. Who comes with
    what is just being checked waits for that.
    """

    waits = True

    def __init__(
        self,
        name: str,
        hashes: Mapping[bytes, bytes],
        trusted: Sequence[Network],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(name)
        self._hashes = hashes
        # Of nobody: or the time that an answer takes would tell which names there are.
        self._no_hash = max(hashes.values(), default=b"$2b$12$", key=lambda each: each[4:6])[:7] + b"." * 53
        self._client = request_key("client_ip", trusted)
        self._clock = clock
        self._guesses = Guesses(clock)
        self._key = token_bytes(32)
        self._lock = Lock()
        self._checks: dict[bytes, Check] = {}
        self._free, self._places = BoundedSemaphore(CHECKS_AT_ONCE), BoundedSemaphore(QUEUE_PLACES)
        self._challenge = f'Basic realm="{name}", charset="UTF-8"'

    def check(self, request: Request) -> Granted | Refused:
        found = sent(request, b"basic")
        if not found:
            return self.refused("missing", "no password was sent", self._challenge)
        if len(found) > 1:
            return self.refused("invalid", "more than one password was sent", self._challenge)
        client = self._client(request)
        if seconds := self._guesses.wait(client, True):
            return self._throttled(seconds)
        user, colon, password = _decoded(found[0]).partition(b":")
        if not colon or len(password) > LONGEST_PASSWORD:
            return self.refused("invalid", "no name and password as RFC 7617 has them", self._challenge)
        is_right = self._is_right(user, password, client)
        if is_right:
            return granted(user.decode())
        if is_right is None:
            seconds = self._guesses.wait(client, True)
            return self._throttled(seconds) if seconds else self._busy()
        return self.refused("invalid", "this name or password is wrong", self._challenge)

    def _throttled(self, seconds: float) -> Refused:
        text = "too many wrong passwords from this address"
        return self.refused("throttled", text, decision=TooManyGuesses(f"{self.name}: {text}", seconds))

    def _busy(self) -> Refused:
        text = "too many passwords are being checked"
        return self.refused("unavailable", text, decision=AuthUnavailable(f"{self.name}: {text}"))

    def _is_right(self, user: bytes, password: bytes, client: bytes) -> bool | None:
        digest = blake2b(user + b":" + password, key=self._key, digest_size=32).digest()
        now = self._clock()
        with self._lock:
            check = self._checks.get(digest)
            is_new = check is None or check.until <= now
            if check is None or is_new:
                self._checks.pop(digest, None)  # and in again, as the newest
                check = self._checks[digest] = Check(Future(), now + KEPT_SECONDS)
                if len(self._checks) > MOST_KEPT:
                    del self._checks[next(iter(self._checks))]
        if is_new:
            is_right = None
            try:
                if self._places.acquire(blocking=False):
                    is_right = self._compare(user, password, client)
            finally:
                if is_right is None:
                    with self._lock:
                        self._checks.pop(digest, None)
                check.is_right.set_result(is_right)
        return check.is_right.result()

    def _compare(self, user: bytes, password: bytes, client: bytes) -> bool | None:
        """None if it is not this one's turn in time, or its client has guessed too often meanwhile."""
        try:
            if not self._free.acquire(timeout=QUEUE_SECONDS):
                return None
        finally:
            self._places.release()
        try:
            if self._guesses.wait(client, True):
                return None
            is_right = bcrypt.checkpw(password, self._hashes.get(user, self._no_hash)) and user in self._hashes
        finally:
            self._free.release()
        self._guesses.wait(client, is_right)
        return is_right


def _decoded(text: bytes) -> bytes:
    """Nothing for what is no Base64."""
    try:
        return b64decode(text, validate=True) if len(text) <= LONGEST_SENT else b""
    except ValueError:
        return b""


def read_users(data: bytes) -> dict[bytes, bytes]:
    """Lines of name:hash, as `htpasswd -B` writes them. Raises ValueError, whose text has no hash."""
    users: dict[bytes, bytes] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip() or line.startswith(b"#"):
            continue
        name, _, hashed = line.strip().partition(b":")
        if not _HASH.fullmatch(hashed) or not is_subject(name.decode("utf-8", "surrogateescape")):
            raise ValueError(
                f"line {number}: expected NAME:HASH with a bcrypt hash of cost 4 to 16, as htpasswd -B writes"
            )
        if name in users:
            raise ValueError(f"line {number}: a name stands there twice")
        users[name] = hashed
    if not users:
        raise ValueError("no users; expected lines of NAME:HASH, as htpasswd -B writes")
    return users
