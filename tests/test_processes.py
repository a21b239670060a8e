"""Several worker processes: one balancer towards clients, operators and backends, whatever becomes of any of them."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from socket import socket
from typing import Any

import pytest
from certificates import Files, make_pair
from fleet import DemoBackend
from redis_server import RedisServer
from support import (
    PYTHON,
    ROOT,
    BalancerProcess,
    Process,
    RawRequest,
    StartProcess,
    connect,
    fetch,
    fetch_json,
    get,
    ok,
    read_all,
    wait_until,
)
from wire import WireBackend

from balancer.edge import quota
from balancer.edge.upgrade import Successor
from balancer.errors import SettingsError
from balancer.loadbalancer import LoadBalancer
from balancer.processes.crew import LONGEST_PAUSE, SETTLE_SECONDS
from balancer.processes.crew import Crew as RealCrew
from balancer.processes.forwarded import AskingMaster

MANY = 24  # connections: that all go to one of two workers is out of the question


def workers(url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = fetch_json(f"{url}/cluster")["workers"]
    return found


def are_running(url: str, count: int = 2) -> bool:
    with suppress(OSError, ValueError):
        return [each["state"] for each in workers(url)] == ["running"] * count
    return False


def pids(url: str) -> list[int]:
    return [each["pid"] for each in workers(url)]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def children(parent: int) -> set[int]:
    listed = subprocess.run(["ps", "--ppid", str(parent), "-o", "pid="], capture_output=True, text=True, check=False)
    return {int(pid) for pid in listed.stdout.split() if not is_gone(int(pid))}


def served_by(url: str, count: int = MANY) -> Counter[str]:
    """By which backends, over so many connections."""
    answers = [fetch(f"{url}/") for _ in range(count)]
    assert {status for status, _, _ in answers} == {200}
    return Counter(headers["x-served-by"] for _, headers, _ in answers)


@contextmanager
def traffic(url: str) -> Iterator[list[object]]:
    """Requests meanwhile, over new connections and kept ones; what failed of them."""
    failed: list[object] = []
    answered: list[int] = []
    is_over = threading.Event()
    port = int(url.rpartition(":")[2])

    def ask(is_kept: bool) -> None:
        client = HTTPConnection("127.0.0.1", port, timeout=60)
        while not is_over.is_set():
            try:
                client.request("GET", "/")
                response = client.getresponse()
                response.read()
                (answered if response.status == 200 else failed).append(response.status)
            except (OSError, HTTPException) as error:
                failed.append(error)
                client.close()
            if not is_kept:
                client.close()
        client.close()

    threads = [threading.Thread(target=ask, args=(is_kept,), name="traffic") for is_kept in (False, True, True)]
    for thread in threads:
        thread.start()
    try:
        yield failed
        before = len(answered)
        wait_until(lambda: len(answered) > before + 20 or failed, "traffic goes on")
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


class Crew:
    """Two workers in front of two backends, with settings from a file."""

    def __init__(self, folder: Path) -> None:
        self.backends = {name: DemoBackend(name) for name in ("a", "b")}
        self.file = folder / "lb.toml"
        self.configure("")
        flags = ("--expose-backend", "--health-interval=0.2", "--access-log=false", "--algorithm=round_robin")
        self.process = BalancerProcess("--workers=2", f"--config={self.file}", *flags)
        self.url = self.process.url
        wait_until(lambda: are_running(self.url), "two workers")

    def configure(self, more: str) -> None:
        backends = [f'[[backends]]\nid = "{name}"\nurl = "{each.url}"\n' for name, each in self.backends.items()]
        self.file.write_text(f"{more}\n{''.join(backends)}", encoding="utf-8")

    def change(self, path: str, body: Any = None, method: str = "PATCH") -> int:
        return fetch(f"{self.url}{path}", {} if body is None else body, method)[0]

    def waiting(self) -> int:
        """The one more that has no place yet."""
        (spare,) = wait_until(lambda: children(self.process.pid) - {*pids(self.url)}, "one that waits")
        return spare

    def close(self) -> None:
        self.process.stop()
        for backend in self.backends.values():
            backend.kill()


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    crew = Crew(tmp_path_factory.mktemp("crew"))
    yield crew
    crew.close()


# One balancer.


def test_the_master_never_has_granian(crew: Crew) -> None:
    """Nor is it any worker's: it could end with that. Each worker has a CPU of its own."""

    def has_it(pid: int) -> bool:
        return "_granian" in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")

    found = workers(crew.url)
    assert [has_it(pid) for pid in (crew.process.pid, *pids(crew.url))] == [False, True, True]
    assert [os.sched_getaffinity(each["pid"]) for each in found] == [{each["cpu"]} for each in found]
    assert len({each["cpu"] for each in found}) == min(2, len(os.sched_getaffinity(0)))


