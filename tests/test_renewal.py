"""Other options for a listener that serves, its certificate among them: what clients notice of it, which is nothing."""

from __future__ import annotations

import http.client
import json
import re
import resource
import signal
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from socket import AF_UNIX, socket
from threading import Event

import pytest
from certificates import Files, make_pair
from support import (
    Balancer,
    Clock,
    RawRequest,
    Start,
    StartProcess,
    connect,
    exchange,
    fetch,
    fetch_json,
    get,
    read_all,
    split_response,
    wait_until,
)
from support import options as options_of
from wire import WireBackend, wait_closed

from balancer.edge import granian, renewal
from balancer.edge import port as ports
from balancer.edge.port import Port
from balancer.edge.renewal import Renewal
from balancer.edge.tls import DAY, TlsOptions
from balancer.errors import SettingsError


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(ports, "PARKED_SECONDS", 0.1)
    monkeypatch.setattr(renewal, "LOOK_SECONDS", 0.05)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def secure(files: Files, start: Start) -> Balancer:
    balancer = start(*files.flags, wait_ready=False)
    wait_until(lambda: balancer.library.control.is_serving(), "balancer is ready")
    return balancer


@pytest.fixture
def held(scripted: WireBackend) -> Iterator[Event]:
    """The second half of `/held` comes when this is set."""
    event = Event()

    def script(sock: socket, request: RawRequest) -> None:
        sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"a" * 100_000)
        if request.target == b"/held":
            event.wait()
        sock.sendall(b"b" * 100_000)

    scripted.script = script
    yield event
    event.set()


def trusting_all() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def name_at(port: int) -> str:
    """Of the certificate that a new connection is shown."""
    with connect(port) as sock, trusting_all().wrap_socket(sock) as shaken:
        found = re.search(rb"[a-z0-9]+\.test", shaken.getpeercert(True) or b"")
        assert found is not None
        return found.group().decode()


def port_of(balancer: Balancer) -> Port:
    assert balancer.library._server is not None
    return balancer.library._server.ports[0]


def generations(balancer: Balancer) -> int:
    """That accept no more and have not ended."""
    return len(port_of(balancer)._parked)


def news(balancer: Balancer) -> list[tuple[str, str]]:
    return [(event["kind"], event["message"]) for event in balancer.library.events() if "certificate" in event["kind"]]


# What is noticed, and when.


class Watched:
    """A Renewal without its thread, and what it told."""

    def __init__(self, files: Files, clock: Clock) -> None:
        self.told: list[str] = []
        self.renewed = 0
        self.files = files
        options = options_of(TlsOptions, **files.settings)
        self.renewal = Renewal(options, renew=self._renew, note=lambda kind, text: self.told.append(f"{kind}: {text}"))
        self.renewal._wall_clock = clock

    def _renew(self) -> None:
        self.renewed += 1

    def looks(self, count: int = 1) -> list[str]:
        """What these many looks told."""
        self.told.clear()
        for _ in range(count):
            self.renewal.look()
        return self.told


@pytest.fixture
def watched(files: Files) -> Watched:
    return Watched(files, Clock())


def test_a_pair_that_is_half_written_waits_for_the_other_half(watched: Watched) -> None:
    new = make_pair("new.test")
    watched.files.certificate.write_bytes(new.certificate)
    assert watched.looks() == []
    watched.files.key.write_bytes(new.key)
    assert watched.looks() == [] and watched.renewed == 0
    (text,) = watched.looks(3)
    assert text.startswith("certificate_changed: from lb.test") and "to new.test" in text and watched.renewed == 1


def test_a_pair_that_stays_bad_is_refused_once_and_forgotten_when_it_is_taken_back(watched: Watched) -> None:
    good = watched.files.key.read_bytes()
    watched.files.key.write_bytes(make_pair().key)
    (text,) = watched.looks(5)
    assert text.startswith("certificate_refused: tls_key ") and "is not the key of tls_certificate" in text
    assert watched.renewal.last_error in text and watched.renewed == 0
    watched.files.key.unlink()
    (text,) = watched.looks(5)
    assert "No such file" in text
    watched.files.key.write_bytes(good)
    assert watched.looks(2) == [] and watched.renewal.last_error is None


