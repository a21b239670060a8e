"""The real command against a stub balancer that behaves as each test wants, and once against the real one."""

import contextlib
import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

SCRIPT = Path(__file__).resolve().parent.parent / "test_client.py"
LIMIT = 30  # seconds until a run counts as hanging
Json = dict[str, Any]


def load_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("client_under_test", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


client = load_module()


def wait_until(predicate: Callable[[], bool], timeout: float = 10.0) -> None:
    pause, end = threading.Event(), time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < end, "the condition did not come true in time"
        pause.wait(0.02)


class StubBalancer(ThreadingHTTPServer):
    """A balancer as far as the client can see; the attributes say how it behaves."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StubHandler)
        self.lock = threading.Lock()
        self.turn = 0
        self.total = 0
        self.failed = 0
        self.seen: list[tuple[str, str, bytes]] = []
        self.headers: list[list[tuple[str, str]]] = []
        self.connections = 0
        self.algorithm = "round_robin"
        self.switches: list[str] = []
        self.cycle = ["b1", "b2", "b3"]  # who answers, in turn
        self.expected: dict[str, float | None] = {"b1": 1 / 3, "b2": 1 / 3, "b3": 1 / 3}
        self.down: set[str] = set()
        self.fail_every = 0  # each n-th answer is a 500
        self.delay = 0.0
        self.release = threading.Event()  # ends every delay
        self.close_after_answer = False
        self.truncate = False
        self.trickle = False
        self.name_by = "body"  # or "header", "nothing"
        self.is_balancer = True
        self.count_share = 1.0
        self.refuse_switch: tuple[int, Json] | None = None
        self.token: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of these tests."""

    def next_turn(self) -> tuple[int, str]:
        with self.lock:
            self.turn += 1
            return self.turn, self.cycle[(self.turn - 1) % len(self.cycle)]

    def count(self, failed: bool) -> None:
        with self.lock:
            self.total += 1
            self.failed += failed

    def status(self) -> Json:
        total = int(self.total * self.count_share)
        backends = [
            {"id": name, "healthy": name not in self.down, "weight": 1, "expected_share": share, "unknown": [None]}
            for name, share in self.expected.items()
        ]
        good = total - self.failed
        counters = {"total_requests": total, "successful_requests": good, "failed_requests": self.failed}
        return {"algorithm": self.algorithm, "statistics": counters, "backend_servers": backends, "recent_requests": []}


class StubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: StubBalancer

    def log_message(self, *_arguments: Any) -> None:
        pass

    def answer(self, code: int, document: Json, headers: Json | None = None) -> None:
        body = json.dumps(document).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body) + (10 if self.server.truncate and self.is_proxied else 0)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.server.trickle and self.is_proxied:
            self.send_slowly(body)
        else:
            self.wfile.write(body)

    def send_slowly(self, body: bytes) -> None:
        for byte in body:
            self.wfile.write(bytes([byte]))
            self.wfile.flush()
            if self.server.release.wait(0.1):
                break

    @property
    def is_proxied(self) -> bool:
        return self.path.startswith("/api/") or self.path.startswith("/own")

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.server.is_balancer:
            self.answer(404, {"error": "not found"})
        elif self.is_proxied:
            self.proxied(body)
        elif self.server.token and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, {"error": "token required"})
        elif self.path == "/algorithm":
            self.switch(json.loads(body))
        else:
            self.answer(200, {"status": "healthy"} if self.path == "/health" else self.server.status())

    do_GET = do_POST = do_PUT = do_HEAD = handle_any

    def switch(self, wanted: Json) -> None:
        if self.server.refuse_switch:
            self.answer(*self.server.refuse_switch)
            return
        self.server.algorithm = wanted["algorithm"]
        self.server.switches.append(wanted["algorithm"])
        self.answer(200, {"message": "ok", "current": wanted["algorithm"]})

    def proxied(self, body: bytes) -> None:
        stub = self.server
        stub.seen.append((self.command, self.path, body))
        stub.headers.append(list(self.headers.items()))
        turn, name = stub.next_turn()
        if stub.delay:
            stub.release.wait(stub.delay)
        failed = bool(stub.fail_every and turn % stub.fail_every == 0)
        document = {"message": "ok"} | ({"server_id": name} if stub.name_by == "body" else {})
        stub.count(failed)
        self.answer(500 if failed else 200, document, {"X-Served-By": name} if stub.name_by == "header" else None)
        if stub.close_after_answer or stub.truncate:
            self.close_connection = True  # without saying so: what a kept connection may always meet