def test_a_worker_imports_nothing_that_only_its_master_needs() -> None:
    needless = "flask werkzeug prometheus_client sqlite3 redis dns balancer.control.api balancer.fleet.docker"
    code = f"import sys, balancer.processes.worker; print(*set({needless!r}.split()) & sys.modules.keys())"
    assert subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout == "\n"


def test_whoever_accepts_a_control_request_the_same_answers(crew: Crew) -> None:
    assert crew.change("/reset", method="POST") == 200
    assert sum(served_by(crew.url).values()) == MANY
    identifier = fetch(f"{crew.url}/")[1]["x-request-id"]
    for _ in range(6):
        assert crew.process.status()["statistics"]["total_requests"] == MANY + 1
        assert fetch_json(f"{crew.url}/requests/{identifier}")["request_id"] == identifier
        assert b"statistics_reset" in fetch(f"{crew.url}/metrics")[2]
        assert fetch(f"{crew.url}/dashboard")[2].rstrip().endswith(b"</html>")
    assert crew.change("/backends/a", {"weight": "x"}) == 422
    assert fetch(f"{crew.url}/reset", b"x" * 100_000, "POST", Content_Type="application/json")[0] == 413


def test_what_is_decided_holds_in_all(crew: Crew) -> None:
    assert crew.change("/backends/a", {"admin_state": "drain"}) == 200
    assert served_by(crew.url) == {"b": MANY}
    assert crew.change("/backends", {"id": "c", "url": crew.backends["a"].url}, "POST") == 201
    crew.process.wait_healthy("c")
    wait_until(lambda: served_by(crew.url).keys() == {"b", "c"}, "it takes part everywhere")
    assert crew.change("/backends/c", method="DELETE") == 200
    assert crew.change("/backends/b", {"weight": 0}) == 200
    assert crew.change("/backends/a", {"admin_state": "ready"}) == 200
    wait_until(lambda: served_by(crew.url) == {"a": MANY}, "as decided")
    for weight in (1, 0) * 5 + (1,):  # and when the answer is here, everywhere
        assert crew.change("/backends/b", {"weight": weight}) == 200
        assert ("b" in served_by(crew.url)) == bool(weight)
    assert crew.change("/algorithm", {"algorithm": "least_connections"}, "POST") == 200
    assert served_by(crew.url).keys() == {"a", "b"}
    assert {fetch_json(f"{crew.url}/algorithm")["current"] for _ in range(6)} == {"least_connections"}


def test_who_is_down_is_down_for_all_and_no_request_pays_for_it(crew: Crew) -> None:
    crew.backends["a"].kill()
    assert served_by(crew.url) == {"b": MANY}
    crew.process.wait_healthy("a", healthy=False)
    crew.backends["a"].start()
    crew.process.wait_healthy("a")
    wait_until(lambda: served_by(crew.url).keys() == {"a", "b"}, "it is back everywhere")


def test_whom_one_worker_ejects_gets_nothing_from_any(crew: Crew) -> None:
    """Over one connection, so that all failures are seen by the same one."""
    script = crew.backends["a"].script
    crew.backends["a"].answer(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
    with connect(crew.process.port) as client:
        for _ in range(100):
            client.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
            client.recv(65536)
            if crew.process.backend("a")["state"] == "ejected":
                break
    crew.backends["a"].script = script
    assert served_by(crew.url) == {"b": MANY}
    assert "ejected" in [each["kind"].partition("_")[2] for each in fetch_json(f"{crew.url}/events")["events"]]
    assert crew.change("/backends/a", {"admin_state": "maint"}) == 200
    assert crew.change("/backends/a", {"admin_state": "ready"}) == 200
    wait_until(lambda: served_by(crew.url).keys() == {"a", "b"}, "maintenance ends an ejection everywhere")


def test_a_backend_drains_until_its_last_request_in_any_worker_has_ended(crew: Crew) -> None:
    may_end, script = threading.Event(), crew.backends["a"].script

    def slow(sock: socket, request: RawRequest) -> None:
        may_end.wait()
        script(sock, request)

    crew.backends["a"].script = slow
    assert crew.change("/backends/b", {"admin_state": "drain"}) == 200
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(crew.process.port)) for _ in range(MANY)]
        for client in clients:
            client.sendall(get())
        wait_until(lambda: crew.process.backend("a")["active_connections"] == MANY, "all are there")
        assert crew.change("/backends/a", {"admin_state": "drain"}) == 200
        assert crew.process.backend("a")["state"] == "drain"
        may_end.set()
        assert all(b" 200 " in read_all(client) for client in clients)
    wait_until(lambda: crew.process.backend("a")["state"] == "drained", "it is drained")
    crew.backends["a"].script = script
    assert [crew.change(f"/backends/{name}", {"admin_state": "ready"}) for name in "ab"] == [200, 200]


