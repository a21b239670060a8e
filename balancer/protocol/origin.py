"""Where a backend listens."""

from __future__ import annotations

import os
import re
import sys
from functools import lru_cache
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

from balancer.errors import SettingsError
from balancer.protocol.texts import quoted

# Labels of 1 to 63 characters, as Python's resolver demands; or an IPv6 address in brackets, maybe with a zone.
NAME_PATTERN = r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
IPV6_PATTERN = r"[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9._-]+)?"
# Of the whole authority: urlsplit would drop what stands between a bracket and the port.
AUTHORITY_PATTERN = rf"(?:{NAME_PATTERN}|\[{IPV6_PATTERN}\])(?::[0-9]*)?"

EXPECTED = "http://HOST:PORT or https://HOST:PORT, or http+unix:///PATH"
LOOKED_UP = "dns+http://NAME:PORT, srv+http://_SERVICE._tcp.NAME or kubernetes+http://SERVICE.NAMESPACE:PORT, or https"
UNIX = "http+unix"
LONGEST_PATH = 107  # bytes, the zero at its end aside (unix(7))


class Origin(NamedTuple):
    """Where a backend listens: what a connection needs, parsed once. Also the key of its pooled connections.

    `host` of a Unix socket is its path, and `port` 0. Where `address` is known nobody asks a resolver: `host` is what
    the backend there is called.
    """

    scheme: str
    host: str
    port: int
    address: str = ""

    @classmethod
    def parse(cls, url: str) -> Origin:
        """From `http://host:port`, `https://host` or `http+unix:///path`. Raises SettingsError naming the part that is
        wrong."""
        if url.strip().startswith(f"{UNIX}://"):  # `@` may be a part of the path
            return cls(UNIX, _socket_path(url.strip()), 0)
        _refuse_user_info(url)
        if re.search(r"[\x00-\x20\x7f]", url.strip()):  # urlsplit would drop them without a word
            raise SettingsError(f"backend URL {quoted(url)}: must not have blanks or control characters")
        try:
            parts = urlsplit(url.strip())
            port = parts.port
        except ValueError as error:
            raise SettingsError(f"backend URL {quoted(url)}: {error}") from None
        if parts.scheme not in ("http", "https"):
            raise SettingsError(f"backend URL {quoted(url)}: expected {EXPECTED}")
        if parts.path not in ("", "/") or parts.query or parts.fragment or "?" in url or "#" in url:
            raise SettingsError(f"backend URL {quoted(url)}: must not have a path; requests keep their own")
        if not parts.hostname or not re.fullmatch(AUTHORITY_PATTERN, parts.netloc) or port == 0:
            raise SettingsError(f"backend URL {quoted(url)}: expected {EXPECTED}")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80))

    @property
    def is_unix(self) -> bool:
        return self.scheme == UNIX

    @property
    def name(self) -> str:
        """What the peer itself is called: without the dot that makes a name absolute (RFC 6066 section 3), and without
        the zone of an address, which means something on this machine alone (RFC 6874 section 4)."""
        return self.host.partition("%")[0].removesuffix(".")

    @property
    def authority(self) -> str:
        """host:port, as in `Host`; the dot of an absolute name stays. A path is no name, so that curl says this too."""
        return "localhost" if self.is_unix else self._with_port(self.host.partition("%")[0])

    @property
    def url(self) -> str:
        return _url(self)

    def _with_port(self, host: str) -> str:
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"


@lru_cache(10_000)
def _url(origin: Origin) -> str:
    """Told of all backends again and again."""
    if origin.is_unix:
        return unix_url(origin.host)
    return f"{origin.scheme}://{origin._with_port(origin.address or origin.host)}"


