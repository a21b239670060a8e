"""Where things are, and the files in logs/ and run/: who runs, who is about to start, and what lets the page in.

They are ours alone: of mode 0600 in folders of mode 0700, and never reached through a symbolic link. Whoever could put
a link in their place would choose what is overwritten, or read.
"""

import errno
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from demo.console import STOP, Failure, pause, say
from demo.processes import had_started, identify

HERE = Path(__file__).resolve().parents[1]
IS_INSTALLED = not (HERE / "balancer").exists()  # as `load-balancer demo`: that package is elsewhere, on our path
VENV = HERE / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
PYTHON = Path(sys.executable) if IS_INSTALLED else VENV_PYTHON
# Where an installed program keeps what it writes (XDG Base Directory Specification).
HOME = os.environ.get("LOCALAPPDATA" if os.name == "nt" else "XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
STATE = Path(HOME, "load-balancer") if IS_INSTALLED else HERE
LOGS, RUN, MEMORY = STATE / "logs", STATE / "run", STATE / "state"  # the last has what survives a restart
NAME = "load-balancer demo" if IS_INSTALLED else "start_all"
SCRIPT = NAME if IS_INSTALLED else "start_all.bat" if os.name == "nt" else "./start_all.sh"
OURS = ("start_all.py", "load_balancer.py", "backend_server.py")
# A script, because a page from disk can load nothing else; a page from the web cannot load it. It has an entry for each
# balancer of this folder, by the name of its pid file, so that demos on different ports keep apart.
ACCESS = RUN / "access.js"
VARIABLE = "window.LB_ACCESS = "  # dashboard.html reads it
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)  # one is not there on Windows, one only there


def shown(path: Path) -> str:
    """As a person types it, who is in the folder of the checkout, or anywhere."""
    return str(path if IS_INSTALLED else path.relative_to(HERE))


def open_private(path: Path, flags: int) -> IO[bytes]:
    """The file opened with these flags of os.open(), made if it is not there. Raises Failure for a link."""
    make_private(path.parent)
    refuse_link(path)
    try:
        descriptor = os.open(path, flags | os.O_CREAT | NO_FOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            refuse_link(path)  # put there in this moment
        raise
    if os.name == "posix":
        os.fchmod(descriptor, 0o600)  # one that was there before
    return os.fdopen(descriptor, "r+b" if flags & os.O_RDWR else "wb")


def make_private(folder: Path) -> None:
    """Raises Failure for a link."""
    refuse_link(folder)
    folder.mkdir(mode=0o700, parents=IS_INSTALLED, exist_ok=True)
    if os.name == "posix" and folder.stat().st_mode & 0o077:  # made by an earlier version, or by hand
        folder.chmod(0o700)


def refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise Failure(f"{path} is a symbolic link, which is not followed; remove it", 2)


def write_private(path: Path, text: str) -> None:
    """Whole or not at all: whoever reads it meanwhile gets the old text. Only one process may write it at a time."""
    refuse_link(path)
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)  # of a writer that was killed
    try:
        with named(path), open_private(new, os.O_WRONLY | os.O_EXCL) as file:
            file.write(text.encode("ascii"))
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Of a disk that is full the system does not say where."""
    try:
        yield
    except OSError as error:
        raise Failure(f"{path} cannot be written: {error.strerror}") from None


def read_private(path: Path) -> str:
    """The text; empty if there is no such file, or something else in its place: a link, a folder, a pipe."""
    try:
        descriptor = os.open(path, os.O_RDONLY | NO_FOLLOW | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait
        with os.fdopen(descriptor, "rb") as file:
            return file.read().decode("ascii", "replace") if stat.S_ISREG(os.fstat(descriptor).st_mode) else ""
    except OSError:
        return ""


def remove_file(path: Path) -> None:
    """A folder of that name must not keep us from the rest."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        say(f"{path} could not be removed: {error.strerror}")


@contextmanager
def open_log(path: Path) -> Iterator[IO[bytes]]:
    """Empty, and always written at its end, wherever that is: whoever rotates it may copy it and cut it off."""
    with open_private(path, os.O_WRONLY | os.O_TRUNC | os.O_APPEND) as file:
        with named(path):
            os.write(file.fileno(), b"\n")  # a full disk takes an empty file
        file.truncate(0)
        yield file


def last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it printed nothing"


@contextmanager
def locked(name: str, is_start: bool = False) -> Iterator[None]:
    """One program of this folder at a time. A start must find neither the same port free as another one, nor install at
    the same time; it may last, so who waits for it is told, and may be stopped."""
    with open_private(RUN / name, os.O_RDWR) as file:
        if not try_lock(file) and is_start:
            say("Waiting for another start_all of this folder ...")
        while not try_lock(file):
            if is_start:
                STOP.check()
            pause()
        yield


def try_lock(file: IO[bytes]) -> bool:
    """The system takes the lock back when its holder dies, however it dies."""
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


def write_pid(path: Path, pid: int, script: str) -> None:
    """The id, what runs under it, and since when."""
    write_private(path, f"{pid}\n{script}\n{identify(pid)[0]}\n")


def read_pid(path: Path) -> int | None:
    """The id in the file, if that process still runs which the file was written for.

    A crash may have left it, and somebody else may have that id by now; an editor or a backend started by hand has our
    file in its command line as well. An earlier version wrote no start time, but each file after the start.
    """
    number, script, noted = [*read_private(path).splitlines(), "", "", ""][:3]
    if not re.fullmatch(r"[1-9][0-9]{0,8}", number) or script not in OURS:
        return None
    started, command = identify(int(number))
    try:
        is_the_one = started == noted if noted else had_started(started, path.lstat().st_mtime)
    except OSError:  # it was removed in this moment
        return None
    return int(number) if is_the_one and str(HERE / script) in command else None


def remove_pid(path: Path, pid: int | None) -> None:
    """Remove the file of process `pid`, unless it names another one by now: the one started in its place."""
    if read_pid(path) in (pid, None):
        remove_file(path)


def renew_access(more: dict[str, object] | None = None) -> None:
    """Keep in run/access.js the entries of balancers that run, and add these; without any there is no such file."""
    if not more and not ACCESS.exists():
        return
    with locked("access.lock"):  # for a moment, also when we are asked to stop
        try:
            found = json.loads(read_private(ACCESS).removeprefix(VARIABLE).rstrip(";\n"))
        except ValueError:
            found = None
        names = [name for name in found if re.fullmatch(r"balancer-[0-9]+", name)] if isinstance(found, dict) else []
        entries = {name: found[name] for name in names if read_pid(RUN / f"{name}.pid")} | (more or {})
        if entries:
            write_private(ACCESS, f"{VARIABLE}{json.dumps(entries)};\n")
        else:
            ACCESS.unlink(missing_ok=True)