def test_a_reload_reaches_all(crew: Crew) -> None:
    crew.configure('response_headers = { set = { X-Version = "2" } }')
    crew.process.send(signal.SIGHUP)
    wait_until(
        lambda: {fetch(f"{crew.url}/")[1].get("x-version") for _ in range(MANY)} == {"2"}, "each says so in its answers"
    )
    crew.configure("nonsense = 3")
    crew.process.send(signal.SIGHUP)
    wait_until(lambda: "configuration not reloaded" in crew.process.output, "a wrong file is refused")
    crew.configure("")


# Whatever becomes of one.


def test_a_killed_worker_takes_no_more_with_it_than_it_had(crew: Crew) -> None:
    """And one that waited for this takes its place, with what was decided; even if another one that did was killed."""
    os.kill(killed := crew.waiting(), signal.SIGKILL)
    wait_until(lambda: is_gone(killed), "it has ended")
    spare = crew.waiting()
    assert crew.change("/backends/a", {"admin_state": "drain"}) == 200
    assert crew.change("/reset", method="POST") == 200
    with traffic(crew.url) as failed:
        victim = pids(crew.url)[0]
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: victim not in pids(crew.url) and are_running(crew.url), "another worker")
        assert pids(crew.url)[0] == spare
        assert served_by(crew.url) == {"b": MANY}
        lost = len(failed)
        assert lost <= 3  # as many as there are at a time
        failed.clear()
    assert not failed
    told = re.search(
        r"worker_lost: worker 0 .* was ended by SIGKILL, with (\d) requests in flight", crew.process.output
    )
    assert told is not None and int(told[1]) <= lost
    wait_until(lambda: crew.process.status()["statistics"]["active_requests"] == 0, "none is taken for in flight")
    assert crew.change("/backends/a", {"admin_state": "ready"}) == 200


def test_who_waits_is_kept_while_descriptors_are_missing(crew: Crew) -> None:
    resource = pytest.importorskip("resource")
    spare = crew.waiting()
    master, victim = crew.process.pid, pids(crew.url)[0]
    before = resource.prlimit(master, resource.RLIMIT_NOFILE)
    resource.prlimit(master, resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: "Too many open files" in crew.process.output, "nobody can begin")
    finally:
        resource.prlimit(master, resource.RLIMIT_NOFILE, before)
    wait_until(lambda: victim not in pids(crew.url) and are_running(crew.url), "another worker")
    assert pids(crew.url)[0] == spare


def test_who_waits_is_replaced_at_once_and_ever_later_if_it_is_lost_again_and_again() -> None:
    no_places: Any = None
    crew, now = RealCrew([], [], no_places), 10.0

    def is_there(now: float) -> bool:
        crew._look_at_spare(now)
        return crew._spare is not None

    def kill() -> None:
        assert crew._spare is not None
        crew._spare[0].kill()
        crew._spare[0].wait()

    assert is_there(now)
    for pause in (0, 0.5, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE):
        kill()
        assert [is_there(now), is_there(now + pause - 0.01), is_there(now + pause)] == [not pause, not pause, True]
        now += pause
    kill()
    assert is_there(now + LONGEST_PAUSE)
    crew.close()


def test_a_worker_that_hangs_is_replaced(crew: Crew) -> None:
    victim = pids(crew.url)[1]
    os.kill(victim, signal.SIGSTOP)
    wait_until(lambda: is_gone(victim), "it is ended")
    wait_until(lambda: victim not in pids(crew.url) and are_running(crew.url), "another worker")
    wait_until(lambda: "did not answer any more" in crew.process.output, "it is told")
    assert served_by(crew.url).keys() == {"a", "b"}


