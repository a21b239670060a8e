"""Starts and stops the demo: three backends and the load balancer in front of them.

start_all.sh and start_all.bat only find a Python and call this, so that both do and say the same. Nothing but the
standard library is imported: this runs before anything is installed.

Rules: nothing is started unless its port is free; ready means that it answered, never that some time has passed;
whatever ends this program, everything it started is stopped; a process that it did not start is left alone.
"""

import signal

if __name__ == "__main__":  # Ctrl-C while the imports below run ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import hashlib
import http.client
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, NoReturn

HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = VENV / "requirements.sha256"  # written last: a .venv without it is not finished
LOGS = HERE / "logs"
RUN = HERE / "run"
SCRIPT = "start_all.bat" if os.name == "nt" else "./start_all.sh"

POLL_SECONDS = 0.05
READY_SECONDS = 30.0  # most of it for the first start on a slow machine; a warm one takes about a second
STOP_SECONDS = 10.0  # then the process is killed
WEIGHTS = (3, 2, 1)  # of the first backends; further ones weigh 1

HELP = f"""\
examples:
  {SCRIPT}                     three backends and the load balancer, until Ctrl-C
  {SCRIPT} --detach            the same in the background
  {SCRIPT} stop                stop what runs in the background
  {SCRIPT} backends            only the backends; of those of a running demo, the ones that have ended
  {SCRIPT} balancer            only the load balancer
  {SCRIPT} setup               only make .venv and install requirements.txt

usage: {SCRIPT} [all | backends | balancer | setup | stop] [--detach] [--help] [--version]

environment:
  LB_PORT         port of the load balancer (default 9000)
  BACKEND_PORTS   ports of the backends (default "5001 5002 5003")
  RESPONSE_DELAY, ALGORITHM and every other LB_ setting are passed on

Logs are written to logs/, process ids to run/.
"""


class Failure(Exception):
    """Ends the program with one line on stderr and an exit code: 2 what the user can put right, 1 the rest."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Stopped(Exception):
    """A signal asked for the end."""


def say(text: str = "") -> None:
    try:
        print(text, flush=True)
    except OSError:  # `start_all.sh | head`: nobody reads any longer, which is no reason to leave processes behind
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


# -- Signals: they only raise a flag, the code looks at it where it is safe to stop ---------------------------------


class StopFlag:
    """Set by Ctrl-C, SIGTERM and SIGHUP; `count` tells an impatient second signal from the first."""

    def __init__(self) -> None:
        self.count = 0
        self.number = 0

    def install(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            if number := getattr(signal, name, None):
                signal.signal(number, self._caught)

    def _caught(self, number: int, _frame: object) -> None:
        self.number = self.number or number
        self.count += 1

    def check(self) -> None:
        if self.count:
            raise Stopped

    @property
    def exit_code(self) -> int:
        """Ctrl-C is 130 as everywhere; a SIGTERM was asked for and obeyed, so 0."""
        return 130 if self.number == signal.SIGINT else 0


STOP = StopFlag()
_PAUSE = threading.Event()


def pause(seconds: float = POLL_SECONDS) -> None:
    """Between two looks at something; unlike time.sleep() it is short on Windows too when Ctrl-C comes."""
    _PAUSE.wait(seconds)


# -- Settings --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    balancer_port: int
    backend_ports: tuple[int, ...]
    ports_given: bool  # BACKEND_PORTS is set: the balancer must be told

    @property
    def backends(self) -> str:
        """The backends in the form of LB_BACKENDS."""
        weights = WEIGHTS + (1,) * len(self.backend_ports)
        triples = zip(range(1, len(self.backend_ports) + 1), self.backend_ports, weights, strict=False)
        return ",".join(f"backend_{number}=http://127.0.0.1:{port}@{weight}" for number, port, weight in triples)


def read_settings(environ: Mapping[str, str]) -> Settings:
    balancer = environ.get("LB_PORT", "").strip() or "9000"
    backends = environ.get("BACKEND_PORTS", "").replace(",", " ").split()
    settings = Settings(
        balancer_port=parse_port("LB_PORT", balancer),
        backend_ports=tuple(parse_port("BACKEND_PORTS", text) for text in backends or ("5001", "5002", "5003")),
        ports_given=bool(backends),
    )
    ports = (settings.balancer_port, *settings.backend_ports)
    if len(set(ports)) < len(ports):
        raise Failure(
            f"two processes cannot have the same port: LB_PORT={balancer} BACKEND_PORTS={' '.join(backends)}", 2
        )
    return settings


def parse_port(name: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise Failure(f"{name} must hold port numbers from 1 to 65535, not {text!r}", 2)
    return int(text)


# -- The virtual environment -----------------------------------------------------------------------------------------


def ensure_venv() -> None:
    """Make .venv, install requirements.txt, and write the stamp; nothing to do if the stamp is there and right."""
    wanted = hashlib.sha256((HERE / "requirements.txt").read_bytes()).hexdigest()
    if venv_is_ready(wanted):
        return
    if not venv_has_pip():
        make_venv()
    say("Installing requirements.txt into .venv (once, and when the file changes) ...")
    STAMP.unlink(missing_ok=True)
    pip = [str(VENV_PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    run_step([*pip, "-r", str(HERE / "requirements.txt")], "pip could not install requirements.txt")
    STAMP.write_text(wanted + "\n", encoding="ascii")


def venv_is_ready(wanted: str) -> bool:
    """A Python that was upgraded or removed leaves a dangling link, so look through it."""
    try:
        return VENV_PYTHON.exists() and STAMP.read_text(encoding="ascii").strip() == wanted
    except OSError:
        return False


def venv_has_pip() -> bool:
    if not VENV_PYTHON.exists():
        return False
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([VENV_PYTHON, "-c", check], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def make_venv() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # Debian and Ubuntu leave ensurepip out of python3; without it a venv has no pip.
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        package = f"python{version}-venv"
        raise Failure(f"Python {version} cannot make a virtual environment: apt-get install {package} (on Debian)", 2)
    say(f"Making .venv with Python {sys.version.split()[0]} ...")
    run_step([sys.executable, "-m", "venv", "--clear", str(VENV)], "could not make .venv")


def run_step(command: Sequence[str], failed: str) -> None:
    """Run a command to its end with its output in logs/setup.log, and stop it when we are asked to stop."""
    log = LOGS / "setup.log"
    with open_log(log) as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None:
            STOP.check()
            pause()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        raise Failure(f"{failed}: {last_line(log)} (all of it: {log})")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Two copies of this program must not install, nor find the same port free, at the same time.

    The system takes the lock back when its holder dies, however it dies.
    """
    RUN.mkdir(exist_ok=True)
    with (RUN / "lock").open("a+b") as file:
        if not try_lock(file):
            say("Waiting for another start_all of this folder ...")
        while not try_lock(file):
            STOP.check()
            pause()
        yield


