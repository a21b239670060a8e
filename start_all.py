"""Starts and stops the demo: three backends and the load balancer in front of them.

start_all.sh and start_all.bat only find a Python and call this, so that both do and say the same; installed, it is
`load-balancer demo`. This is the command line, the rest is in demo/. Nothing but the standard library is imported: this
runs before anything is installed.

Rules: nothing is started unless its port is free; ready means that it answered, never that some time has passed;
whatever ends this program, everything it started is stopped; a process that it did not start is left alone.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while the imports below run ends it without a traceback
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I and PYTHONSAFEPATH leave it out
    from balancer.edge.startup import ignore_unused_signals

    ignore_unused_signals()
    if hasattr(signal, "pthread_sigmask"):  # no balancer lets another process take its place, which nobody here knew of
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])

import argparse
import sqlite3
from collections.abc import Sequence
from typing import NoReturn

from balancer import __version__  # has no imports of its own, so it needs no .venv
from demo.console import SIGNALS, Failure, say
from demo.files import HERE, IS_INSTALLED, NAME, RUN, SCRIPT, STATE, locked, read_pid
from demo.running import ensure_venv, run_services, stop_command
from demo.services import backend_services, balancer_service, scaling_service

GO_WITH = {"scale": ["all"], "detach": ["all", "backends", "balancer"], "forget": ["all", "balancer"]}
COMMANDS = ["all", "backends", "balancer", *([] if IS_INSTALLED else ["setup"]), "stop"]
SETUP = "" if IS_INSTALLED else f"  {SCRIPT} setup               only make .venv and install requirements.txt\n"
WHERE = f" of {STATE}" if IS_INSTALLED else ""
HELP = f"""\
examples:
  {SCRIPT}                     three backends and the load balancer, until Ctrl-C
  {SCRIPT} --detach            the same in the background
  {SCRIPT} stop                stop what runs in the background
  {SCRIPT} --scale             the load balancer alone, which starts and stops backends as requests need them (Linux)
  {SCRIPT} --forget            without what was decided in earlier runs: weights, drains, the algorithm
  {SCRIPT} backends            only the backends; of those of a running demo, the ones that have ended
  {SCRIPT} balancer            only the load balancer
{SETUP}
usage: {SCRIPT} [{" | ".join(COMMANDS)}] [--scale] [--detach] [--forget] [--help] [--version]

environment:
  LB_PORT         port of the load balancer (default 9000)
  BACKEND_PORTS   ports of the backends (default "5001 5002 5003")
  LB_STATE_FILE   what keeps those (default: state/balancer-PORT.db, unless there is an LB_CONFIG); empty for nothing
  LB_PAGE_TOKEN   what the dashboard shows the balancer (default: a new one for each start); also beside LB_ADMIN_TOKEN
  RESPONSE_DELAY, ALGORITHM and every other LB_ setting are passed on

Logs are written to logs/, process ids to run/, and until the balancer is stopped its token to run/access.js, where
dashboard.html finds it when it is opened from disk. In state/ is what survives a restart: decisions, events and counts.
These folders{WHERE} are readable by you alone.
"""


class Parser(argparse.ArgumentParser):
    """Examples first in the help, one line for an error."""

    def format_help(self) -> str:
        return HELP

    def error(self, message: str) -> NoReturn:
        raise Failure(f"{message}; see {SCRIPT} --help", 2)


def run(argv: Sequence[str]) -> int:
    parser = Parser(prog="start_all", allow_abbrev=False)
    parser.add_argument("command", nargs="?", default="all", choices=COMMANDS)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--detach", action="store_true")
    parser.add_argument("--forget", action="store_true")
    parser.add_argument("--version", action="store_true")
    options = parser.parse_args(argv)
    if options.version:
        say(f"{NAME} {__version__}")
        return 0
    for flag, commands in GO_WITH.items():
        if getattr(options, flag) and options.command not in commands:
            parser.error(f"--{flag} does not go with {options.command}")
    forget = ["--forget"] if options.forget else []
    if options.command == "stop":
        return stop_command()
    if options.command == "setup":
        with locked():
            ensure_venv()
        return 0
    if options.scale:
        return run_services([scaling_service(os.environ, *forget)], options.detach)
    backends = backend_services(os.environ)
    if options.command == "backends":
        return run_services([each for each in backends if not read_pid(each.pid_file)] or backends, options.detach)
    balancer = balancer_service(os.environ, *forget)
    return run_services([balancer] if options.command == "balancer" else [*backends, balancer], options.detach)


def main() -> int:
    for stream in filter(None, (sys.stdout, sys.stderr)):  # a folder's name may have letters that this console lacks
        stream.reconfigure(errors="backslashreplace")
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        if number := getattr(signal, name, None):
            signal.signal(number, lambda number, _: SIGNALS.append(number))
    try:
        if not IS_INSTALLED:
            os.chdir(HERE)  # paths in settings are meant from here
        return run(sys.argv[1:])
    except KeyboardInterrupt:  # Ctrl-C is 130 as everywhere; a SIGTERM was asked for and obeyed, so 0
        return 130 if SIGNALS[0] == signal.SIGINT else 0
    except Failure as failure:
        print(f"{NAME}: error: {failure}", file=sys.stderr, flush=True)
        return failure.code
    except (OSError, sqlite3.Error) as error:
        where = getattr(error, "filename", None) if isinstance(error, OSError) else RUN / "lock"  # alone read so here
        told = ": ".join(map(str, filter(None, (where, getattr(error, "strerror", None) or error))))
        print(f"{NAME}: error: {told}", file=sys.stderr, flush=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