def test_one_worker_more_and_one_less_without_losing_a_request(crew: Crew) -> None:
    with traffic(crew.url) as failed:
        crew.process.send(signal.SIGTTIN)
        wait_until(lambda: are_running(crew.url, 3), "one more")
        crew.process.send(signal.SIGTTOU)
        wait_until(lambda: are_running(crew.url, 2), "one less")
    assert not failed


def test_usr1_ends_nothing(crew: Crew) -> None:
    crew.process.send(signal.SIGUSR1)
    wait_until(lambda: "SIGUSR1" in crew.process.output, "it is told what became of it")
    assert are_running(crew.url)


def test_five_deaths_within_a_minute_end_all(start_process: StartProcess) -> None:
    balancer = start_process("--workers=2", "--shutdown-delay=0")
    while balancer.popen.poll() is None:
        for victim in children(balancer.pid):
            os.kill(victim, signal.SIGKILL)
    assert balancer.wait() == 1
    assert "5 workers ended within 60 s, the last one was ended by SIGKILL" in balancer.output


@pytest.fixture
def held(scripted: WireBackend) -> Iterator[threading.Event]:
    """Answers come when this is set."""
    event = threading.Event()

    def script(sock: socket, request: RawRequest) -> None:
        event.wait()
        sock.sendall(ok())

    scripted.script = script
    yield event
    event.set()


def asked(balancer: BalancerProcess) -> Callable[[], bytes]:
    """Sends a request that will be held, and returns what waits for its answer."""
    client = connect(balancer.port)
    sock = client.__enter__()
    sock.sendall(get())
    wait_until(lambda: balancer.status()["statistics"]["active_requests"] == 1, "it is in flight")

    def answer() -> bytes:
        try:
            return read_all(sock)
        finally:
            client.__exit__(None, None, None)

    return answer


def test_the_end_lets_requests_finish_and_a_second_signal_does_not(
    start_process: StartProcess, held: threading.Event
) -> None:
    for is_patient in (True, False):
        held.clear()
        balancer = start_process("--workers=2", "--drain-timeout=60")
        answer, living = asked(balancer), pids(balancer.url)
        balancer.send(signal.SIGTERM)
        wait_until(lambda: "draining 2 workers" in balancer.output, "it has begun to end")  # noqa: B023
        if is_patient:
            held.set()
        else:
            balancer.send(signal.SIGTERM)
        assert answer().startswith(b"HTTP/1.1 200") is is_patient
        assert balancer.wait() == 0
        assert all(map(is_gone, living))


def test_a_wish_for_less_ends_with_the_balancer(start_process: StartProcess, held: threading.Event) -> None:
    """While it waits for connections that are being made, the sockets are closed."""
    balancer = start_process("--workers=2")
    answer = asked(balancer)
    balancer.send(signal.SIGTTOU)
    wait_until(lambda: "SIGTTOU: 1 workers" in balancer.output, "it is under way")
    balancer.send(signal.SIGTERM)
    is_over = time.monotonic() + SETTLE_SECONDS + 0.5
    wait_until(lambda: time.monotonic() > is_over, "it would have gone on")
    held.set()
    assert answer().startswith(b"HTTP/1.1 200") and balancer.wait() == 0
    assert "Traceback" not in balancer.output


def test_a_master_that_drains_is_a_member_until_it_has_ended(
    start_process: StartProcess, held: threading.Event, tmp_path: Path
) -> None:
    with RedisServer(tmp_path) as server:
        balancer = start_process("--workers=2", f"--redis-url={server.url}")
        answer = asked(balancer)
        balancer.send(signal.SIGTERM)
        wait_until(lambda: '"lifecycle": "draining"' in server.ask("HVALS lb:{default}:members"), "it says so")
        held.set()
        assert answer().startswith(b"HTTP/1.1 200") and balancer.wait() == 0
    assert "Traceback" not in balancer.output and "cluster_lost" not in balancer.output


def test_workers_without_a_master_finish_and_end(start_process: StartProcess, held: threading.Event) -> None:
    balancer = start_process("--workers=2")
    answer, living = asked(balancer), pids(balancer.url)
    balancer.send(signal.SIGKILL)
    balancer.popen.wait()
    held.set()
    assert answer().startswith(b"HTTP/1.1 200")
    wait_until(lambda: all(map(is_gone, living)), "no worker is left")


# A new master.