@pytest.fixture
def stub() -> Iterator[StubBalancer]:
    server = StubBalancer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="stub-balancer")
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    thread.join()
    server.server_close()


def environment(extra: dict[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("LB_URL", "NO_COLOR")}
    return {**kept, "PYTHONIOENCODING": "utf-8", **(extra or {})}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT, env=environment(env), check=False
    )


def run_json(*arguments: str) -> tuple[int, Json]:
    result = run("--json", *arguments)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    return result.returncode, json.loads(result.stdout)


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(SCRIPT), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


# --- a good balancer --------------------------------------------------------------------------------------------------


def test_a_good_balancer_passes_every_test(stub: StubBalancer) -> None:
    result = run(stub.url)
    assert (result.returncode, result.stderr) == (0, "")
    for title in ("Sequential: 20", "Concurrent: 200", "Distribution: 120", "Response times: 200", "3/3 backends up"):
        assert title in result.stdout
    assert "Balancer delta: total +540, successful +540, failed +0 (540 sent)" in result.stdout
    assert result.stdout.splitlines()[-1] == "PASSED: 6 of 6 checks"
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout


def test_each_worker_keeps_one_connection(stub: StubBalancer) -> None:
    run(stub.url, "--only", "concurrent", "-c", "7", "-n", "70")
    loads = stub.connections
    assert stub.total == 70
    assert loads - 7 <= 6  # the others are looks at /health and /status


def test_json_is_one_object_with_the_documented_fields(stub: StubBalancer) -> None:
    code, report = run_json(stub.url)
    assert code == 0
    assert report["schema_version"] == 1
    assert report["tool"] == {"name": "test_client.py", "version": client.VERSION}
    assert report["target"] == f"{stub.url}/api/process"
    assert (report["passed"], report["interrupted"]) == (True, False)
    assert [test["name"] for test in report["tests"]] == ["sequential", "concurrent", "distribution", "response-times"]
    assert report["summary"] | {"duration_s": 0, "bytes": 0} == {
        "requests": 540, "ok": 540, "failed": 0, "duration_s": 0, "bytes": 0, "stale_retries": 0, "error_rate": 0.0
    }  # fmt: skip
    assert report["balancer"]["delta"]["total_requests"] == report["balancer"]["sent"] == 540
    times = report["tests"][3]
    assert list(times["latency_ms"]) == ["min", "mean", "stdev", "p50", "p75", "p90", "p95", "p99", "max"]
    assert sum(bucket["count"] for bucket in times["histogram"]) == 200
    assert times["status_codes"] == {"200": 200}


def test_shares_are_measured_per_backend(stub: StubBalancer) -> None:
    _, report = run_json(stub.url, "--only", "distribution")
    rows = report["tests"][0]["backends"]
    assert [(row["id"], row["count"], row["errors"]) for row in rows] == [("b1", 40, 0), ("b2", 40, 0), ("b3", 40, 0)]
    assert rows[0]["share"] == pytest.approx(1 / 3)
    assert rows[0]["deviation"] == pytest.approx(0)


def test_the_backend_is_read_from_the_header_too(stub: StubBalancer) -> None:
    stub.name_by = "header"
    _, report = run_json(stub.url, "--only", "distribution")
    assert [row["count"] for row in report["tests"][0]["backends"]] == [40, 40, 40]


