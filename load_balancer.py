#!/usr/bin/env python3
"""The load balancer. `python load_balancer.py --help` says how to use it.

Installed, it is the command `load-balancer`; other WSGI servers get it as `load_balancer:app`. This is only where it
begins: balancer/commandline.py has the command line, balancer/loadbalancer.py the whole. Both are imported when
they are asked for, because that takes half a second, in which signals may come.
"""

from __future__ import annotations

import os
import signal
import sys


def command() -> int:
    """What this program is as a process of its own: `main`, with the signals that come before it can react to them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    if hasattr(signal, "pthread_sigmask"):  # a SIGHUP that comes before `Signals` can react waits, it must not kill
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])
    from balancer.edge.startup import prepare

    prepare()
    return main()


def main(arguments: list[str] | None = None) -> int:
    """The command line; `balancer.commandline.main` says what it returns."""
    from balancer import commandline

    return commandline.main(arguments)


def __getattr__(name: str) -> object:
    """`create_app`, and `app` for other WSGI servers: made from the environment and started when it is asked for."""
    if name not in ("app", "create_app"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from balancer import loadbalancer

    globals()[name] = loadbalancer.create_app if name == "create_app" else loadbalancer.started_app()
    return globals()[name]


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I and PYTHONSAFEPATH leave it out
    sys.exit(command())
