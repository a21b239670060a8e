"""How a script here is called: its docstring is its help; what is wrong or missing is one line, and exit code 2."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import NoReturn, TypeVar

from processes import BenchError, find_program

N = TypeVar("N", int, float)


class Parser(argparse.ArgumentParser):
    def __init__(self, about: str | None) -> None:
        super().__init__(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see --help\n")

    def start(self, main: Callable[..., int | None], *programs: str) -> NoReturn:
        """`main` gets the arguments by name, and needs these programs."""
        sys.exit(ended(partial(main, **vars(self.parse_args())), programs))


def at_least(least: N, most: int = 100_000) -> Callable[[str], N]:
    """The type of an argument."""
    kind = "a whole number" if isinstance(least, int) else "a number"

    def parse(text: str) -> N:
        with suppress(ValueError):
            if least <= (number := type(least)(text)) <= most:
                return number
        raise argparse.ArgumentTypeError(f"{text!r}: expected {kind} from {least:g} to {most}")

    return parse


def require(programs: Iterable[str]) -> None:
    if missing := sorted(name for name in programs if not find_program(name)):
        where = "./bench/run.sh installs what it needs, some into bench/.venv; h2load is in Debian's nghttp2-client"
        raise BenchError(f"not installed: {', '.join(missing)} ({where})")


def ended(steps: Callable[[], int | None], programs: Iterable[str] = ()) -> int:
    """The exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: every started process is stopped
    try:
        require(programs)
        return steps() or 0
    except ModuleNotFoundError as error:
        problem = f"not installed: {error.name} (python -m pip install -r bench/requirements.txt)"
    except (BenchError, OSError) as error:
        problem = str(error)
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130
    print(f"bench: {problem}", file=sys.stderr)
    return 2
