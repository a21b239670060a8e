"""What is asked of every contender: one row per kind of work."""

from __future__ import annotations

from dataclasses import dataclass

from contenders import BODY, FILES, HERE, UPLOAD_PATH, WAIT_PATH

WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class Load:
    """One run of wrk. `send` is the name of a body in FILES; `waits` puts the slow backend behind the contender."""

    name: str
    about: str
    connections: int
    path: str = "/api/process"
    send: str | None = None
    headers: int = 0
    waits: bool = False

    @property
    def body(self) -> bytes | None:
        return None if self.send is None else FILES[self.send]

    @property
    def expected(self) -> bytes:
        return FILES.get(self.path, BODY)

    def script(self) -> str:
        """For wrk: the request, and its figures at the end."""
        lines = [f'wrk.headers["X-Bench-{number:02}"] = "{number:02}-{"v" * 24}"' for number in range(self.headers)]
        if self.body is not None:
            lines += ['wrk.method = "POST"', f'wrk.body = string.rep("x", {len(self.body)})']
        return "\n".join([*lines, (HERE / "config" / "wrk.lua").read_text()])


SMALL = "small JSON answer"
EVERY = (
    Load("small-1", f"{SMALL}, 1 connection", 1),
    *(Load(f"small-{count}", f"{SMALL}, {count} connections", count) for count in (32, 256, 1000)),
    Load("headers-32", f"{SMALL}, 20 more request headers, 32 connections", 32, headers=20),
    Load("wait-1000", f"{SMALL} after {WAIT_SECONDS:g} s, 1000 connections", 1000, path=WAIT_PATH, waits=True),
    Load("down-64k", "64 KiB down, 32 connections", 32, path="/64k"),
    Load("up-64k", "64 KiB up, 32 connections", 32, path=UPLOAD_PATH, send="/64k"),
    Load("down-10m", "10 MiB down, 8 connections", 8, path="/10m"),
    Load("up-10m", "10 MiB up, 8 connections", 8, path=UPLOAD_PATH, send="/10m"),
)
LOADS = {load.name: load for load in EVERY}
ONE_CONNECTION = "small-1"
QUICK = ("small-1", "small-32", "small-1000", "down-64k")
