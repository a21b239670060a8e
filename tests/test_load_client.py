"""test_client.py as a load generator: the real command against a stub balancer that behaves as each test wants."""

from __future__ import annotations

import csv
import json
import os
import pty
import re
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from fleet import Demo
from stub_balancer import LIMIT, SCRIPT, Json, StubBalancer, environment, interrupted, one_line, run, run_json, started
from support import ROOT, free_port, ok, running, wait_until
from wire import WireBackend

from loadtest import problems
from loadtest.flags import build_parser
from loadtest.options import parse_options

SCHEMA = json.loads((ROOT / "loadtest" / "report.schema.json").read_text(encoding="utf-8"))
ONE_BY_ONE = ("-c", "1", "--warmup", "0")


def errors_of(report: Json) -> list[tuple[str, str | None, int]]:
    return [(error["reason"], error["detail"], error["count"]) for error in report["errors"]]


# --- how much is sent, and when ---------------------------------------------------------------------------------------


def test_a_load_run_reports_everything(stub: StubBalancer) -> None:
    result = run(stub.url, "-n", "1k", "-c", "4")
    assert (result.returncode, result.stderr) == (0, "")
    assert stub.total == 1020
    for text in (
        "Load        1000 requests, 4 connections, warm-up 20",
        "1000 ok (100.0 %)",
        "Histogram",
        "200: 1000",
    ):
        assert text in result.stdout
    assert "Balancer delta: total +1020, successful +1020, failed +0 (1020 sent)" in result.stdout
    assert result.stdout.splitlines()[-1] == "PASSED: 1 of 1 checks"
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_the_warm_up_is_sent_but_not_counted(stub: StubBalancer) -> None:
    stub.fail_first = 20
    code, report = run_json(stub.url, "-n", "30", "--warmup", "20")
    assert code == 0
    assert (report["summary"]["requests"], report["summary"]["warmup"], report["summary"]["failed"]) == (30, 20, 0)
    assert (report["summary"]["sent"], report["balancer"]["delta"]["total_requests"]) == (50, 50)
    assert stub.total == 50


def test_a_duration_ends_the_run(stub: StubBalancer) -> None:
    stub.delay = 0.01
    _, report = run_json(stub.url, "-z", "500ms", "-c", "2")
    assert 0.5 <= report["summary"]["duration_s"] < 60
    assert report["summary"]["requests"] > 2


def test_whichever_of_requests_and_duration_ends_first(stub: StubBalancer) -> None:
    _, by_number = run_json(stub.url, "-z", "1m", "-n", "10")
    assert by_number["summary"]["requests"] == 10
    stub.delay = 0.05
    _, by_time = run_json(stub.url, "-z", "200ms", "-n", "1m", "-c", "1", "--warmup", "0")
    assert 1 <= by_time["summary"]["requests"] < 10


def test_answers_under_way_at_the_end_are_awaited_or_cut_off(stub: StubBalancer) -> None:
    stub.delay = 1.5
    _, waited = run_json(stub.url, "-z", "100ms", "-c", "3", "--warmup", "0", "--wait")
    assert (waited["summary"]["ok"], waited["summary"]["cut_off"]) == (3, 0)
    assert waited["summary"]["duration_s"] >= 1.5
    stub.delay = 600
    code, cut = run_json(stub.url, "-z", "100ms", "-c", "3", "--warmup", "0", "--no-wait")
    assert code == 0
    assert (cut["summary"]["requests"], cut["summary"]["cut_off"], cut["interrupted"]) == (0, 3, False)
    assert cut["summary"]["duration_s"] < 60


def test_connections_are_added_during_the_ramp_up(stub: StubBalancer) -> None:
    stub.delay = 0.01
    run(stub.url, "-z", "1200ms", "-c", "4", "--warmup", "0", "--ramp-up", "1s", "--no-preflight")
    firsts = {}
    for at, peer in stub.arrivals:
        firsts.setdefault(peer, at)
    begins = sorted(firsts.values())
    assert len(begins) == 4
    assert begins[3] - begins[0] >= 0.4  # 0.75, had the machine nothing else to do


def due_times(*arguments: str) -> list[float]:
    rows = csv.DictReader(run(*arguments, "-o", "csv").stdout.splitlines())
    return sorted(float(row["offset_s"]) for row in rows)


def test_requests_at_a_rate_are_spread_evenly(stub: StubBalancer) -> None:
    due = due_times(stub.url, "-n", "50", "-q", "100", "--warmup", "0")
    assert [after - before for before, after in pairwise(due)] == pytest.approx([0.01] * 49, abs=1e-5)
    assert stub.arrivals[-1][0] - stub.arrivals[0][0] >= 0.3


def test_a_rate_is_reached_evenly_during_the_ramp_up(stub: StubBalancer) -> None:
    due = due_times(stub.url, "-z", "1s", "-q", "100", "--ramp-up", "1s", "--warmup", "0")
    assert len(due) == 50  # half of what the full rate would send
    assert sum(at - due[0] < 0.5 for at in due) == 13


def test_waiting_behind_a_stalled_server_counts_as_latency(stub: StubBalancer) -> None:
    """Coordinated omission: one answer takes a second, ninety-nine were due meanwhile."""
    stub.stall_at, stub.stall = 10, 1.0
    _, report = run_json(stub.url, "-n", "100", "-q", "100", "-c", "1", "--warmup", "0")
    corrected, raw = report["latency_ms"], report["latency_raw_ms"]
    assert raw["p90"] < 900 and raw["max"] >= 1000
    assert corrected["p50"] > 300 and corrected["max"] >= 1000
    assert report["client"]["waited_for_connection"] > 50


