"""Signed tokens: what counts for one, with which keys it is checked, and where these come from."""

from __future__ import annotations

import base64
import hmac
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guarded import Guarded, guarded
from joserfc import jwk, jws, jwt
from support import Clock, RawRequest, ok, wait_until
from wire import WireBackend

from balancer import LoadBalancer
from balancer.errors import SettingsError
from balancer.filters import jwks
from balancer.filters.auth import Granted, Refused, granted
from balancer.filters.jwt import LEEWAY_SECONDS, Jwt, JwtOptions
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

SECRET = "a-secret-of-this-test-with-32-bytes-or-more"
ISSUER, AUDIENCE = "https://issuer.example", "api"
RSA, EC, ED = (
    jwk.generate_key(*kind, {"kid": kind[0]}) for kind in (("RSA", 2048), ("EC", "P-256"), ("OKP", "Ed25519"))
)
OTHER = jwk.generate_key("RSA", 2048, {"kid": "RSA"})  # of the same name


def claims(**changes: Any) -> dict[str, Any]:
    made = {
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "ann",
        "exp": int(time.time()) + 600,
        "scope": "read write",
        **changes,
    }
    return {name: value for name, value in made.items() if value is not None}


def token(key: Any = RSA, algorithm: str = "RS256", header: dict[str, Any] | None = None, **changes: Any) -> str:
    head = {"alg": algorithm, "kid": key.kid, **(header or {})}
    registry = jws.JWSRegistry(algorithms=[algorithm], strict_check_header=False)
    registry.max_header_length = 10_000
    return jwt.encode({n: v for n, v in head.items() if v is not None}, claims(**changes), key, registry=registry)


def bearer(text: str) -> bytes:
    return f"Authorization: Bearer {text}".encode()


def key_set(*keys: Any) -> bytes:
    return json.dumps({"keys": [key.as_dict(private=False) for key in keys]}).encode()


def unsigned(text: str) -> str:
    """The same claims under the algorithm none."""
    head = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    return f"{head}.{text.split('.')[1]}."


def signed_by_the_public_key() -> str:
    """What a library takes for good that lets the token choose the algorithm (RFC 8725 section 2.1)."""
    head, payload = (base64.urlsafe_b64encode(json.dumps(part).encode()) for part in ({"alg": "HS256"}, claims()))
    signed = b".".join(part.rstrip(b"=") for part in (head, payload))
    signature = hmac.digest(RSA.as_pem(private=False), signed, "sha256")
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def table(**fields: Any) -> dict[str, Any]:
    given = {"algorithms": ["RS256", "ES256", "EdDSA"], "issuer": ISSUER, "audience": AUDIENCE, **fields}
    return {"name": "users", "type": "jwt", **given}


