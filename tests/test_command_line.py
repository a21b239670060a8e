"""`python load_balancer.py ...` as a person calls it: exit codes, one clear line, no traceback, signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import pytest
from support import PYTHON, ROOT, BalancerProcess, connect, fetch, free_port, get, wait_until

import load_balancer
from balancer import __version__
from balancer.config.settings import SECRETS
from balancer.config.values import Values

PASSWORD = "hunter2-hunter2-"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, to its end; `env` is all there is of its environment."""
    for name in [*os.environ]:
        if name.startswith("LB_") or name == "ALGORITHM":
            monkeypatch.delenv(name)

    def call(*arguments: str, env: dict[str, str] | None = None) -> Done:
        with monkeypatch.context() as set_for_it:
            for name, value in (env or {}).items():
                set_for_it.setenv(name, value)
            try:
                code = load_balancer.main([*arguments])
            except SystemExit as ended:
                code = int(ended.code or 0)
        return Done(code, *capsys.readouterr())

    return call


def assert_one_line(stderr: str, *said: str) -> None:
    assert stderr.startswith("load_balancer.py: ") and stderr.endswith("\n")
    assert stderr.count("\n") == 1 and len(stderr) < 1000
    assert "Traceback" not in stderr
    for part in said:
        assert part in stderr


@pytest.fixture
def idle() -> Iterator[BalancerProcess]:
    """A balancer whose only backend is not there."""
    with BalancerProcess(f"--backend=a=http://127.0.0.1:{free_port()}") as process:
        yield process


# What ends at once.


def test_help_names_every_setting_and_fits_the_screen(run: Run) -> None:
    done = run("--help", env={"COLUMNS": "100"})
    assert (done.code, done.err) == (0, "")
    assert max(len(line) for line in done.out.splitlines()) <= 120
    for name in set(Values.model_fields) - {"backends", *SECRETS}:
        assert "--" + name.replace("_", "-") in done.out
    assert all(flag in done.out for flag in ("--backend ", "--config ", "--check-config", "--print-config"))
    assert all(f"LB_{name.upper()}{file}" in done.out for name in SECRETS for file in ("", "_FILE"))
    assert "\n  python load_balancer.py --config " in done.out


def test_help_breaks_no_name(run: Run) -> None:
    for columns in range(80, 120):
        out = run("--help", env={"COLUMNS": str(columns)}).out
        assert "X-Debug" in out and "Cache-Control" in out