def test_at_a_rate_connections_are_opened_as_needed(stub: StubBalancer) -> None:
    stub.stall_at, stub.stall = 10, 1.0
    _, report = run_json(stub.url, "-n", "100", "-q", "100", "--warmup", "0")
    assert report["latency_ms"]["p90"] < 900  # the others did not wait for the slow one
    assert 2 <= report["summary"]["connections"] <= 100
    assert report["client"]["waited_for_connection"] == 0


def test_a_missed_rate_is_shown_with_its_cause(stub: StubBalancer) -> None:
    stub.delay = 0.02
    arguments = (stub.url, "-n", "50", "-q", "100", "-c", "1", "--warmup", "0")
    result = run(*arguments)
    assert result.returncode == 0  # the balancer did nothing wrong
    summary, why = re.findall(r"^(?:Summary|Rate) .*", result.stdout, re.MULTILINE)
    reached = re.search(r"  (\d+\.\d) of 100 req/s", summary)
    assert reached and 0 < float(reached[1]) < 50
    assert re.search(r"missed, too few connections \(1\): \d+ requests waited for a free connection, -c allows", why)
    compared = run(*arguments, "--compare", "weighted").stdout
    assert re.search(r"^weighted\n  Rate      missed, too few connections", compared, re.MULTILINE)
    _, report = run_json(*arguments)
    assert (report["summary"]["planned_rps"], report["summary"]["rate_missed"]) == (100, True)
    assert report["summary"]["sent_rps"] < 50
    _, kept = run_json(stub.url, "-n", "20", "-q", "20", "--warmup", "0")
    assert kept["summary"]["planned_rps"] == 20


def test_a_closed_loop_has_no_corrected_times(stub: StubBalancer) -> None:
    _, report = run_json(stub.url, "-n", "10")
    assert report["latency_raw_ms"] is None
    assert report["client"]["max_schedule_lag_ms"] is None


# --- requests ---------------------------------------------------------------------------------------------------------


def test_requests_are_sent_as_asked(stub: StubBalancer) -> None:
    more = ("-H", "X-A: 1", "-H", "X-A: 2", "-H", "Host: shop.example", "-H", "User-Agent: x")
    run(f"{stub.url}/own?a=1", "-n", "2", *ONE_BY_ONE, "-d", "{}", *more)
    assert stub.seen == [("POST", "/own?a=1", b"{}")] * 2
    sent = stub.headers[0]
    assert [value for name, value in sent if name == "X-A"] == ["1", "2"]
    assert ("Content-Type", "application/json") in sent
    usual = [(name, value) for name, value in sent if name in ("Host", "User-Agent")]
    assert sorted(usual) == [("Host", "shop.example"), ("User-Agent", "x")]  # replaced
    run(stub.url, "--path", "/own/x", "-m", "put", "-n", "1", *ONE_BY_ONE)
    assert stub.seen[-1] == ("PUT", "/own/x", b"")


def test_a_body_comes_from_a_file_or_from_standard_input(stub: StubBalancer, tmp_path: Path) -> None:
    (tmp_path / "body").write_bytes(b"\x00\xff")
    run(stub.url, "-n", "1", *ONE_BY_ONE, "-D", str(tmp_path / "body"), "-T", "application/octet-stream")
    assert stub.seen[-1] == ("POST", "/api/process", b"\x00\xff")
    assert ("Content-Type", "application/octet-stream") in stub.headers[-1]
    command = [sys.executable, str(SCRIPT), stub.url, "-n", "1", *ONE_BY_ONE]
    for given in (["-D", "-"], []):
        env = environment({} if given else {"LB_TEST_DATA_FILE": "-"})
        subprocess.run([*command, *given], input=b"from stdin", env=env, timeout=LIMIT, check=True, capture_output=True)
        assert stub.seen[-1][2] == b"from stdin"


def test_without_keep_alive_each_request_has_a_connection(stub: StubBalancer) -> None:
    _, report = run_json(stub.url, "-n", "5", *ONE_BY_ONE, "--no-keepalive", "--no-preflight")
    assert stub.connections == 5 + 1  # the first only looks whether somebody listens
    assert ("Connection", "close") in stub.headers[0]
    assert report["connect_ms"]["min"] is not None


def test_kept_connections_that_were_closed_are_no_errors_but_a_post_is_never_sent_twice(stub: StubBalancer) -> None:
    stub.close_after_answer = True
    code, report = run_json(stub.url, "-n", "5", *ONE_BY_ONE)
    assert code == 0
    assert (report["summary"]["stale_retries"], report["summary"]["ok"]) == (4, 5)
    assert "after a kept connection was closed" in run(stub.url, "-n", "5", *ONE_BY_ONE).stdout
    stub.total = 0
    code, report = run_json(stub.url, "-n", "4", *ONE_BY_ONE, "-d", "x")
    assert (code, report["summary"]["stale_retries"]) == (1, 0)
    assert stub.total == 2  # every second one meets the closed connection


