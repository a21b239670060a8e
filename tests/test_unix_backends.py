"""Backends on Unix sockets: how they are named, what they get, how what is wrong with one is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import Balancer, fetch, fetch_json, nginx, wait_until
from wire import WireBackend

from balancer.config.values import BackendSettings
from balancer.errors import ConnectFailed, ConnectTimedOut, SettingsError
from balancer.protocol.origin import Origin
from balancer.upstream.dialer import Dialer


@pytest.fixture
def at(tmp_path: Path) -> Iterator[WireBackend]:
    with WireBackend(tmp_path / "odd @1 %.sock") as backend:
        yield backend


@pytest.mark.parametrize(
    ("url", "path", "shown"),
    [
        ("http+unix:///run/app.sock", "/run/app.sock", "http+unix:///run/app.sock"),
        ("http+unix://%2Frun%2fapp.sock/", "/run/app.sock", "http+unix:///run/app.sock"),
        ("http+unix:///run/a%20b%3F@1%25", "/run/a b?@1%", "http+unix:///run/a%20b%3F%401%25"),
        ("http+unix:///run/\u00e4", "/run/\u00e4", "http+unix:///run/%C3%A4"),
    ],
)
def test_a_path_is_read_in_both_spellings_and_told_in_one(url: str, path: str, shown: str) -> None:
    origin = Origin.parse(url)
    assert (origin.host, origin.url, origin.authority) == (path, shown, "localhost")
    assert Origin.parse(origin.url) == origin


def test_the_short_form_tells_a_weight_from_a_path() -> None:
    fields = {"id": "a", "url": "http+unix:///run/app@2.sock", "weight": 3}
    assert BackendSettings.parse("a=http+unix:///run/app@2.sock@3") == fields


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http+unix://run/app.sock", "expected http+unix:///PATH"),
        ("http+unix://", "expected http+unix:///PATH"),
        ("http+unix:///", "expected http+unix:///PATH"),
        ("http+unix:///a?b", "where % ? # are %25 %3F %23"),
        ("http+unix://%2Fa/b", "expected http+unix:///PATH"),
        ("http+unix:///a\ud800", "expected http+unix:///PATH"),
        ("http+unix:///a%00b", "zero bytes"),
        ("http+unix:///" + "a" * 107, "the path has 108 bytes, a Unix socket's has at most 107"),
        ("https+unix:///a", "or http+unix:///PATH"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_what_is_no_path_of_a_socket_is_refused_in_one_line(url: str, said: str) -> None:
    with pytest.raises(SettingsError, match="^[^\n]*$") as caught:
        Origin.parse(url)
    assert said in str(caught.value)


def test_requests_go_on_as_they_are_and_connections_are_kept(at: WireBackend) -> None:
    with WireBackend() as other, Balancer(f"--backend=other={other.url}@0") as balancer:
        url = Origin("http+unix", str(at.path), 0).url
        assert fetch(f"{balancer.url}/backends", {"id": "app", "url": url})[0] == 201
        balancer.wait_healthy("app")
        for body in (None, b"small", b"x" * 300_000):
            assert fetch(f"{balancer.url}/a?b", body, Host="client.example")[0] == 200
        assert [request.body for request in at.requests] == [b"", b"small", b"x" * 300_000]
        assert {dict(request.lines)[b"host"] for request in at.requests} == {b"client.example"}
        assert len(at.used) == 1
        assert balancer.backend("app")["url"] == url
        at.close()
        wait_until(lambda: not balancer.backend("app")["healthy"], "it is down")
        assert "Connection refused" in balancer.backend("app")["health"]["reason"]


def test_nginx_answers_requests_and_checks_with_their_hosts(tmp_path: Path) -> None:
    path = tmp_path / "nginx.sock"
    server = f'listen unix:{path}; location / {{ return 200 "$host $http_x_forwarded_for"; }}'
    with nginx(tmp_path, server), Balancer(f"--backend=http+unix://{path}") as balancer:
        wait_until(lambda: fetch(f"{balancer.url}/")[0] == 200, "nginx answers")
        assert fetch(f"{balancer.url}/", Host="client.example")[2] == b"client.example 127.0.0.1"
        assert fetch_json(f"{balancer.url}/status")["backend_servers"][0]["health"]["last_check"]["status"] == 200


def test_what_is_wrong_with_a_socket_is_told(tmp_path: Path) -> None:
    def dial(name: str, seconds: float = 5.0) -> None:
        Dialer().dial(Origin("http+unix", str(tmp_path / name), 0), seconds).close()

    with pytest.raises(ConnectFailed, match=r"missing: No such file or directory$") as caught:
        dial("missing")
    assert caught.value.refused
    (tmp_path / "file").write_text("", encoding="ascii")
    with pytest.raises(ConnectFailed, match=r"file: Connection refused$"):
        dial("file")
    (tmp_path / "file").unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "file"))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(tmp_path / "file"))
            with pytest.raises(ConnectTimedOut, match=r"did not accept within 0\.05 s"):
                dial("file", 0.05)
