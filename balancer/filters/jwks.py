"""Keys that tokens are signed with: from a file, or fetched by a thread of their own and fetched again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Literal, NamedTuple

from joserfc import jwk

from balancer.protocol.origin import Endpoint
from balancer.protocol.texts import shown
from balancer.upstream.dialer import Dialer
from balancer.upstream.outgoing import OutgoingRequest
from balancer.upstream.response import ResponseBody
from balancer.upstream.transport import BackendAdapter, Timeouts

MOST_KEYS, MOST_BYTES = 100, 1_048_576
FETCH_SECONDS = 3.0  # for all of one fetch
REFRESH_SECONDS = 300.0
COOL_DOWN_SECONDS = 10.0  # at least between two fetches, whatever tokens name
STALE_SECONDS = 86400.0  # for which keys are used while no new ones can be had
RSA_BITS = range(2048, 8193)  # no fewer by RFC 7518 section 3.3, no more because each check would take too long

News = Literal["keys_kept", "keys_found"]


class Key(NamedTuple):
    """`kid` and `alg` are None where the key does not say."""

    kid: str | None
    alg: str | None
    key: jwk.Key


Keys = tuple[Key, ...]


def read_keys(data: bytes) -> Keys:
    """Public keys of a JSON Web Key Set (RFC 7517) that can check signatures. What is of no use is left out, as section
    5 has it. Raises ValueError."""
    try:
        listed = json.loads(data)["keys"]
    except (ValueError, LookupError, TypeError, RecursionError):
        raise ValueError("no JSON Web Key Set") from None
    if not isinstance(listed, list) or len(listed) > MOST_KEYS:
        raise ValueError(f"expected a list of at most {MOST_KEYS} keys")
    keys = tuple(key for each in listed if (key := _read_key(each)) is not None)
    if not keys:
        raise ValueError("no key that can check signatures")
    return keys


def _read_key(given: object) -> Key | None:
    if not isinstance(given, Mapping) or given.get("kty") == "oct" or given.get("use", "sig") != "sig":
        return None
    kid, alg = given.get("kid"), given.get("alg")
    try:
        key = jwk.import_key({**given})
        key.check_key_op("verify")
        if isinstance(key, jwk.RSAKey) and key.public_key.key_size not in RSA_BITS:
            return None
    except Exception:  # of many kinds: fields of other types, numbers that are on no curve
        return None
    return Key(kid if isinstance(kid, str) else None, alg if isinstance(alg, str) else None, key)


class RemoteKeys:
    """Fetches the keys at `url`, from time to time and when somebody `wants` others. `note` is told of each change.

    `_keys` is replaced whole, and only if other keys have come, by the thread alone.
    """

    def __init__(
        self,
        name: str,
        url: Endpoint,
        dialer: Dialer,
        note: Callable[[News, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._url = name, url
        timeouts = Timeouts(FETCH_SECONDS, FETCH_SECONDS, FETCH_SECONDS, pool_idle_timeout=0)
        self._adapter = BackendAdapter(timeouts, max_idle=0, dialer=dialer)
        self._note = note
        self._clock = clock
        self._keys: Keys = ()
        self._raw = b""
        self._fetched_at = 0.0
        self._failure: str | None = None
        self._wanted, self._stopping = Event(), Event()
        self._thread = Thread(target=self._run, name="jwks", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and join; a fetch under way ends within its time limit."""
        self._stopping.set()
        self._wanted.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def keys(self) -> Keys:
        """None before the first fetch, nor when the last one was too long ago."""
        return self._keys if self._keys and self._clock() - self._fetched_at < STALE_SECONDS else ()

    def want(self) -> None:
        """A token names a key that is not here."""
        self._wanted.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._fetch()
            self._stopping.wait(COOL_DOWN_SECONDS)
            if self._failure is None:
                self._wanted.wait(REFRESH_SECONDS - COOL_DOWN_SECONDS)
            self._wanted.clear()

    def _fetch(self) -> None:
        try:
            data = self._download()
            if data != self._raw:
                self._keys, self._raw = read_keys(data), data
                self._note("keys_found", f"{self._name}: {len(self._keys)} keys from {self._url}")
            elif self._failure is not None:
                self._note("keys_found", f"{self._name}: {self._url} answers again")
            self._fetched_at, self._failure = self._clock(), None
        except Exception as error:  # whatever they serve, those that are here are used meanwhile
            failure = shown(str(error))
            if failure != self._failure:
                left = "the old ones are used" if self._keys else "there are none"
                self._note("keys_kept", f"{self._name}: {self._url}: {failure}; {left}")
            self._failure = failure

    def _download(self) -> bytes:
        """Raises BackendError, OutOfDescriptors, ValueError."""
        deadline = time.monotonic() + FETCH_SECONDS
        host = (b"host", self._url.origin.authority.encode("ascii"))
        asked = OutgoingRequest(
            "GET", self._url.target, [host, (b"accept", b"application/json"), (b"connection", b"close")]
        )
        asked.deadline = deadline
        response = self._adapter.exchange(asked, self._url.origin)
        assert isinstance(response.body, ResponseBody)
        data = response.body.read_out(MOST_BYTES, deadline)
        if response.status_code != 200:
            raise ValueError(f"it answered {response.status_code}")
        if not response.body.is_complete:
            raise ValueError(f"no whole answer of at most {MOST_BYTES} bytes within {FETCH_SECONDS:g} s")
        return data
