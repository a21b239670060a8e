"""Whom a guarded route lets in, what backends learn of them, and that nothing of anybody else reaches a backend."""

from __future__ import annotations

import json
import sys
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from guarded import Guarded, api_keys, digest, guarded
from support import Balancer, exchange, fetch, fetch_json, get, split_response, wait_until
from test_http2 import curl
from wire import WireBackend

from balancer import LoadBalancer
from balancer.errors import SettingsError

KEYS = ("acme-key-of-a-test", "beta-key-of-a-test")
KEY = b"X-API-Key: acme-key-of-a-test"
BEARER = b"Authorization: Bearer beta-key-of-a-test"


@pytest.fixture(scope="module")
def balancer(scripted: WireBackend) -> Iterator[Guarded]:
    with guarded(scripted, api_keys(*KEYS)) as made:
        yield made


@pytest.mark.parametrize(
    ("lines", "subject"),
    [
        ([KEY], b"a"),
        ([BEARER], b"b"),
        ([b"authorization: bEaReR  beta-key-of-a-test"], b"b"),
        ([KEY, b"Authorization: Basic eDp5"], b"a"),
    ],
)
def test_a_key_is_known_and_its_owner_told(balancer: Guarded, lines: list[bytes], subject: bytes) -> None:
    balancer.backend.reset()
    forged = [
        b"X-Auth-Subject: root",
        b"x-auth-subject: root",
        b"X_Auth_Subject: root",
        b"Connection: X-Auth-Subject, close",
    ]
    for _ in range(3):  # the first, one that is noted, one that is found again
        assert balancer.status(*lines, *forged, b"X-Else: 1") == 200
    for request in balancer.backend.requests:
        assert request.values(b"x-auth-subject") == [subject] and request.values(b"x-else") == [b"1"]
        assert not request.values(b"authorization") + request.values(b"x-api-key") + request.values(b"x_auth_subject")
    record = balancer.requests(1)[0]
    assert (record["subject"], record["server_id"]) == (subject.decode(), "only")


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "no key was sent"),
        ([b"X-API-Key: acme-key-of-a-tesu"], "not known"),
        ([b"X-API-Key:"], "not known"),
        ([b"X-API-Key: " + b"k" * 40_000], "not known"),
        ([KEY, KEY], "more than one"),
        ([BEARER, b"Authorization: Basic eDp5"], "more than one"),
        ([KEY, BEARER], "more than one"),
        ([BEARER, BEARER], "more than one"),
        ([BEARER + b", Bearer beta-key-of-a-test"], "not known"),
        ([b"X-API-Key: acme-key-of-a-test, acme-key-of-a-test"], "not known"),
        ([b"Cookie: x-api-key=acme-key-of-a-test"], "no key was sent"),
        ([b"X_API_Key: acme-key-of-a-test"], "no key was sent"),
        ([b"X-Auth-Subject: a"], "no key was sent"),
    ],
    ids=range(13),
)
def test_whoever_is_not_known_gets_no_further(balancer: Guarded, lines: list[bytes], why: str) -> None:
    balancer.backend.reset()
    status, answer, body = balancer.ask(*lines)
    told = dict(answer)
    assert (status, told[b"www-authenticate"]) == (401, b'Bearer realm="partners"')
    assert told[b"content-type"] == b"application/problem+json"
    problem = json.loads(body)
    assert (problem["status"], problem["title"]) == (401, "Unauthorized") and why not in problem["detail"]
    record = balancer.requests(1)[0]
    assert (record["status"], record["reason"], record["server_id"]) == (401, "http_request_denied", None)
    assert record["error"] and why in record["error"] and record["subject"] is None
    assert balancer.backend.seen == 0
    assert balancer.pool.snapshot()[0]["health"]["consecutive_failures"] == 0


def test_every_way_to_a_backend_is_guarded(balancer: Guarded) -> None:
    balancer.backend.reset()
    url = balancer.url
    upgrade = (
        b"Connection: Upgrade, close",
        b"Upgrade: websocket",
        b"Sec-WebSocket-Version: 13",
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
    )
    assert balancer.status(*upgrade) == 401
    assert curl(balancer, path="/h2")[0] == 401
    assert curl(balancer, "-H", KEY.decode(), path="/h2")[0] == 200
    assert fetch(url + "/", b"x" * 100_000, "POST")[0] == 401
    assert fetch(url + "/", b"x" * 100_000, "POST", X_API_Key=KEYS[0])[0] == 200
    preflight = (b"Origin: https://a.example", b"Access-Control-Request-Method: PUT")
    assert balancer.ask(*preflight, method=b"OPTIONS")[0] == 200  # browsers put no credentials into these
    assert balancer.ask(preflight[0], method=b"OPTIONS")[0] == balancer.ask(*preflight)[0] == 401
    for more in (b"X-API-Key: wrong", b"Cookie: a=b", b"X-HTTP-Method-Override: DELETE", b"Content-Length: 1"):
        assert balancer.ask(*preflight, more, method=b"OPTIONS")[0] == 401  # so it is none
    seen = [(request.head.split(b" ")[0], request.values(b"x-auth-subject")) for request in balancer.backend.requests]
    assert seen == [(b"GET", [b"a"]), (b"POST", [b"a"]), (b"OPTIONS", [])]


