"""Where things are, and what is in logs/, run/ and state/, ours alone: logs, who runs, and what lets the page in."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO

from demo.console import say, wait_until

HERE = Path(__file__).resolve().parents[1]
IS_INSTALLED = not (HERE / "balancer").exists()  # as `load-balancer demo`: that package is elsewhere, on our path
VENV = HERE / ".venv"
PYTHON = Path(sys.executable) if IS_INSTALLED else VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
# Where an installed program keeps what it writes (XDG Base Directory Specification).
HOME = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
STATE = Path(HOME, "load-balancer") if IS_INSTALLED else HERE
LOGS, RUN, MEMORY = STATE / "logs", STATE / "run", STATE / "state"  # the last has what survives a restart
NAME = "load-balancer demo" if IS_INSTALLED else "start_all"
SCRIPT = NAME if IS_INSTALLED else "start_all.bat" if os.name == "nt" else "./start_all.sh"


def shown(path: Path) -> str:
    """As a person types it, who is in the folder of the checkout, or anywhere."""
    return str(path if IS_INSTALLED else path.relative_to(HERE))


def make_folders() -> None:
    for folder in (LOGS, RUN, MEMORY):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)


def open_new(path: Path) -> IO[bytes]:
    """In place of what is there, which may be a link; written at its end, wherever that is: who rotates a log may copy
    it and cut it off."""
    path.unlink(missing_ok=True)
    return open(path, "ab", opener=lambda name, flags: os.open(name, flags, 0o600))


def write_new(path: Path, text: str) -> None:
    with open_new(path) as file:
        file.write(text.encode())


def last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it printed nothing"]
    return f"{lines[-1].strip()} ({log})"


@contextmanager
def locked() -> Iterator[None]:
    """One start of this folder at a time, until it or its process ends: it must find neither the same port free as
    another one, nor install at the same time."""
    make_folders()
    (RUN / "lock").touch(0o600)
    with closing(sqlite3.connect(RUN / "lock", timeout=0, isolation_level=None)) as lock:

        def is_ours() -> bool:
            with suppress(sqlite3.OperationalError):
                lock.execute("BEGIN EXCLUSIVE")
            return lock.in_transaction

        if not is_ours():
            say("Waiting for another start_all of this folder ...")
            wait_until(is_ours)
        yield


def write_pid(path: Path, pid: int, script: str, entry: object = None) -> None:
    """Who runs, what that is, since when, and of a balancer, what the page gets."""
    write_new(path, f"{pid}\n{script}\n{start_of(pid)}\n{json.dumps(entry) if entry else ''}\n")


def read_pid(path: Path) -> int | None:
    return read_entry(path)[0]


def read_entry(path: Path) -> tuple[int | None, str]:
    """The id and what the page gets, if that process still runs which the file was written for: a crash may have left
    it, and somebody else may have that id by now."""
    with suppress(OSError):  # it is removed in this moment
        if path.is_file() and not path.is_symlink():  # a pipe would not end
            number, _, started, entry = [*path.read_text(errors="replace").splitlines(), "", "", "", ""][:4]
            if number.isdecimal() and started and start_of(int(number)) == started:
                return int(number), entry
    return None, ""


def start_of(pid: int) -> str:
    """When it was started, only to be compared; empty if it does not run. Ids are used again, but not from then."""
    if sys.platform == "linux":
        with suppress(OSError):
            # The second field is the name, which may have blanks and parentheses; see proc_pid_stat(5).
            state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            return "" if state in "ZX" else fields[18]
        return ""
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    if os.name == "nt":
        one = f"Get-CimInstance Win32_Process -Filter 'ProcessId={pid}'"
        command = ["powershell", "-NoProfile", "-NonInteractive", "-Command", f"({one}).CreationDate.ToFileTimeUtc()"]
    in_english = {**os.environ, "LC_ALL": "C", "TZ": "UTC0"}  # the time of a start must not change with the summer
    return subprocess.run(command, capture_output=True, text=True, env=in_english).stdout.strip()


def renew_access() -> None:
    """Write run/access.js, by which dashboard.html gets in to the balancers of this folder that run; without any there
    is none. A script, because a page from disk can load nothing else; a page from the web cannot load it."""
    found = {path.stem: read_entry(path)[1] for path in sorted(RUN.glob("balancer-*.pid"))}
    if entries := ", ".join(f"{json.dumps(name)}: {entry}" for name, entry in found.items() if entry):
        write_new(RUN / "access.js", f"window.LB_ACCESS = {{{entries}}};\n")
    else:
        (RUN / "access.js").unlink(missing_ok=True)