class Discovered(NamedTuple):
    """Where backends are to be looked up, by which `kind` of source; `port` is empty if that says which."""

    kind: Literal["dns", "srv", "kubernetes"]
    scheme: str
    name: str
    port: str

    @classmethod
    def parse(cls, url: str) -> Discovered | None:
        """None if it is the URL of one backend. Raises SettingsError."""
        if not re.match(r"(?:dns|srv|kubernetes)\+", url):
            return None
        _refuse_user_info(url)
        found = re.fullmatch(rf"(dns|srv|kubernetes)\+(https?)://({NAME_PATTERN})(?::([A-Za-z0-9-]+))?/?", url)
        if found is not None:
            made = cls(*found.groups(default=""))  # type: ignore[arg-type]
            is_number = made.port.isdecimal() and 0 < int(made.port) < 65536
            if made.is_name() and (is_number or not made.port or made.kind == "kubernetes"):
                return made
        raise SettingsError(f"backend URL {quoted(url)}: expected {LOOKED_UP}")

    def is_name(self) -> bool:
        if self.kind == "kubernetes":
            return self.name.count(".") < 2
        return not re.fullmatch(r"[0-9.]+", self.name) and not (self.kind == "srv" and self.port)

    @property
    def host(self) -> str:
        """What backends are called: of a name as `_http._tcp.api.example` the last part (RFC 2782)."""
        return re.sub(r"^_[^.]+\._[^.]+\.", "", self.name) if self.kind == "srv" else self.name

    def origin(self, address: str, port: int) -> Origin:
        return Origin(self.scheme, self.host, port, address)

    @property
    def url(self) -> str:
        return f"{self.kind}+{self.scheme}://{self.name}" + (f":{self.port}" if self.port else "")


class Endpoint(NamedTuple):
    """What is asked at an origin: `target` is path and query."""

    origin: Origin
    target: bytes

    @classmethod
    def parse(cls, url: str) -> Endpoint:
        """Raises SettingsError, whose text repeats no password."""
        found = re.fullmatch(r"(https?://[^/?#@]+)(/[\x21\x22\x24-\x7e]*)?", url)
        try:
            if found is not None:
                return cls(Origin.parse(found[1]), (found[2] or "/").encode("ascii"))
        except SettingsError:
            pass
        raise SettingsError(
            f"URL of host {quoted(url.rpartition('@')[2])}: expected http://HOST:PORT/PATH or https://..."
        )

    def __str__(self) -> str:
        return f"{self.origin.url}{self.target.partition(b'?')[0].decode()}"


def unix_url(path: str) -> str:
    """Of the socket at `path`, whatever bytes that has."""
    return f"{UNIX}://{quote(os.fsencode(path))}"


def _refuse_user_info(url: str) -> None:
    """Before anything else: no other message may repeat a password."""
    if "@" in url:
        raise SettingsError(
            f"backend URL of host {quoted(url.rpartition('@')[2])}: user info is not supported, remove it"
        )


def _socket_path(url: str) -> str:
    """Written as it is or, as other programs want it, as one word: `http+unix://%2Frun%2Fapp.sock`."""
    told = url.removeprefix(f"{UNIX}://").removesuffix("/")
    is_one_word = told[:3].upper() == "%2F"
    try:
        path = unquote_to_bytes(told)
    except UnicodeEncodeError:  # half of a surrogate pair
        path = b""
    if not path.startswith(b"/") or path == b"/" or set(told) & set("?#") or (is_one_word and "/" in told):
        raise SettingsError(f"backend URL {quoted(url)}: expected {UNIX}:///PATH, where % ? # are %25 %3F %23")
    try:
        check_path(path)
    except ValueError as error:
        raise SettingsError(f"backend URL {quoted(url)}: {error}") from None
    return os.fsdecode(path)


def check_path(path: bytes) -> None:
    """Raises ValueError if it cannot be a Unix socket's."""
    if sys.platform == "win32":
        raise ValueError("Unix sockets are not supported on Windows")
    if b"\0" in path:
        raise ValueError("a path must not have zero bytes")
    if len(path) > LONGEST_PATH:
        raise ValueError(f"the path has {len(path)} bytes, a Unix socket's has at most {LONGEST_PATH}")