def test_another_field_may_name_the_backend(stub: StubBalancer) -> None:
    _, report = run_json(stub.url, "--only", "sequential", "--backend-field", "message")
    assert {row["id"]: row["count"] for row in report["tests"][0]["backends"]}["ok"] == 20


def test_answers_that_do_not_name_their_backend_are_not_judged(stub: StubBalancer) -> None:
    stub.name_by = "nothing"
    result = run(stub.url, "--only", "distribution")
    assert result.returncode == 0
    assert "answers do not name their backend" in result.stdout
    assert run(stub.url, "--only", "distribution", "--expect", "b1=50").returncode == 1


def test_requests_are_sent_as_asked(stub: StubBalancer) -> None:
    run(f"{stub.url}/own?a=1", "--only", "sequential", "-n", "2", "-d", "{}", "-H", "X-A: 1", "-H", "X-A: 2")
    assert stub.seen == [("POST", "/own?a=1", b"{}")] * 2
    sent = stub.headers[0]
    assert [value for name, value in sent if name == "X-A"] == ["1", "2"]
    assert ("Content-Type", "application/json") in sent
    run(stub.url, "--path", "/own/x", "-m", "put", "--only", "sequential", "-n", "1")
    assert stub.seen[-1] == ("PUT", "/own/x", b"")


def test_the_url_comes_from_the_environment(stub: StubBalancer) -> None:
    # cmd.exe leaves the trailing blank
    assert run("--only", "sequential", env={"LB_URL": f"{stub.url} "}).returncode == 0
    assert stub.total == 20


def test_count_suffixes(stub: StubBalancer) -> None:
    run(stub.url, "--only", "concurrent", "-n", "1k", "-c", "4")
    assert stub.total == 1000


# --- failing checks ---------------------------------------------------------------------------------------------------


def test_skewed_shares_fail(stub: StubBalancer) -> None:
    stub.cycle = ["b1", "b1", "b2", "b3"]
    result = run(stub.url, "--only", "distribution")
    assert result.returncode == 1
    assert re.search(r"FAIL  distribution: share off by +16\.7 points +at most 5\.0 points", result.stdout)
    assert result.stdout.splitlines()[-1] == "FAILED: 1 of 3 checks"


def test_a_larger_tolerance_or_another_expectation_accepts_them(stub: StubBalancer) -> None:
    stub.cycle = ["b1", "b1", "b2", "b3"]
    assert run(stub.url, "--only", "distribution", "--tolerance", "17").returncode == 0
    assert run(stub.url, "--only", "distribution", "--expect", "b1=50,b2=25", "--tolerance", "0").returncode == 0
    assert run(stub.url, "--only", "distribution", "--expect", "b1=50,b9=25").returncode == 1


def test_shares_without_expectation_are_only_reported(stub: StubBalancer) -> None:
    stub.expected = dict.fromkeys(stub.expected)
    stub.cycle = ["b1"]
    code, report = run_json(stub.url, "--only", "distribution")
    assert code == 0
    assert "expects no certain shares" in report["tests"][0]["note"]
    assert [row["count"] for row in report["tests"][0]["backends"]] == [120, 0, 0]


def test_few_requests_get_room_for_rounding(stub: StubBalancer) -> None:
    assert run(stub.url, "--only", "distribution", "-n", "10").returncode == 0
    assert run(stub.url, "--only", "distribution", "-n", "10", "--tolerance", "1").returncode == 1


def test_errors_fail_and_are_named(stub: StubBalancer) -> None:
    stub.fail_every = 10
    result = run(stub.url, "--only", "concurrent")
    assert result.returncode == 1
    assert "180 ok, 20 failed" in result.stdout
    assert re.search(r"Error +\d+ x status 500 \(b[123]\)", result.stdout)
    assert re.search(r"FAIL  concurrent: error rate +10\.0 % +at most 0\.0 %", result.stdout)
    assert run(stub.url, "--only", "concurrent", "--max-error-rate", "10").returncode == 0


