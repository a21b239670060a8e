"""The commands: from the first process started to the last one ended, what is printed in between, setup and stop."""

import errno
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from configparser import Error as ConfigParserError
from configparser import RawConfigParser
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from demo import files
from demo.console import STOP, Failure, pause, printable_command, say
from demo.processes import signals_to
from demo.services import Service, given_token

READY_SECONDS = 30.0  # most of it for the first start on a slow machine; a warm one takes about a second
STOP_SECONDS = 10.0  # then the process is killed
CHECK_SECONDS = 2.0  # some rounds of health checks
WARNING = re.compile(r' WARNING balancer\.settings: (.*)|"logger":"balancer\.settings","message":"(.*)"')  # its log
# With these pip would install elsewhere, or not all. The rest of what is set, such as the index, stays in force.
PIP_ELSEWHERE = ("user", "target", "prefix", "root", "python", "dry-run", "no-deps")
STAMP = files.VENV / "requirements.sha256"  # written last: a .venv without it is not finished


def run_services(services: list[Service], detach: bool) -> int:
    """Start, wait until ready, then watch until the end or a signal; only what is detached and ready outlives this."""
    check_ports(services)  # before an installation that may take minutes
    own_pid_file = files.RUN / f"start_all-{services[-1].port}.pid"
    try:
        with files.locked("lock", is_start=True):
            ensure_venv()
            check_ports(services)
            if files.read_pid(own_pid_file):  # of the one whose ended backends this one starts again
                own_pid_file = files.RUN / f"start_all-{os.getpid()}.pid"
            files.write_pid(own_pid_file, os.getpid(), "start_all.py")
            start_services(services, detach)
            for service in services:
                if service.is_balancer:
                    access = {"urls": control_urls(service), "token": service.environment["LB_PAGE_TOKEN"]}
                    files.renew_access({service.pid_file.stem: access})
        print_urls(services, detach)
        if detach:
            for service in services:
                service.let_go()
            services = []
            return 0
        return watch(services)
    finally:
        stop_services(services)
        files.remove_pid(own_pid_file, os.getpid())
        files.renew_access()
        name_survivors(services)


def without_running(services: list[Service]) -> list[Service]:
    """Those that a running demo has lost; all if none of them runs, or all do, which `check_ports` refuses."""
    return [service for service in services if not files.read_pid(service.pid_file)] or services


def check_ports(services: Sequence[Service]) -> None:
    for service in services:
        if port_is_free(service.address, service.port):
            continue
        if files.read_pid(service.pid_file):
            raise Failure(f"port {service.port} is in use by a demo that runs already; stop it: {files.SCRIPT} stop", 2)
        example = f"LB_PORT={service.port + 1}" if service.is_balancer else 'BACKEND_PORTS="5101 5102 5103"'
        raise Failure(f"port {service.port} is in use by another program; end that, or choose another: {example}", 2)


def port_is_free(address: str, port: int) -> bool:
    if is_answered(address, port):  # on Windows a second bind can succeed, so ask first
        return False
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        if os.name == "posix":  # a port whose last owner has just ended counts as free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE  # what else is wrong with it, the service says
    return True


