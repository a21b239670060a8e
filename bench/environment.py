"""The benchmark's own environment, `bench/.venv`, made with the interpreter that the Python contenders are to have."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from contenders import HERE
from processes import BenchError

VENV = HERE / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "made-of"  # written last: without it the environment is not finished
REQUIREMENTS = (HERE.parent / "requirements.txt", HERE / "requirements.txt")
# The file itself and not a link of another environment, nor the shim of a version manager.
IDENTITY = (
    "import os, sys; print(os.path.realpath(sys.executable)); print(sys.version); sys.exit(sys.version_info < (3, 11))"
)


def enter(python: str) -> None:
    """Begin again in an environment of this interpreter, made here if it is missing or out of date; returns when the
    process is in it. Raises BenchError."""
    identity = identify(python)
    wanted = f"{identity}\n{hashlib.sha256(b''.join(path.read_bytes() for path in REQUIREMENTS)).hexdigest()}\n"
    if not (STAMP.exists() and STAMP.read_text() == wanted):
        make(identity.splitlines()[0], python)
        STAMP.write_text(wanted)
    if Path(sys.prefix) != VENV:
        os.execv(PYTHON, [str(PYTHON), *sys.argv])


def identify(python: str) -> str:
    """Path and version, for people and for the stamp."""
    program = shutil.which(python)
    if program is None:
        raise BenchError(f"--python {python}: no such program")
    done = subprocess.run([program, "-c", IDENTITY], capture_output=True, text=True)
    if done.returncode:
        seen = done.stdout.splitlines()[1:2] or done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise BenchError(f"--python {python}: Python 3.11 or newer is needed, found: {seen[0]}")
    return done.stdout.strip()


def make(interpreter: str, named: str) -> None:
    print(f"Making bench/.venv with {interpreter} and installing bench/requirements.txt ...", flush=True)
    step([interpreter, "-m", "venv", "--clear", str(VENV)], f"--python {named}: could not make bench/.venv")
    quiet = ["--disable-pip-version-check", "--no-input", "install", "-qq"]
    step([str(PYTHON), "-m", "pip", *quiet, "-r", str(REQUIREMENTS[-1])], "could not install bench/requirements.txt")


def step(command: list[str], complaint: str) -> None:
    """Raises BenchError with the last thing the command said, or, if Debian's is incomplete, with what to install."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        hint = "on Debian: apt-get install python3-venv" if "ensurepip" in done.stdout else ""
        raise BenchError(f"{complaint}: {hint or (done.stdout.strip().splitlines() or ['no reason given'])[-1]}")
