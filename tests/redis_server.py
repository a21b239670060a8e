"""A Redis server of its own, on a free port."""

from __future__ import annotations

import shutil
import signal
from contextlib import suppress
from pathlib import Path

from support import Process, exchange, free_port, wait_until


class RedisServer(Process):
    """Keeps nothing on disk; `again` starts another one on the same port after `stop`."""

    def __init__(self, folder: Path, *arguments: str, port: int = 0) -> None:
        program = shutil.which("redis-server")
        assert program is not None, "apt-get install redis-server"
        self.folder, self.arguments, self.port = folder, arguments, port or free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        where = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder), "--save", ""]
        super().__init__([program, *where, *arguments])
        wait_until(self._answers, "Redis answers")

    def _answers(self) -> bool:
        with suppress(OSError):
            return bool(self.ask("PING"))
        return False

    def ask(self, *lines: str) -> str:
        """What it answers to commands, each on a line."""
        return exchange(self.port, "".join(f"{line}\r\n" for line in (*lines, "QUIT")).encode()).decode()

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.send(signal.SIGCONT)  # a stopped process does not end
        super().stop()

    def again(self) -> RedisServer:
        return RedisServer(self.folder, *self.arguments, port=self.port)