@pytest.fixture(scope="module")
def balancer(scripted: WireBackend, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    path = tmp_path_factory.mktemp("keys") / "jwks.json"
    junk: list[Any] = [7, {"kty": "oct", "k": "c2VjcmV0", "kid": "RSA"}, {"kty": "new"}, {"kty": "RSA", "n": 1}]
    keys = json.loads(key_set(RSA, EC, ED))["keys"]
    path.write_text(json.dumps({"keys": [*junk, *keys]}), encoding="utf-8")
    with guarded(scripted, table(jwks_file=str(path), require={"scope": ["read"]})) as made:
        yield made


@pytest.mark.parametrize(
    "good",
    [
        lambda: token(),
        lambda: token(EC, "ES256"),
        lambda: token(ED, "Ed25519"),
        lambda: token(header={"kid": None}),
        lambda: token(header={"typ": "at+jwt"}),
        lambda: token(aud=["other", AUDIENCE], scope=["read"], nbf=int(time.time()) + 5, iat=int(time.time()) + 5),
        lambda: token(exp=int(time.time()) - 5),  # clocks differ
    ],
    ids=range(7),
)
def test_a_good_token_lets_in(balancer: Guarded, good: Callable[[], str]) -> None:
    balancer.backend.reset()
    made = bearer(good())
    assert [balancer.status(made) for _ in range(3)] == [200] * 3
    for request in balancer.backend.requests:
        assert (request.values(b"x-auth-subject"), request.values(b"authorization")) == ([b"ann"], [])


@pytest.mark.parametrize(
    "bad",
    [
        lambda: token(exp=int(time.time()) - 60),
        lambda: token(exp=None),
        lambda: token(exp="9999999999"),
        lambda: token(exp=True),
        lambda: token(nbf=int(time.time()) + 600),
        lambda: token(iss="https://other.example"),
        lambda: token(iss=None),
        lambda: token(aud="other"),
        lambda: token(aud=None),
        lambda: token(sub="ann\r\nX-Admin: 1"),
        lambda: token(sub=["ann"]),
        lambda: token(sub=""),
        lambda: token(OTHER),
        lambda: token(OTHER, header={"kid": "unknown"}),
        lambda: token(OTHER, header={"kid": None}),
        lambda: token(EC, "ES256", header={"kid": "RSA"}),
        lambda: token(RSA, "RS512"),
        lambda: token(header={"jwk": OTHER.as_dict(private=False)}),
        lambda: token(OTHER, header={"jwk": OTHER.as_dict(private=False)}),
        lambda: token(header={"jku": "http://127.0.0.1/keys"}),
        lambda: token(header={"typ": "logout+jwt"}),
        lambda: token(sub="x" * 8000),
        lambda: token()[:-6] + "AAAAAA",
        lambda: token() + ".x",
        lambda: unsigned(token()),
        lambda: signed_by_the_public_key(),
        lambda: "x" * 20_000,
        lambda: "a.b.c",
        lambda: "..",
        lambda: base64.urlsafe_b64encode(b"[" * 500).decode() + ".e30.AA",
        lambda: base64.urlsafe_b64encode(b'{"alg":["RS256"]}').decode() + ".e30.AA",
    ],
    ids=range(31),
)
def test_a_token_that_is_not_good_counts_for_nothing(balancer: Guarded, bad: Callable[[], str]) -> None:
    balancer.backend.reset()
    made = bad()
    for _ in range(2):
        status, answer, body = balancer.ask(bearer(made))
        assert (status, dict(answer)[b"www-authenticate"]) == (401, b'Bearer realm="users", error="invalid_token"')
        assert b"the token" not in body
    error = balancer.requests(1)[0]["error"]
    assert error and error.startswith("users: the token: ") and made not in error
    assert balancer.backend.seen == 0


def test_two_tokens_or_none(balancer: Guarded) -> None:
    assert balancer.status(bearer(token()), bearer(token())) == 401
    status, answer, _ = balancer.ask()
    assert (status, dict(answer)[b"www-authenticate"]) == (401, b'Bearer realm="users"')  # RFC 6750 section 3.1


def test_a_known_one_may_lack_what_is_required(balancer: Guarded) -> None:
    balancer.backend.reset()
    for scope in ("write", "reader", None, 7):
        status, answer, _ = balancer.ask(bearer(token(scope=scope)))
        assert (status, dict(answer)[b"content-type"]) == (403, b"application/problem+json")
        assert dict(answer)[b"www-authenticate"].endswith(b'error="insufficient_scope", scope="read"')
    record = balancer.requests(1)[0]
    assert (record["subject"], record["status"]) == ("ann", 403) and "scope" in str(record["error"])
    assert balancer.backend.seen == 0


def test_a_secret_and_the_token_goes_on_where_it_is_wanted(scripted: WireBackend, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n", encoding="utf-8")
    shared = jwk.OctKey.import_key(SECRET)
    good = token(shared, "HS256", header={"kid": None})
    with guarded(scripted, table(algorithms=["HS256"], secret_file=str(path), forward_token=True)) as made:
        assert made.status(bearer(good)) == 200 and made.status(bearer(token())) == 401
        assert made.backend.requests[0].values(b"authorization") == [f"Bearer {good}".encode()]


def test_a_verdict_is_kept_as_long_as_its_token_is_good(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, checked = Clock(time.time()), []
    monkeypatch.setattr(Jwt, "_look_at", lambda self, claims: checked.append(claims) or granted(claims["sub"]))
    checks = Jwt("users", JwtOptions(("RS256",), ISSUER, AUDIENCE, {}, False), jwks.read_keys(key_set(RSA)), clock)
    lines = [(b"host", b"test"), (b"authorization", f"Bearer {token()}".encode())]
    request = Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", "127.0.0.1", lines)
    for _ in range(3):
        assert isinstance(checks.check(request), Granted)
    clock.now += 600 + LEEWAY_SECONDS - 2
    assert isinstance(checks.check(request), Granted) and len(checked) == 1
    clock.now += 4
    assert isinstance(checks.check(request), Refused)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"secret_file": "short"}, "secret_file .*short: has 5 bytes, so it can be guessed"),
        ({"secret_file": "absent"}, "secret_file .*absent: No such file"),
        ({"jwks_file": "short", "algorithms": ["RS256"]}, "jwks_file .*short: no JSON Web Key Set"),
        ({"jwks_file": "empty", "algorithms": ["RS256"]}, "jwks_file .*empty: no key that can check signatures"),
    ],
)
def test_a_wrong_file_is_told_in_one_line(tmp_path: Path, fields: dict[str, Any], told: str) -> None:
    (tmp_path / "short").write_text("12345", encoding="utf-8")
    (tmp_path / "empty").write_text('{"keys": []}', encoding="utf-8")
    placed = {name: str(tmp_path / value) if isinstance(value, str) else value for name, value in fields.items()}
    with pytest.raises(SettingsError, match="^auth users: " + told):
        LoadBalancer(auth=[table(**{"algorithms": ["HS256"], **placed})])