def is_answered(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


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
            raise Failure(f"{waiting[0].name} was not ready within {READY_SECONDS:g} s: {waiting[0].last_words}")
        if waiting:
            pause()
    say(f"Ready in {time.monotonic() - started:.1f} s.")


def watch(services: Sequence[Service]) -> int:
    """Until the balancer ends, or every process, or a signal comes."""
    living = list(services)
    while living:
        STOP.check()
        for service in [service for service in living if service.exit_code is not None]:
            living.remove(service)
            files.remove_pid(service.pid_file, service.process.pid if service.process else None)
            how = how_it_ended(service.exit_code or 0)
            if not service.is_balancer:
                say(f"{service.name} ended ({how}). Start it again with:")
                say(f"  {printable_command(service.command)}")
            elif service.exit_code == 0:  # asked to from outside, and so do we
                say("The balancer ended.")
                return 0
            else:
                raise Failure(f"the balancer ended by itself ({how}): {service.last_words}")
        pause()
    raise Failure("every backend has ended")


def how_it_ended(code: int) -> str:
    try:
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        return f"killed by signal {-code}"


def stop_services(services: Sequence[Service]) -> None:
    """The balancer first, so that it can finish what it has in hand while the backends still answer."""
    if STOP.count and any(service.process for service in services):
        say("Stopping ...")
    for is_first in (True, False):
        group = [service for service in services if service.is_balancer is is_first]
        for service in group:
            service.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for service in group:
            service.wait(deadline)


def name_survivors(services: Sequence[Service]) -> None:
    """What another start_all has started in the place of one of ours goes on: that one may not even be detached."""
    names = [service.name for service in services if service.process and files.read_pid(service.pid_file)]
    if names:
        say(f"Another start_all has started {', '.join(names)} again; to stop that as well: {files.SCRIPT} stop")


# What is printed when all is ready: where everything is, and what is not as it should be.


def print_urls(services: Sequence[Service], detached: bool) -> None:
    for service in services:
        say(f"  {service.name + ':':<11} http://127.0.0.1:{service.port}  log: {files.shown(service.log)}")
    for service in services:
        if service.is_balancer:
            print_balancer_urls(service)
            name_decisions(service)
            warn_of_unhealthy(service)
            repeat_warnings(service)
    say(f"Stop with: {files.SCRIPT} stop" if detached else "Stop with Ctrl-C.")


def host_names(balancer: Service, port: int) -> list[str]:
    """The names it has in a URL; the last is the one that people like to read, if it leads to this one alone.

    To browsers and curl localhost is ::1 as well as 127.0.0.1 (RFC 6761 section 6.3), where another may listen.
    """
    if balancer.address != "127.0.0.1":
        return [f"[{balancer.address}]" if ":" in balancer.address else balancer.address]
    is_alone = balancer.host == "::" or not is_answered("::1", port)
    return ["127.0.0.1", "localhost"] if is_alone else ["127.0.0.1"]


def control_urls(balancer: Service) -> list[str]:
    port = balancer.control_port
    return [f"http://{host}:{port}{balancer.control_prefix}" for host in host_names(balancer, port)]


def print_balancer_urls(balancer: Service) -> None:
    host, control = host_names(balancer, balancer.port)[-1], control_urls(balancer)[-1]
    base = f"http://{host}:{balancer.port}"
    page = (files.HERE / "dashboard.html").as_uri() + ("" if control == "http://localhost:9000" else f"?lb={control}")
    check = [files.shown(files.PYTHON), files.shown(files.HERE / "test_client.py")]
    where = ([] if control == base else ["--control", control]) + ([] if base == "http://localhost:9000" else [base])
    say()
    if given_token(os.environ):  # known to whoever set it, and not for every log
        say(f"  Dashboard:  {control}/dashboard  (its token is your LB_PAGE_TOKEN)")
    else:  # behind a # it stays in the browser, which sends it to nobody
        say(f"  Dashboard:  {control}/dashboard#token={quote(balancer.environment['LB_PAGE_TOKEN'], safe='')}")
    if not files.IS_INSTALLED:  # else nobody would look for it there
        say(f"              {page}")
    say(f"  API:        curl {base}/api/process")
    say(f"  Status:     {control}/status")
    say(f"  Check:      {printable_command([*check, *where])}")
    say()
    for port in sorted({balancer.port, balancer.control_port}):
        if host_names(balancer, port) == ["127.0.0.1"]:
            say(f"  Warning: another program listens on [::1]:{port}, where localhost leads as well; use 127.0.0.1")


def name_decisions(balancer: Service) -> None:
    """What was decided in an earlier run holds, or what is seen would surprise."""
    try:
        rows = json.loads(balancer.ask("/config", balancer.environment["LB_PAGE_TOKEN"]) or "")["settings"]
        decided = [f"{row['name']} = {row['value']}" for row in rows if row["source"] == "state"]
    except (ValueError, KeyError):
        return  # as below
    if decided:
        say(f"  Decided before, and still so: {', '.join(decided)}")
        say(f"  To start without: {files.SCRIPT} --forget")
        say()


def warn_of_unhealthy(balancer: Service) -> None:
    """Ready means that every backend has been checked, not that the checks were good. One that was not up by then is
    checked again in a moment."""
    deadline = time.monotonic() + CHECK_SECONDS
    while (unhealthy := unhealthy_backends(balancer)) and time.monotonic() < deadline:
        STOP.check()
        pause()
    for name, reason in unhealthy:
        say(f"  Warning: {name} gets no requests: {reason}")


def unhealthy_backends(balancer: Service) -> list[tuple[str, str]]:
    try:
        backends = json.loads(balancer.ask("/backends", balancer.environment["LB_PAGE_TOKEN"]) or "")["backends"]
        return [(one["id"], one["health"]["reason"]) for one in backends if not one["healthy"]]
    except (ValueError, KeyError):
        return []  # it has just said that it is ready; what it says now is for the person to see


def repeat_warnings(balancer: Service) -> None:
    """What it says of variables that it does not know: nobody would look for a slip of the pen in a log."""
    for line in balancer.log.read_text(encoding="utf-8", errors="replace").splitlines():
        if found := WARNING.search(line):
            say(f"  Warning: {found[1] or found[2]}")


# The virtual environment with what requirements.txt names.


def ensure_venv() -> None:
    """Make .venv, install requirements.txt, and write the stamp; nothing to do if the stamp is there and right."""
    if files.IS_INSTALLED:  # with all that it needs
        return
    wanted = hashlib.sha256((files.HERE / "requirements.txt").read_bytes()).hexdigest()
    with suppress(OSError):
        # A Python that was upgraded or removed leaves a dangling link, so look through it.
        if files.VENV_PYTHON.exists() and STAMP.read_text(encoding="ascii").strip() == wanted:
            return
    if not venv_has_pip():
        make_venv()
    say("Installing requirements.txt into .venv (once, and when the file changes) ...")
    STAMP.unlink(missing_ok=True)
    # -I: what PYTHONPATH has is not in .venv, though pip would take it for installed.
    pip = [str(files.VENV_PYTHON), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", "install"]
    pip += ["-r", str(files.HERE / "requirements.txt")]
    with TemporaryDirectory() as folder:
        run_step(pip, "pip could not install requirements.txt", pip_environment(Path(folder, "pip.conf")))
    load = f"import sys; sys.path.insert(0, {str(files.HERE)!r}); import balancer.commandline, backend_server"
    failed = "pip has not brought requirements.txt into .venv, look at its configuration and the PIP_ variables"
    run_step([str(files.VENV_PYTHON), "-I", "-c", load], failed)
    with files.named(STAMP):
        STAMP.write_text(wanted + "\n", encoding="ascii")


def pip_environment(file: Path) -> dict[str, str]:
    """With a configuration `file` that counts more than all others: what the user has named, but for PIP_ELSEWHERE."""
    unset = {"PIP_" + option.upper().replace("-", "_") for option in PIP_ELSEWHERE}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    named = environment.get("PIP_CONFIG_FILE", "")
    if named == os.devnull:  # no file counts then
        return environment
    config = RawConfigParser()
    with suppress(ConfigParserError, ValueError):  # pip passes over it, too
        config.read(named, encoding="utf-8")
    for section in ("global", "install"):
        named_options = dict(config[section]) if section in config else {}
        kept = {name: value for name, value in named_options.items() if name.replace("_", "-") not in PIP_ELSEWHERE}
        config[section] = {**kept, **dict.fromkeys(PIP_ELSEWHERE, "")}  # what is empty counts as not set
    with file.open("w", encoding="utf-8") as written:
        config.write(written)
    return {**environment, "PIP_CONFIG_FILE": str(file)}


def venv_has_pip() -> bool:
    check = "import sys, pip; sys.exit(sys.version_info < (3, 11))"
    try:
        return subprocess.run([files.VENV_PYTHON, "-I", "-c", check], capture_output=True, timeout=60).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def make_venv() -> None:
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    # Debian and Ubuntu leave ensurepip out of python3; without it a venv has no pip.
    if find_spec("venv") is None or find_spec("ensurepip") is None:
        package = f"python{version}-venv"
        raise Failure(f"Python {version} cannot make a virtual environment: apt-get install {package} (on Debian)", 2)
    say(f"Making .venv with Python {sys.version.split()[0]} ...")
    run_step([sys.executable, "-m", "venv", "--clear", str(files.VENV)], "could not make .venv")


def run_step(command: Sequence[str], failed: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a command to its end with its output in logs/setup.log, and stop it when we are asked to stop."""
    log = files.LOGS / "setup.log"
    with files.open_log(log) as output:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        while process.poll() is None:
            STOP.check()
            pause()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if process.returncode != 0:
        raise Failure(f"{failed}: {files.last_line(log)} (all of it: {log})")


# `start_all stop`: ends what another start_all has left running.


def stop_command() -> int:
    """Stop every process that has a file in run/: first a start_all in the foreground, which stops its own."""
    ranks = {"start_all": 0, "balancer": 1}
    paths = sorted(files.RUN.glob("*.pid"), key=lambda path: (ranks.get(path.stem.rpartition("-")[0], 2), path.name))
    stopped = [path.stem.rpartition("-")[0] for path in paths if stop_by_file(path)]
    files.renew_access()
    say(f"Stopped {', '.join(stopped)}." if stopped else "Nothing to stop: no demo of this folder is running.")
    return 0


def stop_by_file(path: Path) -> bool:
    """Ask its process to end, kill it if that takes too long; whether there was one. The file goes in any case."""
    pid = files.read_pid(path)
    if pid is not None:
        deadline = time.monotonic() + STOP_SECONDS * (2 if path.name.startswith("start_all") else 1)
        with signals_to(pid) as send:
            if files.read_pid(path) == pid:  # it may have ended since it was found
                send(signal.SIGTERM)
            while files.read_pid(path) == pid:
                if time.monotonic() > deadline:
                    send(getattr(signal, "SIGKILL", signal.SIGTERM))
                pause()
    files.remove_file(path)
    return pid is not None