def test_one_of_several_must_say_yes(scripted: WireBackend) -> None:
    second = api_keys("second-key-of-a-test", name="others")
    with guarded(scripted, api_keys(*KEYS), second) as both:
        assert both.status(KEY) == both.status(b"X-API-Key: second-key-of-a-test") == 200
        assert both.status(KEY, b"X-API-Key: second-key-of-a-test") == 401
        status, answer, _ = both.ask(b"X-API-Key: wrong")
        challenges = [value for name, value in answer if name == b"www-authenticate"]
        assert (status, challenges) == (401, [b'Bearer realm="partners"', b'Bearer realm="others"'])


def test_no_key_is_told_anywhere(scripted: WireBackend, capfd: pytest.CaptureFixture[str]) -> None:
    """Not in records, events, the settings in force, metrics, the log; nor are digests."""
    with guarded(scripted, api_keys(*KEYS), access_log=True) as balancer:
        balancer.ask(KEY)
        balancer.ask(b"X-API-Key: a-wrong-key-of-a-test")
        wait_until(lambda: not balancer.control.statistics.lifetime().active)
        record = balancer.requests(1)[0]["request_id"]
        paths = ("/status?recent=100", "/events", "/config", "/metrics", f"/requests/{record}", "/openapi.json")
        told = "".join(fetch(balancer.url + path)[2].decode() for path in paths)
    log = capfd.readouterr().out
    assert ' subject="a"' in log and 'lb_auth_failures_total{auth="partners",reason="invalid"} 1.0' in told
    for secret in ("-key-of-a-test", digest(KEYS[0]), digest(KEYS[1])):
        assert secret not in told + log


FILE = """
health_timeout = 5
[[backends]]
id = "only"
url = "{url}"
[[auth]]
name = "partners"
type = "api_key"
keys = [{{ id = "acme", sha256 = "{digest}" }}]
[[auth]]
name = "staff"
type = "basic"
users_file = "{users}"
[[routes]]
name = "v1"
path = "/v1"
auth = ["partners", "staff"]
"""


def test_a_reload_changes_who_is_let_in_and_keeps_what_stays(scripted: WireBackend, tmp_path: Path) -> None:
    scripted.reset()
    file, users = tmp_path / "balancer.toml", tmp_path / "users"
    ann = b"Authorization: Basic " + b64encode(b"ann:a")

    def written(key: str, password: bytes) -> None:
        file.write_text(FILE.format(url=scripted.url, digest=digest(key), users=users), encoding="utf-8")
        users.write_text(f"ann:{bcrypt.hashpw(password, bcrypt.gensalt(4)).decode()}", encoding="ascii")

    def statuses() -> list[int]:
        asked = [get(b"/v1", *lines) for lines in ([KEY], [ann], [])]
        return [
            split_response(exchange(balancer.port, data))[0] for data in [*asked, get(b"/open", b"X-Auth-Subject: a")]
        ]

    written(KEYS[0], b"a")
    with Balancer(f"--config={file}") as balancer:
        library = balancer.library
        assert statuses() == [200, 200, 401, 200]
        assert not scripted.requests[-1].values(b"x-auth-subject")  # nor where nobody asks who it is
        before = library.authentication.filter(("partners", "staff"))._authenticators
        assert not library.reload().changes
        assert library.authentication.filter(("partners", "staff"))._authenticators == before
        written(KEYS[0], b"b")
        assert [str(change) for change in library.reload().changes] == ["auth.staff: staff -> staff (values changed)"]
        assert statuses() == [200, 401, 401, 200]
        written(KEYS[1], b"a")
        users.write_text("ann:plain", encoding="ascii")
        with pytest.raises(SettingsError, match="auth staff: users_file .*line 1"):
            library.reload()
        assert statuses()[0] == 200  # all of it is as before
        written(KEYS[1], b"a")
        assert len(library.reload().changes) == 2 and statuses() == [401, 200, 401, 200]


