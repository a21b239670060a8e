"""Where a backend listens."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from balancer.errors import SettingsError
from balancer.protocol.texts import quoted

# Labels of 1 to 63 characters, as Python's resolver demands; or an IPv6 address in brackets, maybe with a zone.
NAME_PATTERN = r"[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?"
_IPV6 = r"[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*(?:%[A-Za-z0-9._-]+)?"
# Of the whole authority: urlsplit would drop what stands between a bracket and the port.
AUTHORITY_PATTERN = rf"(?:{NAME_PATTERN}|\[{_IPV6}\])(?::[0-9]*)?"


class Origin(NamedTuple):
    """Where a backend listens: what a connection needs, parsed once. Also the key of its pooled connections."""

    scheme: str
    host: str
    port: int

    @classmethod
    def parse(cls, url: str) -> Origin:
        """From `http://host:port` or `https://host`. Raises SettingsError naming the part that is wrong."""
        if "@" in url:  # before anything else: no other message may repeat a password
            raise SettingsError(
                f"backend URL of host {quoted(url.rpartition('@')[2])}: user info is not supported, remove it"
            )
        if re.search(r"[\x00-\x20\x7f]", url.strip()):  # urlsplit would drop them without a word
            raise SettingsError(f"backend URL {quoted(url)}: must not have blanks or control characters")
        try:
            parts = urlsplit(url.strip())
            port = parts.port
        except ValueError as error:
            raise SettingsError(f"backend URL {quoted(url)}: {error}") from None
        if parts.scheme not in ("http", "https"):
            raise SettingsError(f"backend URL {quoted(url)}: expected http://HOST:PORT or https://HOST:PORT")
        if parts.path not in ("", "/") or parts.query or parts.fragment or "?" in url or "#" in url:
            raise SettingsError(f"backend URL {quoted(url)}: must not have a path; requests keep their own")
        if not parts.hostname or not re.fullmatch(AUTHORITY_PATTERN, parts.netloc) or port == 0:
            raise SettingsError(f"backend URL {quoted(url)}: expected http://HOST:PORT or https://HOST:PORT")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80))

    @property
    def name(self) -> str:
        """What the peer itself is called: without the dot that makes a name absolute (RFC 6066 section 3), and without
        the zone of an address, which means something on this machine alone (RFC 6874 section 4)."""
        return self.host.partition("%")[0].removesuffix(".")

    @property
    def authority(self) -> str:
        """host:port, as in `Host`; the dot of an absolute name stays."""
        return self._with_port(self.host.partition("%")[0])

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self._with_port(self.host)}"

    def _with_port(self, host: str) -> str:
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
