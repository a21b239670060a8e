"""One line for each request, true, and safe to look at; logging holds nobody up."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import (
    PYTHON,
    ROOT,
    BalancerProcess,
    RawRequest,
    exchange,
    fetch,
    fetch_json,
    free_port,
    get,
    is_good,
    make_attempt,
    make_record,
    ok,
    options,
    wait_until,
)
from wire import WireBackend

from balancer.observe.accesslog import AGENT_LOGGED, AccessLog, LogOptions, timestamp
from balancer.observe.logwriter import LogWriter
from balancer.observe.record import METHOD_KEPT, PATH_KEPT, Record
from balancer.protocol.request import Request
from balancer.protocol.requestheads import RequestHeads

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
TEXT = re.compile(r'(?P<time>\S+) (?P<client>\S+) (?P<request>"(?:[^"\\]|\\.)*") (?P<status>\d{3}) (?P<rest>.*)')


def json_lines(process: BalancerProcess) -> list[dict[str, Any]]:
    """Of requests."""
    return [told for line in process.lines if line.startswith("{") and "request_id" in (told := json.loads(line))]


@pytest.fixture(scope="module")
def logging(scripted: WireBackend) -> Iterator[BalancerProcess]:
    flags = ("--access-log", "--access-log-format=json", "--trusted-proxies=127.0.0.0/8", "--control-reads=open")
    with BalancerProcess(f"--backend=only={scripted.url}", "--expose-backend", *flags) as balancer:
        yield balancer


def line_of(logging: BalancerProcess, path: str) -> dict[str, Any]:
    found = wait_until(lambda: [line for line in json_lines(logging) if line["path"] == path], what=path)
    assert len(found) == 1
    line: dict[str, Any] = found[0]
    return line


# What a line tells.


def test_a_line_tells_what_the_status_tells(logging: BalancerProcess) -> None:
    status, headers, body = fetch(
        f"{logging.url}/api/process/told?secret=1", b"x" * 500, User_Agent="test/1", Traceparent=TRACEPARENT
    )
    line = line_of(logging, "/api/process/told")
    recent = next(r for r in logging.status()["recent_requests"] if r["request_id"] == line["request_id"])
    assert line["request_id"] == headers["x-request-id"] == recent["request_id"]
    assert line["trace_id"] == recent["trace_id"] == TRACE
    assert (line["method"], line["protocol"], line["status"], line["complete"]) == ("POST", "HTTP/1.1", status, True)
    assert (line["bytes_in"], line["bytes_out"]) == (500, len(body)) == (recent["bytes_in"], recent["bytes_out"])
    assert line["backend"] == recent["server_id"] == headers["x-served-by"]
    assert line["total"] == pytest.approx(recent["response_time"], abs=1e-6)
    assert (line["client"], line["user_agent"], line["reason"]) == ("127.0.0.1", "test/1", None)
    (attempt,) = line["attempts"]
    assert attempt == {"backend": line["backend"], "outcome": str(status), "seconds": line["first_byte"]}
    assert "secret" not in json.dumps(line)


def test_the_phases_add_up(logging: BalancerProcess) -> None:
    for number in range(5):
        fetch(f"{logging.url}/api/process/phases-{number}")
    for number in range(5):
        line = line_of(logging, f"/api/process/phases-{number}")
        phases = [line["received"], line["queued"], line["first_byte"], line["transfer"]]
        assert all(phase >= 0 for phase in phases)
        assert sum(phases) == pytest.approx(line["total"], abs=5e-6)
        assert line["connect"] is None or 0 < line["connect"] <= line["first_byte"]


def test_the_client_is_the_one_a_trusted_proxy_names(logging: BalancerProcess) -> None:
    fetch(f"{logging.url}/behind", X_Forwarded_For="203.0.113.9, 198.51.100.7, 127.0.0.3")
    assert line_of(logging, "/behind")["client"] == "198.51.100.7"


def test_control_requests_are_no_traffic(logging: BalancerProcess) -> None:
    fetch(f"{logging.url}/events")
    fetch(f"{logging.url}/marker")
    line_of(logging, "/marker")
    assert "/events" not in [line["path"] for line in json_lines(logging)]


def test_a_retry_shows_each_attempt_and_a_failure_its_reason() -> None:
    with WireBackend() as backend:
        flags = ("--access-log", "--access-log-format=json", "--panic-threshold=1", "--algorithm=round_robin")
        with BalancerProcess(
            f"--backend=gone=http://127.0.0.1:{free_port()}", f"--backend=good={backend.url}", *flags
        ) as balancer:
            for _ in range(2):
                fetch(f"{balancer.url}/retried")
            backend.answer(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort", close=True)
            exchange(balancer.port, get(b"/broken"))
            backend.answer(ok())
            assert b"400 Bad Request" in exchange(balancer.port, b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            lines = wait_until(lambda: (found := json_lines(balancer)) and len(found) == 4 and found, "four lines")
    retried = next(line for line in lines if len(line["attempts"]) == 2 and line["path"] == "/retried")
    assert [(a["backend"], a["outcome"]) for a in retried["attempts"]] == [
        ("gone", "connection_refused"),
        ("good", "200"),
    ]
    assert (retried["status"], retried["backend"], retried["reason"]) == (200, "good", None)
    broken = next(line for line in lines if line["path"] == "/broken")
    assert (broken["reason"], broken["complete"]) == ("http_response_incomplete", False)
    refused = next(line for line in lines if line["path"] == "/")
    assert (refused["status"], refused["reason"], refused["backend"]) == (400, "http_request_error", None)
    assert refused["attempts"] == [] and refused["transfer"] is refused["received"] is None


def test_a_line_of_text_has_the_same(tmp_path: Path) -> None:
    with WireBackend() as backend, BalancerProcess(f"--backend=only={backend.url}", "--access-log") as balancer:
        fetch(f"{balancer.url}/some/path?secret=1", User_Agent='a "quoted" agent', Traceparent=TRACEPARENT)
        line = wait_until(lambda: next((x for x in balancer.lines if "/some/path" in x), None), "the line")
        recent = balancer.status()["recent_requests"][0]
    match = TEXT.fullmatch(line)
    assert match and json.loads(match["request"]) == "GET /some/path HTTP/1.1"
    assert (match["client"], match["status"]) == ("127.0.0.1", "200")
    told = dict(part.split("=", 1) for part in shlex.split(match["rest"]))
    assert (told["backend"], told["reason"], told["in"], told["out"]) == ("only", "-", "0", "2")
    assert (told["id"], told["trace"]) == (recent["request_id"], TRACE)
    assert told["agent"] == 'a "quoted" agent'
    assert float(told["total"]) == pytest.approx(recent["response_time"], abs=1e-6)
    assert re.fullmatch(r"only:200:\d\.\d{6}", told["attempts"])
    assert abs(time.time() - recent["timestamp"]) < 60 and match["time"] == timestamp(recent["timestamp"])


@pytest.mark.parametrize("form", ["text", "json"])
def test_every_line_has_one_format_and_one_clock(form: str) -> None:
    """A line of its own at the start, or a log line in local time, and no program could read the rest."""
    started = time.time()
    env = {"LB_ALGORITM": "x", "TZ": "Asia/Kathmandu"}
    with BalancerProcess(
        "--backend=http://127.0.0.1:1", "--access-log", f"--access-log-format={form}", env=env
    ) as balancer:
        fetch(f"{balancer.url}/asked")
    lines = [json.loads(line) for line in balancer.lines] if form == "json" else balancer.lines
    times = [line["time"] if form == "json" else line.partition(" ")[0] for line in lines]
    assert len(times) >= 5
    for text in times:
        assert text.endswith("Z") and started - 1 < datetime.fromisoformat(text).timestamp() < time.time()
    warning, listening = lines[:2]
    words = "the variable LB_ALGORITM is ignored, there is no such setting; did you mean LB_ALGORITHM?"
    if form == "json":
        assert warning.items() >= {"level": "warning", "logger": "balancer.settings", "message": words}.items()
        assert listening["message"] == f"lb-1: listening on {balancer.url}"
    else:
        assert warning.endswith(f"Z WARNING balancer.settings: {words}")
        assert listening.endswith(f"Z INFO balancer: lb-1: listening on {balancer.url}")


def test_a_reload_switches_it(tmp_path: Path) -> None:
    with WireBackend() as backend:
        file = tmp_path / "balancer.toml"
        settings = f'[[backends]]\nid = "only"\nurl = "{backend.url}"\n'
        file.write_text(settings)
        with BalancerProcess(f"--config={file}") as balancer:
            fetch(f"{balancer.url}/before")
            file.write_text('access_log = true\naccess_log_format = "json"\n' + settings)
            assert fetch_json(f"{balancer.url}/reload", {})["applied"]
            fetch(f"{balancer.url}/after")
            wait_until(lambda: json_lines(balancer), "a line")
    assert [line["path"] for line in json_lines(balancer)] == ["/after"]


def test_a_reload_turns_it_off_in_mid_request(tmp_path: Path) -> None:
    """Of what ends without a log nothing is logged; to the clients it makes no difference."""
    backend, go_on = WireBackend(), threading.Event()

    def script(sock: socket.socket, asked: RawRequest) -> None:
        first, rest = {b"/head": (b"", ok(b"whole")), b"/body": (ok(b"whole")[:-2], b"le")}.get(
            asked.target, (b"", ok())
        )
        sock.sendall(first)
        assert asked.target not in (b"/head", b"/body") or go_on.wait(60)
        sock.sendall(rest)

    backend.script = script
    file = tmp_path / "balancer.toml"
    settings = f'[[backends]]\nid = "only"\nurl = "{backend.url}"\n'
    file.write_text('access_log = true\naccess_log_format = "json"\n' + settings)
    with backend, BalancerProcess(f"--config={file}") as balancer, ThreadPoolExecutor(2) as clients:
        assert fetch(f"{balancer.url}/before")[0] == 200
        asked = [clients.submit(fetch, f"{balancer.url}{path}") for path in ("/head", "/body")]
        wait_until(lambda: len(backend.requests) == 3, what="both are under way")
        file.write_text(settings)
        changes = fetch_json(f"{balancer.url}/reload", {})["changes"]
        go_on.set()
        assert [answer.result()[::2] for answer in asked] == [(200, b"whole")] * 2
        assert fetch(f"{balancer.url}/after")[0] == 200
        ends = balancer.status()["recent_requests"]
    assert "access_log" in [change["what"] for change in changes]
    assert len(ends) == 4 and all(end["complete"] and end["reason"] is None for end in ends)
    assert [line["path"] for line in json_lines(balancer)] == ["/before"]
    assert "Traceback" not in balancer.output and "ERROR" not in balancer.output


# Safe to look at.

HOSTILE = [
    (b"/%0A2026-01-01T00:00:00.000Z%20forged", b"x\ty"),
    (b"/%1b%5d0;title%07%1b[31mred", b"\x1b[31m \xe2\x80\xae"[4:]),
    (b'/"%22%5c%5C%7f%9b%C2%9b', b'"\\" "'),
    (b"/%E2%80%AEtfel-ot-thgir", b"\xff\xfe caf\xc3\xa9"),
    (b"/" + b"%00" * 900, b"z" * 5000),
]


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_request_forges_a_line_or_talks_to_the_terminal(form: str) -> None:
    with WireBackend() as backend:
        flags = ("--access-log", f"--access-log-format={form}", "--log-level=error")
        with BalancerProcess(f"--backend=only={backend.url}", *flags) as balancer:
            before = len(balancer.lines)
            for target, agent in HOSTILE:
                answer = exchange(balancer.port, get(target, b"User-Agent: " + agent))
                assert answer.startswith(b"HTTP/1.1 200"), (target, answer)
            exchange(balancer.port, get(b"/odd", method=b"M%|~'"))
            count = len(HOSTILE) + 1
            lines = wait_until(lambda: (x := balancer.lines[before:]) and len(x) >= count and x, "all lines")
    assert len(lines) == count
    for line in lines:
        assert line.isascii() and line.isprintable() and len(line) < 10_000
        assert json.loads(line) if form == "json" else TEXT.fullmatch(line)


def make_line(is_json: bool, record: Record, *lines: tuple[bytes, bytes], peer: str = "192.0.2.1") -> str:
    made: list[Any] = []

    class Kept(LogWriter):
        def add(self, line: Any) -> None:
            made.append(line())

    request = Request(RequestHeads(), "GET", "/", b"/", "1.1", "http", peer, lines)
    format_name = "json" if is_json else "text"
    access_log = AccessLog(Kept(None), options(LogOptions, access_log=True, access_log_format=format_name))
    access_log.done(request, record)
    (line,) = made
    assert isinstance(line, str)
    return line


latin = st.text(st.characters(max_codepoint=255), max_size=50)


@given(latin, latin, latin, st.booleans())
def test_whatever_a_request_says_a_line_is_one_line_of_ascii(path: str, agent: str, method: str, is_json: bool) -> None:
    record = make_record(method=method, path="/" + path)
    line = make_line(is_json, record, (b"user-agent", agent.encode("latin-1")))
    assert line.isascii() and line.isprintable()
    if is_json:
        told = json.loads(line)
        assert told["path"] == ("/" + path).encode("latin-1").decode("utf-8", "backslashreplace")
    else:
        assert TEXT.fullmatch(line)


def test_what_is_long_is_cut() -> None:
    record = make_record()
    told = json.loads(make_line(True, record, (b"user-agent", b"a" * 9999), peer="unknown"))
    assert len(told["user_agent"]) == AGENT_LOGGED
    assert told["client"] is None


def test_a_long_path_and_method_are_cut_before_they_are_kept(logging: BalancerProcess) -> None:
    exchange(logging.port, get(b"/long" + b"x" * 9000, method=b"M" * 900))
    line = line_of(logging, "/long" + "x" * (PATH_KEPT - 5))
    assert line["method"] == "M" * METHOD_KEPT


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1795621653.9996, "2026-11-25T15:47:33.999Z"),
        (1709208000.25, "2024-02-29T12:00:00.250Z"),
    ],
)
def test_times_are_iso_8601(seconds: float, text: str) -> None:
    assert timestamp(seconds) == text


def test_the_phases_of_a_request_with_a_pause_between_attempts() -> None:
    failed = make_attempt("a", "http_response_timeout", at=0.25, seconds=1.0, error="slow")
    good = make_attempt("a", "200", at=1.5, seconds=0.3, connect=0.1)
    record = make_record(seconds=2.0, queued=0.2, attempts=[failed, good])
    told = json.loads(make_line(True, record))
    assert told["received"] == pytest.approx(0.05)
    assert (told["queued"], told["connect"], told["first_byte"]) == (0.2, 0.1, 0.3)
    assert told["transfer"] == pytest.approx(0.2)
    assert [attempt["outcome"] for attempt in told["attempts"]] == ["http_response_timeout", "200"]


# It holds nobody up.


@contextmanager
def serving(stdout: Any, *flags: str, **options: Any) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A balancer with an access log whose output goes to `stdout`; in front of one backend."""
    backend, port = WireBackend(), free_port()
    command = [PYTHON, str(ROOT / "load_balancer.py"), f"--port={port}", f"--backend=only={backend.url}"]
    process = subprocess.Popen(
        [*command, "--access-log", *flags], stdout=stdout, stderr=subprocess.PIPE, cwd=ROOT, **options
    )
    url = f"http://127.0.0.1:{port}"

    try:
        wait_until(lambda: is_good(f"{url}/readyz"), "the balancer is ready")
        yield process, url
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        backend.close()