@pytest.fixture
def tls_stub(tmp_path: Path) -> Iterator[StubBalancer]:
    """A balancer behind TLS; `tmp_path`/server.pem is its certificate, for localhost."""
    key, certificate = str(tmp_path / "server.key"), str(tmp_path / "server.pem")
    new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", *new, "-keyout", key, "-out", certificate, *names]
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with StubBalancer() as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), name="tls-balancer")
        thread.start()
        yield server
        server.release.set()
        server.shutdown()
        thread.join()


def test_tls_with_a_certificate_that_is_trusted(tls_stub: StubBalancer, tmp_path: Path) -> None:
    url = f"https://localhost:{tls_stub.server_address[1]}"
    env = {"SSL_CERT_FILE": str(tmp_path / "server.pem")}
    result = run(url, "-n", "50", "-c", "3", "--algorithm", "weighted", env=env)
    assert (result.returncode, result.stderr) == (0, "")
    assert tls_stub.total == 70
    refused = run(url, "-n", "50")
    assert refused.returncode == 3
    assert "self-signed certificate; SSL_CERT_FILE names a CA to trust" in one_line(refused)
    tls_stub.trickle = True  # an answer that does not end is cut
    report = json.loads(run(url, "-n", "1", *ONE_BY_ONE, "-t", "300ms", "--json", env=env).stdout)
    assert errors_of(report) == [("timeout", "after 0.3 s", 1)]


# --- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "arguments", "expected"),
    [
        ({"delay": 600}, ("-t", "200ms"), ("timeout", "after 0.2 s", 2)),
        ({"trickle": True}, ("-t", "300ms", "--connect-timeout", "100ms"), ("timeout", "after 0.3 s", 2)),
        ({"truncate": True}, (), ("bad body", "incomplete", 2)),
        ({}, ("--expect-status", "404"), ("bad status", "200", 2)),
        ({"fail_every": 1}, (), ("bad status", "500", 2)),
        ({"fail_every": 1}, ("--expect-status", "200,5xx"), None),
    ],
)
def test_answers_that_are_late_cut_short_or_unexpected(
    stub: StubBalancer, behaviour: Json, arguments: tuple[str, ...], expected: tuple[str, str, int] | None
) -> None:
    vars(stub).update(behaviour, cycle=["b1"])
    code, report = run_json(stub.url, "-n", "2", *ONE_BY_ONE, *arguments)
    assert (code, errors_of(report)) == ((1, [expected]) if expected else (0, []))


RESET = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # struct linger: on, 0 s


@pytest.mark.parametrize(
    ("answer", "reset", "expected"),
    [
        (b"", False, ("closed", "without an answer")),
        (b"", True, ("reset", "by the other side")),
        (b"SSH-2.0-x\r\n\r\n", False, ("bad answer", "malformed")),
        (b"HTTP/1.1 101 Switching Protocols\r\n\r\n", False, ("bad answer", "status 101")),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n", False, ("closed", "without an answer")),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", False, ("bad body", "incomplete")),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", False, ("bad status", "503")),
    ],
)
def test_each_kind_of_failure_has_its_name(
    scripted: WireBackend, answer: bytes, reset: bool, expected: tuple[str, str]
) -> None:
    def script(sock: socket.socket, _request: Any) -> None:
        sock.sendall(answer)
        if reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            os.close(sock.detach())  # close() would wait for the reader's file object
        else:
            sock.shutdown(socket.SHUT_RDWR)

    scripted.script = script
    code, report = run_json(scripted.url, "--no-preflight", "-n", "1", *ONE_BY_ONE)
    assert (code, errors_of(report)) == (1, [(*expected, 1)])


def test_what_comes_before_an_answer_is_none(scripted: WireBackend) -> None:
    """103 was a bad answer, 20 times of 20."""
    scripted.reset()
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    scripted.answer(b"HTTP/1.1 100 Continue\r\n\r\n" + hints + ok(b"whole"))
    code, report = run_json(scripted.url, "--no-preflight", "-n", "20", *ONE_BY_ONE)
    assert (code, errors_of(report), report["status_codes"]) == (0, [], {"200": 20})
    assert len(set(scripted.peers)) == 1
    shown = run(scripted.url, "--debug").stdout
    assert "< HTTP/1.1 200 OK\n" in shown and "Link" not in shown


def test_with_nobody_listening_it_ends_at_once_without_preflight_too() -> None:
    found = run(f"http://127.0.0.1:{free_port()}", "--no-preflight", "-n", "1m")
    assert (found.returncode, found.stdout) == (3, "")
    assert "nobody to load" in found.stderr and "connect refused" in found.stderr


def test_a_server_that_dies_midway_is_not_hammered_and_used_again_once_it_is_back(stub: StubBalancer) -> None:
    """20,000 refused connections a second it was."""
    with started(stub.url, "-z", "2m", *ONE_BY_ONE, "-o", "csv", "--no-keepalive") as process:
        wait_until(lambda: stub.total > 20, "the first answers")
        stub.shutdown()
        stub.server_close()
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        head = [next(lines)]
        head += [next(line for line in lines if "refused" in line) for _ in range(4)]
        answered = stub.total
        stub.socket = socket.create_server(stub.server_address)
        again = threading.Thread(target=stub.serve_forever, args=(0.02,), name="stub-balancer-again")
        again.start()
        wait_until(lambda: stub.total > answered + 200, "answers again")
        process.send_signal(signal.SIGINT)
        rows = list(csv.DictReader([*head, *lines]))
        stub.shutdown()
        again.join()
    refused = [float(row["offset_s"]) for row in rows if row["error"] == "connect refused"]
    pauses = [later - earlier for earlier, later in pairwise(refused)]
    assert all(pause >= least for pause, least in zip(pauses, (0.01, 0.03, 0.07), strict=False)), pauses
    assert sum(not row["error"] for row in rows) == stub.total - answered


