"""Header rules of a gateway: pure functions on header lines, no I/O.

Facts this module rests on:
- A header section is an ordered list of lines. Lines of one name keep their order and are never merged, because
  `Set-Cookie` cannot be (RFC 9110 section 5.3). So the type is a list of pairs of bytes, not a mapping.
- Names are compared in lower case (section 5.1).
- Hop-by-hop fields belong to one connection. They go first, in both directions; what we add comes after, or a client
  could nominate our own fields in `Connection` and have them removed (section 7.6.1).
- Everything a client says about where it comes from, or what it was after, is a claim until its address is in
  `trusted_proxies`: applications believe it, and cannot tell it from what a proxy has set.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count
from secrets import token_hex
from urllib.parse import unquote

from balancer.errors import ClientError, CodingUnsupported, LoopDetected, MethodRefused, TooManyHeaders
from balancer.protocol.addresses import UNIX, Network, is_in_networks, plain

Line = tuple[bytes, bytes]

# RFC 9110 section 7.6.1, plus the fields that are for one hop by their own definition (sections 10.1.4, 11.7, 6.6.2).
HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"proxy-connection", b"keep-alive", b"te", b"transfer-encoding", b"upgrade", b"trailer"),
        *(b"proxy-authenticate", b"proxy-authorization"),
    }
)
# Not for the backend: `Expect` is answered by our server (section 10.1.1), `Proxy` is CVE-2016-5385 (httpoxy), the
# framing is made anew (section 8.6), the request id is set by us, and for a WebSocket so is the handshake (RFC 6455).
_HANDSHAKE = frozenset({b"sec-websocket-key", b"sec-websocket-version", b"sec-websocket-extensions"})
_NOT_FORWARDED = HOP_BY_HOP | _HANDSHAKE | {b"expect", b"proxy", b"content-length", b"x-request-id"}
# What a proxy tells of the client and of what it asked for, and what applications believe: all that begins like this,
_CLAIMED = (
    *(b"x-original-", b"x-envoy-original-", b"x-ssl", b"ssl-client-", b"wl-proxy-", b"cf-connecting-", b"cloudfront-"),
    *(b"fastly-", b"fly-", b"x-vercel-", b"x-amzn-mtls-", b"x-azure-clientip", b"x-azure-socketip"),
)
# all that has one of these in it,
_CLAIMING = re.compile(
    rb"forwarded|forward(?:er)?-for|client-?cert|(?:client|real|remote|source|originating|proxyuser|user)-?(?:ip|addr)\Z"
)
# and the rest by name: addresses, targets and hosts, schemes and TLS.
_CLAIMS = frozenset(
    {
        *(b"do-connecting-ip", b"x-nf-client-connection-ip", b"x-envoy-external-address", b"x-envoy-internal"),
        *(b"x-rewrite-url", b"x-replaced-path", b"x-request-uri", b"x-http-destinationurl", b"x-prefix"),
        *(b"x-script-name", b"script-name", b"x-host", b"x-http-host-override", b"x-server-name", b"x-server-port"),
        *(b"x-scheme", b"x-url-scheme", b"x-proto", b"x-https", b"front-end-https", b"cf-visitor", b"x-arr-ssl"),
        *(b"x-client-dn", b"x-client-verify"),
    }
)
# Of these, what we tell ourselves, which is added to what a trusted proxy has told.
_ADDED_TO = frozenset({b"forwarded", b"x-forwarded-for", b"x-forwarded-proto", b"x-forwarded-host"})
CREDENTIALS = frozenset({b"authorization", b"x-api-key"})
_PASSED_ON = CREDENTIALS | {b"via", b"max-forwards", b"traceparent", b"tracestate", b"service-worker"}
_SPECIAL = _NOT_FORWARDED | _PASSED_ON | {b"host"}
# `Alt-Svc` names another way to the backend's own origin, which is not ours (RFC 7838 section 2.1).
_NOT_RETURNED = HOP_BY_HOP | {b"alt-svc", b"x-request-id", b"x-served-by"}
# What `Connection` may not take away: without it the message means something else.
_NEVER_NOMINATED = frozenset({b"host", b"content-length"})
NONE: frozenset[bytes] = frozenset()
_CLOSE = frozenset({b"close"})
# For an answer that names no server: ours would name itself otherwise, which is only a part of it.
SERVER_LINE: Line = (b"server", b"load-balancer")

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")  # those that we know; others pass, but for
REFUSED_METHODS = frozenset({"CONNECT", "TRACE"})  # these: not for a gateway (RFC 9110 sections 9.3.6 and 9.3.8)
ALLOWED = ", ".join(METHODS).encode()  # as in `Allow`
IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})  # RFC 9110 section 9.2.2; TRACE is refused
BODILESS_STATUSES = frozenset({204, 304})  # RFC 9112 section 6.3, rule 1

_DIGITS = re.compile(rb"[0-9]{1,18}\Z")
# reg-name, IPv4 or bracketed IPv6, optional port (RFC 3986 section 3.2.2); no user info, no spaces.
_HOST = re.compile(rb"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~!$&'()*+,;=%]+)(?::[0-9]{0,5})?\Z")
_PATH = re.compile(rb"/[\x21-\x7e]*\Z")
# A path that means the same to every reader of URLs: no dots, backslashes, escapes, or host.
_PLAIN_PATH = re.compile(rb"(?:/[A-Za-z0-9_~-]+)+/?\Z")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:+/=@-]{1,128}\Z")

# W3C Trace Context, section 3.2.2: version, trace id, parent id, flags; later versions may say more after that.
_TRACE_PARENT = re.compile(
    rb"(?:00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}"
    rb"|(?!00|ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-[\x21-\x7e]*)?)\Z"
)

_process_id = token_hex(6).encode()
_serial = count(1)


class HeaderLines(Mapping[str, str]):
    """Header lines that also read as a mapping, as `requests` expects of `headers`.

    `lines` is the truth: pairs of bytes in wire order, repeated names kept. The mapping view joins repeated lines with
    a comma, which is right for every field but `Set-Cookie`; use `lines` to forward.
    """

    __slots__ = ("lines",)

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines

    def __getitem__(self, name: str) -> str:
        wanted = name.lower().encode("latin-1", "replace")
        values = [value for key, value in self.lines if key.lower() == wanted]
        if not values:
            raise KeyError(name)
        return b", ".join(values).decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key.lower().decode("latin-1") for key, _ in self.lines))

    def __len__(self) -> int:
        return len({key.lower() for key, _ in self.lines})


def parse_content_length(value: bytes) -> int:
    """Length in bytes. Digits only: `int()` would take `+5`, `1_0`, blanks and digits of other scripts.

    Raises ValueError for anything else (RFC 9110 section 8.6).
    """
    if not is_content_length(value):
        raise ValueError(f"Content-Length {value[:40]!r} is not a number")
    return int(value)


def is_content_length(value: bytes) -> bool:
    return _DIGITS.match(value) is not None


def is_claim(name: bytes) -> bool:
    """Whether this field says where a request comes from, or what it was after before a proxy changed it."""
    return name in _CLAIMS or name.startswith(_CLAIMED) or _CLAIMING.search(name) is not None


def is_plain(name: bytes) -> bool:
    """Whether this field goes on as it is. None with `_` does: WSGI and CGI fold that onto `-`, so that X_Forwarded_For
    would arrive as X-Forwarded-For."""
    return not (name in _SPECIAL or b"_" in name or is_claim(name))


def nominated(lines: Iterable[Line]) -> frozenset[bytes]:
    """Names listed in all `Connection` lines, in lower case (RFC 9110 section 7.6.1)."""
    return NONE.union(*(connection_options(name, value) for name, value in lines))


def connection_options(name: bytes, value: bytes) -> frozenset[bytes]:
    """Of one line. `Persistent-Auth` says that the connection is logged in, so nobody else may have it."""
    if name == b"persistent-auth":
        return _CLOSE
    return options_of(value) if name == b"connection" else NONE


def options_of(value: bytes) -> frozenset[bytes]:
    """Names in one `Connection` line."""
    return frozenset(item.strip().lower() for item in value.split(b",")) - _NEVER_NOMINATED


def check_method(method: str) -> None:
    """Raises MethodRefused."""
    if method in REFUSED_METHODS:
        raise MethodRefused(f"{method} is not supported", ALLOWED)


def check_target(method: str, target: bytes) -> None:
    """Origin-form or asterisk-form in visible ASCII, nothing else. Raises ClientError (RFC 9112 section 3.2)."""
    if not _PATH.match(target) and not (target == b"*" and method == "OPTIONS"):
        raise ClientError("the request target must be a path")


def check_count(lines: Sequence[Line], most: int) -> None:
    """Raises TooManyHeaders (RFC 6585 section 5)."""
    if len(lines) > most:
        raise TooManyHeaders(f"{len(lines)} header lines, at most {most} are accepted")


def check_host(hosts: Sequence[bytes], http_version: str) -> None:
    """Refuse what hyper lets through: no Host, more than one, or one that is no host name.

    Raises ClientError (RFC 9112 section 3.2).
    """
    if len(hosts) > 1:
        raise ClientError(f"the request has {len(hosts)} Host lines, expected one")
    host = hosts[0] if hosts else b""
    if not host:
        if http_version != "1.0":
            raise ClientError("the request has no Host header")
    elif not _HOST.match(host):
        raise ClientError("the Host header is not a host name")


def check_codings(values: Sequence[bytes]) -> None:
    """A body may be chunked, once; any other coding would be lost when it is framed anew (RFC 9112 section 6.1).

    `values` of Transfer-Encoding. Raises CodingUnsupported for another coding, ClientError for chunked twice.
    """
    if not values or (len(values) == 1 and values[0] == b"chunked"):
        return
    codings = [item.strip().lower() for item in b",".join(values).split(b",")]
    if codings == [b"chunked"]:
        return
    if set(codings) == {b"chunked"}:
        raise ClientError("the request body is chunked twice")
    raise CodingUnsupported("a Transfer-Encoding other than chunked is not supported")


def body_length(lengths: Sequence[bytes], codings: Sequence[bytes]) -> int | None:
    """Bytes of a request body by its Content-Length, None without one. Raises ClientError (RFC 9112 section 6.3)."""
    if not lengths:
        return None
    if codings:
        raise ClientError("the request has both Content-Length and Transfer-Encoding")
    try:
        return parse_content_length(b",".join(lengths))
    except ValueError as error:
        raise ClientError(str(error)) from None


def max_forwards(values: Sequence[bytes]) -> int | None:
    """How many more steps an OPTIONS may go, None if nothing says so (RFC 9110 section 7.6.2)."""
    return min((int(value) for value in values if _DIGITS.match(value)), default=None)


def count_down(lines: Iterable[Line]) -> list[Line]:
    """Take this step off `Max-Forwards`."""
    return [
        (name, b"%d" % max(0, int(value) - 1)) if name == b"max-forwards" and _DIGITS.match(value) else (name, value)
        for name, value in lines
    ]


def logs_in(name: bytes, value: bytes) -> bool:
    """Whether this line says who sends a request for its whole connection, not for itself alone (RFC 4559, NTLM)."""
    return name == b"authorization" and value[:4].lower() in (b"ntlm", b"nego")


def request_id(given: Sequence[bytes]) -> bytes | None:
    """The client's X-Request-ID, if it is one sane line."""
    return given[0] if len(given) == 1 and _REQUEST_ID.match(given[0]) else None


