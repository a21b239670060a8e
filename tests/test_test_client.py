"""The check of test_client.py, its usage and its behaviour on signals and terminals: the real command against a stub
balancer that behaves as each test wants, and once against the real one."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from stub_balancer import LIMIT, SCRIPT, StubBalancer, environment, interrupted, one_line, run, run_json, started
from support import ROOT, Balancer, fetch, free_port, ok, running, wait_until
from wire import WireBackend

import test_client
from balancer import __version__
from loadtest import VERSION

# --- the check --------------------------------------------------------------------------------------------------------


def test_a_good_balancer_passes_every_test(stub: StubBalancer) -> None:
    result = run(stub.url)
    assert (result.returncode, result.stderr) == (0, "")
    for title in ("Sequential: 20", "Concurrent: 200", "Distribution: 120", "Response times: 200", "3/3 backends up"):
        assert title in result.stdout
    assert "Failures: none in 540 requests" in result.stdout
    assert "Balancer delta: total +540, successful +540, failed +0 (540 sent)" in result.stdout
    assert result.stdout.splitlines()[-1] == "PASSED: 6 of 6 checks"
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "\x1b" not in result.stdout


def test_each_worker_keeps_one_connection(stub: StubBalancer) -> None:
    run(stub.url, "-c", "7", "-n", "70", "--warmup", "14")
    assert stub.total == 84
    assert stub.connections - 7 <= 6  # the others are looks at /health and /status


def test_the_tests_of_the_check_are_parts_of_the_json(stub: StubBalancer) -> None:
    code, report = run_json(stub.url)
    assert code == 0
    assert report["tool"] == {"name": "test_client.py", "version": VERSION}
    assert report["target"] == f"{stub.url}/api/process"
    assert (report["passed"], report["interrupted"]) == (True, False)
    assert [test["name"] for test in report["tests"]] == ["sequential", "concurrent", "distribution", "response-times"]
    assert (report["summary"]["requests"], report["summary"]["ok"], report["summary"]["failed"]) == (540, 540, 0)
    assert report["balancer"]["delta"]["total_requests"] == report["balancer"]["sent"] == 540
    times = report["tests"][3]
    assert list(times["latency_ms"]) == ["min", "mean", "stdev", "p50", "p75", "p90", "p95", "p99", "p99_9", "max"]
    assert sum(bucket["count"] for bucket in times["histogram"]) == 200
    assert times["status_codes"] == {"200": 200}
    rows = report["tests"][2]["backends"]
    assert [(row["id"], row["count"], row["errors"]) for row in rows] == [("b1", 40, 0), ("b2", 40, 0), ("b3", 40, 0)]
    assert rows[0]["share"] == pytest.approx(1 / 3)
    assert rows[0]["deviation"] == pytest.approx(0)


def test_the_address_comes_from_the_environment(stub: StubBalancer) -> None:
    """With the trailing blank that cmd.exe leaves; LB_PORT is the variable of the start script."""
    port = str(stub.server_address[1])
    common = ("-n", "20", "--warmup", "0")
    for count, env in enumerate(({"LB_URL": f"{stub.url} "}, {"LB_PORT": f"{port} "}), 1):
        assert run(*common, env=env).returncode == 0
        assert stub.total == 20 * count
    given = run(stub.url, *common, env={"LB_PORT": "none"})
    assert (given.returncode, stub.total) == (0, 60)
    wrong = run(env={"LB_PORT": "90000"})
    assert wrong.returncode == 2
    assert "LB_PORT: '90000' is not a port from 1 to 65535" in one_line(wrong)


@pytest.mark.parametrize("moved", ["prefix", "port"])
def test_a_control_api_that_was_moved_is_found_where_the_option_says(backend: WireBackend, moved: str) -> None:
    backend.answer(ok(b'{"server_id": "b1"}'))
    port = free_port()
    flags = ["--control-prefix=/lb"] if moved == "prefix" else [f"--control-port={port}"]
    with Balancer(f"--backend=b1={backend.url}", *flags, wait_ready=False) as balancer:
        control = f"{balancer.url}/lb/" if moved == "prefix" else f"http://127.0.0.1:{port}"
        wait_until(lambda: fetch(f"{control.rstrip('/')}/readyz")[0] == 200)
        lost = run(balancer.url)
        assert lost.returncode == 3
        assert "say with --control URL where control_prefix or control_port moved its control API" in one_line(lost)
        found = run(balancer.url, "--control", control, "-n", "30", "--algorithm", "least_connections")
        assert (found.returncode, found.stderr) == (0, "")
        assert "algorithm least_connections, 1/1 backends up" in found.stdout
        assert "PASSED" in run(balancer.url, env={"LB_TEST_CONTROL": control}).stdout


def test_skewed_shares_fail(stub: StubBalancer) -> None:
    stub.cycle = ["b1", "b1", "b2", "b3"]
    result = run(stub.url)
    assert result.returncode == 1
    assert re.search(r"FAIL  distribution: share off by +16\.7 points +at most 5\.0 points", result.stdout)
    assert result.stdout.splitlines()[-1] == "FAILED: 1 of 6 checks"


def test_shares_without_expectation_are_only_reported(stub: StubBalancer) -> None:
    stub.expected = dict.fromkeys(stub.expected)
    stub.cycle = ["b1"]
    code, report = run_json(stub.url)
    assert code == 0
    assert "expects no certain shares" in report["tests"][2]["note"]
    assert [row["count"] for row in report["tests"][2]["backends"]] == [120, 0, 0]
    stub.expected, stub.name_by = {"b1": 0.5, "b2": 0.5}, "nothing"
    result = run(stub.url)
    assert (result.returncode, "answers do not name their backend" in result.stdout) == (0, True)


def test_names_that_the_balancer_does_not_know_are_not_judged(stub: StubBalancer) -> None:
    """Servers that call themselves otherwise than their balancer does are no fault of it."""
    stub.cycle = ["backend_1", "backend_2", "backend_3", "backend_4"]
    result = run(stub.url)
    assert (result.returncode, result.stderr) == (0, "")
    shown = " ".join(result.stdout.split())
    assert "answers call themselves backend_1, backend_2, backend_3, ..., which are no ids of this balancer" in shown
    assert "start it with --expose-backend or give --backend-header" in shown
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert result.stdout.splitlines()[-1] == "PASSED: 5 of 5 checks"
    given = run(stub.url, "-n", "120", "--expect", "backend_1=100")  # who names shares means these names
    assert (given.returncode, "FAIL  share off by" in given.stdout) == (1, True)


@pytest.mark.parametrize("judged", [(), ("--tolerance", "1")])
def test_a_backend_that_comes_during_the_test_is_no_strange_name(stub: StubBalancer, judged: tuple[str, ...]) -> None:
    stub.delay = 0.01
    with started(stub.url, "-n", "600", *judged, "--warmup", "0", "--json") as process:
        wait_until(lambda: stub.total > 30)
        stub.expected = {**stub.expected, "b4": 0.25}
        stub.cycle = [*stub.cycle, "b4"]
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, "expected shares changed" in json.loads(out)["note"]) == (0, True)


def test_errors_fail_and_are_named(stub: StubBalancer) -> None:
    stub.fail_every = 10
    result = run(stub.url)
    assert result.returncode == 1
    assert "180 ok, 20 failed" in result.stdout
    assert "Failures: 54 of 540 requests" in result.stdout
    assert re.search(r"Error +\d+ x bad status 500 \(b[123]\)", result.stdout)
    assert re.search(r"FAIL  concurrent: error rate +10\.0 % +at most 0\.0 %", result.stdout)
    assert run(stub.url, "--max-error-rate", "10").returncode == 0
    quiet = run(stub.url, "--exit-zero", "--output", "quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def test_thresholds_judge_the_response_times_of_the_check(stub: StubBalancer) -> None:
    code, report = run_json(stub.url, "--max-p50", "1us", "--min-rps", "1")
    assert code == 1
    judged = [(item["part"], item["name"], item["passed"]) for item in report["checks"][-3:-1]]
    assert judged == [("response-times", "p50", False), ("response-times", "rate", True)]


@pytest.mark.parametrize(
    ("share", "code", "told"),
    [(0.5, 1, r"FAIL  balancer: requests counted +270 +at least 540"), (2.0, 0, "540 more than sent here")],
)
def test_a_balancer_that_miscounts_fails_and_traffic_of_others_does_not(
    stub: StubBalancer, share: float, code: int, told: str
) -> None:
    stub.count_share = share
    result = run(stub.url)
    assert result.returncode == code
    assert re.search(told, result.stdout)


def test_a_balancer_that_goes_away_during_the_run_fails(stub: StubBalancer) -> None:
    with started(stub.url) as process:
        wait_until(lambda: stub.total > 20)
        stub.is_balancer = False
        out, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors) == (1, "")
    assert "x bad status 404 (unnamed)" in out
    assert "FAIL  balancer: /status answers at the end" in out


def test_backends_that_are_down_are_named_and_without_any_the_balancer_says_why(stub: StubBalancer) -> None:
    stub.reasons = {name: f"health check failed: http://{name}\x1b: Connection refused" for name in stub.expected}
    shown = run(stub.url, "--preflight-only").stdout
    assert "algorithm round_robin, 3/3 backends up" in shown and "Connection refused" not in shown
    stub.down = {"b3"}
    assert "2/3 backends up (down: b3)" in run(stub.url, "--preflight-only").stdout
    stub.down = {"b1", "b2", "b3"}
    shown = run(stub.url, "--preflight-only").stdout
    assert "0/3 backends up (down: b1, b2, b3)\n" in shown
    assert "\n            b1: health check failed: http://b1?: Connection refused\n" in shown
    stub.expected = dict.fromkeys(f"b{number}" for number in range(1, 10))
    stub.down = set(stub.expected)
    stub.reasons = dict.fromkeys(stub.expected, "why " * 50)
    looked = run(stub.url, "--preflight-only")
    assert "            and 3 more" in looked.stdout.splitlines()
    assert max(map(len, looked.stdout.splitlines())) <= 100
    assert (looked.returncode, stub.seen) == (0, [])  # only looking sends nothing


# --- not a balancer ---------------------------------------------------------------------------------------------------


def test_nobody_listens() -> None:
    result = run(f"http://127.0.0.1:{free_port()}", "--json")
    assert result.returncode == 3
    assert "connect refused" in one_line(result)
    assert "start_all.sh" in result.stderr
    moved = run("--control", f"http://127.0.0.1:{free_port()}/lb")
    assert moved.returncode == 3
    assert one_line(moved).endswith("or say where it is: --control URL\n")


def test_what_listens_is_no_balancer(stub: StubBalancer) -> None:
    stub.is_balancer = False
    result = run(stub.url)
    assert result.returncode == 3
    assert "not as a balancer does (/health: 404)" in one_line(result)
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        thread = threading.Thread(target=lambda: greet(server))
        thread.start()
        result = run(url, "-t", "5s")
        thread.join()
        assert result.returncode == 3
        assert "malformed" in one_line(result)
        result = run(url, "-t", "200ms")
    assert result.returncode == 3
    assert "timeout" in one_line(result)


def greet(server: socket.socket) -> None:
    with server.accept()[0] as connection:
        connection.recv(1000)
        connection.sendall(b"SSH-2.0-x\r\n\r\n")


# What is said, and of which arguments.
USAGE: dict[str, list[list[str]]] = {
    "-n/--requests": [["-n", "0"], ["-n", "-5"], ["-n", "1e3"]],
    "1000000000": [["-n", "2000m"]],
    "-c/--concurrency": [["-c", "0"]],
    "from 1 to 1000": [["-c", "1001"]],
    "duration": [["-t", "nan"], ["-t", "inf"], ["-t", "0"]],
    "-t/--timeout": [["-t", "-1s"]],
    "--max-p95": [["--max-p95", "fast"]],
    "--max-p95: '200' has no unit: 200ms or 200s?": [["--max-p95", "200"]],
    "--max-p50: '0.2' has no unit: 0.2ms or 0.2s?": [["--max-p50", "0.2"]],
    "--buckets: '10' has no unit: 10ms or 10s?": [["--buckets", "5ms,10"]],
    "--tolerance": [["--tolerance", "nan"]],
    "from 0 to 100": [["--tolerance", "101"], ["--expect", "b1=nan"]],
    "--max-error-rate": [["--max-error-rate", "-1"]],
    "b1=50,b2=33": [["--expect", "b1"], ["--expect", "b1=60,b2=60"], ["--expect", "b1=10,b1=10"]],
    "rate": [["-q", "0"]],
    "-q/--rate": [["-q", "nan"]],
    "-z/--duration": [["-z", "0s"]],
    "rising durations": [["--buckets", "5ms,1ms"]],
    "--expect-status": [["--expect-status", "600"]],
    "--compare": [["--compare", "a,a"]],
    "from 1 to 100000": [["--clients", "100001"]],
    "xml": [["-o", "xml"]],
    "--time-unit": [["--time-unit", "h"]],
    "--data and --data-file cannot be used together": [["-d", "x", "-D", "/dev/null"]],
    "--expect and --expect-weights": [["--expect", "a=1", "--expect-weights"]],
    "--algorithm and --compare": [["--algorithm", "a", "--compare", "a,b"]],
    "--no-preflight and --compare": [["--no-preflight", "--compare", "a,b"]],
    "--compare and --output csv": [["--compare", "a,b", "-o", "csv"]],
    "--duration": [["--no-wait"]],
    "--content-type needs a body": [["-T", "text/plain"]],
    "cannot read '/does/not/exist'": [["-D", "/does/not/exist"]],
    "cannot write to '/does/not/exist'": [["--output-file", "/does/not/exist"]],
    "--path": [["--path", "no-slash"], ["--path", "/a b"]],
    "Name: value": [["-H", "nocolon"], ["-H", "A: b\r\nC: d"]],
    "HTTP method": [["-m", "GE T"]],
    "token": [["--token-file", "/does/not/exist"]],
    "unknown '--wrong'": [["--wrong"]],
    "unknown '--concurency', did you mean --concurrency?": [["--concurency", "5"]],
    "unknown '--max-p90', did you mean --max-p": [["--max-p90=1s"]],
    "only http:// and https://": [["ftp://127.0.0.1"]],
    "cannot use the URL": [
        ["http://127.0.0.1:99999"],
        ["http://127.0.0.1:x"],
        ["http://"],
        ["http://[::1"],
        ["http://a b"],
        ["http://127.0.0.1/a b"],
    ],
    "user name": [["http://user@127.0.0.1"]],
    "cannot use the URL 'ftp://127.0.0.1'": [["--control", "ftp://127.0.0.1"]],
    "--control has no query": [["--control", "http://127.0.0.1/lb?a"]],
    "two": [["one", "two"]],
}


@pytest.mark.parametrize("text", USAGE)
def test_bad_usage_is_one_line_and_exit_2(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in USAGE[text]:
        assert test_client.main(arguments) == 2
        told = capsys.readouterr()
        assert told.out == "" and text in told.err
        assert told.err.startswith("test_client.py: ") and told.err.count("\n") == 1


def test_help_and_version() -> None:
    shown = run("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("examples:\n")
    assert max(map(len, shown.stdout.splitlines())) <= 120
    assert run("-V").stdout == f"test_client.py {__version__}\n"


# --- switching the algorithm ------------------------------------------------------------------------------------------


def test_the_algorithm_is_switched_and_put_back(stub: StubBalancer) -> None:
    assert run(stub.url, "-n", "20", "--algorithm", "round_robin").returncode == 0
    assert stub.switches == []  # it is so already
    result = run(stub.url, "-n", "20", "--algorithm", "weighted")
    assert result.returncode == 0
    assert "algorithm weighted" in result.stdout
    assert (stub.switches, stub.algorithm) == (["weighted", "round_robin"], "round_robin")


@pytest.mark.parametrize(
    ("refusal", "code", "words"),
    [
        ((403, {"error": "read-only"}), 3, "refused to switch to algorithm 'weighted' (403 read-only); give a token"),
        ((400, {"error": "unknown", "valid_options": ["round_robin", "moon"]}), 2, "choose from round_robin, moon"),
    ],
)
def test_a_refused_switch_ends_the_run(stub: StubBalancer, refusal: Any, code: int, words: str) -> None:
    stub.refuse_switch = refusal
    result = run(stub.url, "--algorithm", "weighted")
    assert (result.returncode, stub.total) == (code, 0)
    assert words in one_line(result)


def test_an_algorithm_that_cannot_be_put_back_is_a_failure(stub: StubBalancer) -> None:
    stub.delay = 0.01
    with started(stub.url, "-c", "1", "-n", "200", "--algorithm", "weighted") as process:
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
    code, report = run_json(stub.url, "-n", "20", "--token-file", str(tmp_path / "token"))
    assert code == 0
    assert "secret" not in json.dumps(report)
    assert all(name.lower() != "authorization" for sent in stub.headers for name, _ in sent)


def test_a_token_opens_the_reads_of_a_real_balancer(tmp_path: Path) -> None:
    token, file = "a-token-of-this-test", tmp_path / "token"
    file.write_text(token, encoding="ascii")
    with WireBackend() as backend:
        flags = (f"--backend=b={backend.url}", "--control-reads=token")
        with Balancer(*flags, "--expose-backend", env={"LB_ADMIN_TOKEN": token}) as balancer:
            without = one_line(run(balancer.url, "-n", "20"))
            assert 'wants a token (401 control_reads is "token"' in without and "--token-file FILE" in without
            given = run(balancer.url, "-n", "20", "--compare", "round_robin,weighted", "--token-file", str(file))
            assert given.returncode == 0, given.stdout + given.stderr


# --- interruption -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_ctrl_c_reports_what_there_is_and_puts_the_algorithm_back(
    stub: StubBalancer, number: signal.Signals, code: int
) -> None:
    stub.delay = 0.05
    returned, out, errors = interrupted(
        stub.url, "-n", "5k", "--algorithm", "weighted", when=lambda: stub.total > 20, number=number
    )
    assert returned == code
    assert "interrupted: the report follows" in errors
    assert re.search(r"Summary +\d+ ok .* interrupted$", out, re.MULTILINE)
    assert out.splitlines()[-1] == "INTERRUPTED: 1 of 1 checks hold so far"
    assert stub.algorithm == "round_robin"


def test_ctrl_c_does_not_wait_for_answers_that_do_not_come(stub: StubBalancer) -> None:
    stub.delay = 600
    returned, out, _ = interrupted(stub.url, "--json", "-c", "3", "--warmup", "0", when=lambda: len(stub.seen) == 3)
    assert returned == 130
    report = json.loads(out)
    assert report["interrupted"] and not report["passed"]
    found = report["summary"]
    assert (found["requests"], found["error_rate"], found["cut_off"], found["sent"]) == (0, None, 3, 3)
    assert report["latency_ms"]["p50"] is None


def test_ctrl_c_before_anything_is_sent_is_quiet() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with started(f"http://127.0.0.1:{server.getsockname()[1]}") as process, server.accept()[0]:
            process.send_signal(signal.SIGINT)  # it waits for the answer of the preflight
            out, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, out, errors) == (-signal.SIGINT, "", "")


def test_ctrl_c_during_the_warm_up_reports_nothing_but_that(stub: StubBalancer) -> None:
    stub.delay = 600
    returned, out, _ = interrupted(stub.url, "-n", "10", when=lambda: len(stub.seen) == 10)
    assert returned == 130
    assert re.search(r"Summary +0 ok   0 failed .* interrupted$", out, re.MULTILINE)
    assert out.splitlines()[-1] == "INTERRUPTED before there was anything to check"


def test_ctrl_c_during_the_check_reports_the_tests_so_far(stub: StubBalancer) -> None:
    stub.delay = 0.03
    returned, out, _ = interrupted(stub.url, when=lambda: stub.total > 30)
    assert returned == 130
    assert re.search(r"Concurrent: 200 requests, 10 at a time \(interrupted after \d+\)", out)
    assert "Distribution" not in out
    assert out.splitlines()[-1] == "INTERRUPTED: 3 of 3 checks hold so far"


def test_a_second_ctrl_c_leaves_at_once_and_says_what_stays(stub: StubBalancer) -> None:
    stub.delay = 600
    with started(stub.url, "--algorithm", "weighted") as process:
        wait_until(lambda: len(stub.seen) > 0)
        process.send_signal(signal.SIGINT)
        assert process.stderr and "interrupted" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 130
    assert "the algorithm is still weighted, it was round_robin" in errors


@pytest.mark.parametrize("arguments", [["--algorithm", "weighted"], ["--compare", "weighted,least_connections"]])
def test_closing_the_terminal_puts_the_algorithm_back(stub: StubBalancer, arguments: list[str]) -> None:
    """The session leader gets SIGHUP from the kernel; what is written then fails."""
    stub.delay = 0.05
    leader, follower = os.openpty()
    claim = "import fcntl, os, runpy, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); del sys.argv[0]; "
    command = [sys.executable, "-c", claim + "runpy.run_path(sys.argv[0], run_name='__main__')", str(SCRIPT)]
    command += [stub.url, "-n", "5k", *arguments]
    with running(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment(), start_new_session=True, cwd=ROOT
    ) as process:
        os.close(follower)
        wait_until(lambda: stub.total > 20)
        assert stub.algorithm == "weighted"
        os.close(leader)
        assert process.wait(LIMIT) == 129
    assert stub.switches == ["weighted", "round_robin"]
    assert stub.total < 5000


def test_a_second_hangup_is_not_impatience(stub: StubBalancer) -> None:
    stub.delay = 0.5
    with started(stub.url, "-n", "5k", "--algorithm", "weighted") as process:
        wait_until(lambda: len(stub.seen) > 20)
        process.send_signal(signal.SIGHUP)
        assert process.stderr and "interrupted" in process.stderr.readline()
        process.send_signal(signal.SIGHUP)
        out, errors = process.communicate(timeout=LIMIT)
    assert (process.returncode, errors, stub.algorithm) == (129, "", "round_robin")
    assert "INTERRUPTED" in out


def test_a_hangup_that_nohup_ignores_stays_ignored(stub: StubBalancer) -> None:
    stub.delay = 0.02
    ignoring = f'trap "" HUP; exec "{sys.executable}" "{SCRIPT}" {stub.url} -n 100 -c 2'
    with running(["sh", "-c", ignoring], stdout=subprocess.PIPE, text=True, env=environment()) as process:
        wait_until(lambda: stub.total > 20)
        process.send_signal(signal.SIGHUP)
        out, _ = process.communicate(timeout=LIMIT)
    assert (process.returncode, "PASSED" in out) == (0, True)


# --- terminals and pipes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--json"], ["--help"]])
def test_a_reader_that_goes_away_is_no_traceback(stub: StubBalancer, arguments: list[str]) -> None:
    with started(stub.url, "-n", "20", *arguments) as process:
        assert process.stdout
        process.stdout.close()  # before the first line is written
        process.wait(LIMIT)
        assert process.stderr and process.stderr.read() == ""
        assert process.returncode == 0


def test_rows_that_nobody_reads_end_the_run(stub: StubBalancer) -> None:
    stub.delay = 0.01
    with started(stub.url, "-n", "100k", "-o", "csv", "--no-progress", "--algorithm", "weighted") as process:
        assert process.stdout and process.stdout.readline().startswith("offset_s,")
        process.stdout.close()  # as `| head -1` does
        assert process.wait(LIMIT) == 141
        assert process.stderr and process.stderr.read() == ""
    assert stub.total < 100_000
    assert stub.algorithm == "round_robin"


def test_a_report_that_cannot_be_written_is_an_error(stub: StubBalancer) -> None:
    command = [sys.executable, str(SCRIPT), stub.url, "-n", "20", "--algorithm", "weighted"]
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


@pytest.mark.parametrize(
    ("arguments", "extra", "colored"),
    [([], {}, True), (["--no-color"], {}, False), ([], {"NO_COLOR": "1"}, False), ([], {"TERM": "dumb"}, False)],
)
def test_colour_on_a_terminal_only_where_wanted(
    stub: StubBalancer, arguments: list[str], extra: dict[str, str], colored: bool
) -> None:
    leader, follower = os.openpty()
    command = [sys.executable, str(SCRIPT), stub.url, "-n", "1", *arguments]
    with running(command, stdout=follower, env=environment({"TERM": "xterm", **extra})) as process:
        assert process.wait(LIMIT) == 0
    shown = os.read(leader, 65536)
    os.close(leader)
    os.close(follower)
    assert (b"\x1b[32m" in shown) is colored


# --- the real thing ---------------------------------------------------------------------------------------------------


def test_the_demo_passes(demo: Any) -> None:
    result = run(demo.url)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED" in result.stdout.splitlines()[-1]