@pytest.mark.parametrize("arguments", [[], ["--no-preflight"]])
def test_the_wrong_scheme_is_asked_about(stub: StubBalancer, arguments: list[str]) -> None:
    found = run(stub.url.replace("http", "https"), "-n", "1", *arguments)
    assert found.returncode == 3 and "is it http://?" in found.stderr


def test_https_behind_http_is_asked_about_and_any_certificate_taken(tls_stub: StubBalancer) -> None:
    url = f"https://127.0.0.1:{tls_stub.server_address[1]}"  # of which the certificate says nothing
    plain = run(url.replace("https", "http"), "-n", "1")
    assert plain.returncode == 3 and "is it https://?" in plain.stderr
    strict = run(url, "-n", "1")
    assert strict.returncode == 3 and "-k takes any" in strict.stderr
    code, report = run_json(url, "-n", "3", "-k", "-u", "me:secret", *ONE_BY_ONE)
    assert (code, report["summary"]["ok"]) == (0, 3)
    assert ("Authorization", "Basic bWU6c2VjcmV0") in tls_stub.headers[-1] and "secret" not in json.dumps(report)


def test_a_timeline_has_every_second(stub: StubBalancer) -> None:
    stub.delay = 0.02
    _, report = run_json(stub.url, "-z", "2200ms", "-q", "20", "--warmup", "0", "--timeline")
    seconds = report["timeline"]
    assert [one["second"] for one in seconds] == list(range(len(seconds))) and len(seconds) >= 3
    assert sum(one["requests"] for one in seconds) == report["summary"]["requests"]
    assert seconds[1]["p50"] >= 20


def test_worse_than_an_old_report_is_a_failed_check(stub: StubBalancer, tmp_path: Path) -> None:
    report = json.loads(run("--json", stub.url, "-n", "10", "-c", "5").stdout)
    for slower, expected in ((1000, (0, set())), (0.001, (1, {"p50", "p95", "p99", "rate"}))):
        old = report | {"latency_ms": {rank: took and took * slower for rank, took in report["latency_ms"].items()}}
        old["summary"] = report["summary"] | {"rps": report["summary"]["rps"] / slower}
        (tmp_path / "old.json").write_text(json.dumps(old), encoding="utf-8")
        code, found = run_json(stub.url, "-n", "10", "-c", "5", "--against", str(tmp_path / "old.json"))
        assert (code, {item["name"] for item in found["checks"] if not item["passed"]}) == expected


def test_backends_of_the_demo_are_slow_for_the_run_alone(stub: StubBalancer) -> None:
    run_json(stub.url, "-n", "5", *ONE_BY_ONE, "--slow", "b=200ms")
    assert stub.faults == [("POST", "b", {"added_latency": 0.2}), ("DELETE", "b", {})]


def test_a_full_backlog_is_a_connect_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server, full_backlog(server):
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        _, report = run_json(url, "--no-preflight", "-n", "1", *ONE_BY_ONE, "--connect-timeout", "200ms")
    assert errors_of(report) == [("connect timeout", "after 0.2 s", 1)]


@contextmanager
def full_backlog(server: socket.socket) -> Iterator[None]:
    """Connect, without being accepted, until the system takes no more."""
    waiting = []
    try:
        while True:
            sock = socket.socket()
            waiting.append(sock)
            sock.settimeout(0.3)
            try:
                sock.connect(server.getsockname())
            except TimeoutError:
                break
        yield
    finally:
        for sock in waiting:
            sock.close()


# --- the balancer -----------------------------------------------------------------------------------------------------


def test_another_field_or_header_may_name_the_backend(stub: StubBalancer) -> None:
    _, report = run_json(stub.url, "-n", "20", "--backend-field", "message")
    assert {row["id"]: row["count"] for row in report["backends"]}["ok"] == 20
    stub.name_by = "header"
    _, report = run_json(stub.url, "-n", "30", "--warmup", "0")
    assert [row["count"] for row in report["backends"]] == [10, 10, 10]
    _, report = run_json(stub.url, "-n", "20", "--backend-header", "Server")
    assert any(str(row["id"]).startswith("BaseHTTP") and row["count"] == 20 for row in report["backends"])


def test_shares_are_judged_if_asked(stub: StubBalancer) -> None:
    stub.cycle = ["b1", "b1", "b2", "b3"]
    common = (stub.url, "-n", "120", "--warmup", "0")
    assert run(*common).returncode == 0
    assert run(*common, "--tolerance", "17").returncode == 0
    assert run(*common, "--max-share-deviation", "16").returncode == 1
    assert run(*common, "--expect", "b1=50,b2=25", "--tolerance", "0").returncode == 0
    assert run(*common, "--expect", "b1=50,b9=25").returncode == 1


