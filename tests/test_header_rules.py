"""`request_headers` and `response_headers`: what they change, on which ways, and what they may not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import Balancer, BalancerProcess, exchange, fetch_json, get, ok, split_response
from test_http2 import curl
from wire import Line, WireBackend, post, values

from balancer.config import settings
from balancer.errors import SettingsError
from balancer.protocol.headerrules import MOST_RULES
from bench import guard

REQUESTS = (
    '{ set = { X-Team = "a", X-Forwarded-Proto = "https" }, add = { X-More = "2" }, remove = ["x-debug", "Cookie"] }'
)
RESPONSES = (
    '{ set = { Cache-Control = "no-store" }, add = { X-More = "\\u00e4" }, remove = ["X-POWERED-BY", "Server"] }'
)
SENT = [b"X-TEAM: mine", b"x-team: b", b"X-More: 1", b"Cookie: a=1", b"X-Debug: 1", b"Accept: x"]
ANSWERED = [b"cache-control: public", b"CACHE-CONTROL: max-age=1", b"x-more: 1", b"X-Powered-By: p", b"Server: s"]


@pytest.fixture(scope="module")
def ruled(scripted: WireBackend) -> Iterator[Balancer]:
    scripted.reset()
    rules = (f"--request-headers={REQUESTS}", f"--response-headers={RESPONSES}")
    with Balancer(f"--backend=only={scripted.url}", *rules) as balancer:
        yield balancer


def assert_ruled(request: Any) -> None:
    assert request.values(b"x-team") == [b"a"] and request.values(b"x-more") == [b"1", b"2"]
    assert request.values(b"x-debug") == request.values(b"cookie") == [] and request.values(b"accept") == [b"x"]
    assert request.values(b"x-forwarded-proto") == [b"https"] and len(request.values(b"x-request-id")) == 1


@pytest.mark.parametrize(
    "data",
    [
        get(b"/", *SENT),
        post(b"Content-Length: 1", b"Connection: close", *SENT, body=b"x"),
        post(b"Transfer-Encoding: chunked", b"Connection: close", *SENT, body=b"1\r\nx\r\n0\r\n\r\n"),
        get(b"/", *SENT, b"Max-Forwards: 3", method=b"OPTIONS"),
        get(b"/", *SENT, b"Service-Worker: script"),
    ],
    ids=["get", "post", "chunked", "options", "script"],
)
def test_every_request_is_changed(ruled: Balancer, scripted: WireBackend, data: bytes) -> None:
    scripted.reset()
    for _ in range(3):  # the second time its section is kept, and from then on looked up
        exchange(ruled.port, data)
    for request in scripted.requests:
        assert_ruled(request)
    assert len(scripted.requests) == 3 or b"Service-Worker" in data  # which is refused, and never sent


def assert_answer(lines: list[Line], more: list[bytes]) -> None:
    assert values(lines, b"cache-control") == [b"no-store"] and values(lines, b"x-more") == [*more, b"\xe4"]
    assert values(lines, b"x-powered-by") == [] and values(lines, b"server") == [b"load-balancer"]


HEAD = b"\r\n".join([*ANSWERED, b"", b""])


@pytest.mark.parametrize(
    "answer",
    [
        ok(b"ok", *ANSWERED),
        ok(b"x" * 300_000, *ANSWERED),
        b"HTTP/1.1 204 No Content\r\n" + HEAD,
        b"HTTP/1.1 304 Not Modified\r\n" + HEAD,
        b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-0/2\r\nContent-Length: 1\r\n" + HEAD + b"x",
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 1\r\n" + HEAD + b"x",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n" + HEAD + b"1\r\nx\r\n0\r\n\r\n",
    ],
    ids=["plain", "long", "204", "304", "206", "503", "chunked"],
)
def test_every_answer_is_changed(ruled: Balancer, scripted: WireBackend, answer: bytes) -> None:
    scripted.reset()
    scripted.answer(answer)
    for _ in range(3):
        status, lines, _ = split_response(exchange(ruled.port, get()))
        assert answer.startswith(b"HTTP/1.1 %d" % status)
        assert_answer(lines, [b"1"])
    assert b"cache-control: no-store" in exchange(ruled.port, get(method=b"HEAD"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (get(method=b"TRACE"), 405),
        (get(b"/", b"Max-Forwards: 0", method=b"OPTIONS"), 200),
        (get(b"/sw.js", b"Service-Worker: script"), 403),
        (get(host=b"a b"), 400),
    ],
)
def test_our_own_answers_are_changed_but_not_those_of_the_control_api(
    ruled: Balancer, scripted: WireBackend, data: bytes, expected: int
) -> None:
    scripted.reset()
    status, lines, _ = split_response(exchange(ruled.port, data))
    assert status == expected and scripted.seen == 0
    assert_answer(lines, [])
    assert values(split_response(exchange(ruled.port, get(b"/livez")))[1], b"x-more") == []


def test_http2_and_wsgi_are_changed_too(ruled: Balancer, scripted: WireBackend) -> None:
    scripted.reset()
    scripted.answer(ok(b"ok", *ANSWERED))
    status, told = curl(ruled, "-i", "-H", "x-team: mine", "-H", "cookie: a=1")
    assert status == 200 and "cache-control: no-store\r\n" in told and "x-powered-by" not in told
    lines = ruled.library.app.test_client().get("/", headers={"X-Team": "mine"}).headers
    assert (lines.getlist("Cache-Control"), lines.getlist("X-More")) == (["no-store"], ["1", "ä"])
    assert [request.values(b"x-team") for request in scripted.requests] == [[b"a"]] * 2


def from_text() -> dict[str, str]:
    return {"request_headers": REQUESTS, "response_headers": RESPONSES}


def test_a_reload_changes_them_and_values_are_told_nowhere(scripted: WireBackend, tmp_path: Path) -> None:
    scripted.reset()
    file = tmp_path / "balancer.toml"

    def write(value: str) -> None:
        backends = f'[[backends]]\nid = "only"\nurl = "{scripted.url}"\n'
        rules = f'request_headers = {{ set = {{ Authorization = "{value}" }} }}\nresponse_headers.remove = ["etag"]\n'
        file.write_text(rules + backends, encoding="utf-8")

    write("hush-hush-1")
    with BalancerProcess(f"--config={file}", "--control-reads=open") as balancer:
        exchange(balancer.port, get())
        write("hush-hush-2")
        changes = fetch_json(f"{balancer.url}/reload", {})["changes"]
        told_change = {"from": "set authorization", "to": "set authorization (values changed)"}
        assert changes == [{"what": "request_headers", **told_change}]
        exchange(balancer.port, get())
        assert [r.values(b"authorization") for r in scripted.requests] == [[b"hush-hush-1"], [b"hush-hush-2"]]
        told = [fetch_json(balancer.url + path) for path in ("/config", "/events", "/status")]
        write("\\u0000-hush-hush-3")
        assert "Authorization" in fetch_json(f"{balancer.url}/reload", {})["error"]
        assert "set authorization" in str(told) and "remove etag" in str(told)
    assert "hush-hush" not in str(told) + str(changes) + balancer.output


# What they may be.


@pytest.mark.parametrize(
    ("rules", "told"),
    [
        ('{ set = { "a b" = "x" } }', "set: 'a b' is no header name"),
        ('{ add = { "" = "x" } }', "add: '' is no header name"),
        ('{ set = { A = "hush-hush\\r\\nb: c" } }', "set: the value of A is no header value"),
        ('{ set = { A = "hush-hush\\u0000" } }', "set: the value of A is no header value"),
        ('{ set = { A = "hush-hush\\u20ac" } }', "set: the value of A is no header value"),
        ('{ set = { A = " hush-hush" } }', "set: the value of A is no header value"),
        ("{ add = { A = 1 } }", "add: the value of A is no header value"),
        ('{ set = { A = "hush-hush", a = "hush-hush" } }', "set: a name stands there twice"),
        ('{ remove = "A" }', "remove: expected a list"),
        ("{ remove = [1] }", "remove: 1 is no header name"),
        (f"{{ set = {{ {'A' * 5000} = 1 }} }}", f"set: the value of {'A' * 80} is no header value"),
        ("{ set = 1 }", "set: expected a table"),
        ("{ replace = { A = 'hush-hush' } }", "expected { set = "),
        ("hush-hush", "expected { set = "),
        ('{"set": {"A": "hush-hush"}}', "in TOML, which is not JSON"),
        ('{ remove = ["A"] }\nresponse_headers = {}', "expected { set = "),
        ('{ remove = ["A"] }\nhush-hush = 1', "expected { set = "),
        ("[" * 5000, "expected { set = "),
        (f"{{ remove = {[f'x-{n}' for n in range(MOST_RULES + 1)]} }}", "65 rules"),
        (f"{{ add = {{ A = '{'x' * 5000}' }} }}", "bytes together are accepted"),
        *(
            (f'{{ remove = ["{name}"] }}', f"remove: {name} is not for rules")
            for name in (
                "Connection",
                "Content-Length",
                "Transfer-Encoding",
                "TE",
                "Trailer",
                "Upgrade",
                "X-Request-ID",
            )
        ),
    ],
)
@pytest.mark.parametrize("name", ["request_headers", "response_headers"])
def test_a_wrong_rule_is_refused_in_one_line_without_its_value(name: str, rules: str, told: str) -> None:
    with pytest.raises(SettingsError) as caught:
        settings.load({name: rules}, {})
    text = str(caught.value)
    assert text.startswith(f"{name} (flag): {told}") or told in text
    assert "secret" not in text and len(text) < 300 and text.isprintable()


@pytest.mark.parametrize(("name", "direction"), [("Host", "request"), ("Via", "request"), ("X-Served-By", "response")])
def test_some_names_are_kept_in_one_direction(name: str, direction: str) -> None:
    rules = f'{{ set = {{ {name} = "x" }} }}'
    other = {"request": "response_headers", "response": "request_headers"}[direction]
    assert getattr(settings.load({other: rules}, {})[0], other).set == ((name.lower().encode(), b"x"),)
    with pytest.raises(SettingsError, match=f"{name} is not for rules"):
        settings.load({f"{direction}_headers": rules}, {})


def test_the_settings_are_printed_whole_as_the_file_would_have_them() -> None:
    config, sources = settings.load({"request_headers": REQUESTS}, {"LB_RESPONSE_HEADERS": RESPONSES})
    printed = settings.describe(config, sources)
    shown = {line.split()[0]: line.partition("{")[2].rpartition("}")[0] for line in printed.splitlines()}
    for name in from_text():
        again = settings.load({name: f"{{{shown[name]}}}"}, {})[0]
        assert getattr(again, name) == getattr(config, name)


def test_they_cost_a_request_nothing() -> None:
    plain, ruled = guard.measure_all(["get"])["get"], guard.measure_all(["get"], **from_text())["get"]
    assert (ruled.instructions, ruled.python_calls) <= (plain.instructions * 1.01, plain.python_calls)
