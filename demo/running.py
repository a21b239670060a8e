"""The commands: from the first process started to the last one ended, what is printed in between, setup and stop."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from demo import files
from demo.console import SIGNALS, Failure, say, wait_until
from demo.services import STOP_SECONDS, Service, end, given, is_answered

READY_SECONDS = 30.0  # most of it for the first start on a slow machine; a warm one takes about a second
as_typed = subprocess.list2cmdline if os.name == "nt" else shlex.join
WARNING = re.compile(r' WARNING balancer\.settings: (.*)|"logger":"balancer\.settings","message":"(.*)"')  # its log
STAMP = files.VENV / "requirements.sha256"  # of what is installed; a .venv without it is not finished


def run_services(services: list[Service], detach: bool) -> int:
    """Start, wait until ready, then watch until the end or a signal; only what is detached and ready outlives this."""
    own_pid_file = files.RUN / f"start_all-{os.getpid()}.pid"
    try:
        with files.locked():
            check_ports(services)
            ensure_venv()
            files.write_pid(own_pid_file, os.getpid(), "start_all.py")
            started = time.monotonic()
            for service in services:
                service.start(detach)
            for service in services:
                if not wait_until(service.is_ready, started + READY_SECONDS - time.monotonic()):
                    raise Failure(f"{service.name} not ready in {READY_SECONDS:g} s: {files.last_words(service.log)}")
            files.renew_access()
        say(f"Ready in {time.monotonic() - started:.1f} s.")
        for service in services:
            say(f"  {service.name + ':':<11} http://127.0.0.1:{service.port}  log: {files.shown(service.log)}")
        if services[-1].is_balancer:
            print_balancer(services[-1])
        say(f"Stop with: {files.SCRIPT} stop" if detach else "Stop with Ctrl-C.")
        if not detach:
            return watch(list(services))
        while services:  # they go on without us; else Python could warn that nobody has waited for them
            services.pop().process.returncode = 0  # type: ignore[union-attr]
        return 0
    finally:
        if SIGNALS and any(service.process for service in services):
            say("Stopping ...")
        for service in reversed(services):  # the balancer first: it may finish what it has while the backends answer
            service.stop()
        own_pid_file.unlink(missing_ok=True)
        files.renew_access()
        # What another one has started in the place of one of ours goes on: that may not even be detached.
        if names := [service.name for service in services if service.process and service.pid_file.exists()]:
            say(f"Another start_all has started {', '.join(names)} again; to stop that as well: {files.SCRIPT} stop")


def check_ports(services: list[Service]) -> None:
    for service in services:
        if is_answered(service.address, service.port):
            taken = f"port {service.port} is in use by"
            if files.read_pid(service.pid_file):
                raise Failure(f"{taken} a demo that runs already; stop it: {files.SCRIPT} stop", 2)
            example = f"LB_PORT={service.port + 1}" if service.is_balancer else 'BACKEND_PORTS="5101 5102 5103"'
            raise Failure(f"{taken} another program; end that, or choose another: {example}", 2)


def watch(living: list[Service]) -> int:
    """Until the balancer ends, or every process, or a signal comes."""
    while living:
        wait_until(lambda: any(service.how_it_ended for service in living))
        for service in [service for service in living if service.how_it_ended]:
            living.remove(service)
            service.stop()  # of which its file is left
            if not service.is_balancer:
                say(f"{service.name} ended ({service.how_it_ended}). Start it again with:")
                say(f"  {as_typed(service.command)}")
            elif service.process and service.process.returncode == 0:  # asked to from outside, and so do we
                say("The balancer ended.")
                return 0
            else:
                raise Failure(f"the balancer ended by itself ({service.how_it_ended}): {files.last_words(service.log)}")
    raise Failure("every backend has ended")


def print_balancer(balancer: Service) -> None:
    """Where it is, and what is not as it should be."""
    base, control, token = balancer.urls[-1], balancer.control_urls[-1], balancer.environment["LB_PAGE_TOKEN"]
    is_given = given(os.environ, "LB_PAGE_TOKEN") or given(os.environ, "LB_PAGE_TOKEN_FILE")
    check = [files.shown(files.PYTHON), files.shown(files.HERE / "test_client.py")]
    check += [base] if control == base else ["--control", control, base]
    # Behind a # it stays in the browser, which sends it to nobody. One that is known to whoever set it is for no log.
    how = "  (its token is your LB_PAGE_TOKEN)" if is_given else f"#token={quote(token, safe='')}"
    say()
    say(f"  Dashboard:  {control}/dashboard{how}")
    if not files.IS_INSTALLED:  # else nobody would look for it there
        say(f"              {(files.HERE / 'dashboard.html').as_uri()}?lb={control}")
    say(f"  API:        curl {base}/api/process")
    say(f"  Status:     {control}/status")
    say(f"  Check:      {as_typed(check)}")
    say()
    rows = (balancer.ask("/config") or {}).get("settings", ())
    if decided := [f"{row['name']} = {row['value']}" for row in rows if row["source"] == "state"]:
        say(f"  Decided before, and still so: {', '.join(decided)}")
        say(f"  To start without: {files.SCRIPT} --forget")
    for port, urls in {balancer.port: balancer.urls, balancer.control_port: balancer.control_urls}.items():
        if "//127.0.0.1:" in urls[-1]:
            say(f"  Warning: another program listens on [::1]:{port}, where localhost leads as well; use 127.0.0.1")
    wait_until(lambda: not unhealthy(balancer), 2.0)  # checked are all, but some maybe before they answered
    unknown = WARNING.findall(balancer.log.read_text(encoding="utf-8", errors="replace"))
    for warning in [*unhealthy(balancer), *map("".join, unknown)]:
        say(f"  Warning: {warning}")


def unhealthy(balancer: Service) -> list[str]:
    found = (balancer.ask("/backends") or {}).get("backends", ())
    return [f"{one['id']} gets no requests: {one['health']['reason']}" for one in found if not one["healthy"]]


def ensure_venv() -> None:
    """Make .venv, install requirements.txt, and write the stamp; nothing to do if the stamp is there and right."""
    if files.IS_INSTALLED:  # with all that it needs
        return
    wanted = hashlib.sha256((files.HERE / "requirements.txt").read_bytes()).hexdigest()
    is_made = STAMP.exists() and files.PYTHON.exists()  # a Python that was upgraded or removed leaves a dangling link
    if is_made and STAMP.read_text(encoding="ascii").strip() == wanted:
        return
    if not is_made:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        if find_spec("ensurepip") is None:  # Debian and Ubuntu leave it out of python3; without it a venv has no pip
            raise Failure(f"Python {version} has no venv: apt-get install python{version}-venv (on Debian)", 2)
        say(f"Making .venv with Python {version} ...")
        run_step([sys.executable, "-m", "venv", "--clear", str(files.VENV)], "could not make .venv")
    say("Installing requirements.txt into .venv (once, and when the file changes) ...")
    STAMP.write_text("nothing yet\n", encoding="ascii")
    # -I: what PYTHONPATH has is not in .venv, though pip would take it for installed. Nor is pip to install elsewhere,
    # or not all, whatever it is set to. The rest of that, such as the index, stays in force.
    pip = "-I -m pip --python= --disable-pip-version-check --no-input install --target= --root=/ -r requirements.txt"
    run_step([str(files.PYTHON), *pip.split(), f"--prefix={files.VENV}"], "pip could not install requirements.txt")
    STAMP.write_text(wanted + "\n", encoding="ascii")


def run_step(command: list[str], failed: str) -> None:
    """Run a command to its end with its output in logs/setup.log. Ctrl-C ends it, too."""
    log = files.LOGS / "setup.log"
    with files.open_new(log) as output:
        variables = {**os.environ, "PIP_USER": "0", "PIP_DRY_RUN": "0", "PIP_NO_DEPS": "0"}
        code = subprocess.call(command, env=variables, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    if SIGNALS:
        raise KeyboardInterrupt
    if code != 0:
        raise Failure(f"{failed}: {files.last_words(log)}")


def stop_command() -> int:
    """Stop every process that has a file in run/: first a start_all in the foreground, which stops its own."""
    paths = [path for kind in ("start_all", "balancer", "") for path in sorted(files.RUN.glob(f"{kind}*.pid"))]
    stopped = [path.stem.rpartition("-")[0] for path in paths if stop_by_file(path)]
    files.renew_access()
    say(f"Stopped {', '.join(stopped)}." if stopped else "Nothing to stop: no demo of this folder is running.")
    return 0


def stop_by_file(path: Path) -> bool:
    """Whether its process runs, until now. The file goes in any case."""
    if pid := files.read_pid(path):
        end(pid, lambda: files.read_pid(path) == pid, 3 * STOP_SECONDS)
    if path.is_file():
        path.unlink(missing_ok=True)
    return pid is not None