def test_shares_by_weight_whatever_the_algorithm(stub: StubBalancer) -> None:
    few = (stub.url, "-n", "10", "--warmup", "0", "--expect-weights")
    assert run(*few).returncode == 0  # few requests get room for rounding
    assert run(*few, "--tolerance", "1").returncode == 1
    stub.turn = 0
    stub.weights = {"b1": 2, "b2": 1, "b3": 1}
    stub.cycle = ["b1", "b1", "b2", "b3"]
    code, report = run_json(stub.url, "-n", "40", "--warmup", "0", "--expect-weights", "--tolerance", "1")
    assert code == 0
    assert [row["expected_share"] for row in report["backends"]] == [0.5, 0.25, 0.25]
    stub.cycle = ["b1"]
    assert run(stub.url, "-n", "40", "--expect-weights").returncode == 1


def test_clients_have_addresses_and_keep_their_cookies(stub: StubBalancer) -> None:
    # One at a time: a client whose first answer is still under way has no cookie to send.
    arguments = (stub.url, "-n", "40", "-c", "1", "--warmup", "0", "--clients", "4")
    assert run_json(*arguments)[1]["clients"] == {"count": 4, "returning": 4, "sticky": 0}  # they were moved
    stub.sticky = True
    stub.headers.clear()
    code, report = run_json(*arguments)
    assert code == 0
    assert report["clients"] == {"count": 4, "returning": 4, "sticky": 4}
    pairs = {(dict(sent)["X-Forwarded-For"], dict(sent).get("Cookie")) for sent in stub.headers}
    assert {address for address, _ in pairs} == {f"198.18.0.{n}" for n in range(1, 5)}
    given = {cookie for _, cookie in pairs if cookie}
    assert len(given) == 4 and all(cookie.startswith("lb=") for cookie in given)


def test_algorithms_are_compared_under_the_same_load(stub: StubBalancer) -> None:
    result = run(stub.url, "-n", "30", "--compare", "weighted,least_connections")
    assert (result.returncode, result.stderr) == (0, "")
    for name in ("weighted", "least_connections"):
        assert len(re.findall(rf"^  {name} +30 +0 ", result.stdout, re.MULTILINE)) == 1
    assert stub.switches == ["weighted", "least_connections", "round_robin"]
    assert "PASSED: 2 of 2 checks" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_all_algorithms_are_those_that_the_balancer_lists(stub: StubBalancer) -> None:
    result = run(stub.url, "-n", "5", "--compare", "weighted,nonsense")
    assert result.returncode == 2
    assert "no algorithm 'nonsense'; choose from round_robin, weighted" in one_line(result)
    assert (stub.switches, stub.total) == ([], 0)
    code, report = run_json(stub.url, "-n", "5", "--compare", "all")
    assert code == 0
    assert [test["name"] for test in report["tests"]] == ["round_robin", "weighted", "least_connections"]
    assert report["summary"]["requests"] == 15
    assert stub.algorithm == "round_robin"


def test_ctrl_c_during_a_comparison_reports_it_and_puts_the_algorithm_back(stub: StubBalancer) -> None:
    stub.delay = 0.02
    returned, out, _ = interrupted(
        stub.url,
        "-n",
        "200",
        "--compare",
        "weighted,least_connections",
        when=lambda: stub.algorithm == "least_connections" and stub.total > 250,
    )
    assert returned == 130
    assert re.search(r"^  weighted +200 ", out, re.MULTILINE)
    assert "INTERRUPTED" in out.splitlines()[-1]
    assert stub.algorithm == "round_robin"


def test_a_server_that_names_a_new_backend_each_time_fills_no_screen(stub: StubBalancer) -> None:
    result = run(stub.url, "-n", "1200", "--backend-header", "X-Request-ID")
    assert result.returncode == 0
    assert len(result.stdout.splitlines()) < 60
    assert re.search(r"^  and \d+ more \(all of them with --json\)$", result.stdout, re.MULTILINE)


def test_comparing_says_why_shares_are_not_judged(stub: StubBalancer) -> None:
    stub.expected = dict.fromkeys(stub.expected)
    result = run(stub.url, "-n", "20", "--compare", "least_connections", "--tolerance", "5")
    assert result.returncode == 0
    assert "expects no certain shares" in result.stdout


def test_any_http_server_can_be_loaded(scripted: WireBackend) -> None:
    scripted.reset()
    result = run(f"{scripted.url}/x", "--no-preflight", "-n", "5", *ONE_BY_ONE)
    assert result.returncode == 0
    assert [request.target for request in scripted.requests] == [b"/x"] * 5
    assert "Balancer" not in result.stdout


# --- thresholds and exit codes ----------------------------------------------------------------------------------------


def test_each_threshold_can_fail(stub: StubBalancer) -> None:
    stub.delay = 0.03
    limits = ("--max-p50", "20ms", "--max-p95", "5s", "--max-p99", "20ms", "--min-rps", "1k")
    code, report = run_json(stub.url, "-n", "5", *ONE_BY_ONE, *limits)
    assert code == 1
    assert {item["name"]: item["passed"] for item in report["checks"]} == {
        "error rate": True, "p50": False, "p95": True, "p99": False, "rate": False
    }  # fmt: skip
    assert report["latency_ms"]["min"] >= 30
    assert run(stub.url, "-n", "5", *ONE_BY_ONE, *limits, "--exit-zero").returncode == 0


