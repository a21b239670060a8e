"""The demo backend: the application by Flask's test client, the server as a real process on a real socket."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from flask.testing import FlaskClient
from support import free_port, wait_until

import backend_server
from backend_server import BackendState, Faults, Settings, UsageError, create_app, parse_settings

SCRIPT = Path(backend_server.__file__)
QUICK = Settings(delay=0.0)


@pytest.fixture
def state() -> BackendState:
    return BackendState(QUICK, random.Random(1))


@pytest.fixture
def client(state: BackendState) -> FlaskClient:
    return create_app(state=state).test_client()


# -- Settings


def test_defaults() -> None:
    assert parse_settings([], {}) == Settings("backend_1", 5001, "127.0.0.1", 0.05)


def test_environment_is_read_and_stripped() -> None:
    environ = {"SERVER_ID": "b ", "SERVER_PORT": " 5002 ", "SERVER_HOST": "0.0.0.0 ", "RESPONSE_DELAY": "0.5\t"}
    assert parse_settings([], environ) == Settings("b", 5002, "0.0.0.0", 0.5)


def test_flag_beats_environment_beats_default() -> None:
    environ = {"SERVER_ID": "from-env", "SERVER_PORT": "5002", "RESPONSE_DELAY": "  "}
    settings = parse_settings(["--port", "5003"], environ)
    assert (settings.server_id, settings.port, settings.delay) == ("from-env", 5003, 0.05)


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        (["--port", "x"], {}, "--port"),
        (["--port", "0"], {}, "--port"),
        (["--port", "65536"], {}, "--port"),
        (["--port", "\u0663"], {}, "--port"),
        ([], {"SERVER_PORT": "-1"}, "SERVER_PORT"),
        ([], {"SERVER_ID": "two words"}, "SERVER_ID"),
        (["--id", ""], {}, "--id"),
        (["--host", "nowhere"], {}, "--host"),
        (["--delay", "nan"], {}, "--delay"),
        ([], {"RESPONSE_DELAY": "61"}, "RESPONSE_DELAY"),
        (["--nonsense"], {}, "--nonsense"),
        (["--po", "5001"], {}, "--po"),
    ],
)
def test_a_bad_value_is_refused_by_name(argv: list[str], environ: dict[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){named}"):
        parse_settings(argv, environ)


# -- Service


def test_process_answers_every_field(client: FlaskClient) -> None:
    before = time.time()
    answer = client.get("/api/process").get_json()
    assert answer["server_id"] == "backend_1"
    assert answer["server_port"] == 5001
    assert answer["request_number"] == 1
    assert answer["method"] == "GET"
    assert answer["request_data"] is None
    assert before <= answer["timestamp"] <= time.time()
    assert answer["message"]


def test_processing_time_is_measured() -> None:
    client = create_app(Settings(delay=0.08)).test_client()
    started = time.perf_counter()
    answer = client.get("/api/process").get_json()
    assert 0.08 <= answer["processing_time"] <= time.perf_counter() - started


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"json": {"a": [1, None]}}, {"a": [1, None]}),
        ({"data": {"a": "1"}}, {"a": ["1"]}),
        ({"data": b"plain \xff", "content_type": "text/plain"}, "plain \ufffd"),
        ({"query_string": "a=1&a=2"}, {"a": ["1", "2"]}),
        ({"data": b"", "content_type": "application/json"}, None),
    ],
)
def test_request_data_is_what_came(client: FlaskClient, arguments: dict[str, Any], expected: Any) -> None:
    assert client.post("/api/process", **arguments).get_json()["request_data"] == expected


@pytest.mark.parametrize("body", ["{", "NaN", '{"a": Infinity}', "[" * 100_000, "1" * 5000])
def test_bad_json_is_400(client: FlaskClient, body: str) -> None:
    answer = client.post("/api/process", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert "JSON" in answer.get_json()["error"]


def test_unknown_path_and_method_are_json(client: FlaskClient) -> None:
    assert "error" in client.get("/nothing").get_json()
    refused = client.put("/health")
    assert refused.status_code == 405
    assert "GET" in refused.headers["Allow"]
    assert "error" in refused.get_json()


def test_health(client: FlaskClient) -> None:
    answer = client.get("/health")
    assert answer.status_code == 200
    assert answer.get_json()["status"] == "healthy"


def test_stats_count_and_reset_zeroes(client: FlaskClient) -> None:
    assert client.get("/stats").get_json()["avg_processing_time"] is None
    for _ in range(3):
        client.get("/api/process")
    stats = client.get("/stats").get_json()
    assert (stats["total_requests"], stats["successful_requests"], stats["failed_requests"]) == (3, 3, 0)
    assert stats["active_requests"] == 0
    assert stats["avg_processing_time"] > 0
    assert client.post("/reset").status_code == 200
    assert client.get("/stats").get_json()["total_requests"] == 0
    assert client.get("/api/process").get_json()["request_number"] == 1


def test_a_reset_in_the_midst_of_a_request_leaves_the_new_counts_alone(state: BackendState) -> None:
    counters, _ = state.begin()
    state.reset()
    state.finish(counters, True, 0.1)
    stats = state.stats()
    assert (stats["total_requests"], stats["successful_requests"], stats["active_requests"]) == (0, 0, 0)


def test_counts_are_exact_under_threads(state: BackendState) -> None:
    app = create_app(state=state)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: app.test_client().get("/api/process").get_json(), range(200)))
    assert sorted(answer["request_number"] for answer in answers) == list(range(1, 201))
    assert state.stats()["successful_requests"] == 200


# -- Load


def test_simulated_load_is_really_worked_off(client: FlaskClient) -> None:
    answer = client.post("/simulate-load", json={"duration": 0.2}).get_json()
    assert answer["mode"] == "cpu"
    assert answer["elapsed"] >= 0.2
    assert answer["cpu_time"] > 0


def test_simulated_load_can_sleep(client: FlaskClient) -> None:
    answer = client.post("/simulate-load", json={"duration": 0.2, "mode": "sleep"}).get_json()
    assert answer["elapsed"] >= 0.2
    assert answer["cpu_time"] < 0.1


@pytest.mark.parametrize(
    "body", [{"duration": 10.1}, {"duration": -1}, {"duration": True}, {"duration": "1"}, {"mode": "x"}, {"x": 1}, []]
)
def test_load_is_bounded_and_validated(client: FlaskClient, body: Any) -> None:
    answer = client.post("/simulate-load", json=body)
    assert answer.status_code == 400
    assert "0 to 10" in answer.get_json()["error"]


# -- Faults


def test_faults_are_set_one_by_one_and_cleared(client: FlaskClient) -> None:
    clear = {"added_latency": 0, "error_rate": 0, "error_status": 500, "hang": False, "fail_health": False}
    assert client.get("/faults").get_json() == clear
    client.post("/faults", json={"added_latency": 0.5})
    assert client.post("/faults", json={"fail_health": True}).get_json() == {
        **clear,
        "added_latency": 0.5,
        "fail_health": True,
    }
    assert client.delete("/faults").get_json() == clear


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"latency": 1}', "added_latency"),
        ('{"added_latency": 61}', "0 to 60"),
        ('{"added_latency": "1"}', "0 to 60"),
        ('{"error_rate": 1.1}', "0 to 1"),
        ('{"error_rate": true}', "0 to 1"),
        ('{"error_rate": NaN}', "not valid JSON"),
        ('{"error_status": 200}', "500 to 599"),
        ('{"error_status": 503.0}', "500 to 599"),
        ('{"error_status": true}', "500 to 599"),
        ('{"hang": 1}', "true or false"),
        ('{"hang": null}', "true or false"),
        ("{}", "fail_health"),
        ("[]", "fail_health"),
        ("", "fail_health"),
        ("{", "not valid JSON"),
    ],
)
def test_a_bad_fault_is_refused_with_what_is_expected(client: FlaskClient, body: str, expected: str) -> None:
    answer = client.post("/faults", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert expected in answer.get_json()["error"]
    assert client.get("/faults").get_json()["error_rate"] == 0


def test_one_bad_field_changes_nothing(client: FlaskClient) -> None:
    assert client.post("/faults", json={"fail_health": True, "error_rate": 2}).status_code == 400
    assert client.get("/health").status_code == 200


def test_added_latency_is_added(client: FlaskClient) -> None:
    client.post("/faults", json={"added_latency": 0.1})
    assert client.get("/api/process").get_json()["processing_time"] >= 0.1


def test_error_rate(client: FlaskClient) -> None:
    client.post("/faults", json={"error_rate": 0.5})
    codes = [client.get("/api/process").status_code for _ in range(200)]
    assert set(codes) == {200, 500}
    assert 60 < codes.count(500) < 140
    assert client.get("/stats").get_json()["failed_requests"] == codes.count(500)


def test_the_status_of_an_error_can_be_chosen(client: FlaskClient) -> None:
    client.post("/faults", json={"error_rate": 1, "error_status": 503})
    assert client.get("/api/process").status_code == 503
    client.post("/faults", json={"error_rate": 0})
    assert client.get("/api/process").status_code == 200


def test_fail_health_fails_only_health(client: FlaskClient) -> None:
    client.post("/faults", json={"fail_health": True})
    answer = client.get("/health")
    assert (answer.status_code, answer.get_json()["status"]) == (503, "unhealthy")
    assert client.get("/api/process").status_code == 200


def test_hang_holds_until_it_is_cleared(state: BackendState) -> None:
    app = create_app(state=state)
    app.test_client().post("/faults", json={"hang": True})
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(lambda: app.test_client().get("/health").status_code)
        wait_until(lambda: state.stats()["hanging_requests"] == 1)
        assert not hanging.done()
        app.test_client().delete("/faults")
        assert hanging.result(timeout=60) == 200


def test_too_many_hanging_requests_are_refused(state: BackendState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend_server, "MAX_HANGING", 0)
    state.change_faults({"hang": True})
    assert not state.hang(None)


def test_a_stopping_backend_keeps_nobody_waiting(state: BackendState) -> None:
    state.stop()
    state.wait(600)
    state.burn(600)
    assert state.faults == Faults()


# -- Who may trouble it

TROUBLE = [("POST", "/faults", b'{"hang": true}'), ("DELETE", "/faults", None), ("POST", "/reset", None)]
TROUBLE += [("POST", "/simulate-load", b'{"duration": 0}')]
JSON = "application/json"
PAGES = [
    *({"Origin": origin} for origin in ("https://evil.example", "null", "http://localhost", "http://localhost:9000")),
    *({"Sec-Fetch-Site": site} for site in ("cross-site", "same-site", "same-origin")),
]


@pytest.mark.parametrize("headers", PAGES, ids=lambda headers: next(iter(headers.values())))
@pytest.mark.parametrize("content_type", [JSON, "text/plain"])
@pytest.mark.parametrize(("method", "path", "body"), TROUBLE)
def test_no_page_troubles_it(
    client: FlaskClient, method: str, path: str, body: bytes | None, content_type: str, headers: dict[str, str]
) -> None:
    """Any page could, by a POST of plain text, whose answer it cannot read: the effect was enough."""
    client.get("/api/process")
    refused = client.open(path, method=method, data=body, content_type=content_type, headers=headers)
    assert refused.status_code == 403
    assert "may not change this backend" in refused.get_json()["error"]
    stats = client.get("/stats").get_json()
    assert (stats["total_requests"], stats["faults"]["hang"]) == (1, False)


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None]
)
@pytest.mark.parametrize("path", ["/faults", "/simulate-load"])
def test_what_a_form_could_send_is_no_json(client: FlaskClient, path: str, content_type: str | None) -> None:
    refused = client.post(path, data=b'{"hang": true, "duration": 0}', content_type=content_type)
    assert (refused.status_code, refused.get_json()) == (415, {"error": "expected Content-Type: application/json"})
    assert not client.get("/faults").get_json()["hang"]


@pytest.mark.parametrize(("method", "path", "body"), TROUBLE)
def test_a_person_at_a_terminal_troubles_it(client: FlaskClient, method: str, path: str, body: bytes | None) -> None:
    assert client.open(path, method=method, data=body, content_type=JSON if body else None).status_code == 200
    assert client.delete("/faults").status_code == 200


def test_the_service_is_open_to_every_page(client: FlaskClient) -> None:
    headers = {"Origin": "https://any.example", "Sec-Fetch-Site": "cross-site"}
    answer = client.post("/api/process", data=b"plain", content_type="text/plain", headers=headers)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (200, headers["Origin"])
    assert "Access-Control-Allow-Origin" not in client.get("/stats", headers=headers).headers


@pytest.mark.parametrize("path", ["/api/process?<script>", "/health", "/stats", "/faults", "/nothing", "/reset"])
def test_no_answer_is_taken_for_a_page(client: FlaskClient, path: str) -> None:
    assert client.get(path).headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("command", [line for line in backend_server.EXAMPLES.splitlines() if "curl" in line])
def test_the_commands_of_the_help_are_obeyed(running: Backend, command: str) -> None:
    """As they stand there, with the port of a backend of our own."""
    typed = re.split(r" {3,}", command.strip())[0]
    assert re.search(r"127\.0\.0\.1:5001/faults", typed)
    json_header = next(line.strip() for line in backend_server.EXAMPLES.splitlines() if "JSON=" in line)
    typed = typed.replace("curl ", "curl -sf ").replace(":5001", f":{running.port}")
    done = subprocess.run(["bash", "-c", f"{json_header}\n{typed}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "added_latency" in done.stdout) == (0, True), done.stderr


# -- The real process


class Backend:
    def __init__(self, *arguments: str, **environment: str) -> None:
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "--port", str(self.port), *arguments],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_until(lambda: self.process.poll() is not None or self.is_up())

    def is_up(self) -> bool:
        try:
            return self.call("GET", "/health")[0] == 200
        except OSError:
            return False

    def call(self, method: str, path: str, body: Any = None, timeout: float = 10) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def hanging(self) -> int:
        return int(self.call("GET", "/stats")[1]["hanging_requests"])

    def end(self, number: int) -> tuple[int, str, str]:
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def backend(*arguments: str, **environment: str) -> Iterator[Backend]:
    running = Backend(*arguments, **environment)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


@pytest.fixture(scope="module")
def shared() -> Iterator[Backend]:
    with backend("--delay", "0") as running:
        yield running


@pytest.fixture
def running(shared: Backend) -> Iterator[Backend]:
    """One without delay or, before and after, any fault."""
    yield shared
    shared.call("DELETE", "/faults")


def test_the_process_serves_by_flag_and_environment() -> None:
    with backend("--delay", "0", SERVER_ID="from-env ") as running:
        status, answer = running.call("POST", "/api/process", {"a": 1})
        assert status == 200
        assert (answer["server_id"], answer["server_port"]) == ("from-env", running.port)


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_quietly_and_quickly_though_clients_wait(number: int, expected: int) -> None:
    with backend() as running, ThreadPoolExecutor(2) as pool:
        idle = socket.create_connection(("127.0.0.1", running.port))
        running.call("POST", "/faults", {"hang": True})
        hanging = pool.submit(running.call, "GET", "/api/process")
        wait_until(lambda: running.hanging() == 1)
        code, out, err = running.end(number)
        assert (code, err, len(out.splitlines())) == (expected, "", 1)
        idle.close()
        assert hanging.exception() or hanging.result()[0] == 503


def test_it_is_one_process() -> None:
    with backend() as running:
        children = Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text()
        assert children == ""
        running.process.kill()
        running.process.wait()
        wait_until(lambda: not running.is_up())


def test_connections_are_kept(running: Backend) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.connect()
    first = connection.sock
    for _ in range(5):
        connection.request("POST", "/api/process", b"x" * 1000, {"Content-Type": "text/plain"})
        response = connection.getresponse()
        assert (response.version, response.status, len(response.read()) > 1000) == (11, 200, True)
    assert connection.sock is first
    connection.close()


def test_200_slow_requests_at_once() -> None:
    with backend("--delay", "0.5") as running, ThreadPoolExecutor(200) as pool:
        started = time.monotonic()
        answers = list(pool.map(lambda _: running.call("GET", "/api/process", timeout=60), range(200)))
        assert {status for status, _ in answers} == {200}
        assert sorted(answer["request_number"] for _, answer in answers) == list(range(1, 201))
        assert time.monotonic() - started < 90  # one after the other they would take 100 s


def test_a_body_over_1_mib_is_413_and_one_of_1_mib_is_not(running: Backend) -> None:
    assert send_body(running, 1024 * 1024, chunked=False) == 200
    for chunked in (False, True):
        assert send_body(running, 1024 * 1024 + 1, chunked) == 413
        assert send_body(running, 8 * 1024 * 1024, chunked) == 413
    assert running.is_up()


def send_body(running: Backend, size: int, chunked: bool) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    body: Any = iter([b"a" * size]) if chunked else b"a" * size
    with suppress(
        BrokenPipeError, ConnectionResetError
    ):  # the answer may be here before all of the body has been taken
        connection.request("POST", "/api/process", body, {"Content-Type": "text/plain"}, encode_chunked=chunked)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def test_a_hanging_request_is_forgotten_when_its_client_goes(running: Backend) -> None:
    running.call("POST", "/faults", {"hang": True})
    with pytest.raises(TimeoutError):
        running.call("GET", "/api/process", timeout=0.3)
    wait_until(lambda: running.hanging() == 0)


def test_faults_can_be_cleared_while_many_requests_hang(running: Backend) -> None:
    with ThreadPoolExecutor(50) as pool:
        running.call("POST", "/faults", {"hang": True})
        hanging = [pool.submit(running.call, "GET", "/health", timeout=60) for _ in range(50)]
        wait_until(lambda: running.hanging() == 50)
        assert running.call("DELETE", "/faults")[0] == 200
        assert {future.result()[0] for future in hanging} == {200}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--port", "none"], "--port must be"), (["--delay", "-1"], "--delay must be"), (["extra"], "extra")],
)
def test_bad_usage_is_one_line_and_2(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    assert backend_server.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1) and expected in err


def test_a_taken_port_is_one_line_and_2(running: Backend) -> None:
    command = [sys.executable, SCRIPT, "--port", str(running.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert str(running.port) in done.stderr and "another port" in done.stderr


def test_help_begins_with_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        backend_server.main(["--help"])
    assert not ended.value.code and capsys.readouterr().out.startswith("examples:")