def test_the_end_is_told_fourteen_and_three_days_before_and_when_it_has_come(watched: Watched) -> None:
    clock = watched.renewal._wall_clock
    assert isinstance(clock, Clock) and watched.renewal.certificate is not None
    for days, said in (
        (15, ""),
        (13.9, "in less than 14 days"),
        (5, ""),
        (2, "in less than 3 days"),
        (0, "has expired"),
    ):
        clock.now = watched.renewal.certificate.expires_at - days * DAY
        told = watched.looks(3)
        assert len(told) == bool(said) and said in "".join(told)
    watched.files.write(make_pair(days=60))
    assert [text.partition(":")[0] for text in watched.looks(3)] == ["certificate_changed"]


def test_what_clients_refuse_replaces_nothing_that_they_take(watched: Watched) -> None:
    clock, options = watched.renewal._wall_clock, watched.renewal._options
    assert isinstance(clock, Clock)
    clock.now = time.time()
    watched.files.write(make_pair(days=-1))
    (text,) = watched.looks(5)
    assert text.startswith("certificate_refused: tls_certificate ") and ": has expired: lb.test" in text
    with pytest.raises(SettingsError, match="has expired"):
        watched.renewal.check(options)
    watched.files.write(make_pair(days=100))  # from the tenth day on
    (text,) = watched.looks(5)
    assert ": is not valid before " in text and watched.renewed == 0
    clock.now += 11 * DAY
    (text,) = watched.looks(5)
    assert text.startswith("certificate_changed") and watched.renewed == 1
    clock.now += 100 * DAY
    watched.files.write(make_pair(days=-1))
    assert any(text.startswith("certificate_changed") for text in watched.looks(3)), "neither is valid"


def test_a_renewal_that_waits_is_told(files: Files, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "RENEW_SECONDS", 600.0)
    balancer = start(*files.flags, wait_ready=False)
    port, told = port_of(balancer), balancer.library.control.tls
    before = told()
    assert before is not None and not before["pending"]
    files.write(make_pair("new.test", days=60))
    wait_until(lambda: told() != before, "it is in force")
    assert told() == {**before, "pending": True} and name_at(balancer.port) == "lb.test"
    port._next_renewal = 0.0
    port.renew(*port.wanted)
    wait_until(lambda: told() != {**before, "pending": True}, "it is shown")
    after = told()
    assert after is not None and after["names"][0] == name_at(balancer.port) == "new.test" and not after["pending"]


