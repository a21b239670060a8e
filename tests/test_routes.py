"""Routes in a balancer that serves: where requests go, what becomes of their paths and lines, what is refused."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from exposition import read, value
from support import ROOT, Balancer, exchange, fetch, fetch_json, get, make_record, ok, split_response, wait_until
from test_http2 import curl
from test_route_table import readings
from test_websocket import Echo
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from wire import WireBackend

from balancer import LoadBalancer
from balancer.commandline import main
from balancer.observe.accesslog import as_json, as_text
from balancer.protocol.origin import Origin

ROUTES = """
health_timeout = 10
expose_backend = true
trusted_proxies = []
request_headers = { set = { X-General = "1" } }
response_headers = { set = { X-General = "2", X-Both = "general" } }

[[backends]]
id = "main"
url = "%s"

[[pools]]
name = "api"
backend_host = "api.internal"
[[pools.backends]]
id = "api_1"
url = "%s"

[[routes]]
name = "v1"
host = "api.test"
path = "/v1"
pool = "api"
strip_prefix = "/v1"
rewrite_answers = true
request_headers = { set = { X-Team = "a" }, remove = ["X-Debug"] }
response_headers = { set = { X-Both = "own" }, add = { Cache-Control = "no-store" } }

[[routes]]
name = "beta"
host = "api.test"
path = "/v1"
match_headers = { X-Beta = "1" }

[[routes]]
name = "writes"
host = "*.test"
path = "/items"
methods = ["POST", "PUT"]
pool = "api"
max_request_body = 10

[[routes]]
name = "slow"
path = "/slow"
response_timeout = 0.2
retries = 0

[[routes]]
name = "moved"
path = "/moved"
redirect = "https://new.test{path}"

[[routes]]
name = "plain"
host = "plain.test"
redirect = "https://{host}:8443/new{path}?{query}&from=old"
redirect_status = 302

[[routes]]
name = "gone"
path = "=/gone"
status = 410
body = "gone\\n"

[[routes]]
name = "denied"
host = "deny.test"
path = "/admin"
status = 403

[[auth]]
name = "partners"
type = "api_key"
keys = [{ id = "acme", sha256 = "%s" }]

[[routes]]
name = "guarded"
host = "guard.test"
path = "/admin"
auth = ["partners"]

