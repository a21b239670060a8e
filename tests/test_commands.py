"""What the command does beside serving: --probe and completion. `demo` is in test_install.py."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from certificates import Files
from support import Balancer, free_port
from test_command_line import Run, run
from wire import WireBackend

from balancer import LoadBalancer
from balancer.commandline import make_parser
from balancer.commands import completion
from balancer.commands.probe import probe
from balancer.config.settings import Settings
from balancer.errors import SettingsError

__all__ = ["run"]  # a fixture


# --probe


def test_it_says_whether_the_balancer_is_ready(run: Run, start: Callable[..., Balancer]) -> None:
    balancer = start("--control-prefix=/lb")
    asked = f"127.0.0.1:{balancer.port}/lb"
    env = {"LB_PORT": str(balancer.port), "LB_CONTROL_PREFIX": "/lb", "LB_HOST": "0.0.0.0"}
    assert run("--probe", env=env) == (0, f"{asked}/readyz: 200\n", "")
    assert run("--probe=livez", env=env) == (0, f"{asked}/livez: 200\n", "")
    balancer.library.drain("the end")
    assert run("--probe", env=env) == (1, f"{asked}/readyz: 503\n", "")


def test_it_asks_where_the_control_api_is(start: Callable[..., Balancer], tmp_path: Path) -> None:
    files, path = Files(tmp_path), tmp_path / "lb.sock"
    for values in (files.settings, {"host": f"unix:{path}"}, {"control_port": free_port()}):
        with LoadBalancer([], **values) as balancer:
            config = balancer.settings
            if "host" not in values:
                config = config.model_copy(update={"port": int(balancer.url.rpartition(":")[2])})
            code, told = probe(config, "livez")
            assert (code, told.rpartition("/")[2]) == (0, "livez: 200")


def test_no_answer_is_1_and_not_waited_for_long(scripted: WireBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("balancer.commands.probe.PROBE_SECONDS", 0.3)
    assert probe(Settings(port=free_port()), "readyz")[0] == 1
    scripted.script = lambda sock, asked: (sock.sendall(b"H"), sock.recv(1))[0]
    code, told = probe(Settings(port=int(scripted.url.rpartition(":")[2])), "readyz")
    assert code == 1 and told.endswith("timed out")
    with pytest.raises(SettingsError, match="only the balancer knows"):
        probe(Settings(port=0), "readyz")


# completion


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_flag_can_be_completed(run: Run, shell: str) -> None:
    done = run("completion", shell)
    assert (done.code, done.err) == (0, "")
    for action in make_parser()._actions:
        assert action.option_strings[-1].removeprefix("--") in done.out
    assert run("completion", "csh").code == 2


def test_bash_completes_flags_values_and_files(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file with a blank.toml").touch()
    complete = '_t() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _load_balancer; echo "${COMPREPLY[*]}"; }\n'
    asked = [
        ("--tls-cl", "--tls-client-ca --tls-client-auth"),
        ("--algorithm ran", "random"),
        ("--sticky ''", "true false"),
    ]
    asked += [("dem", "demo"), ("completion ''", "bash zsh fish"), ("--config fi", "file with a blank.toml")]
    script = run("completion", "bash").out + complete + "".join(f"_t load-balancer {words}\n" for words, _ in asked)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.stdout.splitlines(), done.stderr) == ([found for _, found in asked], "")
