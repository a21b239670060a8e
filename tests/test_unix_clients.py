"""Clients that come through a Unix socket: its file, what is told of them, how those end that hold on to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support import (
    PYTHON,
    ROOT,
    Balancer,
    Clock,
    Process,
    Start,
    fetch,
    free_port,
    get,
    nginx_before,
    ok,
    read_all,
    wait_until,
)
from wire import HEAD_OK, WireBackend, wait_closed

from balancer.control.neighbours import is_private
from balancer.edge import accepted, unixsocket
from balancer.errors import SettingsError
from balancer.loadbalancer import LoadBalancer

TOKEN = "the-token-of-a-test"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lb.sock"


@pytest.fixture
def start_at(path: Path, scripted: WireBackend) -> Iterator[Start]:
    scripted.reset()
    started: list[Balancer] = []

    def begin(*flags: str, **options: Any) -> Balancer:
        arguments = (f"--host=unix:{path}", f"--backend=only={scripted.url}", *flags)
        started.append(Balancer(*arguments, wait_ready=False, **options))
        wait_until(lambda: curl(path, "/readyz")[0] == 200, "it is ready")
        return started[-1]

    yield begin
    for balancer in started:
        balancer.stop()


def curl(path: Path, target: str, *flags: str) -> tuple[int, str]:
    """(status, body)."""
    command = ["curl", "-s", "-m", "60", "-w", "\n%{http_code}", "--unix-socket", str(path), *flags]
    body, _, status = subprocess.check_output([*command, f"http://localhost{target}"], text=True).rpartition("\n")
    return int(status), body


def connect_to(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(60)
    client.connect(str(path))
    return client


def is_shut(end: socket.socket) -> bool:
    try:
        return end.recv(1) == b""
    except BlockingIOError:
        return False


def lines_of(backend: WireBackend) -> dict[bytes, bytes]:
    return dict(backend.requests[-1].lines)


def test_all_is_answered_there_and_the_file_goes_in_the_end(start_at: Start, path: Path, scripted: WireBackend) -> None:
    balancer = start_at()
    assert balancer.url == f"http+unix://{path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert curl(path, "/a", "-d", "body") == (200, "ok")
    assert (scripted.requests[-1].body, lines_of(scripted)[b"x-forwarded-for"]) == (b"body", b"unknown")
    assert json.loads(curl(path, "/status")[1])["statistics"]["total_requests"] == 1
    change = ("-X", "PATCH", "-H", "Content-Type: application/json", "-d", '{"weight": 3}')
    assert curl(path, "/backends/only", *change)[0] == 200
    assert curl(path, "/metrics")[0] == 200
    balancer.stop()
    assert not path.exists()


def test_others_who_may_connect_need_a_token_to_write(start_at: Start, path: Path) -> None:
    start_at("--unix-socket-mode=0660", env={"LB_PAGE_TOKEN": TOKEN})
    write = ("-X", "POST")
    assert curl(path, "/status")[0] == 200  # whoever may connect
    assert curl(path, "/reset", *write)[0] == 401
    assert curl(path, "/reset", *write, "-H", f"Authorization: Bearer {TOKEN}")[0] == 200
    path.chmod(0o600)
    assert curl(path, "/reset", *write)[0] == 200
    assert not is_private(str(path) + ".missing")


@pytest.mark.parametrize("trusts", [False, True])
def test_a_proxy_there_is_believed_if_unix_is_trusted(
    start_at: Start, path: Path, scripted: WireBackend, trusts: bool
) -> None:
    start_at(*(["--trusted-proxies=unix,10.0.0.0/8"] if trusts else []))
    claims = ("-H", "X-Forwarded-For: 192.0.2.1", "-H", "Forwarded: for=192.0.2.1", "-H", "X-Real-IP: 192.0.2.1")
    assert curl(path, "/", *claims)[0] == 200
    got = lines_of(scripted)
    assert got[b"x-forwarded-for"] == (b"192.0.2.1" if trusts else b"unknown")
    forwarded = b'for=192.0.2.1, for=unknown;host="localhost";proto=http'
    assert got.get(b"forwarded") == (forwarded if trusts else None)
    assert (b"x-real-ip" in got) is trusts
    assert curl(path, "/status")[0] == (403 if trusts else 200)  # through a proxy it could be anybody


def test_nginx_in_front_of_it_names_its_clients(
    start_at: Start, path: Path, scripted: WireBackend, tmp_path: Path
) -> None:
    balancer = start_at("--trusted-proxies=unix")
    balancer.url = f"http://unix:{path}:"
    forwarded = "proxy_set_header X-Forwarded-For $remote_addr;"
    with nginx_before(tmp_path, balancer, forwarded, main="user root;") as url:  # or its workers may not connect
        assert subprocess.check_output(["curl", "-s", url], text=True) == "ok"
    assert lines_of(scripted)[b"x-forwarded-for"] == b"127.0.0.1"


def test_what_a_dead_process_left_is_replaced_and_a_live_one_is_not(path: Path) -> None:
    with Process([PYTHON, str(ROOT / "load_balancer.py"), f"--host=unix:{path}"]) as first:
        wait_until(path.is_socket, "it listens")
        with pytest.raises(SettingsError, match=r"lb\.sock is in use; stop what uses it or choose another path$"):
            LoadBalancer(host=f"unix:{path}").listen()
        first.send(signal.SIGKILL)
        first.wait()
        assert path.is_socket()
    with LoadBalancer(host=f"unix:{path}"):
        assert curl(path, "/health")[0] == 200
    assert not path.exists()


def test_a_successor_may_have_the_path_while_its_predecessor_ends(path: Path) -> None:
    first = LoadBalancer(host=f"unix:{path}")
    with first:
        path.unlink()
        with LoadBalancer(host=f"unix:{path}"):
            first.stop()
            assert path.is_socket()


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("missing/lb.sock", {}, "lb.sock: No such file or directory"),
        ("file", {}, "what is there is no socket; choose another path"),
        ("a" * 110, {}, "bytes, a Unix socket's has at most 107"),
        ("lb.sock", {"unix_socket_owner": "no-such-user"}, "no such user: 'no-such-user'; expected USER:GROUP"),
        ("lb.sock", {"unix_socket_owner": ":no-such-group"}, "no such group: 'no-such-group'; expected USER:GROUP"),
        ("lb.sock", {"unix_socket_owner": "a:b:c"}, "expected USER, USER:GROUP or :GROUP"),
        ("lb.sock", {"unix_socket_mode": "rw"}, 'expected octal digits as text, such as "0660"'),
        ("lb.sock", {"unix_socket_mode": 0o660}, 'expected octal digits as text, such as "0660"'),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tmp_path: Path, name: str, settings: dict[str, Any], said: str) -> None:
    (tmp_path / "file").write_text("kept", encoding="ascii")
    with pytest.raises(SettingsError, match="^[^\n]*$") as caught:
        LoadBalancer(host=f"unix:{tmp_path / name}", **settings).listen()
    assert said in str(caught.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file"]


def test_a_relative_path_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"host = 'unix:lb.sock' \(program\): expected unix:/PATH"):
        LoadBalancer(host="unix:lb.sock")


def test_its_owner_and_mode_are_what_the_settings_say(path: Path) -> None:
    with LoadBalancer(host=f"unix:{path}", unix_socket_mode="0660", unix_socket_owner=f"{os.getuid()}:{os.getgid()}"):
        found = path.stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (0o660, os.getuid(), os.getgid())


def test_beside_it_the_control_port_is_on_loopback(path: Path) -> None:
    port = free_port()
    with LoadBalancer(host=f"unix:{path}", port=port, control_port=port) as balancer:
        assert balancer.urls == [f"http+unix://{path}", f"http://127.0.0.1:{port}"]
        assert fetch(f"{balancer.urls[1]}/reset", method="POST")[0] == 200


@pytest.mark.parametrize("data", [b"", b"GET / HT", b"PRI * HT"])
def test_who_says_nothing_is_gone_after_header_timeout(start_at: Start, path: Path, data: bytes) -> None:
    start_at("--header-timeout=0.5")
    with connect_to(path) as client:
        client.sendall(data)
        assert wait_closed(client, 60)


def test_who_reads_nothing_is_gone_and_who_reads_slowly_is_not(path: Path) -> None:
    clock = Clock()
    with unixsocket.listen(str(path), "0600", None, 5) as listener, connect_to(path) as slow, connect_to(path):
        ends = [listener.accept()[0], listener.accept()[0]]
        for end in ends:
            end.setblocking(False)
        unread = unixsocket.Unread(str(path), clock)
        for _ in range(10):
            for end in ends:
                with suppress(OSError):  # full, or shut down
                    while True:
                        end.send(b"x" * 4096)
            list(unread.close(75))
            clock.now += 10
            slow.recv(65536)
            list(unread.close(75))
            slow.recv(65536)
        assert [is_shut(end) for end in ends] == [False, True]
        for end in ends:
            end.close()


def test_a_download_that_is_not_read_ends_for_its_backend_at_once(
    start_at: Start, path: Path, scripted: WireBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "IDLE_SECONDS", 0.1)
    balancer = start_at("--idle-timeout=1", "--header-timeout=0.5")
    scripted.answer(HEAD_OK + b"Content-Length: 9000000\r\n\r\n" + bytes(9_000_000))
    with connect_to(path) as client:
        client.sendall(get())
        wait_until(lambda: balancer.library.requests(1), "it is recorded")
        assert balancer.library.requests(1)[0]["reason"] == "client_too_slow"
        received = client.recv(1000)
        assert received.startswith(b"HTTP/1.1 200") and len(read_all(client)) < 9_000_000


def test_an_answer_before_the_end_of_its_request_ends_the_connection(start_at: Start, path: Path) -> None:
    start_at("--max-request-body=10")
    with connect_to(path) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000\r\n\r\n" + bytes(100_000))
        assert read_all(client).startswith(b"HTTP/1.1 413 ")


def test_a_stop_cuts_off_what_does_not_finish(start_at: Start, path: Path, scripted: WireBackend) -> None:
    balancer = start_at()
    scripted.script = lambda sock, request: wait_closed(sock, 60) and None or sock.sendall(ok())
    with connect_to(path) as client:
        client.sendall(get())
        wait_until(lambda: scripted.seen, "it has come")
        balancer.stop()
        assert read_all(client) == b""