def test_a_slow_balancer_breaks_a_latency_limit(stub: StubBalancer) -> None:
    stub.delay = 0.03
    arguments = (stub.url, "--only", "sequential", "-n", "5")
    code, report = run_json(*arguments, "--max-p95", "20ms", "--max-p50", "5s")
    assert code == 1
    assert {item["name"]: item["passed"] for item in report["checks"]} == {
        "error rate": True, "p50": True, "p95": False, "requests counted": True
    }  # fmt: skip
    assert report["tests"][0]["latency_ms"]["min"] >= 30


def test_no_answer_in_time(stub: StubBalancer) -> None:
    stub.delay = 20
    code, report = run_json(stub.url, "--only", "sequential", "-n", "2", "-t", "200ms")
    assert code == 1
    assert report["tests"][0]["errors"] == [{"reason": "timeout", "backend": None, "count": 2}]


def test_an_answer_that_comes_byte_by_byte_ends_in_time(stub: StubBalancer) -> None:
    stub.trickle = True
    code, report = run_json(stub.url, "--only", "sequential", "-n", "1", "-t", "300ms", "--connect-timeout", "100ms")
    assert code == 1
    assert report["tests"][0]["errors"][0]["reason"] == "timeout"


def test_incomplete_bodies_are_errors(stub: StubBalancer) -> None:
    stub.truncate = True
    _, report = run_json(stub.url, "--only", "sequential", "-n", "3")
    assert [(error["reason"], error["count"]) for error in report["tests"][0]["errors"]] == [("incomplete body", 3)]


def test_kept_connections_that_were_closed_are_no_errors(stub: StubBalancer) -> None:
    stub.close_after_answer = True
    code, report = run_json(stub.url, "--only", "sequential", "-n", "5")
    assert code == 0
    assert report["summary"]["stale_retries"] == 4
    assert report["summary"]["ok"] == 5


def test_a_post_is_never_sent_twice(stub: StubBalancer) -> None:
    stub.close_after_answer = True
    code, report = run_json(stub.url, "--only", "sequential", "-n", "4", "-d", "x")
    assert code == 1
    assert report["summary"]["stale_retries"] == 0
    assert stub.total == 2  # every second one meets the closed connection


def test_a_balancer_that_miscounts_fails(stub: StubBalancer) -> None:
    stub.count_share = 0.5
    result = run(stub.url, "--only", "sequential")
    assert result.returncode == 1
    assert re.search(r"FAIL  balancer: requests counted +10 +at least 20", result.stdout)


def test_a_balancer_that_goes_away_during_the_run_fails(stub: StubBalancer) -> None:
    stub.delay = 0.01
    with started(stub.url, "--only", "concurrent", "-n", "2k") as process:
        wait_until(lambda: stub.total > 20)
        stub.is_balancer = False
        out, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (1, "")
    assert "x status 404 (unnamed)" in out
    assert "FAIL  balancer: /status answers at the end" in out


def test_traffic_of_others_is_no_failure(stub: StubBalancer) -> None:
    stub.count_share = 2.0
    result = run(stub.url, "--only", "sequential")
    assert result.returncode == 0
    assert "20 more than sent here" in result.stdout


def test_backends_that_are_down_are_named(stub: StubBalancer) -> None:
    stub.down = {"b3"}
    stub.expected = {"b1": 0.5, "b2": 0.5, "b3": 0.0}
    stub.cycle = ["b1", "b2"]
    result = run(stub.url)
    assert result.returncode == 0
    assert "2/3 backends up (down: b3)" in result.stdout


# --- not a balancer ---------------------------------------------------------------------------------------------------