@pytest.fixture
def heirs() -> Iterator[list[int]]:
    """Processes that are nobody's children here, and end with the test."""
    found: list[int] = []
    yield found
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        wait_until(lambda: is_gone(pid), "the last one has ended")  # noqa: B023


@pytest.mark.parametrize("count", [1, 2])
def test_the_next_one_takes_over_without_losing_a_request(
    start_process: StartProcess, tmp_path: Path, heirs: list[int], count: int
) -> None:
    """With what was decided. One that cannot start changes nothing."""
    file, state = tmp_path / "lb.toml", tmp_path / "state.db"
    file.write_text("", encoding="utf-8")
    balancer = start_process(f"--workers={count}", f"--config={file}", f"--state-file={state}")
    url = balancer.url
    assert fetch(f"{url}/backends/only", {"weight": 7}, "PATCH")[0] == 200

    file.write_text("algorithm = 3", encoding="utf-8")
    balancer.send(signal.SIGUSR2)
    wait_until(lambda: "ended with 2 before it served" in balancer.output, "the old one goes on")

    file.write_text("", encoding="utf-8")
    with traffic(url) as failed:
        old = balancer.pid
        for _ in range(2):
            before = set(pids(url))
            os.kill(old, signal.SIGUSR2)
            told = f"{old}.*is to take over"
            wait_until(lambda: is_gone(old) and before.isdisjoint(pids(url)), told)  # noqa: B023
            old = int(re.findall(r"process (\d+) is to take over", balancer.output)[-1])
            heirs[:] = [old]
    assert not failed
    assert balancer.backend("only")["weight"] == 7
    assert fetch_json(f"{url}/status")["state"]["last_error"] is None


def test_one_that_cannot_even_be_started_is_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", "/no/python")
    successor = Successor(dict, None)
    assert asyncio.run(successor.start({})) is False and successor.process is None
    assert "no process can be started, this one goes on: [Errno 2]" in caplog.text


@contextmanager
def changed_program(backend: WireBackend, folder: Path) -> Iterator[tuple[Process, str]]:
    """A balancer whose files are others by now, and whose workers have ended."""
    package, program = folder / "balancer", shutil.copy(ROOT / "load_balancer.py", folder)
    shutil.copytree(ROOT / "balancer", package, ignore=shutil.ignore_patterns("__pycache__"))
    with Process([PYTHON, program, "--port=0", "--workers=2", f"--backend=only={backend.url}"]) as master:
        url = wait_until(lambda: re.search(r"http://[^ ,]+", master.output), "it listens")[0]
        wait_until(lambda: are_running(url), "two workers")
        os.utime(package / "errors.py")
        for pid in pids(url):  # one more is there that may be of the old files
            os.kill(pid, signal.SIGKILL)
        yield master, url


def test_a_program_that_was_replaced_takes_over_when_a_worker_has_to_begin(
    scripted: WireBackend, tmp_path: Path, heirs: list[int]
) -> None:
    with changed_program(scripted, tmp_path) as (master, url):
        wait_until(lambda: is_gone(master.pid), "another one takes over")
        heirs.append(int(re.findall(r"process (\d+) is to take over", master.output)[-1]))
        assert are_running(url)
        os.kill(heirs[0], signal.SIGTERM)