@pytest.mark.parametrize(
    ("program", "shown"),
    [("load_balancer.py", "load-balancer"), ("backend_server.py", ""), ("start_all.py", ""), ("test_client.py", "")],
)
def test_every_program_starts_however_python_is_called(tmp_path: Path, program: str, shown: str) -> None:
    """By a link. -I leaves its own folder out of the path of modules, as PYTHONSAFEPATH does; -OO all docstrings."""
    (tmp_path / "link.py").symlink_to(ROOT / program)
    command = [PYTHON, "-I", "-OO", "-W", "error", "link.py", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env={"LC_ALL": "C"}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(shown) and done.stdout.endswith(f" {__version__}\n")


def test_check_config_says_ok_from_any_directory(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "with a blank.toml"
    file.write_text('backends = ["http://127.0.0.1:8080"]', encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run("--config", file.name, "--check-config") == (0, "configuration ok\n", "")


def test_a_new_key_and_its_line(run: Run, tmp_path: Path) -> None:
    made = [run("new-key", "acme") for _ in range(2)]
    assert [(done.code, done.err) for done in made] == [(0, "")] * 2 and made[0].out != made[1].out
    key, line = made[0].out.splitlines()
    assert line == f'keys = [{{ id = "acme", sha256 = "{sha256(key.encode()).hexdigest()}" }}]' and len(key) > 40
    file = tmp_path / "balancer.toml"
    file.write_text(f'[[auth]]\nname = "partners"\ntype = "api_key"\n{line}\n', encoding="utf-8")
    assert run("--config", str(file), "--check-config").code == 0
    for wrong in ([], ["a b"], ["a", "b"]):
        done = run("new-key", *wrong)
        assert done.code == 2 and done.out == "" and done.err.count("\n") == 1


def test_print_config_shows_values_sources_and_no_secrets(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "balancer.toml"
    file.write_text("retries = 1\n", encoding="utf-8")
    env = {"LB_ID": "edge", "LB_ADMIN_TOKEN": PASSWORD}
    done = run("--config", str(file), "--port", "9001", "--print-config", env=env)
    assert (done.code, done.err) == (0, "")
    shown = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()}
    assert shown["port"] == ["9001", "flag"]
    assert shown["id"] == ["edge", "environment"]
    assert shown["retries"] == ["1", "file", str(file)]
    assert shown["algorithm"] == ["weighted", "default"]
    assert shown["admin_token"] == ["(hidden)", "environment"]
    assert PASSWORD not in done.out


@pytest.mark.parametrize(
    ("arguments", "env", "said"),
    [
        (["--port", "http"], {}, ["port", "'http'", "flag"]),
        ([], {"LB_PORT": "70000"}, ["port", "'70000'", "environment"]),
        (["--algorithm", "fastest"], {}, ["'fastest'", "round_robin"]),
        (["--backend", f"http://user:{PASSWORD}@h"], {}, ["user info"]),
        (["--cpu-affinity", "4095"], {}, ["cpu_affinity", "4095"]),
        (["--ca-file", "missing.pem"], {}, ["ca_file", "missing.pem"]),
        (["--host", "192.0.2.1"], {}, ["192.0.2.1"]),
        (["--host", "127.0..1"], {}, ["127.0..1"]),
        (["--nonsense"], {}, ["--nonsense"]),
        (["--port"], {}, ["--port"]),
        (["--prot=9001"], {}, ["--prot", "did you mean --port?"]),
        (["stray"], {}, ["stray", "see --help"]),
        (["a\nb", ""], {}, [r"a\x0ab"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_and_exit_code_2(
    run: Run, arguments: list[str], env: dict[str, str], said: list[str]
) -> None:
    done = run(*(["--port=0", *arguments] if arguments else []), env=env)
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, *said)
    assert PASSWORD not in done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--control-port", "9000"], "control_port"),
        (["--ca-file", str(ROOT / "LICENSE")], "LICENSE': holds no whole certificate; expected a PEM file"),
        (["--ca-file", str(ROOT)], "ca_file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_check_config_finds_it(run: Run, arguments: list[str], said: str) -> None:
    done = run(*arguments, "--check-config")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, said)


@pytest.mark.parametrize("arguments", [["--print-config"], ["new-key", "acme"], ["completion", "bash"]])
def test_what_cannot_be_printed_is_one_line(arguments: list[str]) -> None:
    with open("/dev/full", "wb") as full:
        command = [sys.executable, str(ROOT / "load_balancer.py"), *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert_one_line(done.stderr, "No space left on device")


def test_a_pipe_in_place_of_a_file_of_cas_is_not_waited_for(run: Run, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "ca.pem")
    done = run("--ca-file", str(tmp_path / "ca.pem"), "--check-config")
    assert (done.code, done.out) == (2, "")
    assert_one_line(done.err, "ca_file", "not a regular file")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("LB_ALGORITM", "did you mean LB_ALGORITHM?"),
        ("LB_BACKEND", "did you mean LB_BACKENDS?"),
        ("LB_ADMIN_TOKENFILE", "did you mean LB_ADMIN_TOKEN_FILE?"),
        ("LB_CONFIG_FILE", "did you mean LB_CONFIG?"),
        ("LB_XYZZY", "see --help"),
    ],
)
def test_an_unknown_variable_is_told_without_its_value(run: Run, name: str, hint: str) -> None:
    done = run("--check-config", env={name: PASSWORD})
    assert (done.code, done.out) == (0, "configuration ok\n")
    assert_one_line(done.err, f"warning: the variable {name} is ignored", hint)
    assert PASSWORD not in done.err


# Of Services called lb and lb-control, on ports 80 and "http".
KUBERNETES = {
    "LB_SERVICE_HOST": "10.96.0.7",
    "LB_SERVICE_PORT": "80",
    "LB_SERVICE_PORT_HTTP": "80",
    "LB_PORT": "tcp://10.96.0.7:80",
    "LB_PORT_80_TCP": "tcp://10.96.0.7:80",
    "LB_PORT_80_TCP_PROTO": "tcp",
    "LB_PORT_80_TCP_PORT": "80",
    "LB_PORT_80_TCP_ADDR": "10.96.0.7",
    "LB_CONTROL_SERVICE_HOST": "10.96.0.8",
    "LB_CONTROL_PORT": "udp://10.96.0.8:9001",
}


@pytest.mark.parametrize("env", [KUBERNETES, {"LB_URL": "http://x", "LB_TEST_RATE": "5"}, {"LB_PROT": " "}])
def test_the_variables_of_others_are_passed_over_in_silence(run: Run, env: dict[str, str]) -> None:
    done = run("--print-config", env=env)
    assert (done.code, done.err) == (0, "")
    shown = {line.split()[0]: line.split()[1:] for line in done.out.splitlines()}
    assert (shown["port"], shown["control_port"]) == (["9000", "default"], ["(empty)", "default"])


def test_a_port_in_a_variable_is_not_mistaken_for_that_of_a_service(run: Run) -> None:
    done = run("--check-config", env={"LB_PORT": "tcp:80"})
    assert done.code == 2
    assert_one_line(done.err, "port", "'tcp:80'", "environment")


# What serves.


def test_a_taken_port_is_one_line_and_disturbs_nobody(idle: BalancerProcess, run: Run) -> None:
    command = [PYTHON, str(ROOT / "load_balancer.py"), "--port", str(idle.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, str(idle.port), "in use")
    for _ in range(10):
        assert fetch(f"{idle.url}/health")[0] == 200
    assert idle.popen.poll() is None

    code, _, told = run("--port=0", "--control-port", str(idle.port))
    assert code == 2
    assert_one_line(told, str(idle.port), "in use")


def test_a_port_just_left_can_be_taken_again(idle: BalancerProcess) -> None:
    with connect(idle.port) as sock:
        sock.sendall(get(b"/health"))
        wait_until(lambda: sock.recv(1000), what="an answer")
    idle.stop()
    again = BalancerProcess("--port", str(idle.port), f"--backend=a=http://127.0.0.1:{free_port()}")
    again.stop()
    assert again.port == idle.port


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_it_quickly_and_quietly(idle: BalancerProcess, number: signal.Signals, code: int) -> None:
    with connect(idle.port) as sock:  # of a client that keeps it
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        wait_until(lambda: b"healthy" in sock.recv(4096), what="an answer")
        idle.send(number)
        assert idle.wait() == code  # not after the 30 s that requests in flight would get
    assert not re.search(r"Traceback|KeyboardInterrupt|ERROR|WARNING", idle.output.partition("draining")[2])
    assert "Traceback" not in idle.output


def test_two_signals_end_it_once(idle: BalancerProcess) -> None:
    idle.send(signal.SIGINT)
    idle.send(signal.SIGINT)
    assert idle.wait() == 130
    assert "Traceback" not in idle.output


@pytest.mark.parametrize("name", ["LB_CONFIG", "LB_ADMIN_TOKEN_FILE"])
def test_what_a_path_contains_forges_no_line(run: Run, name: str, tmp_path: Path) -> None:
    done = run("--check-config", env={name: f"{tmp_path}/a\nFORGED\x1b[31m"})
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and r"a\x0aFORGED\x1b[31m" in done.err


@pytest.mark.parametrize("name", ["LB_ADMIN_TOKEN", "LB_PAGE_TOKEN"])
@pytest.mark.parametrize("value", ["", "                    "], ids=["empty", "blank"])
def test_a_token_that_is_set_but_empty_is_refused(run: Run, name: str, value: str) -> None:
    """A command that was to bring it had failed, and the API stood open without a word."""
    done = run("--check-config", env={name: value})
    assert done.code == 2
    assert f"{name} is empty" in done.err and len(done.err.splitlines()) == 1


def test_a_secret_without_end_is_refused(run: Run) -> None:
    done = run("--check-config", env={"LB_ADMIN_TOKEN_FILE": "/dev/zero"})
    assert done.code == 2 and "more than 65536 bytes" in done.err
