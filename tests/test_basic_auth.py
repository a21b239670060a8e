"""Names and passwords: checked rarely, never more than a few at once, and not for whoever guesses."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import bcrypt
import pytest
from guarded import Guarded, guarded
from support import wait_until
from wire import WireBackend

from balancer import LoadBalancer
from balancer.errors import SettingsError
from balancer.filters import basic
from balancer.protocol.guesses import GUESSES

PASSWORD = "pässwörd:with-colon"


def sent(user: str, password: str) -> bytes:
    return b"Authorization: Basic " + b64encode(f"{user}:{password}".encode())


def users(folder: Path, **passwords: str) -> dict[str, Any]:
    hashed = [f"{name}:{bcrypt.hashpw(text.encode(), bcrypt.gensalt(4)).decode()}" for name, text in passwords.items()]
    (folder / "users").write_text("# a comment\n\n" + "\n".join(hashed) + "\n", encoding="utf-8")
    return {"name": "staff", "type": "basic", "users_file": str(folder / "users")}


class Counted:
    """How often a password was really checked, and how many at once; while `open` is not set they take their time."""

    def __init__(self) -> None:
        self.calls = self.most = self.now = 0
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()
        self._check = bcrypt.checkpw

    def __call__(self, password: bytes, hashed: bytes) -> bool:
        with self._lock:
            self.calls, self.now = self.calls + 1, self.now + 1
            self.most = max(self.most, self.now)
        self.open.wait()
        try:
            return self._check(password, hashed)
        finally:
            with self._lock:
                self.now -= 1


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(basic.bcrypt, "checkpw", counted)
    return counted


@pytest.fixture
def balancer(scripted: WireBackend, tmp_path: Path, checks: Counted) -> Iterator[Guarded]:
    table = users(tmp_path, ann=PASSWORD, bob="b")
    with guarded(scripted, table, trusted_proxies="127.0.0.1", admin_token="a-token-of-this-test") as made:
        yield made


def test_a_password_is_checked_once_and_not_passed_on(balancer: Guarded, checks: Counted) -> None:
    for _ in range(3):
        assert balancer.status(sent("ann", PASSWORD)) == 200
    assert checks.calls == 1
    assert [request.values(b"x-auth-subject") for request in balancer.backend.requests] == [[b"ann"]] * 3
    assert not any(request.values(b"authorization") for request in balancer.backend.requests)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [sent("ann", "wrong")],
        [sent("ann", "")],
        [sent("nobody", PASSWORD)],
        [sent("ann", PASSWORD), sent("ann", PASSWORD)],
        [sent("ann", PASSWORD) + b"="],
        [sent("ann", "x" * 73)],
        [sent("ann", "x" * 5000)],
        [b"Authorization: Basic " + b64encode(b"ann")],
        [b"Authorization: Bearer " + b64encode(f"ann:{PASSWORD}".encode())],
    ],
    ids=range(10),
)
def test_whoever_has_no_right_password_gets_no_further(balancer: Guarded, lines: list[bytes]) -> None:
    status, answer, _ = balancer.ask(*lines)
    assert (status, dict(answer)[b"www-authenticate"]) == (401, b'Basic realm="staff", charset="UTF-8"')
    assert balancer.backend.seen == 0
    error = balancer.requests(1)[0]["error"]
    assert error and "wrong" not in error.replace("is wrong", "") and PASSWORD not in error


def test_an_unknown_name_takes_as_long_as_a_known_one(balancer: Guarded, checks: Counted) -> None:
    balancer.ask(sent("nobody", "x"))
    assert checks.calls == 1


def test_whoever_guesses_has_to_wait_and_nobody_else(balancer: Guarded, checks: Counted) -> None:
    guesser, other = b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-For: 192.0.2.2"
    for _ in range(3):  # the same wrong one is no further guess
        assert balancer.status(guesser, sent("ann", "0")) == 401
    for number in range(1, GUESSES):
        assert balancer.status(guesser, sent("ann", str(number))) == 401
    status, answer, _ = balancer.ask(guesser, sent("ann", PASSWORD))  # or each answer would still tell
    assert (status, dict(answer)[b"content-type"]) == (429, b"application/problem+json")
    assert 1 <= int(dict(answer)[b"retry-after"]) <= 60
    assert checks.calls == GUESSES and balancer.backend.seen == 0
    assert balancer.status(other, sent("ann", PASSWORD)) == 200


def test_many_at_once_are_one_check_or_a_few(balancer: Guarded, checks: Counted) -> None:
    """Of one password one, of many no more than a few at the same time."""
    checks.open.clear()
    with ThreadPoolExecutor(12) as pool:
        same = [pool.submit(balancer.status, sent("ann", PASSWORD)) for _ in range(6)]
        others = [
            pool.submit(balancer.status, b"X-Forwarded-For: 192.0.2.%d" % number, sent("bob", str(number)))
            for number in range(6)
        ]
        wait_until(lambda: checks.now == basic.CHECKS_AT_ONCE, "checks are under way")
        checks.open.set()
        assert [each.result() for each in same] == [200] * 6 and [each.result() for each in others] == [401] * 6
    assert (checks.calls, checks.most) == (7, basic.CHECKS_AT_ONCE)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "no users"),
        ("ann:plain-password\n", "line 1: expected NAME:HASH"),
        (f"ann:$2b$31${'x' * 53}\n", "line 1: expected NAME:HASH"),
        (f"ann:$2b$04${'x' * 53}\nann:$2b$04${'y' * 53}\n", "line 2: a name stands there twice"),
        (None, "No such file"),
    ],
)
def test_a_wrong_file_is_told_in_one_line_without_what_is_in_it(tmp_path: Path, content: str | None, told: str) -> None:
    path = tmp_path / "users"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match="^auth staff: users_file .*" + told) as failed:
        LoadBalancer(auth=[{"name": "staff", "type": "basic", "users_file": str(path)}])
    assert "plain-password" not in str(failed.value) and "xxx" not in str(failed.value)