def test_an_internal_error_is_one_line_with_its_place(stub: StubBalancer, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import loadtest.results\ndef broken(*_): raise KeyError('boom')\nloadtest.results._summary = broken\n",
        encoding="utf-8",
    )
    result = run(stub.url, "-n", "1", env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert result.returncode == 4
    assert re.search(r"internal error, please report it: KeyError: 'boom' \(.*sitecustomize.py:2\)$", result.stderr)
    assert result.stderr.count("\n") == 1


def test_more_connections_than_open_files_allow_are_wrong_usage(stub: StubBalancer) -> None:
    limited = f'ulimit -n 100; exec "{sys.executable}" "{SCRIPT}" {stub.url} -c 500 --algorithm weighted'
    result = subprocess.run(["sh", "-c", limited], capture_output=True, text=True, timeout=LIMIT, env=environment())
    assert result.returncode == 2
    assert "need 564 open files, and the limit is 100" in result.stderr
    assert (stub.total, stub.algorithm) == (0, "round_robin")


def test_many_connections_at_a_time(stub: StubBalancer) -> None:
    _, report = run_json(stub.url, "-n", "400", "-c", "200")
    assert (report["summary"]["connections"], report["summary"]["warmup"]) == (200, 200)
    assert report["summary"]["ok"] == 400


def test_beyond_the_limit_of_exact_times_percentiles_stay_within_a_percent(stub: StubBalancer) -> None:
    stub.delay = 0.002
    lower = "import loadtest.recording as r; r.EXACT_SAMPLES, r.CONDENSE_EVERY = 500, 100"
    code = f"import sys; {lower}; import test_client; sys.exit(test_client.main())"
    command = [sys.executable, "-c", code, stub.url, "-n", "2000", "-o", "json"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment(), cwd=ROOT)
    report = json.loads(result.stdout)
    times = report["latency_ms"]
    assert (result.returncode, report["summary"]["ok"], report["client"]["exact_percentiles"]) == (0, 2000, False)
    assert 2 <= times["min"] <= times["p50"] <= times["p95"] <= times["p99_9"] <= times["max"]
    assert sum(bucket["count"] for bucket in report["histogram"]) == 2000
    assert report["slowest"][0]["latency_ms"] == times["max"]


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["-n", "20"],
        ["-n", "20", "-q", "200", "--tolerance", "5"],
        ["-n", "20", "--compare", "weighted,round_robin"],
        ["-n", "20", "--clients", "3", "--buckets", "1us,1h"],
        ["-n", "20", "--max-p95", "1us"],
        ["-z", "50ms", "-t", "1ms", "--connect-timeout", "1ms"],
        ["--preflight-only"],
        ["-n", "5", "--no-preflight", "--expect-status", "404"],
    ],
    ids=lambda arguments: " ".join(arguments) or "check",
)
def test_json_is_as_its_schema_says(stub: StubBalancer, arguments: list[str]) -> None:
    if "-t" in arguments:
        stub.delay = 0.1
    result = run(stub.url, *arguments, "--json")
    if result.returncode == 3:  # 1 ms was too short for the preflight
        assert "timeout" in one_line(result)
        return
    report = json.loads(result.stdout)
    validator = jsonschema.Draft202012Validator(SCHEMA, format_checker=jsonschema.FormatChecker())
    assert [f"{list(error.path)}: {error.message}" for error in validator.iter_errors(report)] == []
    report["surplus"] = report["summary"]["surplus"] = 1
    assert len(list(validator.iter_errors(report))) >= 2  # so that the schema cannot fall behind


def test_no_secret_is_in_the_json(stub: StubBalancer) -> None:
    result = run(stub.url, "-n", "1", "--json", "-H", "Authorization: Bearer geheim", "-d", "geheim")
    assert ("Authorization", "Bearer geheim") in stub.headers[0]
    assert "geheim" not in result.stdout


