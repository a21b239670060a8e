"""Processes on this machine, kept by a program that outlives the balancer by as long as it takes to end them."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from threading import Thread

from balancer.config.scaling import ScalingSettings
from balancer.fleet import keeper
from balancer.fleet.discovery import SourceFailed
from balancer.protocol.origin import Origin
from balancer.protocol.texts import shown

log = logging.getLogger("balancer.scaling")

END_SECONDS = keeper.KILL_SECONDS + 1  # for the keeper
NOT_FOR_BACKENDS = ("LB_", "LISTEN_", "NOTIFY_", "WATCHDOG_")  # settings, secrets among them, and what systemd tells us


class Processes:
    """Those of one pool. A Launcher, for one thread, beside which another reads what the keeper writes: that adds to
    `_ended`, `_groups` and `_last_lines`, each in one step.

    `cpus` are those that they may use: the balancer may have pinned itself to one. The keeper knows each by a key, for
    the next one of its id may be started while it ends.
    """

    def __init__(self, options: ScalingSettings, cpus: frozenset[int]) -> None:
        self.options = options
        self._cpus = cpus
        self._keeper: subprocess.Popen[bytes] | None = None
        self._reader: Thread | None = None
        self._numbers = count(1)
        self._running: dict[str, tuple[str, int]] = {}  # key and port of each, by id
        self._ended: dict[str, str] = {}  # how, by key
        self._groups: dict[str, int] = {}  # of processes, by key
        self._last_lines: dict[str, str] = {}  # of output, by key

    def found(self) -> Mapping[str, Origin]:
        return {}  # nothing outlives a balancer

    def start(self, backend_id: str) -> Origin:
        assert self.options.command is not None
        key, port = f"{backend_id}:{next(self._numbers)}", self._free_port()
        words = shlex.split(self.options.command)
        command = [word.replace("{port}", str(port)).replace("{id}", backend_id) for word in words]
        if self._keeper is None:
            self._begin()
        self._ask(start=key, command=command)
        self._running[backend_id] = key, port
        return Origin("http", "127.0.0.1", port)

    def ended(self) -> Mapping[str, str]:
        if self._keeper is not None and self._keeper.poll() is not None:
            self.close()
            for key, _ in self._running.values():
                self._ended.setdefault(key, "its keeper was killed, and it with that")
        return {backend_id: self._ended[key] for backend_id, (key, _) in self._running.items() if key in self._ended}

    def stop(self, backend_id: str) -> None:
        key, _ = self._running.pop(backend_id)
        if key not in self._ended:
            self._ask(stop=key)
        for known in self._ended.keys() - {key for key, _ in self._running.values()}:
            del self._ended[known]  # of those that were stopped

    def close(self) -> None:
        """The end of its input is the keeper's end, after that of all others."""
        process, self._keeper = self._keeper, None
        if process is None:
            return
        assert process.stdin is not None and self._reader is not None
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._reader.join()
        for group in self._groups.values():  # if it was killed: those that it kept go with it, not what they started
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)
        self._groups.clear()

    def _free_port(self) -> int:
        taken = {port for _, port in self._running.values()}  # one that was just started may not listen yet
        while True:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                port: int = listener.getsockname()[1]
            if port not in taken:
                return port

    def _begin(self) -> None:
        """In a session of its own, so that Ctrl-C and what kills our group spare it: it is to end the others."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(NOT_FOR_BACKENDS)}
        if sys.prefix != sys.base_prefix:  # `python` is the one that runs us, as where its environment is activated
            environment["PATH"] = os.pathsep.join(
                [os.path.dirname(sys.executable), environment.get("PATH", os.defpath)]
            )
        command = [sys.executable, "-I", str(Path(keeper.__file__)), ",".join(map(str, self._cpus))]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
        except OSError as error:
            raise SourceFailed(f"no process can be started: {error.strerror}") from None
        self._keeper = process
        self._reader = Thread(target=self._read, args=(process,), name=f"keeper-{self.options.name}", daemon=True)
        self._reader.start()

    def _ask(self, **what: object) -> None:
        assert self._keeper is not None and self._keeper.stdin is not None
        try:
            self._keeper.stdin.write(json.dumps(what).encode() + b"\n")
            self._keeper.stdin.flush()
        except OSError:
            raise SourceFailed("the keeper of its processes has ended") from None

    # The keeper's reader.

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with process.stdout as told:
            for line in told:
                what = json.loads(line)
                key = what["id"]
                if "group" in what:
                    self._groups[key] = what["group"]
                elif "line" in what:
                    text = self._last_lines[key] = shown(what["line"])
                    log.info("%s: %s", key.partition(":")[0], text)
                else:
                    self._groups.pop(key, None)
                    last = self._last_lines.pop(key, "")
                    self._ended[key] = f"{what['ended']}: {last}" if last else what["ended"]