# Keys from a URL.


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WireBackend]:
    """Has RSA, and is asked again soon if need be."""
    monkeypatch.setattr(jwks, "COOL_DOWN_SECONDS", 0.3)
    monkeypatch.setattr(jwks, "FETCH_SECONDS", 0.5)
    with WireBackend() as made:
        made.answer(ok(key_set(RSA)))
        yield made


def fetched(server: WireBackend) -> dict[str, Any]:
    return table(jwks_url=f"{server.url}/keys?x=1", algorithms=["RS256", "ES256"])


def kinds(balancer: Guarded) -> list[str]:
    return [event["kind"] for event in balancer.events() if event["kind"].startswith("keys")]


def test_keys_are_fetched_and_fetched_again_for_one_that_is_new(scripted: WireBackend, server: WireBackend) -> None:
    with guarded(scripted, fetched(server)) as made:
        wait_until(lambda: made.status(bearer(token())) == 200, "the keys are here")
        assert server.requests[0].target == b"/keys?x=1"
        assert made.status(bearer(token(EC, "ES256"))) == 401
        server.answer(ok(key_set(EC)))
        wait_until(lambda: made.status(bearer(token(EC, "ES256"))) == 200, "the new key is here")
        assert made.status(bearer(token())) == 401  # its key was taken back, and so is what was found of it
        assert kinds(made) == ["keys_found", "keys_found"]


def test_who_makes_up_names_of_keys_causes_no_more_fetches(scripted: WireBackend, server: WireBackend) -> None:
    jwks.COOL_DOWN_SECONDS = 60.0
    with guarded(scripted, fetched(server)) as made:
        wait_until(lambda: made.status(bearer(token())) == 200, "the keys are here")
        for number in range(20):
            assert made.status(bearer(token(OTHER, header={"kid": f"x{number}"}))) == 401
        assert len(server.requests) == 1


def hang(sock: socket.socket, request: RawRequest) -> None:
    sock.recv(1)


def trickle(sock: socket.socket, request: RawRequest) -> None:
    sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    pause = threading.Event()
    while not pause.wait(0.05):
        sock.sendall(b" ")  # until the other side has closed


FAULTS = {
    "error": b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n",
    "redirect": b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\nContent-Length: 0\r\n\r\n",
    "garbage": ok(b"<html>"),
    "no keys": ok(b'{"keys": []}'),
    "huge": ok(b" " * 1_100_000 + key_set(OTHER)),
    "hang": hang,
    "trickle": trickle,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_old_keys_are_used_while_there_are_no_others(
    scripted: WireBackend, server: WireBackend, fault: str
) -> None:
    with guarded(scripted, fetched(server)) as made:
        wait_until(lambda: made.status(bearer(token())) == 200, "the keys are here")
        told = FAULTS[fault]
        if isinstance(told, bytes):
            server.answer(told)
        else:
            server.script = told
        wait_until(
            lambda: made.status(bearer(token(EC, "ES256"))) == 401 and kinds(made)[-1] == "keys_kept", "it was asked"
        )
        assert made.status(bearer(token(jti=fault))) == 200
        server.answer(ok(key_set(EC)))
        wait_until(lambda: made.status(bearer(token(EC, "ES256"))) == 200, "it has answered again")


def test_without_any_key_nobody_is_let_in(scripted: WireBackend, server: WireBackend) -> None:
    server.close()
    with guarded(scripted, fetched(server)) as made:
        wait_until(lambda: kinds(made) == ["keys_kept"], "it was asked")
        status, answer, _ = made.ask(bearer(token()))
        assert (status, dict(answer)[b"retry-after"]) == (503, b"1")
        assert made.status() == 401 and made.backend.seen == 0
        assert made.requests(2)[1]["reason"] == "auth_unavailable"
    assert not [thread for thread in threading.enumerate() if thread.name == "jwks"]
