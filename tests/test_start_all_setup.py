"""What start_all.sh makes before it starts anything, with requirements that need no download; its usage."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest
from launched import PROJECT, Demo, bare, bare_tree, copy_project, demo, tree

import start_all
from demo.console import Failure

__all__ = ["bare", "bare_tree", "demo", "tree"]  # fixtures


def test_stop_is_not_kept_by_what_is_no_file(bare: Demo) -> None:
    """It waited for ever for a writer of the pipe, deaf to every signal, and a folder ended it. Both are left alone."""
    run = bare.tree / "run"
    run.mkdir(mode=0o700, exist_ok=True)
    os.mkfifo(run / "a-1.pid")
    (run / "b-2.pid").mkdir()
    stop = bare.start("stop")
    assert stop.end() == 0 and "Nothing to stop" in stop.out
    (run / "a-1.pid").unlink()
    (run / "b-2.pid").rmdir()


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["everything"], {}, ["everything", "--help"]),
        (["--det"], {}, ["--det"]),
        ([], {"LB_PORT": "nine"}, ["LB_PORT", "nine"]),
        ([], {"BACKEND_PORTS": "5001 70000"}, ["BACKEND_PORTS", "70000"]),
        ([], {"BACKEND_PORTS": "5001 5001"}, ["same port", "BACKEND_PORTS=5001 5001"]),
        ([], {"LB_CONTROL_PORT": "abc"}, ["LB_CONTROL_PORT", "abc"]),
        ([], {"LB_HOST": "unix:/run/lb.sock"}, ["LB_HOST=unix:/run/lb.sock", "ports"]),
        (["stop", "--detach"], {}, ["--detach", "stop", "--help"]),
        (["backends", "--scale"], {}, ["--scale", "backends"]),
    ],
)
def test_bad_usage_is_one_line_and_2(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], environment: dict[str, str], words: list[str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Failure) as failure:
        start_all.run(arguments)
    assert failure.value.code == 2
    for word in words:
        assert word in str(failure.value)


def test_a_lock_that_is_none_is_one_line(demo: Demo) -> None:
    lock = demo.tree / "run" / "lock"
    lock.parent.mkdir(exist_ok=True)
    lock.write_bytes(b"not a lock" * 100)
    demo.start("balancer").assert_one_line_error(1, str(lock))
    lock.unlink()


def test_help_version_and_usage(demo: Demo) -> None:
    from balancer import __version__

    demo.start("--nonsense").assert_one_line_error(2, "--nonsense", "--help")
    shown, version = demo.start("--help"), demo.start("--version")
    assert (shown.end(), shown.err, version.end(), version.err) == (0, "", 0, "")
    assert shown.out.startswith("examples:")
    assert version.out == f"start_all {__version__}\n"


def test_without_a_standard_output_it_is_quiet() -> None:
    command = ["sh", "-c", f'exec "{sys.executable}" start_all.py --version >&-']
    done = subprocess.run(command, cwd=PROJECT, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("found", ["none", "3.9.2 (python3)"])
def test_no_fit_python_is_one_line_and_2(demo: Demo, tmp_path: Path, found: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("dirname", "readlink"):  # no bash
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    if found != "none":
        (tools / "python3").write_text("#!/bin/sh\necho 3.9.2\nexit 1\n")
        (tools / "python3").chmod(0o755)
    demo.start(PATH=str(tools)).assert_one_line_error(2, "Python 3.11 or newer", f"found: {found};")


def test_the_windows_script_has_its_line_ends_and_says_the_same() -> None:
    windows = (PROJECT / "start_all.bat").read_bytes()
    assert windows.isascii()
    assert windows.count(b"\n") == windows.count(b"\r\n") > 10
    assert b'cd /d "%~dp0"' in windows
    error = re.compile(r"start_all: error: .*needed, found: (?:\$found|%FOUND%)(; [^\">]*)")
    unix = (PROJECT / "start_all.sh").read_text()
    assert [match[1] for match in error.finditer(unix)] == [match[1] for match in error.finditer(windows.decode())]


def set_up(demo: Demo, **environment: str) -> str:
    run = demo.start("setup", **environment)
    assert (run.end(150), run.err) == (0, "")
    return run.out


def test_a_venv_that_is_half_made_is_made_once(bare: Demo) -> None:
    python = bare.tree / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.unlink(missing_ok=True)
    python.symlink_to("/nowhere/python")  # as after an upgrade of the system's Python
    assert "Making .venv" in set_up(bare)
    assert set_up(bare) == ""
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True, timeout=60).returncode == 0

    (bare.tree / "requirements.txt").write_text("# still nothing\n")
    changed = set_up(bare)
    assert "Making" not in changed and "Installing" in changed
    assert set_up(bare) == ""

    (bare.tree / "requirements.txt").write_text("no-such-package-anywhere\n")
    empty = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}
    run = bare.start("setup", **empty)
    run.assert_one_line_error(1, "pip could not install requirements.txt", "no-such-package-anywhere", "setup.log")
    (bare.tree / "requirements.txt").write_text("# nothing\n")
    assert "Installing" in set_up(bare)


def make_wheel(folder: Path, name: str) -> Path:
    wheel = folder / f"{name}-1-py3-none-any.whl"
    about = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with ZipFile(wheel, "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        archive.writestr(f"{name}-1.dist-info/WHEEL", about)
        archive.writestr(f"{name}-1.dist-info/RECORD", "")
    return wheel


@pytest.mark.timeout(180)
def test_whatever_pip_is_set_to_it_installs_into_the_venv(bare: Demo, tmp_path: Path) -> None:
    """It failed, or believed that it had installed."""
    elsewhere, config = tmp_path / "elsewhere", tmp_path / "pip" / "pip.conf"
    config.parent.mkdir()
    folder = {name: str(elsewhere) for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")}
    for number, (text, environment) in enumerate(
        [
            (f"[global]\nuser = true\nprefix = {elsewhere}\n[install]\ndry-run = true\ntarget = {elsewhere}\n", {}),
            ("", {**folder, "PIP_USER": "1", "PIP_DRY_RUN": "1", "PYTHONPATH": str(tmp_path)}),
            (f"[install]\nuser = true\ntarget = {elsewhere}\nroot = {elsewhere}\n", {"PIP_CONFIG_FILE": str(config)}),
        ]
    ):
        name = f"brought_{number}"
        config.write_text(text)
        (bare.tree / "requirements.txt").write_text(f"{make_wheel(tmp_path, name)}\n")
        assert "Installing" in set_up(bare, XDG_CONFIG_HOME=str(tmp_path), **environment)
        command = [bare.tree / ".venv" / "bin" / "python", "-I", "-c", f"import {name}"]
        assert subprocess.run(command, timeout=60).returncode == 0
        assert not elsewhere.exists()

    (bare.tree / "requirements.txt").write_text("# nothing\n")


def test_a_python_without_ensurepip_names_the_package(demo: Demo, tmp_path: Path) -> None:
    """Debian's python3 without python3-venv."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['ensurepip'] = None\n")
    tree = tmp_path / "tree"
    tree.mkdir()
    copy_project(tree)
    run = Demo(tree, tmp_path).start("setup", PYTHONPATH=str(tmp_path))
    run.assert_one_line_error(2, "apt-get install python3.", "-venv")