[[routes]]
name = "all_but"
host = "open.test"
status = 403
[[routes]]
name = "public"
host = "open.test"
path = "/public"
"""


class Routed:
    """A balancer with these routes, and its backends."""

    def __init__(self, folder: Path) -> None:
        self.main, self.api = WireBackend(), WireBackend()
        self.file = folder / "balancer.toml"
        self.text = ROUTES % (self.main.url, self.api.url, "0" * 64)
        self.file.write_text(self.text, encoding="utf-8")
        self.balancer = Balancer("--config", str(self.file))
        self.url = self.balancer.url

    def ask(self, target: bytes, *lines: bytes, host: bytes = b"x", method: bytes = b"GET") -> Any:
        """(status, lines, body)"""
        status, got, body = split_response(exchange(self.balancer.port, get(target, *lines, host=host, method=method)))
        return status, dict(got), body

    def reload(self, text: str, **query: str) -> tuple[int, Any]:
        self.file.write_text(text, encoding="utf-8")
        told = "&".join(f"{name}={value}" for name, value in query.items())
        status, _, body = fetch(f"{self.url}/reload?{told}", {}, "POST")
        return status, json.loads(body)

    def close(self) -> None:
        self.balancer.stop()
        self.main.close()
        self.api.close()


@pytest.fixture(scope="module")
def started_routed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    routed = Routed(tmp_path_factory.mktemp("routes"))
    yield routed
    routed.close()


@pytest.fixture
def routed(started_routed: Routed) -> Routed:
    started_routed.main.reset()
    started_routed.api.reset()
    return started_routed


@pytest.mark.parametrize(
    ("host", "method", "target", "lines", "server", "route"),
    [
        (b"api.test", b"GET", b"/v1/x", (), b"api_1", "v1"),
        (b"API.Test.:80", b"GET", b"/v1", (), b"api_1", "v1"),
        (b"api.test", b"GET", b"/v1/x", (b"X-Beta: 1",), b"main", "beta"),
        (b"api.test", b"GET", b"/v10", (), b"main", None),
        (b"api.test", b"POST", b"/items", (), b"api_1", "writes"),
        (b"a.b.test", b"PUT", b"/items/1", (), b"api_1", "writes"),
        (b"api.test", b"GET", b"/items", (), b"main", None),
        (b"test", b"POST", b"/items", (), b"main", None),
        (b"x", b"GET", b"/", (), b"main", None),
    ],
)
def test_a_request_takes_the_best_route(
    routed: Routed, host: bytes, method: bytes, target: bytes, lines: tuple[bytes, ...], server: bytes, route: str
) -> None:
    status, got, _ = routed.ask(target, *lines, host=host, method=method)
    assert (status, got[b"x-served-by"]) == (200, server)
    shown = fetch_json(f"{routed.url}/requests/{got[b'x-request-id'].decode()}")
    assert (shown["route"], shown["pool"]) == (route, "api" if server == b"api_1" else "default")


def test_http2_and_wsgi_take_routes_too(routed: Routed) -> None:
    assert curl(routed.balancer, "-H", "Host: api.test", path="/v1/h2") == (200, "ok")
    assert routed.api.requests[-1].target == b"/h2"
    client = routed.balancer.library.app.test_client()
    answer = client.get("/v1/a%20b?q", headers={"Host": "api.test"})
    assert answer.headers["X-Served-By"] == "api_1" and routed.api.requests[-1].target == b"/a%20b?q"
    assert client.get("/moved").status_code == 308


def test_a_prefix_is_taken_off_and_put_back(routed: Routed) -> None:
    told = (b"Location: /login?next=/x", b"Set-Cookie: a=1; path=/; HttpOnly", b"Set-Cookie: b=2; Path=/x", b"X: /x")
    routed.api.answer(ok(b"", *told))
    data = exchange(routed.balancer.port, get(b"/v1/a%20b/%C3%A9?q=/v1/%2f", host=b"api.test"))
    assert routed.api.requests[-1].target == b"/a%20b/%C3%A9?q=/v1/%2f"
    lines = split_response(data)[1]
    assert [value for name, value in lines if name in (b"location", b"set-cookie", b"x")] == [
        b"/v1/login?next=/x", b"a=1; path=/v1/; HttpOnly", b"b=2; Path=/v1/x", b"/x",
    ]  # fmt: skip
    for location, seen in {
        b"http://api.internal/x": b"/v1/x", b"https://api.test/x": b"https://api.test/v1/x", b"https://other.test/x": b"https://other.test/x",
        b"//other.test/x": b"//other.test/x", b"x": b"x", b"/": b"/v1/",
    }.items():  # fmt: skip
        routed.api.answer(ok(b"", b"Location: " + location))
        assert routed.ask(b"/v1/", host=b"api.test")[1][b"location"] == seen


def test_header_lines_are_changed_for_one_route_after_the_general_rules(routed: Routed) -> None:
    for _ in range(4):  # the third one is looked up
        _, got, _ = routed.ask(b"/v1/x", b"X-Debug: 1", b"X-Team: b", host=b"api.test")
        assert (got[b"x-both"], got[b"x-general"], got[b"cache-control"]) == (b"own", b"2", b"no-store")
        sent = routed.api.requests[-1]
        assert [sent.values(name) for name in (b"x-team", b"x-debug", b"x-general")] == [[b"a"], [], [b"1"]]
        assert sent.values(b"host") == [b"api.internal"] and sent.lines[0][0].lower() == b"host"
    _, got, _ = routed.ask(b"/x", b"X-Debug: 1", host=b"api.test")
    assert (got[b"x-both"], b"cache-control" in got) == (b"general", False)
    sent = routed.main.requests[-1]
    assert (sent.values(b"host"), sent.values(b"x-debug"), sent.values(b"x-team")) == ([b"api.test"], [b"1"], [])


def test_a_route_has_limits_and_times_of_its_own(routed: Routed) -> None:
    body = (b"Content-Length: 11", b"", b"x" * 11)
    assert routed.ask(b"/items", *body, host=b"a.test", method=b"POST")[0] == 413
    assert routed.ask(b"/other", *body, host=b"a.test", method=b"POST")[0] == 200
    routed.main.script = lambda sock, request: None
    assert routed.ask(b"/slow")[0] == 504
    routed.main.answer(ok())
    for _ in range(2):  # both use the connections of the pool
        assert routed.ask(b"/slow")[0] == 200
    assert len(set(routed.main.peers[-2:])) == 1


def test_redirects_and_fixed_answers_ask_no_backend(routed: Routed) -> None:
    for target, host, status, location in (
        (b"/moved/a%20b?x=1", b"x", 308, b"https://new.test/moved/a%20b?x=1"),
        (b"/moved//evil.test/%0d%0a", b"x", 308, b"https://new.test/moved//evil.test/%0d%0a"),
        (b"/a?b=2", b"Plain.test:80", 302, b"https://plain.test:8443/new/a?b=2&from=old"),
    ):
        got = routed.ask(target, host=host)
        assert (got[0], got[1][b"location"], got[1][b"x-general"]) == (status, location, b"2")
    status, lines, body = routed.ask(b"/gone")
    assert (status, lines[b"content-type"], body) == (410, b"text/plain; charset=utf-8", b"gone\n")
    assert routed.ask(b"/gone", method=b"HEAD")[2] == b""
    assert routed.ask(b"/gone/x")[0] == 200
    assert len(routed.main.requests) == 1 and not routed.api.requests
    newest = routed.balancer.status(3)["recent_requests"][1:]
    assert {(each["route"], each["pool"], each["server_id"], each["reason"]) for each in newest} == {
        ("gone", None, None, None)
    }


# Paths that can be read in more than one way.

BETWEEN = [
    *("%2f", "%2F", "//", "/./", "/%2e/", "/%2E/", "\\", "%5c", "%5C", "/;/", "/;x=1/", "/%3b/", "/.;/", "/%2e;a/"),
    *("/x/../", "/x/%2e%2e/", "/x/.%2e/", "/x/%2E./", "/x/..;/", "/x/..;a=b/", "/x/..%3b/", "/x/..%2f", "/x/..\\"),
    *("/x/..%5c", "/x/%252e%252e/", "%252f", "%25252f", "%c0%af", "%C0%AF", "%e0%80%af", "%f0%80%80%af", "%c1%9c"),
    *("/x/%c0%ae%c0%ae/", "%00/", "/%00", "%u002f", "/%0a", "/%09", "%%32f", "/x/%2e%2e%2f"),
]
HOSTILE = [
    *(f"/y{between}../admin/secret" for between in BETWEEN[:8]),
    *(f"/admin{between}secret" for between in BETWEEN),
    *(f"{between if between.startswith('/') else '/' + between}admin/secret" for between in BETWEEN),
    *("/admin;x", "/admin;x/secret", "/x;/../admin", "/%61dmin/secret", "/admin%2e", "/admin/..", "/admin/.", "/y/.."),
    *(
        "/admin%00.png",
        "/admin?/../x",
        "/%61%64%6d%69%6e",
        "/admin%5c..%5csecret",
        "/./admin",
        "/../admin",
        "/..;/admin",
    ),
]


def test_a_guarded_path_has_no_second_spelling(routed: Routed) -> None:
    """Each is refused, or seen for what it is."""
    assert len(HOSTILE) >= 100
    for host, refused in ((b"deny.test", 403), (b"guard.test", 401)):
        for path in HOSTILE:
            assert (path, routed.ask(path.encode(), host=host)[0]) in ((path, 400), (path, refused))
    for path in HOSTILE:  # out of what is open into what is not
        assert (path, routed.ask(b"/public" + path.encode(), host=b"open.test")[0]) in ((path, 400), (path, 200))
    for request in routed.main.requests:
        for reading in readings(request.target):
            assert reading == b"/public" or reading.startswith(b"/public/"), request.target
    assert not routed.api.requests


def test_a_guarded_host_has_no_second_spelling(routed: Routed) -> None:
    for host in (
        b"deny%2etest",
        b"deny.test;",
        b"deny.test,x",
        b"x,deny.test",
        b".deny.test",
        b"deny..test",
        b"deny.test%00",
    ):
        assert (host, routed.ask(b"/admin", host=host)[0]) == (host, 400)
    assert routed.ask(b"/admin", host=b"DENY.test.:80")[0] == 403
    assert routed.ask(b"/", host=b"[::1]:80")[0] == routed.ask(b"/", host=b"a_b.xn--80ak6aa92e.test:1")[0] == 200


def test_where_nothing_is_guarded_paths_go_on_as_they_are(routed: Routed) -> None:
    for target in (b"/a%2fb//c/../%2e", b"/a;b=1/\\x", b"/x%zz"):
        assert routed.ask(target)[0] == 200
        assert routed.main.requests[-1].target == target


def test_it_says_which_way_and_why_not(routed: Routed) -> None:
    status, lines, body = routed.ask(b"/x/%2e%2e/admin", host=b"deny.test")
    assert status == 400 and b"more than one way" in body
    shown = fetch_json(f"{routed.url}/requests/{lines[b'x-request-id'].decode()}")
    assert (shown["reason"], shown["route"], shown["pool"]) == ("ambiguous_path", None, None)


# What is seen of them.


def test_status_and_metrics_count_by_route(routed: Routed) -> None:
    routed.ask(b"/v1/x", host=b"api.test")
    wait_until(lambda: routed.balancer.status()["statistics"]["active_requests"] == 0)
    fetch(f"{routed.url}/reset", {}, "POST")
    for _ in range(3):
        routed.ask(b"/v1/x", host=b"api.test")
    routed.ask(b"/gone")
    wait_until(lambda: routed.balancer.status()["statistics"]["active_requests"] == 0)
    shown = {each["name"]: each for each in routed.balancer.status()["routes"]}
    assert (shown["v1"]["total_requests"], shown["v1"]["codes"]["2xx"], shown["gone"]["codes"]["4xx"]) == (3, 3, 1)
    assert (shown["v1"]["host"], shown["v1"]["path"], shown["v1"]["pool"]) == ("api.test", "/v1", "api")
    assert (shown["slow"]["total_requests"], shown["moved"]["redirect"]) == (0, "https://new.test{path}")
    samples = read(fetch(f"{routed.url}/metrics")[2].decode())
    assert value(samples, "lb_route_requests_total", route="v1", code="200") > 3  # a reset takes nothing off
    rows = {row["name"]: row["value"] for row in fetch_json(f"{routed.url}/config")["settings"]}
    assert "v1 (api.test/v1 to api)" in rows["routes"]


def test_the_access_log_says_which_way(routed: Routed) -> None:
    record = make_record(route="v1", pool="api")
    assert " route=v1 pool=api backend=a " in as_text(record, None, "HTTP/1.1", None)
    assert '"route":"v1","pool":"api",' in as_json(record, None, "HTTP/1.1", None)


def test_a_websocket_takes_a_route(routed: Routed) -> None:
    echo = Echo()
    more = f'[[pools]]\nname = "talk"\n[[pools.backends]]\nid = "talk_1"\nurl = "{echo.url}"\n'
    more += '[[routes]]\nname = "talk"\npath = "/talk"\npool = "talk"\nstrip_prefix = "/talk"\n'
    try:
        assert routed.reload(routed.text + more)[0] == 200
        routed.balancer.wait_healthy("talk_1")
        address = f"ws{routed.url.removeprefix('http')}"
        with connect(f"{address}/talk/room") as socket:
            socket.send("hello")
            assert socket.recv() == "hello"
        assert echo.requests[-1].path == "/room"
        with pytest.raises(InvalidStatus) as refused, connect(f"{address}/gone"):
            pass
        assert refused.value.response.status_code == 410
    finally:
        assert routed.reload(routed.text)[0] == 200
        echo.stop()


# Expectations and reloads.

MET = '\n[[expect]]\nrequest = "GET http://api.test/v1/x"\nroute = "v1"\npool = "api"\n'
OTHERS = """
[[expect]]
request = "GET http://API.test:80/v1/x?y"
headers = { X-Beta = "1" }
route = "beta"
pool = "default"
[[expect]]
request = "GET http://x/moved"
status = 308
[[expect]]
request = "POST http://x/v1"
route = ""
[[expect]]
request = "GET http://deny.test/x/../admin"
status = 400
"""


def test_expectations_are_tried_before_anything_changes(routed: Routed, capsys: pytest.CaptureFixture[str]) -> None:
    routed.file.write_text(routed.text + MET + OTHERS, encoding="utf-8")
    assert main(["--config", str(routed.file), "--check-config"]) == 0
    wrong = routed.text.replace('path = "/v1"\npool', 'path = "/v2"\npool').replace(
        '= "/v1"\nrewrite', '= "/v2"\nrewrite'
    )
    for query in ({"dry_run": "1"}, {}):
        status, told = routed.reload(wrong + MET, **query)
        assert status == 422
        assert "expect GET http://api.test/v1/x: expected route v1 and pool api, got no route, pool default" in str(
            told
        )
    assert routed.ask(b"/v1/x", host=b"api.test")[1][b"x-served-by"] == b"api_1"
    assert main(["--config", str(routed.file), "--check-config"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    status, told = routed.reload(routed.text)
    assert (status, told["changes"]) == (200, [])


def test_a_reload_replaces_the_table_at_once(routed: Routed) -> None:
    status, told = routed.reload(routed.text.replace('path = "/slow"', 'path = "/quick"'), dry_run="1")
    assert [each["what"] for each in told["changes"]] == ["routes.slow"]
    assert told["changes"][0]["to"] == "slow (/quick to default)"
    try:
        assert routed.reload(routed.text.replace("/moved", "/gone/on"))[0] == 200
        assert [routed.ask(path)[0] for path in (b"/moved", b"/gone/on/x")] == [200, 308]
    finally:
        assert routed.reload(routed.text)[0] == 200
    assert routed.ask(b"/moved")[0] == 308


def test_requests_keep_their_route_while_others_come(routed: Routed) -> None:
    """Each is answered by the one or by the other, whole."""
    change = routed.text.replace('strip_prefix = "/v1"', 'replace_prefix = ["/v1", "/other"]')
    routed.api.script = lambda sock, request: sock.sendall(ok(request.target + request.values(b"x-team")[0]))
    answers, ended = [], threading.Event()

    def ask() -> None:
        while not ended.is_set():
            status, lines, body = routed.ask(b"/v1/x", host=b"api.test")
            answers.append((status, body, lines.get(b"x-both")))

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(ask) for _ in range(2)]
        try:
            for number in range(10):
                assert routed.reload(routed.text if number % 2 else change)[0] == 200
                so_far = len(answers)
                wait_until(lambda so_far=so_far: len(answers) > so_far + 4)
        finally:
            ended.set()
        assert [each.result() for each in asking] == [None, None]
    assert set(answers) == {(200, b"/xa", b"own"), (200, b"/other/xa", b"own")}


def test_the_example_does_what_it_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = ROOT / "docs" / "examples" / "gateway.toml"
    assert (main(["--config", str(example), "--check-config"]), capsys.readouterr().out) == (0, "configuration ok\n")
    with ExitStack() as stack:
        text, backends = example.read_text(encoding="utf-8"), {}
        for name, port in (("shop_1", 8080), ("api_1", 8081), ("api_2", 8082), ("files_1", 8083)):
            backends[name] = stack.enter_context(WireBackend())
            text = text.replace(f"http://127.0.0.1:{port}", backends[name].url)
        file = tmp_path / "gateway.toml"
        file.write_text("health_timeout = 10\nexpose_backend = true\n" + text, encoding="utf-8")
        balancer = stack.enter_context(Balancer("--config", str(file)))
        wait_until(lambda: all(each["healthy"] for each in balancer.status()["backend_servers"]))
        key = b"X-API-Key: the-example-key-of-acme"
        assert fetch(f"{balancer.url}/v1/users", Host="api.example.com")[0] == 401
        for host, target, status, server in (
            (b"api.example.com", b"/v1/users", 200, b"api"), (b"api.example.com", b"/v0/x", 410, None),
            (b"eu.shop.example.com", b"/cart", 301, None), (b"shop.example.com", b"/files/a%2F//b", 200, b"files"),
            (b"shop.example.com", b"/admin", 404, None), (b"shop.example.com", b"/x/..;/admin", 400, None),
            (b"shop.example.com", b"/", 200, b"shop"),
        ):  # fmt: skip
            got, lines, _ = split_response(exchange(balancer.port, get(target, key, host=host)))
            served_by = dict(lines).get(b"x-served-by", b"").partition(b"_")[0]
            assert (got, served_by or None) == (status, server)
        sent = [request for name in ("api_1", "api_2") for request in backends[name].requests]
        assert [(each.target, each.values(b"host")) for each in sent] == [(b"/users", [b"api.internal"])]


def test_without_a_route_and_without_backends_it_is_404() -> None:
    with WireBackend() as backend:
        pools = [{"name": "api", "backends": [{"url": backend.url}]}]
        with LoadBalancer([], pools=pools, routes=[{"name": "v1", "path": "/v1", "pool": "api"}]) as balancer:
            wait_until(lambda: fetch(f"{balancer.url}/v1")[0] == 200)
            status, lines, body = fetch(f"{balancer.url}/v2")
            assert status == 404 and b"no_route" in body
            shown = fetch_json(f"{balancer.url}/requests/{lines['x-request-id']}")
            assert (shown["reason"], shown["route"], shown["pool"]) == ("no_route", None, None)
            balancer.pool.add("late", Origin.parse(backend.url))
            wait_until(lambda: fetch(f"{balancer.url}/v2")[0] == 200, "backends that the API adds count")