def test_csv_has_a_row_for_each_request(stub: StubBalancer) -> None:
    stub.fail_every = 10
    result = run(stub.url, "-n", "50", "-c", "3", "--warmup", "0", "-o", "csv")
    assert result.returncode == 1
    rows = list(csv.DictReader(result.stdout.splitlines()))
    assert list(rows[0]) == ["offset_s", "latency_ms", "ttfb_ms", "status", "backend", "error", "bytes", "worker"]
    assert len(rows) == 50
    assert sum(row["error"] == "bad status 500" for row in rows) == 5
    assert {row["worker"] for row in rows} == {"1", "2", "3"}
    assert all(float(row["latency_ms"]) >= float(row["ttfb_ms"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("cycle", "name_by", "fail_every", "said"),
    [
        (
            ["b1", "backend_2"],
            "body",
            0,
            "answers call themselves backend_2, which are no ids of this balancer, so",
        ),
        (["b1"], "nothing", 0, "answers do not name their backend"),
        (["b1", "b2", "b3"], "body", 0, None),
        (["nobody"], "body", 1, None),
    ],
)
def test_a_load_run_says_why_its_shares_mean_nothing(
    stub: StubBalancer, cycle: list[str], name_by: str, fail_every: int, said: str | None
) -> None:
    """It judges none, but its table has columns for what was expected, and how far that was missed."""
    stub.cycle, stub.name_by, stub.fail_every = cycle, name_by, fail_every
    note = run_json(stub.url, "-n", "20")[1]["note"]
    assert said in note if said else note is None
    if said:
        assert said in " ".join(run(stub.url, "-n", "20").stdout.split())
        assert run_json(stub.url, "-n", "20", "--no-preflight")[1]["note"] is None  # nobody told what to expect


def test_the_report_may_go_to_a_file(stub: StubBalancer, tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    result = run(stub.url, "-n", "10", "--json", "--output-file", str(target))
    assert (result.returncode, result.stdout) == (0, "")
    assert json.loads(target.read_text(encoding="utf-8"))["summary"]["requests"] == 10
    result = run(stub.url, "-n", "10", "--output-file", str(target))
    assert "PASSED: 1 of 1 checks; the report is in" in result.stderr
    assert target.read_text(encoding="utf-8").endswith("PASSED: 1 of 1 checks\n")


def test_buckets_and_units_as_asked(stub: StubBalancer) -> None:
    stub.delay = 0.01
    _, report = run_json(stub.url, "-n", "10", *ONE_BY_ONE, "--buckets", "1ms,5ms")
    assert report["histogram"] == [{"le_ms": 1, "count": 0}, {"le_ms": 5, "count": 0}, {"le_ms": None, "count": 10}]
    text = run(stub.url, "-n", "10", *ONE_BY_ONE, "--buckets", "1ms,5ms", "--time-unit", "us").stdout
    assert "<= 1000 us" in text and "> 5000 us" in text and "Latency us" in text


def test_verbose_names_the_slowest_requests(stub: StubBalancer) -> None:
    stub.stall_at, stub.stall = 5, 0.3
    text = run(stub.url, "-n", "20", *ONE_BY_ONE, "-v").stdout
    assert "To 1st byte" in text
    assert re.search(r"Slowest +3\d\d\.\d ms +at \d\.\d+ s +200 +b2 +id request-5\n", text)


def test_debug_shows_both_sides_of_one_request(stub: StubBalancer) -> None:
    result = run(stub.url, "--debug", "-d", '{"a": 1}', "-H", "Authorization: Bearer geheim")
    assert result.returncode == 0
    assert "> POST /api/process HTTP/1.1\n" in result.stdout and '> {"a": 1}\n' in result.stdout
    assert "< HTTP/1.1 200 OK\n" in result.stdout and '< {"message": "ok", "server_id": "b1"}\n' in result.stdout
    assert "geheim" not in result.stdout
    assert len(stub.seen) == 1
    stub.fail_every = 1
    assert run(stub.url, "--debug").returncode == 1


# --- progress ---------------------------------------------------------------------------------------------------------


def on_a_terminal(*arguments: str, interrupt: Callable[[], bool] | None = None, **extra: str) -> str:
    """What a run shows whose output is a terminal of 100 columns; Ctrl-C when `interrupt` is true."""
    leader, follower = pty.openpty()
    env = environment({"TERM": "xterm", "COLUMNS": "100", **extra})
    command = [sys.executable, str(SCRIPT), *arguments]
    with running(command, stdout=follower, stderr=follower, env=env) as process:
        os.close(follower)
        if interrupt:
            wait_until(interrupt)
            process.send_signal(signal.SIGINT)
        shown = b""
        while select.select([leader], [], [], LIMIT)[0]:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # Linux: the last one to write has closed it
                break
            if not piece:
                break
            shown += piece
        assert process.wait(LIMIT) == (130 if interrupt else 0)
    os.close(leader)
    return shown.decode()


def test_a_terminal_has_a_live_line(stub: StubBalancer) -> None:
    stub.delay = 0.02
    shown = on_a_terminal(stub.url, "-n", "200", "-c", "4")
    lines = re.findall(r"\r\x1b\[K([^\r]*)", shown)
    assert len([line for line in lines if line]) >= 3
    live = r"load  .* +\d+% +\d+/200 +[\d.]+ req/s  errors 0  p95 +[\d.]+ ms  \d+ s left"
    assert any(re.match(live, line) for line in lines)
    assert all(len(line) < 100 for line in lines[:-1])
    assert "\x1b[32mPASSED: 1 of 1 checks\x1b[0m" in shown


@pytest.mark.parametrize("columns", [80, 60])
def test_a_narrow_terminal_loses_the_bar_before_the_errors(stub: StubBalancer, columns: int) -> None:
    stub.delay = 0.02
    shown = on_a_terminal(stub.url, "-n", "200", "-c", "4", COLUMNS=str(columns))
    lines = [line for line in re.findall(r"\r\x1b\[K([^\r]*)", shown)[:-1] if line.startswith("load")]
    assert lines
    for line in lines:
        assert len(line) < columns
        assert re.match(r"load  +\d+%  +\d+/200  +[\d.]+ req/s  errors 0  p95", line), line


def test_ctrl_c_takes_the_live_line_off_the_terminal(stub: StubBalancer) -> None:
    stub.delay = 0.02
    shown = on_a_terminal(stub.url, "-n", "5k", "-c", "4", interrupt=lambda: stub.total > 100)
    assert re.search(r"\r\x1b\[Kinterrupted: the report follows", shown)
    assert "INTERRUPTED" in shown.splitlines()[-1]


@pytest.mark.parametrize("extra", [{"TERM": "dumb"}, {"LB_TEST_NO_PROGRESS": "1"}, {"LB_TEST_OUTPUT": "csv"}])
def test_no_live_line_where_it_does_no_good(stub: StubBalancer, extra: dict[str, str]) -> None:
    stub.delay = 0.02
    shown = on_a_terminal(stub.url, "-n", "60", "-c", "4", **extra)
    assert "\x1b[K" not in shown and ("PASSED" in shown or shown.count(",b1,") == 20)


def test_off_a_terminal_there_is_a_plain_line_now_and_then(stub: StubBalancer) -> None:
    result = run(stub.url, "-z", "5600ms", "-q", "20", "--json")
    assert json.loads(result.stdout)["passed"]
    assert re.fullmatch(r"load  \d+%  \d+  [\d.]+ req/s  errors 0  p95 [\d.]+ ms  \d s left\n", result.stderr)


# --- the environment --------------------------------------------------------------------------------------------------


def test_every_option_has_a_long_form_and_a_variable() -> None:
    parser = build_parser()
    mirrored = set(map(id, parser.mirrored.values()))
    for action in parser._actions:
        if action.option_strings and action.dest not in ("help", "version"):
            assert any(name.startswith("--") for name in action.option_strings)
            assert id(action) in mirrored, action.dest
    assert all(re.fullmatch("LB_TEST_[A-Z0-9_]+", name) for name in parser.mirrored)


def test_variables_are_read_and_flags_win(stub: StubBalancer) -> None:
    env = {"LB_TEST_REQUESTS": "7 ", "LB_TEST_WARMUP": "0", "LB_TEST_JSON": "true", "LB_TEST_HEADER": "X-A: 1"}
    report = json.loads(run(stub.url, env=env).stdout)
    assert report["summary"]["requests"] == 7
    assert ("X-A", "1") in stub.headers[0]
    text = run(stub.url, "-n", "3", "-o", "text", env=env).stdout
    assert "Load        3 requests" in text
    _, waited = run_json(stub.url, "-z", "50ms")
    assert waited["config"]["wait"] is None
    report = json.loads(run(stub.url, "-z", "50ms", env={"LB_TEST_JSON": "1", "LB_TEST_WAIT": "no"}).stdout)
    assert report["config"]["wait"] is False


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("LB_TEST_RATE", "fast", "LB_TEST_RATE: argument -q/--rate: 'fast' is not a rate"),
        ("LB_TEST_REQUEST", "5", "unknown 'LB_TEST_REQUEST', did you mean LB_TEST_REQUESTS?"),
        ("LB_TEST_NO_COLOR", "maybe", "LB_TEST_NO_COLOR: 'maybe' is neither true nor false"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str, text: str) -> None:
    result = run(env={name: value})
    assert result.returncode == 2
    assert text in one_line(result)


# --- the client's own limit -------------------------------------------------------------------------------------------


def test_a_client_that_is_held_up_says_so(stub: StubBalancer) -> None:
    """Stopped for half a second, it sends fifty requests late: the fault of its machine, not of the balancer."""
    with started(stub.url, "-n", "100", "-q", "100", "--warmup", "0") as process:
        wait_until(lambda: len(stub.arrivals) >= 20)
        process.send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        wait_until(lambda: time.monotonic() > stopped + 0.5)
        process.send_signal(signal.SIGCONT)
        out, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0
    behind = re.search(r"at most (\d+\.\d) ms behind schedule", out)
    assert behind and float(behind[1]) >= 400
    assert "this client was the limit" in out


def test_an_unhurried_client_is_not_the_limit(stub: StubBalancer) -> None:
    stub.delay = 0.02
    _, report = run_json(stub.url, "-n", "40", "-c", "2")
    assert report["client"]["cpu_ratio"] < 0.9
    assert report["client"]["exact_percentiles"] is True


# --- the real thing ---------------------------------------------------------------------------------------------------


def test_a_real_balancer_under_load(demo: Demo) -> None:
    code, report = run_json(demo.url, "-n", "600", "-c", "10", "--expect-weights", "--tolerance", "2")
    assert code == 0, report["checks"]
    assert [row["id"] for row in report["backends"]] == ["backend_1", "backend_2", "backend_3"]
    assert report["balancer"]["delta"]["total_requests"] == 620
    assert report["slowest"][0]["request_id"]


def test_a_backend_that_dies_under_load_costs_no_request(demo: Demo) -> None:
    killer = threading.Thread(target=lambda: kill_under_load(demo))
    killer.start()
    code, report = run_json(demo.url, "-z", "3s", "-q", "100")
    killer.join()
    assert code == 0, report["errors"]
    assert report["balancer"]["delta"]["retries"] >= 1


def kill_under_load(demo: Demo) -> None:
    wait_until(lambda: demo.balancer.status()["statistics"]["total_requests"] > 50)
    demo.backends[0].kill()


# --- the pages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", ["docs/load-testing.md", "README.md"])
def test_pages_name_only_options_that_there_are(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.json").write_text('{"summary": {}, "latency_ms": {}}', encoding="ascii")
    commands = re.findall(r"test_client\.py( .*?)(?:`|#|$)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert commands
    for command in commands:
        parse_options(command.split(), {})


def test_the_exit_codes_and_reasons_of_the_page_are_those_of_the_program() -> None:
    page = (ROOT / "docs" / "load-testing.md").read_text(encoding="utf-8")
    for code in (problems.EXIT_FAILED, problems.EXIT_USAGE, problems.EXIT_UNREACHABLE, problems.EXIT_INTERNAL):
        assert f"| {code} |" in page
    reasons = SCHEMA["$defs"]["result"]["properties"]["errors"]["items"]["properties"]["reason"]["enum"]
    assert all(f"`{reason}`" in page for reason in reasons)