def one_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.stdout == ""
    assert result.stderr.startswith("test_client.py: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_nobody_listens() -> None:
    result = run(f"http://127.0.0.1:{free_port()}", "--json")
    assert result.returncode == 3
    assert "connect refused" in one_line(result)
    assert "start_all.sh" in result.stderr


def test_something_else_listens(stub: StubBalancer) -> None:
    stub.is_balancer = False
    result = run(stub.url)
    assert result.returncode == 3
    assert "not as a balancer does (/health: 404)" in one_line(result)


def test_a_server_that_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = run(f"127.0.0.1:{server.getsockname()[1]}", "-t", "200ms")
    assert result.returncode == 3
    assert "timeout" in one_line(result)


def test_a_server_that_speaks_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: greet(server))
        thread.start()
        result = run(f"http://127.0.0.1:{server.getsockname()[1]}", "-t", "5s")
        thread.join()
    assert result.returncode == 3
    assert "malformed answer" in one_line(result)


def greet(server: socket.socket) -> None:
    with server.accept()[0] as connection:
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-x\r\n\r\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-n", "0"], "-n/--requests"),
        (["-n", "-5"], "-n/--requests"),
        (["-n", "2m"], "1000000"),
        (["-n", "1e3"], "-n/--requests"),
        (["-c", "0"], "-c/--concurrency"),
        (["-c", "1001"], "from 1 to 1000"),
        (["-t", "nan"], "duration"),
        (["-t", "inf"], "duration"),
        (["-t", "0"], "duration"),
        (["-t", "-1s"], "-t/--timeout"),
        (["--max-p95", "fast"], "--max-p95"),
        (["--tolerance", "nan"], "--tolerance"),
        (["--tolerance", "101"], "from 0 to 100"),
        (["--max-error-rate", "-1"], "--max-error-rate"),
        (["--expect", "b1"], "b1=50,b2=33"),
        (["--expect", "b1=nan"], "from 0 to 100"),
        (["--expect", "b1=60,b2=60"], "b1=50,b2=33"),
        (["--expect", "b1=10,b1=10"], "b1=50,b2=33"),
        (["--only", "everything"], "sequential, concurrent"),
        (["--path", "no-slash"], "--path"),
        (["--path", "/a b"], "--path"),
        (["-H", "nocolon"], "Name: value"),
        (["-H", "A: b\r\nC: d"], "Name: value"),
        (["-m", "GE T"], "HTTP method"),
        (["--token-file", "/does/not/exist"], "token"),
        (["--wrong"], "--wrong"),
        (["ftp://127.0.0.1"], "only http:// and https://"),
        (["http://127.0.0.1:99999"], "cannot use the URL"),
        (["http://127.0.0.1:x"], "cannot use the URL"),
        (["http://user@127.0.0.1"], "user name"),
        (["http://"], "cannot use the URL"),
        (["http://[::1"], "cannot use the URL"),
        (["http://a b"], "cannot use the URL"),
        (["http://127.0.0.1/a b"], "cannot use the URL"),
        (["one", "two"], "two"),
    ],
)
def test_bad_usage_is_one_line_and_exit_2(arguments: list[str], text: str) -> None:
    result = run(*arguments)
    assert result.returncode == 2
    assert text in one_line(result)