def new_request_id() -> bytes:
    """Unique in this process and across restarts."""
    return b"%s-%x" % (_process_id, next(_serial))


def trace_id(given: Sequence[bytes]) -> str | None:
    """The trace id of the one valid `traceparent`; None if there is none (W3C Trace Context, section 3.2)."""
    match = _TRACE_PARENT.match(given[0]) if len(given) == 1 else None
    return (match[1] or match[2]).decode("ascii") if match else None


def request_lines(
    lines: Sequence[Line],
    found: Mapping[bytes, Sequence[bytes]],
    *,
    peer: str,
    scheme: str,
    http_version: str,
    pseudonym: bytes | None,
    trusted: Sequence[Network] = (),
) -> list[Line]:
    """Header lines for the backend, without framing fields and X-Request-ID; `Host` first.

    `found` are the fields of `lines` that are not plain; `peer` is the address of the TCP connection; `pseudonym` our
    name in `Via`, None for no `Via` at all. Raises LoopDetected if the request has passed through us before.
    """
    # HTTP/1.0 may have none: then it is the backend's own, which `upstream` knows once there is one.
    host = found[b"host"][0] if b"host" in found else b""
    kept = [line for line in lines if line[0] not in found]
    told: dict[bytes, bytes] = {}  # by a trusted proxy, of what we tell too
    if len(found) > 1 or b"host" not in found:  # more than Host, which is all that most requests have
        kept, claims = _with_special(kept, found, pseudonym)
        if claims and is_in_networks(peer, trusted):
            kept += [(name, value) for name, values in claims.items() if name not in _ADDED_TO for value in values]
            told = {name: b", ".join(values) for name, values in claims.items() if name in _ADDED_TO}
    address = b"unknown" if peer == UNIX else plain(peer).encode("ascii", "replace")  # RFC 7239 section 6.2
    protocol = scheme.encode()
    if b"forwarded" in told:
        kept.append((b"forwarded", told[b"forwarded"] + b", " + _forwarded(address, host, scheme)))
    forwarded_for = address
    if b"x-forwarded-for" in told:  # of a proxy that has no address nothing is added, for most take all for addresses
        forwarded_for = told[b"x-forwarded-for"] + (b"" if peer == UNIX else b", " + address)
    made = [
        (b"host", host),
        *kept,
        (b"x-forwarded-for", forwarded_for),
        (b"x-forwarded-proto", told.get(b"x-forwarded-proto", protocol)),
    ]
    if forwarded_host := told.get(b"x-forwarded-host", host):
        made.append((b"x-forwarded-host", forwarded_host))
    if pseudonym is not None:
        made.append((b"via", b"%s %s" % (http_version.encode(), pseudonym)))
    return made


