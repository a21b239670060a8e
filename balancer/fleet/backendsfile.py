"""Backends that stand in a file. Its bytes are compared, so it may be replaced, mounted or a link to another one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from balancer.config import backendsfile
from balancer.fleet.discovery import Found, Source, SourceFailed
from balancer.protocol.files import read_whole
from balancer.protocol.origin import Origin

LOOK_SECONDS = 1.0


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
            try:
                if (now := read_whole(self._path)) != data:
                    data, found = now, found_in(now)
            except ValueError as error:
                raise SourceFailed(f"{self._path}: {error}") from None
            yield found
            self.stopping.wait(LOOK_SECONDS)


def found_in(data: bytes) -> list[Found]:
    """Raises SettingsError."""
    return [
        Found(each.id, each.pool, Origin.parse(each.url), each.weight, each.max_connections, each.drain_timeout)
        for each in backendsfile.parse(data)
    ]
