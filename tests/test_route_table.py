"""Which route a request takes: the table against a plain model, and how paths are read."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.forwarding.routetable import Candidate, Match, RouteTable
from balancer.protocol.paths import Rewriting
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads
from bench.guard import count_instructions

HEADS = RequestHeads()
NAMES = ["a", "b"]


def request(host: bytes, target: bytes, method: str = "GET", **fields: str) -> Request:
    lines = [(b"host", host), *((name.encode(), value.encode()) for name, value in fields.items())]
    return Request(HEADS, method, "", target, "1.1", "http", "127.0.0.1", lines)


def table(*matches: Match, **options: bool) -> RouteTable[Any]:
    """Of which each finds the number of the route."""
    return RouteTable(
        (Candidate(match, number, **options) for number, match in enumerate(matches)), missing=None, ambiguous="400"
    )


# The model: every rule as it is written down, one after the other, for all routes.


def expected(matches: Sequence[Match], asked: Request) -> int | None:
    fitting = [number for number, match in enumerate(matches) if fits(match, asked)]
    return max(fitting, key=lambda number: (*rank(matches[number]), -number), default=None)


def fits(match: Match, asked: Request) -> bool:
    host = asked.values(b"host")[0].decode().lower().partition(":")[0].removesuffix(".")
    path, _, query = asked.target.decode().partition("?")
    wanted, segments = match.path.decode(), path.split("/")
    is_host = match.host in (b"", host.encode()) or (
        match.host.startswith(b"*.") and host.endswith(match.host[1:].decode()) and len(host) >= len(match.host)
    )
    is_path = path == wanted if match.is_exact else segments[: len(wanted.split("/"))] == wanted.split("/")
    told = {name.decode(): value.decode() for name, value in asked.lines}
    parameters = dict(pair.split("=") for pair in query.split("&") if pair)
    return (
        is_host
        and is_path
        and (not match.methods or asked.method in match.methods)
        and all(told.get(name) == value for name, value in match.headers.items())
        and all(parameters.get(name) == value for name, value in match.query.items())
    )


def rank(match: Match) -> tuple[Any, ...]:
    host = (2, 0) if match.host[:1] not in (b"", b"*") else (1 if match.host else 0, len(match.host))
    return host, match.is_exact, len(match.path), bool(match.methods), len(match.headers), len(match.query)


HOSTS = ["a.test", "b.a.test", "c.b.a.test", "test", "other"]
PATHS = st.lists(st.sampled_from(NAMES), max_size=4).map(lambda names: "".join(f"/{name}" for name in names))
FIELDS = st.dictionaries(st.sampled_from(["x-a", "x-b", "x-c"]), st.sampled_from("12"), max_size=2)
MATCHES = st.builds(
    Match,
    st.sampled_from(["", *HOSTS, "*.test", "*.a.test", "*.b.a.test"]).map(str.encode),
    PATHS.map(str.encode),
    st.booleans(),
    st.frozensets(st.sampled_from(["GET", "POST"]), max_size=2),
    FIELDS,
    FIELDS,
).map(lambda match: replace(match, path=b"/") if match.is_exact and not match.path else match)


@given(
    st.lists(MATCHES, max_size=12),
    st.sampled_from([*HOSTS, "A.Test:80", "b.a.test.", "x.c.b.a.test"]),
    PATHS,
    st.sampled_from(["", "/", "/z"]),
    st.sampled_from(["GET", "POST", "PUT"]),
    FIELDS,
    FIELDS,
)
def test_the_best_route_is_found_that_the_rules_name(
    matches: list[Match], host: str, path: str, end: str, method: str, headers: dict[str, str], query: dict[str, str]
) -> None:
    target = (path + end or "/") + "?" + "&".join(f"{name}={value}" for name, value in query.items())
    asked = request(host.encode(), target.encode(), method, **headers)
    assert table(*matches).find(asked) == expected(matches, asked)


def test_a_path_is_read_as_a_backend_reads_it() -> None:
    routes = table(Match(path=b"/v1"), Match(path=b"/v1/b c"), Match(path=b"/a/b"))
    for target, found in {
        b"/%761/x": 0, b"/v1/b%20c": 1, b"/v1?/v1/b%20c": 0, b"/v10": None, b"/v1%2fb%20c": None, b"/a%2fb": None,
        b"/V1": None, b"*": None, b"/" + b"a/" * 4000: None, b"/a/b/" + b"a/" * 4000: 2,
    }.items():  # fmt: skip
        assert routes.find(request(b"x", target)) == found, target[:20]


@pytest.mark.parametrize("host", [b"[::1]", b"[::1]:80", b"[::1]:"])
def test_an_address_in_brackets_is_a_host(host: bytes) -> None:
    assert table(Match(b"[::1]")).find(request(host, b"/")) == 0


def test_a_host_of_many_labels_takes_no_time() -> None:
    routes, long = table(Match(b"*.test")), b"a." * 4000 + b"test"
    assert routes.find(request(b"a." * 100 + b"test", b"/")) == 0
    assert routes.find(request(long, b"/")) is None


def test_only_hosts_with_something_to_guard_are_strict_and_not_for_all_routes() -> None:
    guarded, objects = Candidate(Match(b"*.a", b"/in"), "in", is_guarded=True), Match(b"*.a", b"/objects")
    forwarded = Candidate(objects, "objects", is_guarded=True, takes_ambiguous=True)
    routes = RouteTable([guarded, forwarded], missing=None, ambiguous="400")
    for host, target, found in (
        (b"x.a", b"/o/%2e%2e/in", "400"), (b"x.b", b"/o/%2e%2e/in", None), (b"x.a", b"/objects//%2f", "objects"),
        (b"x.a", b"/in;a=1", "400"), (b"x.a", b"/in/x;a", "in"), (b"x.a", b"/;a=1/in", "400"), (b"x.a", b"/x;a", None),
    ):  # fmt: skip
        assert routes.find(request(host, target)) == found, target


def test_a_thousand_routes_cost_what_ten_cost() -> None:
    def instructions(count: int) -> int:
        routes = table(*(Match(b"h%d.test" % (n % 97), b"/v%d" % n) for n in range(count)))
        asked = request(b"h9.test", b"/v9/x")
        assert routes.find(asked) == 9
        return count_instructions(lambda: routes.find(asked))

    assert instructions(1000) == instructions(10)


@pytest.mark.parametrize(
    ("old", "new", "target", "sent", "back"),
    [
        (b"/v1", b"", b"/v1/x?/v1", b"/x?/v1", {b"/x": b"/v1/x", b"/": b"/v1/"}),
        (b"/v1", b"", b"/v1", b"/", {}),
        (b"/v1", b"", b"/v1/", b"/", {}),
        (b"/v1", b"", b"/v1?", b"/?", {}),
        (b"/v1", b"", b"/%761/a%20b//", b"/a%20b//", {}),
        (b"/v1/x", b"/api", b"/v1/x/y", b"/api/y", {b"/api/y": b"/v1/x/y", b"/api": b"/v1/x", b"/apis": b"/apis"}),
        (b"/v1", b"/a/b", b"/v1", b"/a/b", {b"/a/b/": b"/v1/"}),
        (b"", b"/api", b"/", b"/api/", {b"/api": b"/", b"/api/x": b"/x", b"/": b"/"}),
    ],
)
def test_a_prefix_is_put_in_the_place_of_another(
    old: bytes, new: bytes, target: bytes, sent: bytes, back: dict[bytes, bytes]
) -> None:
    rewriting = Rewriting(old, new)
    assert rewriting.of_target(target) == sent
    assert {path: rewriting.of_answer(path) for path in back} == back


def readings(target: bytes) -> set[bytes]:
    """What servers make of a path: decoded once or twice, parameters cut off, backslashes turned, slashes merged, dot
    segments resolved, as nginx, servlet containers and others do."""
    found, path = set(), target.partition(b"?")[0]
    for _ in range(2):
        path = unquote_to_bytes(path)
        for cut in (path, re.sub(rb";[^/]*", b"", path), path.partition(b"\0")[0], path.partition(b"#")[0]):
            found.add(posixpath.normpath(re.sub(rb"/+", b"/", cut.replace(b"\\", b"/"))))
    return found


PIECES = st.lists(
    st.sampled_from([*"/.;\\%ab", "%2f", "%2e", "%5C", "%61", "%25", "%00", "/a", "..", "/b"]), max_size=8
)


@given(PIECES, st.booleans())
def test_whatever_a_server_makes_of_a_path_it_comes_by_no_other_way(pieces: list[str], is_open_inside: bool) -> None:
    """To what is below /a, or to what is not below it where that alone is open."""
    routes = RouteTable(
        [Candidate(Match(path=b"/a"), "a", is_guarded=not is_open_inside), Candidate(Match(), "rest", is_guarded=True)],
        missing="",
        ambiguous="400",
    )
    target = ("/" + "".join(pieces)).encode()
    found = routes.find(request(b"x", target))
    if found != "400":
        assert {"a" if (reading + b"/").startswith(b"/a/") else "rest" for reading in readings(target)} == {found}