def test_help_and_version() -> None:
    shown = run("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("examples:\n")
    assert run("-V").stdout == f"test_client.py {client.VERSION}\n"


# --- switching the algorithm ------------------------------------------------------------------------------------------


def test_the_algorithm_is_switched_and_put_back(stub: StubBalancer) -> None:
    result = run(stub.url, "--only", "sequential", "--algorithm", "weighted")
    assert result.returncode == 0
    assert "algorithm weighted" in result.stdout
    assert (stub.switches, stub.algorithm) == (["weighted", "round_robin"], "round_robin")


def test_the_present_algorithm_needs_no_switch(stub: StubBalancer) -> None:
    assert run(stub.url, "--only", "sequential", "--algorithm", "round_robin").returncode == 0
    assert stub.switches == []


def test_a_refused_switch_ends_the_run(stub: StubBalancer) -> None:
    stub.refuse_switch = (403, {"error": "read-only"})
    result = run(stub.url, "--algorithm", "weighted")
    assert result.returncode == 3
    assert "refused to switch to algorithm 'weighted' (403 read-only); give a token" in one_line(result)
    assert stub.total == 0


def test_an_unknown_algorithm_is_wrong_usage(stub: StubBalancer) -> None:
    stub.refuse_switch = (400, {"error": "unknown", "valid_options": ["round_robin", "weighted"]})
    result = run(stub.url, "--algorithm", "nonsense")
    assert result.returncode == 2
    assert "choose from round_robin, weighted" in one_line(result)


def test_an_algorithm_that_cannot_be_put_back_is_a_failure(stub: StubBalancer) -> None:
    stub.delay = 0.01
    with started(stub.url, "--only", "sequential", "-n", "200", "--algorithm", "weighted") as process:
        wait_until(lambda: stub.total > 0)
        stub.refuse_switch = (503, {"error": "busy"})
        out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "FAIL  balancer: put back to round_robin" in out
    assert "could not put the algorithm back to round_robin" in errors


def test_a_token_opens_the_control_api(stub: StubBalancer, tmp_path: Path) -> None:
    stub.token = "secret"
    assert "--token-file" in one_line(run(stub.url))
    (tmp_path / "token").write_text("secret\n", encoding="ascii")
    code, report = run_json(stub.url, "--only", "sequential", "--token-file", str(tmp_path / "token"))
    assert code == 0
    assert "secret" not in json.dumps(report)
    assert all(name.lower() != "authorization" for sent in stub.headers for name, _ in sent)


# --- interruption -----------------------------------------------------------------------------------------------------

posix_only = pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")


@posix_only
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_reports_what_there_is_and_puts_the_algorithm_back(
    stub: StubBalancer, number: signal.Signals, code: int
) -> None:
    stub.delay = 0.05
    with started(stub.url, "--only", "concurrent,distribution", "-n", "5k", "--algorithm", "weighted") as process:
        wait_until(lambda: stub.total > 20)
        process.send_signal(number)
        out, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == code
    assert "interrupted: the report follows" in errors
    assert re.search(r"Concurrent: 5000 requests, 10 at a time \(interrupted after \d+\)", out)
    assert out.splitlines()[-1] == "INTERRUPTED: 2 of 2 checks hold so far"
    assert "Distribution" not in out
    assert stub.algorithm == "round_robin"


@posix_only
def test_ctrl_c_does_not_wait_for_answers_that_do_not_come(stub: StubBalancer) -> None:
    stub.delay = 20
    with started(stub.url, "--json", "-c", "3", "--only", "concurrent") as process:
        wait_until(lambda: len(stub.seen) == 3)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert time.monotonic() - begin < 5
    report = json.loads(out)
    assert report["interrupted"] and not report["passed"]
    assert report["tests"][0]["summary"] | {"duration_s": 0} == {
        "requests": 0, "ok": 0, "failed": 0, "error_rate": None, "duration_s": 0, "rps": 0.0, "bytes": 0,
        "stale_retries": 0, "answered": 0, "sent": 3,
    }  # fmt: skip
    assert report["tests"][0]["latency_ms"]["p50"] is None


@posix_only
def test_a_second_ctrl_c_leaves_at_once_and_says_what_stays(stub: StubBalancer) -> None:
    stub.delay = 20
    with started(stub.url, "--algorithm", "weighted") as process:
        wait_until(lambda: len(stub.seen) > 0)
        process.send_signal(signal.SIGINT)
        assert process.stderr and "interrupted" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "the algorithm is still weighted, it was round_robin" in errors


# --- terminals and pipes ----------------------------------------------------------------------------------------------


@posix_only
@pytest.mark.parametrize("arguments", [[], ["--json"], ["--help"]])
def test_a_reader_that_goes_away_is_no_traceback(stub: StubBalancer, arguments: list[str]) -> None:
    with started(stub.url, "--only", "sequential", *arguments) as process:
        assert process.stdout
        process.stdout.close()  # before the first line is written
        process.wait(LIMIT)
        assert process.stderr and process.stderr.read() == ""
        assert process.returncode == 0


@posix_only
def test_a_report_that_cannot_be_written_is_an_error(stub: StubBalancer) -> None:
    command = [sys.executable, str(SCRIPT), stub.url, "--only", "sequential", "--algorithm", "weighted"]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment(), check=False)
    assert result.returncode == 4
    assert result.stderr == "test_client.py: cannot write the report: No space left on device\n"
    assert stub.algorithm == "round_robin"