def test_files_behind_a_link_that_is_switched(tmp_path: Path, start: Start) -> None:
    """So Kubernetes and certbot do it."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        Files(tmp_path / name, make_pair(f"{name}.test"))
    (tmp_path / "current").symlink_to("old")
    flags = [f"--tls-certificate={tmp_path}/current/cert.pem", f"--tls-key={tmp_path}/current/key.pem"]
    balancer = start(*flags, wait_ready=False)
    assert name_at(balancer.port) == "old.test"
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").replace(tmp_path / "current")
    wait_until(lambda: name_at(balancer.port) == "new.test", "the new one is shown")
    assert [kind for kind, _ in news(balancer)] == ["certificate_changed"]


# By whoever reloads.


def test_a_reload_without_a_file_reads_the_certificate_at_once(
    files: Files, secure: Balancer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(files.certificate))
    files.write(make_pair("new.test", is_ca=True))
    wait_until(lambda: name_at(secure.port) == "new.test")
    assert fetch_json(f"{secure.url}/reload", {})["changes"] == []
    files.key.write_bytes(make_pair().key)
    status, _, body = fetch(f"{secure.url}/reload", {})
    assert status == 422 and "is not the key of tls_certificate" in json.loads(body)["error"]
    assert fetch(f"{secure.url}/readyz")[0] == 200
    tls = secure.status()["tls"]
    assert tls["names"] == ["new.test", "127.0.0.1"]
    assert tls["last_error"] == "tls_key 'key.pem': is not the key of tls_certificate", "a folder"
    kinds = [kind for kind, _ in news(secure)]
    assert kinds[0] == "certificate_changed" and set(kinds[1:]) == {"certificate_refused"}


def test_hangup_reads_the_certificate(files: Files, start_process: StartProcess) -> None:
    balancer = start_process(*files.flags, wait_ready=False)
    files.write(make_pair("new.test"))
    balancer.send(signal.SIGHUP)
    wait_until(lambda: name_at(balancer.port) == "new.test" and "configuration reloaded" in balancer.output)


def test_what_a_listener_begins_with_is_reloaded(tmp_path: Path, scripted: WireBackend, files: Files) -> None:
    scripted.reset()
    file = tmp_path / "balancer.toml"

    def configure(**settings: object) -> None:
        lines = [f"{name} = {json.dumps(value, default=str)}" for name, value in settings.items()]
        file.write_text("\n".join([*lines, f'backends = ["{scripted.url}"]']), encoding="utf-8")

    configure(max_header_bytes=8192, header_timeout=600, max_clients=1)
    with Balancer(f"--config={file}") as balancer:
        head = get(b"/", *(b"X-%d: %s" % (number, b"v" * 1000) for number in range(20)))
        assert split_response(exchange(balancer.port, head))[0] == 431
        with connect(balancer.port) as silent, connect(balancer.port) as second:  # the first takes the only place
            second.sendall(head)
            configure(max_header_bytes=65536, header_timeout=1)
            changes = balancer.library.reload().changes
            assert {change.what for change in changes} == {"max_header_bytes", "header_timeout", "max_clients"}
            assert split_response(read_all(second))[0] == 200
        with connect(balancer.port) as silent:
            assert wait_closed(silent, 60)
        configure(**files.settings)
        balancer.library.reload()
        wait_until(lambda: balancer.library.url.startswith("https"))
        wait_until(lambda: is_secure(balancer.port), "clients speak TLS")
        configure()
        balancer.library.reload()
        wait_until(lambda: exchange(balancer.port, get(b"/livez")).startswith(b"HTTP/1.1 200"), "and no more")


def is_secure(port: int) -> bool:
    try:
        return name_at(port) == "lb.test"
    except OSError:
        return False


# Nobody is lost.


def test_no_request_is_lost(files: Files, secure: Balancer, monkeypatch: pytest.MonkeyPatch) -> None:
    """New connections, kept ones and HTTP/2, while the certificate is renewed again and again."""
    monkeypatch.setattr(ports, "PARKED_SECONDS", 3.0)
    stop = Event()
    done: list[int] = []

    def keep_asking(is_kept: bool) -> None:
        client = http.client.HTTPSConnection("127.0.0.1", secure.port, timeout=60, context=trusting_all())
        while not stop.is_set():
            client.request("GET", "/", headers={} if is_kept else {"Connection": "close"})
            done.append(client.getresponse().read() == b"ok")
        client.close()

    def ask_with_curl() -> None:
        command = ["curl", "-sSk", "--http2", "-Z", "--parallel-max", "10", f"{secure.url}/[1-500]", "-o", "/dev/null"]
        while not stop.is_set():
            output = subprocess.run([*command, "-w", "%{http_version}%{http_code} "], capture_output=True).stdout
            assert output.count(b"2200 ") == 500, output

    with ExitStack() as stack:
        failed: list[BaseException] = []
        for step in (lambda: keep_asking(True), lambda: keep_asking(False), ask_with_curl):
            stack.enter_context(background(step, failed))
        stack.callback(stop.set)
        for number in range(1, 7):
            files.write(make_pair(f"n{number}.test"))
            wait_until(lambda name=f"n{number}.test": name_at(secure.port) == name)
        wait_until(lambda: generations(secure) == 0, "the old ones have ended")
    assert failed == [] and len(done) > 50


class background:
    """A thread that is joined at the end of the block; what went wrong in it is in `failed`."""

    def __init__(self, step: Callable[[], None], failed: list[BaseException]) -> None:
        self._step, self._failed = step, failed
        self._thread = threading.Thread(target=self._run, name="client")

    def _run(self) -> None:
        try:
            self._step()
        except BaseException as error:
            self._failed.append(error)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join()


def begun(stack: ExitStack, balancer: Balancer) -> socket.socket:
    """A download that has begun, and is held."""
    sock = stack.enter_context(connect(balancer.port))
    sock.sendall(get(b"/held"))
    wait_until(lambda: sock.recv(1), "it has begun")
    return sock


def test_generations_end_with_what_they_serve_and_are_no_more_than_a_few(
    start: Start, held: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "MOST_PARKED", 3)
    balancer = start()
    port = port_of(balancer)
    options, certificate = port.wanted
    with ExitStack() as stack:
        downloads = []
        for number in range(ports.MOST_PARKED + 2):
            downloads.append(begun(stack, balancer))
            port.renew(replace(options, max_header_bytes=10_000 + number), certificate)
            wait_until(lambda count=number + 1: generations(balancer) == min(count, ports.MOST_PARKED))
        assert port._worker is not None and port._worker.made_of[0].max_header_bytes == 10_002
        assert fetch(f"{balancer.url}/livez")[0] == 200
        held.set()
        assert [len(split_response(b"H" + read_all(sock))[2]) for sock in downloads] == [200_000] * len(downloads)
        wait_until(lambda: generations(balancer) == 0 and port._worker.made_of == port.wanted, "the last one is used")


def test_what_never_ends_keeps_no_renewal_waiting_for_ever(
    start: Start, held: Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "MOST_PARKED", 1)
    monkeypatch.setattr(ports, "LONGEST_PARKED", 0.3)
    monkeypatch.setattr(ports, "PARKED_SECONDS", 0.0)
    balancer = start()
    port = port_of(balancer)
    options, _ = port.wanted
    with ExitStack() as stack:
        downloads = []
        for number in range(2):
            downloads.append(begun(stack, balancer))
            port.renew(replace(options, max_clients=100 + number), None)
            wait_until(lambda: port._worker is not None and port._worker.made_of == port.wanted)
        endless, newer = downloads
        assert len(split_response(b"H" + read_all(endless))[2]) < 200_000
        held.set()
        assert len(split_response(b"H" + read_all(newer))[2]) == 200_000


@pytest.mark.parametrize("is_given_up", [False, True])
def test_the_end_while_an_old_generation_is_at_work(
    start: Start, held: Event, is_given_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "PARKED_SECONDS", 60.0)  # nothing idle ends
    balancer = start()
    port = port_of(balancer)
    with connect(balancer.port) as sock, connect(balancer.port) as kept:
        sock.sendall(get(b"/held"))
        wait_until(lambda: sock.recv(1), "it has begun")
        kept.sendall(b"GET /livez HTTP/1.1\r\nHost: test\r\n\r\n")
        assert kept.recv(65536)
        port.renew(replace(port.wanted[0], max_clients=7), None)
        wait_until(lambda: generations(balancer) == 1)
        kept.sendall(b"GET /livez HTTP/1.1\r\nHost: test\r\n\r\n")
        assert b"connection: close" in read_all(kept), "it is asked to come anew"
        stopping = threading.Thread(target=balancer.library.stop, args=(0 if is_given_up else 60,), name="stopping")
        stopping.start()
        wait_until(lambda: balancer.library.control.lifecycle == "draining")
        port.renew(replace(port.wanted[0], max_clients=8), None)
        if not is_given_up:
            held.set()
        received = b"H" + read_all(sock)
        stopping.join()
    assert (len(split_response(received)[2]) == 200_000) is not is_given_up


def test_level_after_many_renewals(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads and descriptors; a renewal for which the machine has no room is made up for."""
    real, refusals = granian._ensure_room, [OSError("no descriptor"), RuntimeError("no thread")]

    def ensure_room(listener: socket) -> None:
        if refusals:
            raise refusals.pop()
        real(listener)

    balancer = start()
    monkeypatch.setattr(granian, "_ensure_room", ensure_room)
    port = port_of(balancer)
    options, _ = port.wanted
    before = threading.active_count(), native_threads(), descriptors()
    for number in range(12):
        port.renew(replace(options, max_clients=1000 + number), None)
        wait_until(lambda wanted=port.wanted: port._worker is not None and port._worker.made_of == wanted)
        assert fetch(f"{balancer.url}/livez")[0] == 200
    assert refusals == []
    wait_until(lambda: generations(balancer) == 0)
    wait_until(lambda: (threading.active_count(), native_threads()) <= before[:2] and descriptors() <= before[2] + 2)


def test_connections_without_a_handshake_do_not_use_up_the_descriptors_for_ever(
    files: Files, start_process: StartProcess
) -> None:
    """Granian's handshakes have their time limit only while it can accept."""
    balancer = start_process(*files.flags, wait_ready=False)
    resource.prlimit(balancer.pid, resource.RLIMIT_NOFILE, (150, 150))
    with ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(connect(balancer.port))
        wait_until(lambda: "no descriptor is left" in balancer.output)
    assert name_at(balancer.port) == "lb.test"


def test_a_unix_socket_is_renewed_too(tmp_path: Path) -> None:
    path = tmp_path / "lb.sock"
    with Balancer(f"--host=unix:{path}", "--backend=http://127.0.0.1:1", wait_ready=False) as balancer:
        port = port_of(balancer)
        for number in range(3):
            port.renew(replace(port.wanted[0], max_clients=100 + number), None)
            wait_until(lambda: port._worker is not None and port._worker.made_of == port.wanted)
            with socket(AF_UNIX) as client:
                client.settimeout(60)
                client.connect(str(path))
                client.sendall(get(b"/livez"))
                assert read_all(client).startswith(b"HTTP/1.1 200")
        wait_until(lambda: generations(balancer) == 0)


def native_threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))