def terminate(process: subprocess.Popen[bytes]) -> str:
    """What it says on stderr; it must end in time."""
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert process.stderr is not None
    return process.stderr.read().decode()


def test_every_request_has_its_line_when_the_process_ends(tmp_path: Path) -> None:
    file = tmp_path / "log"
    with open(file, "wb") as stdout, serving(stdout, "--access-log-format=json") as (process, url):
        with ThreadPoolExecutor(8) as clients:
            for status, _, _ in clients.map(lambda number: fetch(f"{url}/n{number}"), range(300)):
                assert status == 200
        assert terminate(process) == ""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["path"] for line in lines if "path" in line) == sorted(f"/n{number}" for number in range(300))


def test_a_pipe_that_nobody_reads_stops_neither_requests_nor_the_end() -> None:
    with serving(subprocess.PIPE) as (process, url):
        long = "x" * 900
        statistics: dict[str, Any] = {}

        def is_full() -> bool:
            """A pipe holds 64 KiB."""
            for status, _, _ in clients.map(lambda _: fetch(f"{url}/{long}"), range(100)):
                assert status == 200
            statistics.update(fetch_json(f"{url}/status")["statistics"])
            return process.poll() is None and statistics["total_requests"] >= 200

        with ThreadPoolExecutor(8) as clients:
            wait_until(is_full, "the pipe is full")
        assert fetch(f"{url}/still-here")[0] == 200
        assert terminate(process) == ""


def test_a_full_disk_is_counted(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full, serving(full) as (process, url):
        for _ in range(20):
            assert fetch(f"{url}/x")[0] == 200

        def lost() -> int:
            count: int = fetch_json(f"{url}/status")["statistics"]["access_log_dropped"]
            return count

        wait_until(lambda: lost() >= 20, "all lines are lost")
        metrics = fetch(f"{url}/metrics")[2].decode()
        match = re.search(r"^lb_log_lines_dropped_total (\S+)$", metrics, re.MULTILINE)
        assert match and float(match[1]) >= 20
        assert "Traceback" not in terminate(process)


def test_a_closed_standard_output_does_not_send_lines_to_a_client() -> None:
    with serving(None, preexec_fn=lambda: os.close(1)) as (process, url):
        for _ in range(20):
            status, _, body = fetch(f"{url}/x")
            assert (status, body) == (200, b"ok")
        wait_until(lambda: fetch_json(f"{url}/status")["statistics"]["access_log_dropped"] >= 20, "all lines are lost")
        assert terminate(process) == ""