def try_lock(file: IO[bytes]) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


# -- Ports and answers -----------------------------------------------------------------------------------------------


def port_is_free(port: int) -> bool:
    if connects(port):  # on Windows a second bind can succeed, so ask first
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        if os.name == "posix":  # a port whose last owner has just ended counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def connects(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def answers(host: str, port: int, path: str) -> bool:
    """Whether GET path is answered with 200. No urllib: it would obey the machine's HTTP_PROXY."""
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


# -- Processes -------------------------------------------------------------------------------------------------------


@dataclass
class Service:
    """One process of the demo, and how to tell that it works."""

    name: str
    port: int
    script: str
    arguments: list[str]
    ready_path: str
    port_setting: str  # what to change if the port is taken
    environment: dict[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    ready_port: int | None = None  # if it is not `port`
    process: subprocess.Popen[bytes] | None = None

    @property
    def command(self) -> list[str]:
        return [str(VENV_PYTHON), str(HERE / self.script), *self.arguments]

    @property
    def log(self) -> Path:
        """The port is in the name so that two demos on different ports keep apart."""
        return LOGS / f"{self.name}-{self.port}.log"

    @property
    def pid_file(self) -> Path:
        return RUN / f"{self.name}-{self.port}.pid"

    @property
    def exit_code(self) -> int | None:
        return self.process.poll() if self.process else None

    def start(self, detached: bool) -> None:
        # A session of its own: Ctrl-C then reaches only this program, which stops its processes in the right order.
        # On Windows the console tells them all at once, which is quick and does no harm.
        with open_log(self.log) as output:
            self.process = subprocess.Popen(
                self.command,
                cwd=HERE,
                env={**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                creationflags=windows_flags() if detached else 0,
            )
        write_pid(self.pid_file, self.process.pid, self.script)

    def is_ready(self) -> bool:
        if self.exit_code is not None:
            raise Failure(f"{self.name} ended at once with code {self.exit_code}: {last_line(self.log)} ({self.log})")
        return answers(self.host, self.ready_port or self.port, self.ready_path)

    def terminate(self) -> None:
        """Ask it to end; Ctrl-C is passed on as Ctrl-C, which servers obey sooner than SIGTERM."""
        interrupted = STOP.number == signal.SIGINT
        if self.process and self.process.poll() is None and not (os.name == "nt" and interrupted):
            self.process.send_signal(signal.SIGINT if interrupted else signal.SIGTERM)

    def wait(self, deadline: float) -> None:
        """Until it has ended; killed at the deadline or at the second signal."""
        while self.process and self.process.poll() is None:
            if time.monotonic() > deadline or STOP.count > 1:
                self.process.kill()
            pause()
        self.sweep()
        remove_pid(self.pid_file, self.process.pid if self.process else None)

    def sweep(self) -> None:
        """Kill what a process that was killed may have left: its own children are in its group."""
        if self.process and sys.platform != "win32":
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass


def windows_flags() -> int:
    """No console window of its own, and no Ctrl-C from this one. Zero elsewhere."""
    return getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0) | getattr(subprocess, "CREATE_NO_WINDOW", 0)


def backend_services(settings: Settings) -> list[Service]:
    delay = os.environ.get("RESPONSE_DELAY", "").strip()
    return [
        Service(
            name=f"backend_{number}",
            port=port,
            script="backend_server.py",
            # Flags, not environment, so that the printed command is the whole truth in every shell.
            arguments=["--id", f"backend_{number}", "--port", str(port), "--host", "127.0.0.1"]
            + (["--delay", delay] if delay else []),
            ready_path="/health",
            port_setting="BACKEND_PORTS",
        )
        for number, port in enumerate(settings.backend_ports, start=1)
    ]


def control_prefix() -> str:
    return os.environ.get("LB_CONTROL_PREFIX", "").strip().rstrip("/")


def balancer_service(settings: Settings) -> Service:
    environment = {
        "LB_PORT": str(settings.balancer_port),
        # The demo shows who answered, and lets dashboard.html write when it is opened from disk.
        "LB_EXPOSE_BACKEND": os.environ.get("LB_EXPOSE_BACKEND", "true"),
        "LB_ALLOW_FILE_ORIGIN": os.environ.get("LB_ALLOW_FILE_ORIGIN", "true"),
    }
    if settings.ports_given:
        environment["LB_BACKENDS"] = os.environ.get("LB_BACKENDS", "") or settings.backends
    host = os.environ.get("LB_HOST", "").strip()
    return Service(
        name="balancer",
        port=settings.balancer_port,
        script="load_balancer.py",
        arguments=[],
        ready_path=control_prefix() + "/readyz",
        ready_port=int(os.environ.get("LB_CONTROL_PORT", "").strip() or settings.balancer_port),
        port_setting="LB_PORT",
        environment=environment,
        host="127.0.0.1" if host in ("", "localhost", "0.0.0.0", "::") else host.strip("[]"),
    )


# -- Files -----------------------------------------------------------------------------------------------------------


def open_log(path: Path) -> IO[bytes]:
    path.parent.mkdir(exist_ok=True)
    return path.open("wb")


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"


def write_pid(path: Path, pid: int, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{pid}\n{script}\n", encoding="ascii")


def read_pid(path: Path) -> int | None:
    """The id in the file, if a process of that id runs the script named there, from this folder.

    Ids are used again: a file that a crash has left may name somebody else's process by now.
    """
    try:
        number, script = path.read_text(encoding="ascii").split()
        pid = int(number)
    except (OSError, ValueError):
        return None
    return pid if pid > 0 and str(HERE / script) in command_line(pid) else None


def remove_pid(path: Path, pid: int | None) -> None:
    """Remove the file of process `pid`, unless it names another one by now: the one started in its place."""
    if read_pid(path) in (pid, None):
        path.unlink(missing_ok=True)


def command_line(pid: int) -> str:
    """What the process was started with, blanks between; empty if there is none (or only its ashes)."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="surrogateescape")
        except OSError:
            return ""
    if os.name == "nt":
        query = f"(Get-CimInstance Win32_Process -Filter 'ProcessId={pid}').CommandLine"
        asked = ["powershell", "-NoProfile", "-NonInteractive", "-Command", query]
    else:
        asked = ["ps", "-ww", "-o", "command=", "-p", str(pid)]
    return subprocess.run(asked, capture_output=True, text=True, errors="surrogateescape").stdout


# -- Commands --------------------------------------------------------------------------------------------------------


def run_services(services: list[Service], detach: bool) -> int:
    """Start, wait until ready, then watch until the end or a signal; only what is detached and ready outlives this."""
    check_ports(services)  # before an installation that may take minutes
    own_pid_file = RUN / f"start_all-{services[-1].port}.pid"
    try:
        with one_at_a_time():
            ensure_venv()
            check_ports(services)
            if read_pid(own_pid_file):  # of the one whose ended backends this one starts again
                own_pid_file = RUN / f"start_all-{os.getpid()}.pid"
            write_pid(own_pid_file, os.getpid(), Path(__file__).name)
            start_services(services, detach)
        print_urls(services, detach)
        if detach:
            services = []
            return 0
        return watch(services)
    finally:
        stop_services(services)
        remove_pid(own_pid_file, os.getpid())
        name_survivors(services)


def without_running(services: list[Service]) -> list[Service]:
    """Those that a running demo has lost; all if none of them runs, or all do, which `check_ports` refuses."""
    return [service for service in services if not read_pid(service.pid_file)] or services


def check_ports(services: Sequence[Service]) -> None:
    for service in services:
        if port_is_free(service.port):
            continue
        if read_pid(service.pid_file):
            raise Failure(f"port {service.port} is in use by a demo that runs already; stop it: {SCRIPT} stop", 2)
        example = f"{service.port_setting}={example_ports(service)}"
        raise Failure(f"port {service.port} is in use by another program; end that, or choose another: {example}", 2)


def example_ports(service: Service) -> str:
    return str(service.port + 1) if service.port_setting == "LB_PORT" else '"5101 5102 5103"'


def start_services(services: Sequence[Service], detached: bool) -> None:
    started = time.monotonic()
    for service in services:
        STOP.check()
        service.start(detached)
    waiting = list(services)
    while waiting:
        STOP.check()
        waiting = [service for service in waiting if not service.is_ready()]
        if waiting and time.monotonic() > started + READY_SECONDS:
            slow = waiting[0]
            raise Failure(f"{slow.name} was not ready within {READY_SECONDS:g} s: {last_line(slow.log)} ({slow.log})")
        if waiting:
            pause()
    say(f"Ready in {time.monotonic() - started:.1f} s.")


def print_urls(services: Sequence[Service], detached: bool) -> None:
    for service in services:
        say(f"  {service.name + ':':<11} http://127.0.0.1:{service.port}  log: {service.log.relative_to(HERE)}")
    for service in services:
        if service.name == "balancer":
            host = "localhost" if service.host == "127.0.0.1" else service.host
            host = f"[{host}]" if ":" in host else host
            control = f"http://{host}:{service.ready_port or service.port}{control_prefix()}"
            print_balancer_urls(f"http://{host}:{service.port}", control)
            warn_of_unhealthy(service)
            repeat_warnings(service)
    say(f"Stop with: {SCRIPT} stop" if detached else "Stop with Ctrl-C.")


def print_balancer_urls(base: str, control: str) -> None:
    page = (HERE / "dashboard.html").as_uri() + ("" if control == "http://localhost:9000" else f"?lb={control}")
    say()
    say(f"  Dashboard:  {control}/dashboard")
    say(f"              {page}")
    say(f"  API:        curl {base}/api/process")
    say(f"  Status:     {control}/status")
    say(f"  Check:      {check_command(base, control)}")
    say()


def check_command(base: str, control: str) -> str:
    """test_client.py for this balancer, to be typed in this folder."""
    arguments = [] if control == base else ["--control", control]
    arguments += [] if base == "http://localhost:9000" else [base]
    return printable_command([str(VENV_PYTHON.relative_to(HERE)), "test_client.py", *arguments])


def warn_of_unhealthy(balancer: Service) -> None:
    """Ready means that every backend has been checked, not that the checks were good."""
    connection = http.client.HTTPConnection(balancer.host, balancer.ready_port or balancer.port, timeout=1)
    try:
        connection.request("GET", control_prefix() + "/backends")
        for backend in json.loads(connection.getresponse().read())["backends"]:
            if not backend["healthy"]:
                say(f"  Warning: {backend['id']} gets no requests: {backend['health']['reason']}")
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        pass  # it has just said that it is ready; what it says now is for the person to see
    finally:
        connection.close()


def repeat_warnings(balancer: Service) -> None:
    """What it says of variables that it does not know: nobody would look for a slip of the pen in a log."""
    for line in balancer.log.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(f"{balancer.script}: warning: "):
            say("  Warning: " + line.partition(": warning: ")[2])


def watch(services: Sequence[Service]) -> int:
    """Until the balancer ends, or every process, or a signal comes."""
    living = list(services)
    while living:
        STOP.check()
        for service in [service for service in living if service.exit_code is not None]:
            living.remove(service)
            service.sweep()
            remove_pid(service.pid_file, service.process.pid if service.process else None)
            if service.name == "balancer":
                return report_balancer_end(service)
            say(f"{service.name} ended ({how_it_ended(service)}). Start it again with:")
            say(f"  {printable_command(service.command)}")
        pause()
    raise Failure("every backend has ended")


def report_balancer_end(balancer: Service) -> int:
    """Asked to end from outside it ends with 0, and so do we; else it died."""
    if balancer.exit_code == 0:
        say("The balancer ended.")
        return 0
    how = how_it_ended(balancer)
    raise Failure(f"the balancer ended by itself ({how}): {last_line(balancer.log)} ({balancer.log})")


def how_it_ended(service: Service) -> str:
    code = service.exit_code
    if code is not None and code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"


def printable_command(command: list[str]) -> str:
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def stop_services(services: Sequence[Service]) -> None:
    """The balancer first, so that it can finish what it has in hand while the backends still answer."""
    if STOP.count and any(service.process for service in services):
        say("Stopping ...")
    for group in (
        [service for service in services if service.name == "balancer"],
        [service for service in services if service.name != "balancer"],
    ):
        for service in group:
            service.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for service in group:
            service.wait(deadline)


def name_survivors(services: Sequence[Service]) -> None:
    """What another start_all has started in the place of one of ours goes on: that one may not even be detached."""
    names = [service.name for service in services if service.process and read_pid(service.pid_file)]
    if names:
        say(f"Another start_all has started {', '.join(names)} again; to stop that as well: {SCRIPT} stop")


def stop_command() -> int:
    """Stop every process that has a file in run/: first a start_all in the foreground, which stops its own."""
    files = sorted(RUN.glob("*.pid"), key=stop_order)
    stopped = [name for name in map(stop_by_file, files) if name]
    say(f"Stopped {', '.join(stopped)}." if stopped else "Nothing to stop: no demo of this folder is running.")
    return 0


def stop_order(path: Path) -> tuple[int, str]:
    for rank, prefix in enumerate(("start_all", "balancer")):
        if path.name.startswith(prefix):
            return rank, path.name
    return 2, path.name


def stop_by_file(path: Path) -> str | None:
    """The name of the process if one was stopped; the file goes in any case."""
    pid = read_pid(path)
    if pid is not None:
        deadline = time.monotonic() + STOP_SECONDS * (2 if path.name.startswith("start_all") else 1)
        send(pid, signal.SIGTERM)
        while read_pid(path) == pid:
            if time.monotonic() > deadline:
                send(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
            pause()
    path.unlink(missing_ok=True)
    return path.stem.rpartition("-")[0] if pid is not None else None


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        raise Failure(f"process {pid} belongs to another user; stop it as that user", 2) from None


# -- Command line ----------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """Examples first in the help, one line for an error."""

    def format_help(self) -> str:
        return HELP

    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}; see {SCRIPT} --help", 2)


def run(argv: Sequence[str]) -> int:
    parser = Parser(prog="start_all", allow_abbrev=False)
    parser.add_argument("command", nargs="?", default="all", choices=["all", "backends", "balancer", "setup", "stop"])
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--version", action="store_true")
    options = parser.parse_args(argv)
    if options.version:
        from balancer import __version__  # has no imports of its own, so it needs no .venv

        say(f"start_all {__version__}")
        return 0
    if options.command == "stop":
        return stop_command()
    if options.command == "setup":
        with one_at_a_time():
            ensure_venv()
        return 0
    settings = read_settings(os.environ)
    backends = backend_services(settings) if options.command != "balancer" else []
    if options.command == "backends":
        return run_services(without_running(backends), options.detach)
    balancer = [balancer_service(settings)]
    return run_services(backends + balancer, options.detach)


def main() -> int:
    for stream in (sys.stdout, sys.stderr):  # a folder's name may have letters that this console lacks
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    STOP.install()
    try:
        return run(sys.argv[1:])
    except Stopped:
        return STOP.exit_code
    except Failure as failure:
        print(f"start_all: error: {failure}", file=sys.stderr, flush=True)
        return failure.code
    except OSError as error:
        print(f"start_all: error: {error}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
