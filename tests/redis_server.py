"""A Redis server of its own, on a free port."""

from __future__ import annotations

import asyncio
import shutil
import signal
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from pathlib import Path
from threading import Thread

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


class SlowWay:
    """Between clients and a Redis server: each piece of an answer takes `delay` seconds more. `answers` are counted."""

    def __init__(self, server: RedisServer) -> None:
        self.delay, self.answers = 0.0, 0
        self._to = server.port
        self._loop = asyncio.new_event_loop()
        self._listener = self._loop.run_until_complete(asyncio.start_server(self._connect, "127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}/0"
        self._thread = Thread(target=self._loop.run_forever, name="slow way")

    def __enter__(self) -> SlowWay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._listener.close()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:  # else it would look for a loop of this thread
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _connect(self, reader: StreamReader, writer: StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", self._to)
        try:
            await asyncio.gather(self._pass_on(reader, to_server), self._pass_on(from_server, writer, is_answer=True))
        finally:
            to_server.close()
            writer.close()

    async def _pass_on(self, reader: StreamReader, writer: StreamWriter, is_answer: bool = False) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                if is_answer:
                    await asyncio.sleep(self.delay)
                    self.answers += 1
                writer.write(data)
                await writer.drain()
        writer.close()
