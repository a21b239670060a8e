"""The way of one request through the files of `balancer/`: how many it visits, and how often it goes back.

Prints files, stays and returns of a GET, a POST and a control request. Counted is what somebody sees who follows a
request from function to function. Each function of `balancer/` that is entered counts for the file it stands in; what
is entered in the same file one after the other is one stay there. A return is a stay in a file that the way had left
before, so returns are stays less files. To come back to a caller is no entry; neither are functions that Python makes,
such as those of a dataclass, which stand in no file.

The request goes the way that `bench/guard.py` has it: from `Bridge.accept` to a real backend on a loopback socket and
back, in one thread, workers and the express way included.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from backends import slow_backends
from contenders import HERE
from guard import Kind, balancer, serve
from script import Parser

from balancer.edge.bridge import Bridge

PACKAGE = HERE.parent / "balancer"
WARMUP_REQUESTS = 20  # afterwards the connection is kept, and what follows from the heads is known
REQUESTS = {
    "GET": Kind(),  # on the express way
    "POST": Kind("POST", b"x" * 200_000),  # its body is too large for that: a worker thread has it
    "control": Kind(path="/status", answer=None),
}


@dataclass
class Way:
    """Stays in their order: the file, and the functions entered there."""

    stays: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.stays}

    @property
    def returns(self) -> int:
        return len(self.stays) - len(self.files)

    def enter(self, file: str, function: str) -> None:
        if not self.stays or self.stays[-1][0] != file:
            self.stays.append((file, []))
        self.stays[-1][1].append(function)


def trace(bridge: Bridge, kind: Kind) -> Way:
    way = Way()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            way.enter(str(path.relative_to(PACKAGE)), frame.f_code.co_qualname)

    for _ in range(WARMUP_REQUESTS):
        serve(bridge, kind)
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        serve(bridge, kind)
    finally:
        sys.setprofile(before)
    return way


def trace_all() -> dict[str, Way]:
    with slow_backends("0") as backends, balancer(backends.ports[0], control_reads="open") as bridge:
        return {name: trace(bridge, kind) for name, kind in REQUESTS.items()}


def main(is_listed: bool) -> None:
    for name, way in trace_all().items():
        print(f"{name}: {len(way.files)} files, {len(way.stays)} stays, {way.returns} returns")
        if is_listed:
            print(*(f"    {file}: {', '.join(functions)}" for file, functions in way.stays), sep="\n")


if __name__ == "__main__":
    parser = Parser(__doc__)
    parser.add_argument(
        "--list", dest="is_listed", action="store_true", help="and each stay, with the functions that are entered there"
    )
    parser.start(main)