def test_output_that_cannot_encode_blocks_is_ascii(stub: StubBalancer) -> None:
    stub.cycle = ["b\u00e4\x1b[2J"]
    stub.expected = {stub.cycle[0]: 1.0}
    plain = run(stub.url, env={"PYTHONIOENCODING": "ascii"})
    assert plain.returncode == 0
    assert plain.stdout.isascii() and "#####" in plain.stdout
    assert "\x1b" not in plain.stdout
    assert "\u2588" in run(stub.url).stdout


@posix_only
@pytest.mark.parametrize(
    ("arguments", "extra", "colored"),
    [([], {}, True), (["--no-color"], {}, False), ([], {"NO_COLOR": "1"}, False), ([], {"TERM": "dumb"}, False)],
)
def test_colour_on_a_terminal_only_where_wanted(
    stub: StubBalancer, arguments: list[str], extra: dict[str, str], colored: bool
) -> None:
    leader, follower = os.openpty()
    command = [sys.executable, str(SCRIPT), stub.url, "--only", "sequential", "-n", "1", *arguments]
    with subprocess.Popen(command, stdout=follower, env=environment({"TERM": "xterm", **extra})) as process:
        assert process.wait(LIMIT) == 0
    shown = os.read(leader, 65536)
    os.close(leader)
    os.close(follower)
    assert (b"\x1b[32m" in shown) is colored


# --- numbers ----------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
def test_percentile_is_the_nearest_rank(values: list[float], rank: int) -> None:
    ordered = sorted(values)
    found = client.percentile(ordered, rank)
    below = [value for value in sorted(set(ordered)) if sum(v <= value for v in ordered) * 100 >= rank * len(ordered)]
    assert found == below[0]


def test_percentiles_by_hand() -> None:
    assert [client.percentile([15, 20, 35, 40, 50], rank) for rank in (5, 30, 40, 50, 100)] == [15, 20, 20, 35, 50]
    assert client.percentile(range(1, 101), 95) == 95


@given(st.lists(st.floats(1e-6, 100), min_size=1, max_size=300))
def test_every_answer_is_in_the_histogram_once(seconds: list[float]) -> None:
    buckets = client.histogram([client.Sample(seconds=value) for value in seconds])
    bounds = [bucket["le_ms"] for bucket in buckets]
    assert sum(bucket["count"] for bucket in buckets) == len(seconds)
    assert bounds == sorted(set(bounds)) and 1 <= len(bounds) <= 12
    assert bounds[-1] * (1 + 1e-9) >= max(seconds) * 1000


def test_latency_leaves_failures_out() -> None:
    samples = [client.Sample(0.001), client.Sample(0.003), client.Sample(9.0, error="timeout")]
    found = client.latency(samples)
    assert (found["min"], found["mean"], found["max"]) == (1.0, 2.0, 3.0)
    assert found["stdev"] == pytest.approx(math.sqrt(2), abs=1e-4)
    assert client.latency([])["p50"] is None
    assert client.latency(samples[:1])["stdev"] is None


# --- the real thing ---------------------------------------------------------------------------------------------------


def test_the_demo_passes(demo: Any) -> None:
    begin = time.monotonic()
    result = run(demo.url)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED" in result.stdout.splitlines()[-1]
    assert time.monotonic() - begin < 10