@pytest.mark.parametrize(("module", "table"), [("bcrypt", "basic"), ("joserfc", "jwt")])
def test_the_extra_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, module: str, table: str, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for name in ("basic", "jwt", "jwks"):
        monkeypatch.delitem(sys.modules, f"balancer.filters.{name}", raising=False)
        monkeypatch.delattr(f"balancer.filters.{name}", raising=False)
    (tmp_path / "file").write_text("x", encoding="ascii")
    fields = {"basic": {"users_file": "file"}, "jwt": {"secret_file": "file", "algorithms": ["HS256"]}}[table]
    given = {name: str(tmp_path / "file") if name.endswith("_file") else value for name, value in fields.items()}
    with pytest.raises(
        SettingsError, match=r"^auth a: type \w+ needs the extra auth: pip install 'python-load-balancer\[auth\]'$"
    ):
        LoadBalancer(auth=[{"name": "a", "type": table, **given}])


def test_what_is_kept_by_whom_counts_for_limits(scripted: WireBackend) -> None:
    limit = {"name": "each", "rate": "1/h", "key": "subject"}
    with guarded(scripted, api_keys(*KEYS), limits=[limit]) as made:
        assert [made.status(line) for line in (KEY, BEARER, KEY, BEARER)] == [200, 200, 429, 429]
        assert made.requests(1)[0]["subject"] == "b"


KEYED = {"name": "a", "type": "api_key"}
SIGNED = {"name": "a", "type": "jwt"}
ASKED = {"name": "a", "type": "forward"}


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"name": "a", "type": "none"}, "auth.a (program): expected a table with type api_key, basic, forward, jwt"),
        ({"name": "a"}, "auth.a (program): expected a table with type api_key, basic, forward, jwt"),
        ({**KEYED, "keys": []}, "no keys; make one by load-balancer new-key"),
        ({**KEYED, "keys": "a-plain-secret"}, "keys = (hidden)"),
        (
            {**KEYED, "keys": [{"id": "x", "sha256": "a-plain-secret"}]},
            "sha256 = (hidden) (program): expected a SHA-256 ",
        ),
        ({**KEYED, "keys": [{"id": "x", "sha256": "0" * 64}] * 2}, "two have the same sha256"),
        ({**SIGNED, "algorithms": ["none"], "secret_file": "x"}, "algorithms.0 = 'none' (program): expected HS256, "),
        ({**SIGNED, "secret_file": "x"}, "algorithms (program): is missing"),
        ({**SIGNED, "algorithms": ["HS256"]}, "no keys; expected exactly one of secret_file, jwks_file, jwks_url"),
        (
            {**SIGNED, "algorithms": ["HS256", "RS256"], "secret_file": "x"},
            "HS256, RS256 with secret_file; expected HS*",
        ),
        ({**SIGNED, "algorithms": ["HS256"], "jwks_url": "http://x/"}, "HS256 with jwks_url; expected HS*"),
        ({**SIGNED, "algorithms": ["RS256"], "jwks_url": "https://u:a-plain-secret@x/"}, "URL of host 'x/': expected"),
        ({**SIGNED, "algorithms": ["RS256"], "jwks_url": "file:///etc/passwd"}, "expected http://HOST:PORT/PATH"),
        ({**SIGNED, "require": {"scope": ['"']}, "algorithms": ["RS256"]}, "is no scope"),
        ({**ASKED, "url": "http://x/", "copy_headers": ["Host"]}, "'Host' is no field that can be copied"),
        ({**ASKED, "url": "http://x/", "copy_headers": ["X_User"]}, "'X_User' is no field that can be copied"),
    ],
    ids=range(16),
)
def test_a_wrong_table_is_told_in_one_line_without_secrets(table: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError) as failed:
        LoadBalancer(auth=[table])
    assert told in str(failed.value) and "\n" not in str(failed.value) and "a-plain-secret" not in str(failed.value)


def test_advice_about_what_guards_nothing() -> None:
    jwt = {"name": "users", "type": "jwt", "algorithms": ["RS256"], "jwks_url": "http://keys.example/"}
    told = "".join(LoadBalancer(auth=[jwt]).advice())
    assert all(part in told for part in ("no route names it", "without issuer", "without audience", "without TLS"))


def test_readers_without_a_token_are_not_told_who_sent_what(scripted: WireBackend) -> None:
    with guarded(scripted, api_keys(*KEYS), admin_token="a-token-of-this-test") as made:
        assert made.status(KEY) == 200
        for headers, subject in (({}, None), ({"Authorization": "Bearer a-token-of-this-test"}, "a")):
            recent = fetch_json(made.url + "/status", **headers)["recent_requests"]
            assert recent[0]["subject"] == subject