def test_one_whose_place_nobody_may_take_ends_rather_than_leave_clients_waiting(
    scripted: WireBackend, tmp_path: Path
) -> None:
    """As in the demo, which blocks SIGUSR2 for all that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        with changed_program(scripted, tmp_path) as (master, _):
            assert master.wait() == 1
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert "no worker can begin, the program's files are others now; so this balancer ends" in master.output


# Sockets of every kind.


def test_all_show_the_certificate_that_is_in_force(start_process: StartProcess, tmp_path: Path) -> None:
    files = Files(tmp_path)
    balancer = start_process("--workers=2", *files.flags, wait_ready=False)
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def names() -> set[str]:
        found = set()
        for _ in range(MANY // 2):
            with connect(balancer.port) as plain, context.wrap_socket(plain) as client:
                shown = client.getpeercert(binary_form=True)
                assert shown is not None
                found.add(ssl.DER_cert_to_PEM_cert(shown).strip())
        return found

    first = files.certificate.read_text(encoding="ascii").strip()
    wait_until(lambda: names() == {first}, "the first one")
    files.write(make_pair("other.test"))
    balancer.send(signal.SIGHUP)
    second = files.certificate.read_text(encoding="ascii").strip()
    wait_until(lambda: names() == {second}, "the second one")


def test_a_unix_socket_is_shared(start_process: StartProcess, tmp_path: Path) -> None:
    path = tmp_path / "lb.sock"
    balancer = start_process("--workers=2", f"--host=unix:{path}", wait_ready=False)

    def answers() -> bool:
        command = ["curl", "-s", "-m", "60", "--unix-socket", str(path), "http://localhost/cluster"]
        out = subprocess.run(command, capture_output=True, check=False).stdout
        return bool(out) and [each["state"] for each in json.loads(out)["workers"]] == ["running"] * 2

    wait_until(answers, "both run")
    balancer.send(signal.SIGTERM)
    assert balancer.wait() == 0 and not path.exists()


def test_an_answer_that_comes_last_does_not_stand_in_the_way_of_the_end() -> None:
    """Who waited for it had not gone on yet: the end of the link failed, and a worker without a master lived on."""

    class Last:
        def tell(self, what: str, number: int, *more: object) -> None:
            asking.answered(number, ("200 OK", [], b"last"))
            asking.give_up()

    asking = AskingMaster(Last())  # type: ignore[arg-type]
    told: list[str] = []
    assert [*asking({"wsgi.input": io.BytesIO()}, lambda status, lines: told.append(status))] == [b"last"]
    assert [*asking({"wsgi.input": io.BytesIO()}, lambda status, lines: told.append(status))] == [b""]  # without a wait
    assert told == ["200 OK", "503 Service Unavailable"]


def test_a_program_of_ones_own_has_one_process() -> None:
    with pytest.raises(SettingsError, match="workers = 2: a program has one"):
        LoadBalancer(workers=2)
    for wrong in (0, 65, "many", True):
        with pytest.raises(SettingsError, match="expected auto, or a whole number from 1 to 64"):
            LoadBalancer(workers=wrong)


# What each has of what there is.


def test_workers_hold_a_limit_together_and_one_alone_has_all_of_it(crew: Crew) -> None:
    limit = '[[limits]]\nname = "l"\nkey = "header:X-Key"\nrate = "1/h"\nburst = 12\n'
    crew.configure(f'{limit}[[routes]]\nname = "r"\npath = "/limited"\npool = "default"\nlimits = ["l"]\n')
    assert crew.change("/reload", method="POST") == 200
    url = f"{crew.url}/limited"
    before: list[int] = []

    def holds_in_each() -> bool:
        answers = [fetch(url, X_Key="any") for _ in range(MANY)]
        limited = [status for status, headers, _ in answers if "ratelimit-policy" in headers]
        before.extend(limited)
        return len(limited) == MANY

    wait_until(holds_in_each, "the reload has reached each")
    let_in = 0

    def many() -> int:
        nonlocal let_in
        let_in += [fetch(url, X_Key="many")[0] for _ in range(20)].count(200)
        return let_in

    # Each has half of it until the other has spoken, and the first to be sure may give out all of it before that; the
    # last of it goes to nobody while each would have half of a request.
    wait_until(lambda: many() >= 11, "all of it, or nearly")
    assert many() <= 18
    client, passed = HTTPConnection("127.0.0.1", crew.process.port, timeout=60), 0

    def one_more() -> int:
        nonlocal passed
        client.request("GET", "/limited", headers={"X-Key": "one"})
        response = client.getresponse()
        response.read()
        passed += response.status == 200
        return passed

    wait_until(lambda: one_more() == 12, "all of it, over one connection")
    assert [one_more() for _ in range(5)] == [12] * 5
    client.close()

    def counted() -> dict[str, int]:
        found: dict[str, int] = fetch_json(f"{crew.url}/limits")["limits"][0]["requests"]
        return found

    allowed = let_in + 12 + before.count(200)
    wait_until(lambda: counted()["allowed"] == allowed and counted()["refused"] >= 5, "the master counts for all")
    crew.configure("")
    assert crew.change("/reload", method="POST") == 200


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "300000 100000"}, 3.0),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "50000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ("", {}, float("inf")),
    ],
)
def test_the_share_of_the_cpus_that_a_container_has(
    tmp_path: Path, groups: str, files: dict[str, str], cpus: float
) -> None:
    (tmp_path / "cgroup").write_text(groups, encoding="ascii")
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n", encoding="ascii")
    assert quota.quota(tmp_path / "cgroup", tmp_path / "fs") == cpus
