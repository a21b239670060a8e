"""The virtual environment with what requirements.txt names."""

import hashlib
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from demo.console import Failure, say
from demo.places import HERE, LOGS, VENV, VENV_PYTHON, last_line, open_log
from demo.signals import STOP, pause

STAMP = VENV / "requirements.sha256"  # written last: a .venv without it is not finished


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
