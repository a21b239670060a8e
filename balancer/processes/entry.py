"""The first lines of a worker process: `python -m balancer.processes.entry DESCRIPTOR PROGRAM`.

These are its end of the link, and what the files of its master were. It imports all that a worker needs and waits until
it is one. Signals are the master's: they are blocked here, since before this began.
"""

from __future__ import annotations

import socket
import sys
from importlib import import_module

from balancer.edge import startup
from balancer.processes import program


def main(descriptor: str, its_program: str) -> int:
    startup.prepare()
    from balancer.processes import worker

    import_module("balancer.edge.port")  # and with it Granian, which is imported last elsewhere
    if its_program != program.state():
        return program.IS_ANOTHER
    return worker.run(socket.socket(fileno=int(descriptor)))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
