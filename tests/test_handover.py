"""Sockets that whoever starts the balancer hands over, as systemd does: which is which, and what is refused."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from support import PYTHON, ROOT, fetch, running, wait_until
from test_unix_clients import curl

from balancer.edge import handover
from balancer.errors import SettingsError

# Like systemd: descriptors from 3 on, then the program in the same process.
LAUNCHER = """
import os, sys
names, descriptors, *command = sys.argv[1:]
given = [os.dup2(int(each), number) for number, each in enumerate(descriptors.split(), start=100)]
for number, each in enumerate(given, start=3):
    os.dup2(each, number)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(given))}
os.environ |= {"LISTEN_FDNAMES": names} if names else {}
os.execv(command[0], command)
"""
TAKE = """
import os
from balancer.edge import handover
from balancer.errors import SettingsError
try:
    handed = handover.take(os.environ)
    print(sorted(handed), sorted(handover.settings_of(handed)), [name for name in os.environ if "LISTEN" in name])
except SettingsError as error:
    print(error)
"""


def launch(names: str, sockets: Sequence[socket.socket], *command: str) -> list[str]:
    descriptors = " ".join(str(each.fileno()) for each in sockets)
    return [PYTHON, "-c", LAUNCHER, names, descriptors, PYTHON, *command]


def test_a_unix_socket_and_a_control_port_are_served(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as control, socket.socket(socket.AF_UNIX) as main, ExitStack() as stack:
        path, url = tmp_path / "lb.sock", f"http://127.0.0.1:{control.getsockname()[1]}"
        main.bind(str(path))
        main.listen()
        command = launch(
            "control:http", [control, main], str(ROOT / "load_balancer.py"), "--backend=http://127.0.0.1:9"
        )
        process = stack.enter_context(
            running(command, cwd=tmp_path, pass_fds=(control.fileno(), main.fileno()), stdout=subprocess.DEVNULL)
        )
        wait_until(lambda: curl(path, "/x")[0] == 503, "it answers")
        assert json.loads(fetch(f"{url}/status")[2])["capabilities"]["traffic"] is False
        rows = {row["name"]: (row["value"], row["source"]) for row in json.loads(fetch(f"{url}/config")[2])["settings"]}
        assert (rows["host"], rows["control_port"]) == (
            ("127.0.0.1", "systemd"),
            (str(control.getsockname()[1]), "systemd"),
        )
        process.terminate()
        assert process.wait(60) == 0
        assert path.is_socket()  # it is not ours
        with socket.socket(socket.AF_UNIX) as later:
            later.connect(str(path))  # who handed it over listens still


def test_what_is_meant_for_another_process_is_left_alone_and_not_passed_on() -> None:
    environ = {"LISTEN_PID": str(os.getpid() + 1), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "http", "OTHER": "x"}
    assert handover.take(environ) == {} and environ == {"OTHER": "x"}


def test_so_many_there_cannot_be() -> None:
    with pytest.raises(SettingsError, match="expected a number of sockets"):
        handover.take({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "9" * 20})


@pytest.mark.parametrize(
    ("names", "kinds", "said"),
    [
        ("", "TT", "['control', 'http'] ['control_port', 'host', 'port'] []"),
        ("lb.socket:control", "TT", "['control', 'http']"),
        ("", "U", "['http'] ['host'] []"),
        ("", "TTT", "['control', 'http', 'redirect'] ['control_port', 'host', 'http_redirect_port', 'port']"),
        ("", "TTTT", "too many sockets without a name; expected http, control, redirect"),
        ("ftp", "T", "one that is called 'ftp'; expected http, control, redirect"),
        ("http:http", "TT", "two sockets are handed over as http; expected one of each"),
        ("control", "T", "no socket that is handed over is called http"),
        ("http", "TT", "LISTEN_FDS = 2, but LISTEN_FDNAMES has 1 names"),
        ("", "D", "does not listen for TCP nor on a Unix socket"),
        ("", "N", "does not listen for TCP nor on a Unix socket"),
        ("", "A", "has no path, so anybody could connect; give it one"),
        ("", "F", "descriptor 3, handed over as http, is no socket"),
    ],
)
def test_each_is_what_it_is_called_and_of_the_right_kind(tmp_path: Path, names: str, kinds: str, said: str) -> None:
    with ExitStack() as stack:
        given = []
        for kind in kinds:
            family = socket.AF_UNIX if kind in "UA" else socket.AF_INET
            made = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM if kind == "D" else socket.SOCK_STREAM))
            made.bind({"U": str(tmp_path / "u"), "A": "\0" + tmp_path.name}.get(kind, ("127.0.0.1", 0)))
            if kind in "TUA":
                made.listen()
            given.append(made)
        command = launch(names, given, "-c", TAKE)
        if kinds == "F":
            file = stack.enter_context((tmp_path / "file").open("w"))
            os.dup2(file.fileno(), given[0].fileno())
        told = subprocess.check_output(command, cwd=ROOT, pass_fds=[each.fileno() for each in given], text=True)
    assert said in told