def _with_special(
    kept: list[Line], found: Mapping[bytes, Sequence[bytes]], pseudonym: bytes | None
) -> tuple[list[Line], dict[bytes, Sequence[bytes]]]:
    """(lines that go on, what the client claims), less what its `Connection` names."""
    if pseudonym is None:
        found = {name: values for name, values in found.items() if name != b"via"}
    elif any(pseudonym in value for value in found.get(b"via", ())):
        raise LoopDetected("the request has already passed through this load balancer")
    kept += [(name, value) for name, values in found.items() if name in _PASSED_ON for value in values]
    options = frozenset[bytes]().union(*(options_of(value) for value in found.get(b"connection", ())))
    if not options <= HOP_BY_HOP:
        kept = [line for line in kept if line[0] not in options]
    return kept, {name: values for name, values in found.items() if is_claim(name) and name not in options}


def join_cookies(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    """HTTP/2 may split `Cookie` over several lines; HTTP/1.1 must get one (RFC 9113 section 8.2.3)."""
    crumbs = [value for name, value in lines if name == b"cookie"]
    if len(crumbs) < 2:
        return lines
    return (*(line for line in lines if line[0] != b"cookie"), (b"cookie", b"; ".join(crumbs)))


def without_cookies(lines: tuple[Line, ...], names: Collection[bytes]) -> tuple[tuple[Line, ...], dict[bytes, bytes]]:
    """The lines without these cookies, and the value of the first one of each name, which has the longest path
    (RFC 6265, 5.4)."""
    values: dict[bytes, bytes] = {}
    left = []
    for line in lines:
        if line[0] == b"cookie":
            others = []
            crumbs = [crumb.strip() for crumb in line[1].split(b";")]
            for crumb in crumbs:
                name, equals, value = crumb.partition(b"=")
                if equals and name in names:
                    values[name] = values.get(name) or value
                else:
                    others.append(crumb)
            if len(others) < len(crumbs):
                line = (b"cookie", b"; ".join(others))
                if not line[1]:
                    continue
        left.append(line)
    return tuple(left), values


def response_lines(lines: Sequence[Line], status: int, options: frozenset[bytes]) -> list[Line]:
    """Header lines for the client: everything that is not for the connection to the backend only, and SERVER_LINE.

    `lines` have lower-case names; `options` are what `nominated` found in them.
    """
    drop = _NOT_RETURNED if options <= _NOT_RETURNED else _NOT_RETURNED | options
    if status == 204:  # RFC 9110 section 8.6
        drop |= {b"content-length"}
    return named([line for line in lines if line[0] not in drop])


def named(lines: list[Line]) -> list[Line]:
    """With a `Server`: if these have none, ours."""
    return lines if any(name == b"server" for name, _ in lines) else [*lines, SERVER_LINE]


def scope_of(target: bytes) -> str:
    """The folder of the script that is asked for: how far it reaches as a service worker, unless its answer says more
    (W3C Service Workers, section "Service Worker Script Response")."""
    return unquote(target.partition(b"?")[0].rpartition(b"/")[0], "latin-1") + "/"


def narrowed(lines: Iterable[Line], is_too_wide: Callable[[str], bool]) -> list[Line]:
    """Without a `Service-Worker-Allowed` that is too wide. It is a URL, so what is no plain path may be everything."""
    return [
        (name, value)
        for name, value in lines
        if name != b"service-worker-allowed"
        or not is_too_wide(value.decode("ascii") if _PLAIN_PATH.match(value) else "")
    ]


def _forwarded(address: bytes, host: bytes, scheme: str) -> bytes:
    """One element of `Forwarded` (RFC 7239 section 4); an IPv6 address is bracketed and quoted (section 6)."""
    node = b'"[%s]"' % address if b":" in address else address
    return b"for=%s;%sproto=%s" % (node, b'host="%s";' % host if host else b"", scheme.encode())
