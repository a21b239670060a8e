"""Who may read and write through the control API: pages of every kind, programs, proxies, guessers.

What a browser adds to requests is written out here; tests/test_dashboard_access.py has the real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient
from support import (
    PYTHON,
    BalancerProcess,
    Clock,
    Process,
    connect,
    exchange,
    fetch,
    fetch_json,
    free_port,
    get,
    make_record,
    ok,
    split_response,
    wait_until,
)
from test_http2 import client as http2
from werkzeug.test import Client, TestResponse
from wire import WireBackend, post

from balancer.config.settings import BackendSettings, Settings, load
from balancer.control.access import GUESS_SECONDS, GUESSERS_KEPT, GUESSES, Guesses, first_segment
from balancer.loadbalancer import create_app

TOKEN, PAGE_TOKEN = "s3cret-t0ken-of-the-test", "an0ther-t0ken-for-pages"
ALLOWED, FOREIGN = "https://ops.example", "https://evil.example"
OPEN = ["/health", "/livez", "/readyz", "/dashboard"]
READS = ["/status", "/algorithm", "/backends", "/backends/a", "/requests/id-1", "/config", "/events", "/history"]
READS += ["/metrics", "/openapi.json"]
WRITES = [("POST", "/algorithm"), ("POST", "/reset"), ("POST", "/reload"), ("POST", "/backends")]
WRITES += [("PATCH", "/backends/a"), ("DELETE", "/backends/a")]
SECRET = "SECRET-OF-A-PATH"
Headers = dict[str, str]


def bearer(token: str) -> Headers:
    return {"Authorization": f"Bearer {token}"}


def make_app(**settings: Any) -> Flask:
    """An app that is wired but not started, with a request in its records."""
    app = create_app(Settings(backends=(BackendSettings(id="a", url="http://127.0.0.1:9"),), **settings))
    statistics = app.extensions["control"].statistics
    statistics.begin()
    statistics.record(make_record(path=f"/reset-password/{SECRET}", timestamp=time.time()))
    return app


def read(app: Flask, headers: Headers | None = None, path: str = "/status", **environ: str) -> TestResponse:
    return app.test_client().get(path, headers=headers, environ_overrides=environ)


def write(app: Flask, headers: Headers | None = None, **environ: str) -> TestResponse:
    body = {"algorithm": "round_robin"}
    return app.test_client().post("/algorithm", json=body, headers=headers, environ_overrides=environ)


def said(answer: TestResponse) -> str:
    text: str = json.loads(answer.data)["error"]
    return text


# Whom nobody needs to trust: other sites, sandboxed frames, names that were made to resolve to us.


@pytest.mark.parametrize("settings", [{}, {"allow_file_origin": True}, {"control_reads": "open"}], ids=str)
@pytest.mark.parametrize("site", [{}, {"Sec-Fetch-Site": "cross-site"}], ids=str)
def test_a_sandboxed_frame_neither_reads_nor_writes(settings: dict[str, Any], site: Headers) -> None:
    """`Origin: null` is what every sandboxed frame of every site sends, and a page from disk too."""
    app = make_app(**settings)
    for answer in (read(app, {"Origin": "null"} | site), write(app, {"Origin": "null"} | site)):
        assert answer.status_code == 403 and "LB_PAGE_TOKEN" in said(answer)
        assert "Access-Control-Allow-Origin" not in answer.headers
    assert app.extensions["control"].pool.algorithm == "weighted"


@pytest.mark.parametrize("settings", [{"admin_token": TOKEN}, {"page_token": TOKEN}], ids=list)
def test_a_page_from_disk_reads_and_writes_with_a_token_alone(settings: dict[str, Any]) -> None:
    app, origin = make_app(**settings), {"Origin": "null", "Sec-Fetch-Site": "cross-site"}
    for answer in (read(app, origin), write(app, origin), write(app, origin | bearer("wrong"))):
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"].startswith("Bearer")
        assert "Access-Control-Allow-Origin" not in answer.headers
    for answer in (read(app, origin | bearer(TOKEN)), write(app, origin | bearer(TOKEN))):
        assert answer.status_code == 200 and answer.headers["Access-Control-Allow-Origin"] == "null"


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, None), ({"admin_token": TOKEN}, "null"), ({"page_token": TOKEN}, "null")], ids=str
)
def test_a_preflight_of_a_page_from_disk_is_answered_only_where_there_is_a_token(
    settings: dict[str, Any], expected: str | None
) -> None:
    asked = {"Origin": "null", "Access-Control-Request-Method": "POST"}
    answer = make_app(**settings).test_client().options("/algorithm", headers=asked)
    assert answer.headers.get("Access-Control-Allow-Origin") == expected


@pytest.mark.parametrize("settings", [{}, {"admin_token": TOKEN, "control_reads": "open"}], ids=str)
def test_a_page_of_another_site_gets_nothing_even_with_the_token(settings: dict[str, Any]) -> None:
    app = make_app(**settings)
    for headers in ({"Origin": FOREIGN}, {"Origin": FOREIGN} | bearer(TOKEN), {"Origin": f"{FOREIGN}{'x' * 9000}"}):
        for answer in (read(app, headers), write(app, headers)):
            assert answer.status_code == 403 and "cors_origins" in said(answer)
            assert "Access-Control-Allow-Origin" not in answer.headers and len(said(answer)) < 300


@pytest.mark.parametrize(("method", "path"), WRITES)
@pytest.mark.parametrize("origin", [{}, {"Origin": "http://localhost"}], ids=str)
def test_a_write_that_comes_across_sites_is_refused(method: str, path: str, origin: Headers) -> None:
    """Also a DELETE, which needs no content type."""
    app = make_app(admin_token=TOKEN)
    headers = {"Sec-Fetch-Site": "cross-site"} | origin | bearer(TOKEN)
    client = app.test_client()
    assert client.open(path, method=method, json={}, headers=headers).status_code == 403
    assert client.delete("/backends/a", headers=headers).status_code == 403
    assert client.get("/backends/a", headers=bearer(TOKEN)).status_code == 200


def test_a_page_on_the_list_may_come_across_sites() -> None:
    headers = {"Origin": ALLOWED, "Sec-Fetch-Site": "cross-site"}
    assert write(make_app(cors_origins=(ALLOWED,)), headers).status_code == 200
    assert write(make_app(cors_origins=(ALLOWED,), page_token=TOKEN), headers).status_code == 401


@pytest.mark.parametrize("origin", ["https://[2001:db8::1]:9000", "https://a.b-c.example"])
def test_origins_are_compared_as_text(origin: str) -> None:
    """flask-cors takes brackets and dots for a regular expression."""
    app = make_app(cors_origins=(origin,))
    near = [re.sub(r"\[.*\]", "2", origin), origin.replace(".", "x"), origin + "x", "x" + origin, origin[:-1]]
    assert read(app, {"Origin": origin}).headers["Access-Control-Allow-Origin"] == origin
    for other in {*near, origin.upper()} - {origin}:
        answer = read(app, {"Origin": other})
        assert answer.status_code == 403 and "Access-Control-Allow-Origin" not in answer.headers
        asked = {"Origin": other, "Access-Control-Request-Method": "POST"}
        assert "Access-Control-Allow-Origin" not in app.test_client().options("/status", headers=asked).headers


@pytest.mark.parametrize("host", ["rebound.evil.example", "rebound.evil.example:9000", "10.0.0.1", "localhost.x"])
@pytest.mark.parametrize("path", READS)
def test_a_name_made_to_resolve_to_us_may_not_read(host: str, path: str) -> None:
    assert read(make_app(), {"Host": host}, path).status_code == 403
    assert read(make_app(page_token=TOKEN), {"Host": host}, path).status_code == 401
    assert read(make_app(page_token=TOKEN), {"Host": host} | bearer(TOKEN), path).status_code in (200, 404)


# Callers of this machine, and those who are taken for one.


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "[::1]:9000", "LOCALHOST:80"])
def test_a_program_on_this_machine_reads_and_writes(host: str) -> None:
    for settings in ({}, {"page_token": TOKEN}):
        app = make_app(**settings)
        assert read(app, {"Host": host}).status_code == write(app, {"Host": host}).status_code == 200


PROXIES = [{"X-Forwarded-For": "192.0.2.1"}, {"X-Forwarded-Proto": "https"}, {"X-Forwarded-Prefix": "/lb"}]
PROXIES += [{"Forwarded": "for=192.0.2.1"}, {"Via": "1.1 nginx"}, {"X-Real-IP": "192.0.2.1"}]


@pytest.mark.parametrize("sign", PROXIES, ids=str)
def test_what_comes_through_a_proxy_is_not_local(sign: Headers) -> None:
    (name,) = sign
    app = make_app()
    for answer in (read(app, sign), write(app, sign)):
        assert answer.status_code == 403 and name.lower() in said(answer) and "LB_ADMIN_TOKEN" in said(answer)
    for settings in ({"admin_token": TOKEN}, {"page_token": TOKEN}):
        app = make_app(**settings)
        for answer in (read(app, sign), write(app, sign)):
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"]
        assert read(app, sign | bearer(TOKEN)).status_code == write(app, sign | bearer(TOKEN)).status_code == 200


@pytest.mark.parametrize(
    ("settings", "environ"),
    [
        ({"trusted_proxies": ("10.0.0.0/8",)}, {}),
        ({"host": "0.0.0.0"}, {}),
        ({"host": "127.example"}, {}),
        ({"host": "::"}, {}),
        ({}, {"SERVER_PROTOCOL": "HTTP/1.0"}),  # nginx with a plain `proxy_pass`
        ({}, {"REMOTE_ADDR": "192.0.2.1"}),  # another WSGI server, which listens where it likes
        ({}, {"REMOTE_ADDR": ""}),  # the same on a Unix socket
    ],
    ids=str,
)
def test_others_who_are_not_local(settings: dict[str, Any], environ: Headers) -> None:
    app = make_app(**settings)
    for answer in (read(app, **environ), write(app, **environ)):
        assert answer.status_code == 403 and "LB_ADMIN_TOKEN" in said(answer)
    app = make_app(**settings, admin_token=TOKEN)
    assert read(app, **environ).status_code == write(app, **environ).status_code == 401
    assert read(app, bearer(TOKEN), **environ).status_code == write(app, bearer(TOKEN), **environ).status_code == 200


def test_proxies_that_a_reload_brings_count_at_once() -> None:
    app = make_app()
    configuration = app.extensions["balancer"].configuration
    configuration.read = lambda: (
        configuration.settings.model_copy(update={"trusted_proxies": ("10.0.0.0/8",)}),
        configuration.sources,
    )
    assert write(app).status_code == 200
    app.extensions["balancer"].reload()
    assert write(app).status_code == 403


@pytest.mark.parametrize("host", ["localhost", "::1", "127.0.0.2"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_addresses_of_this_machine(host: str, peer: str) -> None:
    assert write(make_app(host=host), REMOTE_ADDR=peer).status_code == 200


# The dashboard, and the pages of backends, which have the same origin.


@pytest.mark.parametrize("browser", [{"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}], ids=str)
def test_a_page_of_our_own_origin_writes_with_a_token_where_there_is_one(browser: Headers) -> None:
    assert write(make_app(), browser).status_code == 200
    for settings in ({"admin_token": TOKEN}, {"page_token": TOKEN}):
        app = make_app(**settings)
        assert write(app, browser).status_code == 401
        assert read(app, browser).status_code == 200  # open, but with paths cut
        assert write(app, browser | bearer(TOKEN)).status_code == 200


def test_either_token_opens_everything() -> None:
    app = make_app(admin_token=TOKEN, page_token=PAGE_TOKEN, control_reads="token", host="0.0.0.0")
    for token in (TOKEN, PAGE_TOKEN):
        assert read(app, bearer(token)).status_code == write(app, bearer(token)).status_code == 200
        assert write(app, bearer(token) | {"Origin": "null"}).status_code == 200


def test_another_scheme_is_no_token() -> None:
    """A browser sends the password of a backend to our paths too: that is neither a token nor a guess."""
    app = make_app(page_token=TOKEN)
    for _ in range(2 * GUESSES):
        assert read(app, {"Authorization": "Basic YTpi"}).status_code == 200
    assert write(app, {"Authorization": "Basic YTpi", "Origin": "http://localhost"}).status_code == 401


# Reads.


@pytest.mark.parametrize(
    ("settings", "local", "remote"),
    [
        ({}, 200, 403),
        ({"page_token": TOKEN}, 200, 401),
        ({"admin_token": TOKEN}, 200, 401),
        ({"control_reads": "open"}, 200, 200),
        ({"control_reads": "open", "host": "0.0.0.0", "admin_token": TOKEN}, 200, 200),
        ({"control_reads": "token", "admin_token": TOKEN}, 401, 401),
        ({"control_reads": "token"}, 403, 403),
        ({"host": "0.0.0.0", "admin_token": TOKEN}, 401, 401),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", READS)
def test_who_may_read(settings: dict[str, Any], local: int, remote: int, path: str) -> None:
    app = make_app(**settings)
    for status, environ in ((local, {}), (remote, {"REMOTE_ADDR": "192.0.2.1", "HTTP_HOST": "lb.example"})):
        answer = read(app, path=path, **environ)
        assert answer.status_code == status
        if status >= 400:
            words = said(answer)
            assert "Bearer" in words if status == 401 else "LB_ADMIN_TOKEN" in words and "control_reads" in words


@pytest.mark.parametrize("path", OPEN)
@pytest.mark.parametrize("headers", [{}, {"Origin": "null"}, {"Host": "pod.example"}, bearer("wrong")], ids=str)
def test_probes_and_the_page_are_open_to_all(path: str, headers: Headers) -> None:
    app = make_app(control_reads="token", host="0.0.0.0", admin_token=TOKEN)
    answer = read(app, headers, path, REMOTE_ADDR="192.0.2.1", HTTP_X_FORWARDED_FOR="198.51.100.1")
    assert answer.status_code == (503 if path == "/readyz" else 200)
    if path != "/dashboard":
        assert set(answer.json) <= {"status", "load_balancer_id", "lifecycle"}  # type: ignore[arg-type]


def test_a_head_is_a_read() -> None:
    client = make_app(control_reads="token", admin_token=TOKEN).test_client()
    assert client.head("/status").status_code == 401
    assert client.head("/status", headers=bearer(TOKEN)).status_code == 200


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/reset-password/SECRET", "/reset-password/\u2026"),
        ("/a/b/c", "/a/\u2026"),
        ("/x", "/x"),
        ("/x/", "/x/"),
        ("/", "/"),
        ("//SECRET", "//\u2026"),
        ("/a;token=SECRET", "/a;\u2026"),
        ("/a?SECRET", "/a?\u2026"),
        ("/a\\SECRET", "/a\\\u2026"),
        ("*", "*"),
        ("", ""),
    ],
)
def test_what_is_left_of_a_path(path: str, shown: str) -> None:
    assert first_segment(path) == shown


def test_a_reader_without_a_token_sees_no_more_of_paths_than_their_first_segment() -> None:
    app = make_app(admin_token=TOKEN)
    for _ in range(2):  # one is refused, and is an event
        app.test_client().delete(f"/backends/{SECRET}", headers={"Origin": FOREIGN})
    for path in ("/status", "/requests/id-1", "/events"):
        cut, whole = read(app, path=path).text, read(app, bearer(TOKEN), path).text
        assert SECRET in whole and SECRET not in cut
    assert read(app, path="/requests/id-1").json["path"] == "/reset-password/\u2026"  # type: ignore[index]
    (event,) = read(app, path="/events").json["events"]  # type: ignore[index]
    assert event["message"].startswith("DELETE /backends/\u2026: origin ") and event["count"] == 2


def test_a_query_is_never_told() -> None:
    app = make_app(admin_token=TOKEN)
    assert read(app, path=f"/elsewhere?token={SECRET}x").status_code == 503  # no backend is up
    app.test_client().post(f"/reset?token={SECRET}x", headers={"Origin": FOREIGN})
    for path in ("/status", "/events", "/metrics"):
        assert f"{SECRET}x" not in read(app, bearer(TOKEN), path).text


def test_a_reader_without_a_token_sees_names_of_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / SECRET
    file, token_file = folder / "balancer.toml", folder / "token"
    monkeypatch.setenv("LB_ADMIN_TOKEN_FILE", str(token_file))
    app = make_app(admin_token=TOKEN)
    configuration = app.extensions["balancer"].configuration
    configuration.file, configuration.sources = file, dict.fromkeys(Settings.model_fields, f"file {file}")
    configuration.settings = configuration.settings.model_copy(update={"ca_file": folder / "ca.pem"})
    for missing in (file, None):  # neither is the file of settings there, nor that of the token
        configuration.read = lambda missing=missing: load({}, file=missing)
        assert app.test_client().post("/reload", headers=bearer(TOKEN)).status_code == 422
    for path in ("/config", "/status", "/events"):
        cut, whole = read(app, path=path).text, read(app, bearer(TOKEN), path).text
        assert SECRET in whole and SECRET not in cut and "LB_ADMIN_TOKEN_FILE=token" in cut
    assert "balancer.toml" in read(app, path="/config").text and "ca.pem" in read(app, path="/config").text


@pytest.mark.parametrize(
    ("settings", "headers", "expected"),
    [
        ({}, {}, (True, False, False)),
        ({"page_token": TOKEN}, {}, (True, True, False)),
        ({"page_token": TOKEN}, bearer(TOKEN), (True, True, True)),
        ({"admin_token": TOKEN}, {}, (True, True, False)),
        ({"control_reads": "open"}, {"Via": "1.1 x"}, (False, False, False)),
        ({"control_reads": "open", "page_token": TOKEN}, {"Via": "1.1 x"}, (True, True, False)),
        ({}, bearer("nothing to compare it with"), (True, False, False)),
    ],
    ids=str,
)
def test_a_reader_is_told_what_it_may_do(
    settings: dict[str, Any], headers: Headers, expected: tuple[bool, bool, bool]
) -> None:
    told = read(make_app(**settings), headers).json["capabilities"]  # type: ignore[index]
    assert (told["writes"], told["token_required"], told["authorized"]) == expected


# Guessing.


def guess(app: Flask, token: str, peer: str = "127.0.0.1", **headers: str) -> TestResponse:
    return read(app, bearer(token) | headers, REMOTE_ADDR=peer)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def guarded(clock: Clock) -> Flask:
    app = make_app(admin_token=TOKEN, page_token=PAGE_TOKEN, trusted_proxies=("10.0.0.0/8",))
    app.extensions["control"].access.guesses = Guesses(clock)
    return app


def test_guesses_are_slowed_and_tell_nothing(guarded: Flask, clock: Clock) -> None:
    for _ in range(GUESSES):
        assert guess(guarded, TOKEN).status_code == 200  # whoever has it is not disturbed so far
        assert guess(guarded, "wrong").status_code == 401
        clock.now += 1
    for token in ("wrong", TOKEN, PAGE_TOKEN):
        answer = guess(guarded, token)
        assert answer.status_code == 429 and answer.headers["Retry-After"] == str(int(GUESS_SECONDS) - GUESSES)
        assert write(guarded, bearer(token)).status_code == 429
    assert guess(guarded, TOKEN, "192.0.2.7").status_code == 200  # elsewhere nobody guesses
    clock.now += GUESS_SECONDS - GUESSES + 0.5
    assert guess(guarded, TOKEN).status_code == 200
    assert guess(guarded, "wrong").status_code == 401  # the oldest of the ten is forgotten, so there is room for one
    assert guess(guarded, "wrong").status_code == 429


def test_guesses_of_a_sandboxed_frame_do_not_lock_this_machine_out(guarded: Flask) -> None:
    for _ in range(GUESSES):
        assert guess(guarded, "wrong", Origin="null").status_code == 401
    assert guess(guarded, "wrong", Origin="null").status_code == guess(guarded, TOKEN, Origin="null").status_code == 429
    assert guess(guarded, PAGE_TOKEN, Origin="null").status_code == 200  # nor out the page from disk
    assert guess(guarded, TOKEN).status_code == guess(guarded, TOKEN, Origin="http://localhost").status_code == 200
    for _ in range(GUESSES):
        assert guess(guarded, "wrong", Origin=FOREIGN).status_code == 403
    assert guess(guarded, TOKEN).status_code == 200


@pytest.mark.parametrize(
    ("guesser", "same", "other"),
    [
        (("2001:db8:1:2::1", {}), ("2001:db8:1:2:ffff::9", {}), ("2001:db8:1:3::1", {})),
        (
            ("10.0.0.1", {"X-Forwarded-For": "192.0.2.1"}),
            ("10.0.0.2", {"X-Forwarded-For": "203.0.113.5, 192.0.2.1"}),
            ("10.0.0.1", {"X-Forwarded-For": "192.0.2.2"}),
        ),
        (
            ("192.0.2.1", {"X-Forwarded-For": "1.1.1.1"}),
            ("192.0.2.1", {"X-Forwarded-For": "2.2.2.2"}),
            ("192.0.2.2", {}),
        ),
    ],
    ids=["a network of IPv6", "clients behind a trusted proxy", "claims of somebody else"],
)
def test_whose_guesses_count_together(
    guarded: Flask, guesser: tuple[str, Headers], same: tuple[str, Headers], other: tuple[str, Headers]
) -> None:
    for _ in range(GUESSES):
        assert guess(guarded, "wrong", guesser[0], **guesser[1]).status_code == 401
    assert guess(guarded, TOKEN, same[0], **same[1]).status_code == 429
    assert guess(guarded, TOKEN, other[0], **other[1]).status_code == 200


def test_the_table_of_guessers_is_bounded(clock: Clock) -> None:
    guesses = Guesses(clock)
    for _ in range(GUESSES):
        assert guesses.wait("first", False) == 0
    for number in range(GUESSERS_KEPT):
        assert guesses.wait("first", True) > 0 or number == GUESSERS_KEPT
        assert guesses.wait(number, False) == 0
    assert guesses.wait("first", True) == 0
    assert len(guesses._wrong) == GUESSERS_KEPT


# The answers themselves.


@pytest.mark.parametrize("path", [*READS, *OPEN, "/requests/none", "/backends/none", "/status?recent=x", "/reset"])
def test_every_answer_is_of_use_to_nobody_else(path: str) -> None:
    answer = read(make_app(), path=path)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Cache-Control"] == ("no-cache" if path == "/dashboard" else "no-store")
    assert "Origin" in answer.vary
    assert make_app().test_client().put("/status").headers["Cache-Control"] == "no-store"  # 405


@pytest.mark.parametrize(
    "path", ["//x", "//status", "/status//", "/backends//a", "/requests//a//b", "//evil.example/%2e"]
)
def test_no_path_is_answered_with_a_redirect(path: str) -> None:
    """Werkzeug would send `//x` on, to a URL that it makes from Host."""
    app = make_app(control_port=9001)
    control = app.extensions["balancer"].control_app
    answer = Client(control).get(path, headers={"Host": "evil.example"}, environ_base={"REMOTE_ADDR": "127.0.0.1"})
    assert answer.status_code in (403, 404) and "Location" not in answer.headers
    answer = Client(control).get(path, headers={"Host": "localhost"}, environ_base={"REMOTE_ADDR": "127.0.0.1"})
    assert answer.status_code == 404 and "Location" not in answer.headers


@pytest.mark.parametrize(("method", "path"), [write for write in WRITES if write[0] != "DELETE"])
@pytest.mark.parametrize("name", [r"\ud800", r"\udfff\ud800", r"a\ud800b"])
def test_a_field_whose_name_is_half_a_character_is_refused(
    client: FlaskClient, method: str, path: str, name: str
) -> None:
    answer = client.open(path, method=method, data=f'{{"{name}": 1}}', content_type="application/json")
    assert 400 <= answer.status_code < 500 and "Unicode" in said(answer)


@pytest.fixture
def client() -> FlaskClient:
    return make_app().test_client()


@pytest.mark.parametrize("method", ["GET", "PATCH", "DELETE"])
@pytest.mark.parametrize("headers", [{}, {"Origin": FOREIGN}], ids=str)
def test_a_path_cannot_forge_a_line(client: FlaskClient, method: str, headers: Headers) -> None:
    body = {"json": {"weight": 1}} if method == "PATCH" else {}
    answer = client.open("/backends/a%0aFORGED%1b[31m", method=method, headers=headers, **body)  # type: ignore[arg-type]
    assert answer.status_code in (403, 404)
    events = [event["message"] for event in client.application.extensions["control"].events.since(0)[0]]
    for text in (said(answer), *events):
        assert text.isprintable()
    assert headers == {} or method == "GET" or r"/backends/a\nFORGED\x1b[31m" in events[-1]


# Bytes on the wire.


@pytest.fixture(scope="module")
def balancer() -> Iterator[BalancerProcess]:
    env = {"LB_PAGE_TOKEN": PAGE_TOKEN}
    started = BalancerProcess(f"--backend=a=http://127.0.0.1:{free_port()}", "--log-level=debug", env=env)
    yield started
    started.stop()


@pytest.mark.parametrize("path", [b"/status", b"/health", b"/dashboard"])
@pytest.mark.parametrize(
    "lines",
    [
        [],
        [b"Host:"],
        [b"Host: localhost", b"Host: localhost"],
        [b"Host: localhost", b"Host: evil.example"],
        [b"Host: localhost, evil.example"],
        [b"Host: user@localhost"],
        [b"Host: localhost/x"],
        [b"Host: [::1]x:80"],
    ],
    ids=str,
)
def test_control_paths_obey_the_rules_of_host(balancer: BalancerProcess, path: bytes, lines: list[bytes]) -> None:
    """RFC 9112 section 3.2."""
    asked = b"\r\n".join([b"GET " + path + b" HTTP/1.1", *lines, b"Connection: close"]) + b"\r\n\r\n"
    assert exchange(balancer.port, asked).startswith(b"HTTP/1.1 400 ")


def test_the_authority_of_an_absolute_form_is_checked_where_it_can_be_seen(balancer: BalancerProcess) -> None:
    """RFC 9112 section 3.2.2. Granian shows it only without a Host line; with one, that line is what is checked."""
    lines = b"\r\nConnection: close\r\n\r\n"
    for asked, status in (
        (b"GET http://evil.example/status HTTP/1.1", 401),
        (b"GET http://evil.example/status HTTP/1.1\r\nHost: evil.example", 401),
        (b"GET http://localhost/status HTTP/1.1\r\nHost: evil.example", 401),
        (b"GET http://localhost/status HTTP/1.1", 200),
        (b"GET http://localhost/status HTTP/1.1\r\nHost: localhost", 200),
    ):
        assert split_response(exchange(balancer.port, asked + lines))[0] == status


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ([(b":authority", b"localhost")], 200),
        ([(b":authority", b""), (b"host", b"localhost")], 200),
        ([(b":authority", b"evil.example")], 401),
        ([(b":authority", b"localhost"), (b"host", b"evil.example")], 401),
        ([(b":authority", b""), (b"host", b"localhost"), (b"host", b"localhost")], 400),
        ([(b":authority", b"localhost"), (b"host", b"a"), (b"host", b"b")], 400),
        ([(b":authority", b"")], 400),
    ],
    ids=str,
)
def test_the_authority_of_http_2(balancer: BalancerProcess, fields: list[tuple[bytes, bytes]], status: int) -> None:
    """RFC 9113 section 8.3.1. Granian shows `host` alone where both are there, so that is what is checked."""
    with http2(balancer) as h2:
        h2.request(1, (b":path", b"/status"), *fields)
        assert h2.finish(1).status == status


def test_a_rebound_name_reads_nothing(balancer: BalancerProcess) -> None:
    for path in READS:
        assert fetch(balancer.url + path, Host="rebound.evil.example")[0] == 401
        assert fetch(balancer.url + path)[0] in (200, 404)


@pytest.mark.parametrize("framing", [b"Transfer-Encoding: chunked", b"Content-Length: 2"])
@pytest.mark.parametrize("content_type", [b"Content-Type: text/plain", b"X-None: 1"])
def test_a_body_must_be_json_whatever_its_framing(
    balancer: BalancerProcess, framing: bytes, content_type: bytes
) -> None:
    body = b"{}" if framing.startswith(b"Content") else b"2\r\n{}\r\n0\r\n\r\n"
    asked = post(content_type, framing, b"Connection: close", body=body, target=b"/reset")
    asked = asked.replace(b"Host: test", b"Host: localhost")
    assert exchange(balancer.port, asked).startswith(b"HTTP/1.1 415 ")
    asked = asked.replace(content_type, b"Content-Type: application/json")
    assert exchange(balancer.port, asked).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("body", "status"), [(b"{}", 415), (b"", 200)])
def test_a_body_must_be_json_over_http_2_too(balancer: BalancerProcess, body: bytes, status: int) -> None:
    """Where no Content-Length tells that there is one."""
    with http2(balancer) as h2:
        h2.request(1, (b":path", b"/reset"), (b":authority", b"localhost"), method=b"POST", end=False)
        h2.data(1, body)
        assert h2.finish(1).status == status


def test_guesses_on_a_real_connection() -> None:
    balancer = BalancerProcess(f"--backend=a=http://127.0.0.1:{free_port()}", env={"LB_ADMIN_TOKEN": TOKEN})
    try:
        tried = [fetch(f"{balancer.url}/status", **bearer("wrong")) for _ in range(GUESSES + 1)]
        assert [status for status, _, _ in tried] == [401] * GUESSES + [429]
        assert 1 <= int(tried[-1][1]["retry-after"]) <= GUESS_SECONDS
        assert fetch(f"{balancer.url}/status", **bearer(TOKEN))[0] == 429
        assert fetch(f"{balancer.url}/health", **bearer(TOKEN))[0] == 200
    finally:
        balancer.stop()


def test_a_forged_line_is_in_no_log() -> None:
    balancer = BalancerProcess(f"--backend=a=http://127.0.0.1:{free_port()}", "--log-level=debug")
    try:
        for method in ("GET", "PATCH", "DELETE"):
            fetch(f"{balancer.url}/backends/a%0aFORGED%1b[31m", {} if method == "PATCH" else None, method)
        fetch(f"{balancer.url}/backends/a%0aFORGED", b'{"\\ud800": 1}', "PATCH", Content_Type="application/json")
    finally:
        balancer.stop()  # then all of its log is here
    assert not any(line.startswith("FORGED") or "\x1b" in line for line in balancer.lines)
    assert "Traceback" not in balancer.output


@pytest.mark.parametrize("setting", ["admin_token", "page_token"])
def test_a_short_token_is_refused_at_the_start(setting: str) -> None:
    process = Process([PYTHON, "load_balancer.py", "--check-config"], {f"LB_{setting.upper()}": "fifteen-letters"})
    try:
        assert process.wait() == 2
    finally:
        process.stop()
    assert setting in process.output and "at least 16" in process.output and "fifteen-letters" not in process.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--allow-file-origin"], "allow_file_origin does nothing any more"),
        (["--host=0.0.0.0"], "the control API only answers probes"),
        ([], None),
        (["--host=0.0.0.0", "--control-reads=open"], None),
    ],
    ids=str,
)
def test_what_does_not_do_what_one_may_expect_is_told_at_the_start(flags: list[str], words: str | None) -> None:
    process = Process([PYTHON, "load_balancer.py", "--check-config", *flags])
    try:
        assert process.wait() == 0
    finally:
        process.stop()
    assert words in process.output if words else "warning" not in process.output
    assert process.output.count("warning") == (words is not None)


# nginx in front, as somebody may set it up who has not read about it.

NGINX = """
daemon off; pid nginx.pid; error_log stderr; worker_processes 1;
events {{ worker_connections 64; }}
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path f; uwsgi_temp_path u; scgi_temp_path s;
    server {{
        listen 127.0.0.1:{port};
        location {at} {{ proxy_pass {url}; {more} }}
    }}
}}
"""


@contextmanager
def nginx_before(folder: Path, balancer: BalancerProcess, more: str, at: str = "/") -> Iterator[str]:
    """Its URL. The path `at` is taken off what it passes on."""
    nginx = shutil.which("nginx")
    assert nginx is not None, "apt-get install nginx-light"
    port = free_port()
    file = folder / "nginx.conf"
    file.write_text(
        NGINX.format(port=port, at=at, url=balancer.url + ("" if at == "/" else "/"), more=more), encoding="utf-8"
    )
    process = subprocess.Popen([nginx, "-p", str(folder), "-c", str(file)], stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        try:
            return fetch(url)[0] != 0
        except OSError:
            return False

    try:
        wait_until(answers, what="nginx listens")
        yield url
    finally:
        process.terminate()
        process.wait(60)


def test_a_proxy_that_hides_itself_has_another_user(tmp_path: Path, balancer: BalancerProcess) -> None:
    """As nginx does from 1.29.7 on without a word of its owner: HTTP/1.1, no header of its own, our Host."""
    hidden = 'proxy_http_version 1.1; proxy_set_header Connection "";'
    with nginx_before(tmp_path, balancer, hidden) as url:
        new = {"id": "b", "url": "http://169.254.169.254"}
        # Started by root its workers are somebody else; else they are ourselves, and nobody can tell.
        assert fetch(f"{url}/backends", new)[0] == (401 if os.geteuid() == 0 else 201)
        assert fetch(f"{balancer.url}/backends/b", method="DELETE")[0] == (404 if os.geteuid() == 0 else 200)


@pytest.mark.parametrize("more", ["", "proxy_http_version 1.1; proxy_set_header X-Forwarded-For $remote_addr;"])
def test_behind_nginx_nobody_is_local(tmp_path: Path, balancer: BalancerProcess, more: str) -> None:
    with nginx_before(tmp_path, balancer, more) as url:
        new = {"id": "b", "url": "http://169.254.169.254"}
        assert fetch(f"{url}/backends", new)[0] == fetch(f"{url}/status")[0] == 401
        assert fetch(f"{url}/status", **bearer(PAGE_TOKEN))[0] == 200
        assert fetch(f"{url}/backends", new, **bearer(PAGE_TOKEN))[0] == 201
        assert fetch(f"{url}/backends/b", method="DELETE", **bearer(PAGE_TOKEN))[0] == 200


# Service workers: the page of a backend may register one, and its scope must not cover the control API.


@pytest.fixture(scope="module")
def scripts() -> Iterator[WireBackend]:
    backend = WireBackend()
    backend.answer(ok(b"script", b"Content-Type: text/javascript", b"Service-Worker-Allowed: /", b"X-Kept: 1"))
    yield backend
    backend.close()


def register(balancer: BalancerProcess, target: bytes) -> tuple[int, dict[bytes, bytes]]:
    answer = exchange(balancer.port, get(target, b"Service-Worker: script", host=b"localhost"))
    status, lines, _ = split_response(answer)
    return status, dict(lines)


@pytest.mark.parametrize(
    ("flags", "refused", "forwarded"),
    [
        ([], [b"/sw.js", b"/sw.js?v=1", b"/x%2Fsw.js", b"/?/a/b"], [b"/app/sw.js", b"/app/?x=/", b"//sw.js"]),
        (
            ["--control-prefix=/lb"],
            [b"/sw.js", b"/lb/sw.js", b"/%6cb/sw.js"],
            [b"/app/sw.js", b"/lb/x/sw.js", b"/lbx/sw.js"],
        ),
        (["--control-prefix=/a/b"], [b"/sw.js", b"/a/sw.js", b"/a/b/sw.js"], [b"/b/sw.js", b"/a/c/sw.js"]),
        (["--control-port={free}"], [], [b"/sw.js", b"/app/sw.js"]),
    ],
    ids=str,
)
def test_a_service_worker_over_the_control_api_is_refused(
    scripts: WireBackend, flags: list[str], refused: list[bytes], forwarded: list[bytes]
) -> None:
    free = str(free_port())
    balancer = BalancerProcess(
        f"--backend=b={scripts.url}", *[flag.replace("{free}", free) for flag in flags], wait_ready=False
    )
    has_own_port = any("port" in flag for flag in flags)
    try:
        wait_until(lambda: fetch(f"{balancer.url}/x")[0] == 200, what="the backend is up")
        for target in refused * 2:
            assert register(balancer, target)[0] == 403
            assert exchange(balancer.port, get(target, host=b"localhost")).startswith(b"HTTP/1.1 200 ")
        for target in forwarded * 2:
            status, lines = register(balancer, target)
            assert status == 200 and lines[b"x-kept"] == b"1"
            assert (b"service-worker-allowed" in lines) is has_own_port
        got = next(request for request in reversed(scripts.requests) if request.target == forwarded[0])
        assert got.values(b"service-worker") == [b"script"]
    finally:
        balancer.stop()


@pytest.mark.parametrize(
    ("allowed", "is_kept"),
    [
        (b"/app/", True),
        (b"/app", True),
        (b"/", False),
        (b"/stat", False),
        (b"/dashboard", False),
        (b"../", False),
        (b"/app/../", False),
        (b"/app/%2e%2e/", False),
        (b"\\", False),
        (b"http://localhost/", False),
        (b"//localhost/", False),
        (b"", False),
    ],
)
def test_how_far_an_answer_may_let_a_service_worker_reach(
    scripts: WireBackend, balancer_of_scripts: BalancerProcess, allowed: bytes, is_kept: bool
) -> None:
    scripts.answer(ok(b"script", b"Service-Worker-Allowed: " + allowed))
    status, lines = register(balancer_of_scripts, b"/app/js/sw.js")
    assert status == 200 and (lines.get(b"service-worker-allowed") == allowed) is is_kept
    scripts.answer(ok(b"x" * 300_000, b"Service-Worker-Allowed: " + allowed))  # not whole at once
    assert (register(balancer_of_scripts, b"/app/js/sw.js")[1].get(b"service-worker-allowed") == allowed) is is_kept


@pytest.fixture(scope="module")
def balancer_of_scripts(scripts: WireBackend) -> Iterator[BalancerProcess]:
    started = BalancerProcess(f"--backend=b={scripts.url}")
    started.wait_healthy("b")
    yield started
    started.stop()


def test_a_refused_service_worker_is_on_record(scripts: WireBackend, balancer_of_scripts: BalancerProcess) -> None:
    with connect(balancer_of_scripts.port) as sock:
        sock.sendall(get(b"/sw.js", b"Service-Worker: script"))
        status, _, body = split_response(sock.recv(65536))
    assert status == 403 and "control_port" in json.loads(body)["error"]
    told = fetch_json(f"{balancer_of_scripts.url}/requests/{json.loads(body)['request_id']}")
    assert (told["status"], told["reason"], told["tried"]) == (403, "http_request_denied", [])
