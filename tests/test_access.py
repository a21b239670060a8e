"""Who may read and write through the control API: pages of every kind, programs, proxies, guessers.

What a browser adds to requests is written out here; tests/test_dashboard_access.py has the real one.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from control import ALLOWED, FOREIGN, READS, TOKEN, Headers, bearer
from flask import Flask
from flask.testing import FlaskClient
from support import PAGE_TOKEN, Clock, make_record
from werkzeug.test import Client, TestResponse

from balancer.config.settings import Settings, load
from balancer.config.values import BackendSettings
from balancer.control.access import first_segment
from balancer.loadbalancer import create_app
from balancer.protocol.guesses import GUESS_SECONDS, GUESSERS_KEPT, GUESSES, Guesses

OPEN = ["/health", "/livez", "/readyz", "/dashboard"]
WRITES = [("POST", "/algorithm"), ("POST", "/reset"), ("POST", "/reload"), ("POST", "/backends")]
WRITES += [("PATCH", "/backends/a"), ("DELETE", "/backends/a")]
SECRET = "SECRET-OF-A-PATH"


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


ORIGINS = [FOREIGN, f"{FOREIGN}{'x' * 9000}", "http://localhost:1", "https://localhost", "http://127.0.0.1", "x"]
ORIGINS += ["http://localhost.evil.example"]


@pytest.mark.parametrize("settings", [{}, {"admin_token": TOKEN, "control_reads": "open"}], ids=str)
@pytest.mark.parametrize("origin", [*ORIGINS, ""])
def test_a_page_of_another_site_gets_nothing_even_with_the_token(settings: dict[str, Any], origin: str) -> None:
    app = make_app(**settings)
    for headers in ({"Origin": origin}, {"Origin": origin} | bearer(TOKEN)):
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
    event = app.extensions["control"].events.since(0)[0][-1]
    assert (event["kind"], event["severity"]) == ("write_refused", "warning")
    assert path in event["message"] and method in event["message"]
    assert client.get("/backends/a", headers=bearer(TOKEN)).status_code == 200


def test_a_page_on_the_list_may_come_across_sites() -> None:
    headers = {"Origin": ALLOWED, "Sec-Fetch-Site": "cross-site"}
    assert write(make_app(cors_origins=(ALLOWED,)), headers).status_code == 200
    guarded = make_app(cors_origins=(ALLOWED,), page_token=TOKEN)
    assert (write(guarded, headers).status_code, write(guarded, headers | bearer(TOKEN)).status_code) == (401, 200)
    assert read(guarded, headers, "/backends/no").headers["Access-Control-Allow-Origin"] == ALLOWED


@pytest.mark.parametrize("origin", ["https://[2001:db8::1]:9000", "https://a.b-c.example"])
def test_origins_are_compared_as_text(origin: str) -> None:
    """flask-cors takes brackets and dots for a regular expression."""
    app = make_app(cors_origins=(origin,))
    near = [re.sub(r"\[.*\]", "2", origin), origin.replace(".", "x"), origin + "x", "x" + origin, origin[:-1]]
    assert read(app, {"Origin": origin}).headers["Access-Control-Allow-Origin"] == origin
    for other in {*near, origin.upper()} - {origin}:
        answer = read(app, {"Origin": other})
        assert answer.status_code == 403 and "Access-Control-Allow-Origin" not in answer.headers
        assert write(app, {"Origin": other}).status_code == 403
        asked = {"Origin": other, "Access-Control-Request-Method": "POST"}
        assert "Access-Control-Allow-Origin" not in app.test_client().options("/status", headers=asked).headers


@pytest.mark.parametrize("host", ["rebound.evil.example", "rebound.evil.example:9000", "10.0.0.1", "localhost.x"])
@pytest.mark.parametrize("path", READS)
def test_a_name_made_to_resolve_to_us_may_not_read_nor_write(host: str, path: str) -> None:
    assert read(make_app(), {"Host": host}, path).status_code == 403
    for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
        assert write(make_app(), headers).status_code == 403
    assert read(make_app(page_token=TOKEN), {"Host": host}, path).status_code == 401
    assert read(make_app(page_token=TOKEN), {"Host": host} | bearer(TOKEN), path).status_code in (200, 404)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
def test_what_a_form_can_send_is_refused(client: FlaskClient, content_type: str | None) -> None:
    for headers in ({"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {}):
        answer = client.post("/algorithm", data=b'{"algorithm": "x"}', content_type=content_type, headers=headers)
        assert answer.status_code == 415 and "application/json" in said(answer)


def test_a_reset_without_body_from_a_browser_is_refused(client: FlaskClient) -> None:
    """Any page can send one without asking; curl can too, but curl is not lured to a page."""
    for headers in ({"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": FOREIGN}):
        assert client.post("/reset", headers=headers).status_code in (403, 415)
    assert client.get("/status").json["statistics"]["total_requests"] == 1


@pytest.mark.parametrize(
    "given",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \u00fc\u00fc"],
)
def test_a_wrong_token_or_none_is_refused(given: str | None) -> None:
    app = make_app(admin_token=TOKEN, host="0.0.0.0")
    answer = write(app, {} if given is None else {"Authorization": given})
    assert answer.status_code == 401 and "token" in said(answer)
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert write(app, {"Authorization": f"bearer {TOKEN}"}).status_code == 200  # RFC 9110 section 11.1


@pytest.mark.parametrize(("method", "path"), WRITES)
def test_a_preflight_tells_an_allowed_origin_yes_and_a_foreign_one_nothing(method: str, path: str) -> None:
    client = make_app(cors_origins=(ALLOWED,)).test_client()
    asked = {"Access-Control-Request-Method": method, "Access-Control-Request-Headers": "authorization, content-type"}
    answer = client.options(path, headers={"Origin": ALLOWED} | asked)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, ALLOWED)
    assert method in answer.headers["Access-Control-Allow-Methods"]
    allowed = answer.headers["Access-Control-Allow-Headers"].lower()
    assert "content-type" in allowed and "authorization" in allowed
    assert "Access-Control-Allow-Credentials" not in answer.headers
    assert "Access-Control-Allow-Origin" not in client.options(path, headers={"Origin": FOREIGN} | asked).headers


# Callers of this machine, and those who are taken for one.


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9000", "[::1]:9000", "LOCALHOST:80"])
def test_a_program_on_this_machine_reads_and_writes(host: str) -> None:
    for settings in ({}, {"page_token": TOKEN}):
        app = make_app(**settings)
        assert read(app, {"Host": host}).status_code == write(app, {"Host": host}).status_code == 200
    page = {"Host": host, "Origin": f"http://{host.lower().removesuffix(':80')}"}  # our own
    assert write(make_app(), page).status_code == 200


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
        assert set(answer.json) <= {"status", "load_balancer_id", "lifecycle"}


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
    assert read(app, path="/requests/id-1").json["path"] == "/reset-password/\u2026"
    (event,) = read(app, path="/events").json["events"]
    assert event["message"].startswith("DELETE /backends/\u2026: origin ") and event["count"] == 2


def test_a_query_is_never_told() -> None:
    app = make_app(admin_token=TOKEN, queue_timeout=0.1)
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
    configuration._named.add(folder / "ca.pem")
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
    told = read(make_app(**settings), headers).json["capabilities"]
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
    answer = client.open("/backends/a%0aFORGED%1b[31m", method=method, headers=headers, **body)
    assert answer.status_code in (403, 404)
    events = [event["message"] for event in client.application.extensions["control"].events.since(0)[0]]
    for text in (said(answer), *events):
        assert text.isprintable()
    assert headers == {} or method == "GET" or r"/backends/a\nFORGED\x1b[31m" in events[-1]
