"""Backends that stand in a file. Its bytes are compared, so it may be replaced, mounted or a link to another one."""

from __future__ import annotations

import os
import stat
from collections.abc import Generator, Sequence
from pathlib import Path

from balancer.config import backendsfile
from balancer.errors import SettingsError
from balancer.fleet.discovery import Found, Source, SourceFailed
from balancer.protocol.origin import Origin

LOOK_SECONDS = 1.0
_NONBLOCK = int(getattr(os, "O_NONBLOCK", 0))
MOST_BYTES = 1_048_576  # room for ten thousand backends


class FileSource(Source):
    """The `backends_file`."""

    kind = "file"
    longest_pause = LOOK_SECONDS

    def __init__(self, path: Path) -> None:
        super().__init__("backends_file", str(path), path)
        self._path = path

    def look(self) -> Generator[Sequence[Found], None, None]:
        data, found = None, []
        while not self.stopping.is_set():
            if (now := self._read()) != data:
                data, found = now, self._parse(now)
            yield found
            self.stopping.wait(LOOK_SECONDS)

    def _read(self) -> bytes:
        try:
            # A pipe, or a device, could keep us waiting for ever.
            with open(self._path, "rb", opener=lambda path, flags: os.open(path, flags | _NONBLOCK)) as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise SourceFailed(f"{self._path} is not a regular file")
                data = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise SourceFailed(f"{self._path}: {error.strerror or error}") from None
        if len(data) > MOST_BYTES:
            raise SourceFailed(f"{self._path} has more than {MOST_BYTES} bytes")
        return data

    def _parse(self, data: bytes) -> list[Found]:
        try:
            backends = backendsfile.parse(data)
        except SettingsError as error:
            raise SourceFailed(f"{self._path}: {error}") from None
        return [
            Found(each.id, each.pool, Origin.parse(each.url), each.weight, each.max_connections, each.drain_timeout)
            for each in backends
        ]
