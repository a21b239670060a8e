"""Kills a process again and again while it writes to a state file, and says how often the next one found what was
committed, and nothing by halves.

`python killed_writer.py FOLDER TIMES`. Nothing but balancer.state.store is imported, so that it forks quickly.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

from balancer.state.store import Store

ROWS = 40  # in each commit, all with the same number


def write(path: Path, pipe: int) -> None:
    """Tell what is there, then count up, and tell each number once it is committed. -1 if the rows differ."""
    store = Store(path)
    store.open()  # checks the file too
    found = {int(text) for text in store.load("test").values()} or {0}
    number = found.pop() if len(found) == 1 else -1
    while True:
        os.write(pipe, number.to_bytes(8, signed=True))
        number += 1
        store.save({"test": {str(row): f"{number}" + " " * (number * row % 700) for row in range(ROWS)}})


def killed(path: Path) -> list[int]:
    """What one process told before it was killed."""
    read, written = os.pipe()
    pid = os.fork()
    if pid == 0:
        write(path, written)
    os.close(written)
    with open(read, "rb") as pipe:
        told = pipe.read(8 * random.randrange(1, 60))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        told += pipe.read()
    return [int.from_bytes(told[at : at + 8], signed=True) for at in range(0, len(told), 8)]


if __name__ == "__main__":
    path, times = Path(sys.argv[1], "state.db"), int(sys.argv[2])
    last = good = 0
    for _ in range(times):
        numbers = killed(path)
        good += numbers[0] in (last, last + 1)  # the last one may have been committed, and not told
        last = numbers[-1]
    print(good, *sorted(each.name for each in path.parent.iterdir()))
