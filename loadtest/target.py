"""Where requests go and what they are: the URL taken apart, and the bytes of a request, built once."""

import argparse
import base64
import re
import ssl
import threading
from dataclasses import dataclass, replace
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from loadtest import VERSION, values
from loadtest.options import Options
from loadtest.problems import EXIT_USAGE, Problem

DEFAULT_PATH = "/api/process"
MAX_COOKIES = 50  # of a client, as many as RFC 6265 section 6.1 asks for
WITH_LENGTH = frozenset(("POST", "PUT", "PATCH"))  # RFC 9110 section 8.6: these say their length even if it is 0


@dataclass(frozen=True, slots=True)
class Target:
    host: str
    port: int
    origin: str  # scheme and authority
    authority: str  # what Host says
    path: str
    tls: ssl.SSLContext | None


def parse_target(options: Options) -> Target:
    """A path in the URL, were it only "/", is the path to request. Raises Problem."""
    target = _split(options, options.url)
    return replace(target, path=options.path or target.path or DEFAULT_PATH)


def parse_control(options: Options) -> Target:
    """Where the control API is: `path` is what stands before /status. Raises Problem."""
    if options.control is None:
        return replace(_split(options, options.url), path="")
    target = _split(options, options.control)
    if "?" in target.path:
        raise Problem(f"cannot use the URL {options.control!r}: --control has no query", EXIT_USAGE)
    return replace(target, path=target.path.rstrip("/"))


def _split(options: Options, url: str) -> Target:
    try:
        target = _read(url)
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise Problem(f"cannot use the URL {url!r}: {error}", EXIT_USAGE) from None
    if target.tls and options.insecure:
        target.tls.check_hostname, target.tls.verify_mode = False, ssl.CERT_NONE
    return target


def _read(url: str) -> Target:
    url = url if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", url) else f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("only http:// and https:// are supported")
    if not parts.hostname or parts.port == 0 or not re.fullmatch(r"[\x21-\x3f\x41-\x7e]+", parts.netloc):
        raise ValueError("it needs a plain host name, without a user name")
    # As it stands, with an empty query too, but without a fragment, which is not for the server (RFC 9110 section 7.1).
    own_path = re.sub("^[^/]+//[^/?#]*|#.*", "", url)
    own_path = f"/{own_path}" if own_path.startswith("?") else own_path
    authority = parts.netloc.removesuffix(":")
    return Target(
        host=parts.hostname.replace("%25", "%"),  # of an IPv6 address with a zone (RFC 6874 section 2)
        port=parts.port or (443 if parts.scheme == "https" else 80),
        origin=f"{parts.scheme}://{authority}",
        authority=re.sub("%25.*]", "]", authority),  # a zone means nothing to others (RFC 6874 section 4)
        path=values.path(own_path) if own_path else "",
        tls=ssl.create_default_context() if parts.scheme == "https" else None,
    )


def request_method(options: Options) -> str:
    return options.method or ("GET" if options.body is None else "POST")


class Identity:
    """One client as the balancer sees it: its request, with its address and the cookies that it was given.

    `_lock` guards the cookies, as two connections may carry requests of the same client at one time.
    """

    def __init__(self, options: Options, target: Target, address: str | None) -> None:
        self.request = self._plain = _request(options, target, address)
        self.keeps_cookies = address is not None
        self._body_at = self._plain.index(b"\r\n\r\n") + 2
        self._cookies: dict[str, str] = {}
        self._lock = threading.Lock()

    def remember(self, lines: list[str]) -> None:
        """Take over Set-Cookie lines. Names and values only: all requests go to one origin and path."""
        with self._lock:
            for line in lines:
                try:
                    morsels = SimpleCookie(line)
                except CookieError:
                    continue  # as a browser does with what it does not understand
                for name, morsel in morsels.items():
                    if morsel["max-age"].strip().startswith(("0", "-")):  # RFC 6265 section 5.2.2: forget it
                        self._cookies.pop(name, None)
                    else:
                        self._cookies[name] = morsel.coded_value
            for name in list(self._cookies)[:-MAX_COOKIES]:  # the oldest
                del self._cookies[name]
            pairs = "; ".join(f"{name}={value}" for name, value in self._cookies.items())
        cookie = f"Cookie: {pairs}\r\n".encode("latin-1") if pairs else b""
        self.request = self._plain[: self._body_at] + cookie + self._plain[self._body_at :]


def identities(options: Options, target: Target) -> list[Identity]:
    """One without an address, or with --clients that many, each at an address meant for benchmarks (RFC 2544)."""
    if options.clients is None:
        return [Identity(options, target, None)]
    numbers = range(1, options.clients + 1)
    return [Identity(options, target, f"198.{18 + (n >> 16)}.{n >> 8 & 255}.{n & 255}") for n in numbers]


def _request(options: Options, target: Target, address: str | None) -> bytes:
    method, body = request_method(options), options.body
    given = [(name.encode("ascii"), value.encode("latin-1")) for name, value in options.header]
    defaults = {"Host": target.authority, "User-Agent": f"test_client.py/{VERSION}", "Accept": "*/*"}
    if body is not None:
        defaults["Content-Type"] = options.content_type or "application/json"
    if body is not None or method in WITH_LENGTH:
        defaults["Content-Length"] = str(len(body or b""))
    if options.no_keepalive:
        defaults["Connection"] = "close"
    if address:
        defaults["X-Forwarded-For"] = address
    if options.user is not None:  # RFC 7617 section 2
        defaults["Authorization"] = f"Basic {base64.b64encode(options.user.encode()).decode()}"
    names = {name.lower() for name, _ in given}
    lines = [(n.encode("ascii"), v.encode("latin-1")) for n, v in defaults.items() if n.lower().encode() not in names]
    head = b"".join(b"%s: %s\r\n" % line for line in lines + given)
    return b"%s %s HTTP/1.1\r\n%s\r\n%s" % (method.encode("ascii"), target.path.encode("ascii"), head, body or b"")
