#!/usr/bin/env python3
"""Test a running load balancer: does it answer, does it share the work as it says, how fast is it?

This is the command; the package loadtest beside it does the work. Standard library only.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C before the first request ends it without a traceback
    sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))  # python -I and PYTHONSAFEPATH leave it out

from collections.abc import Sequence
from pathlib import Path

from loadtest import session
from loadtest.options import parse_options
from loadtest.problems import EXIT_INTERNAL, EXIT_INTERRUPTED, Problem
from loadtest.screen import complain


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return session.run(parse_options(sys.argv[1:] if argv is None else argv, os.environ))
    except Problem as problem:
        complain(str(problem))
        return problem.code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # a fault of this program
        complain(f"internal error, please report it: {type(error).__name__}: {error} ({place_of(error)})")
        return EXIT_INTERNAL


def place_of(error: Exception) -> str:
    """Where it was raised, as file:line, callers first."""
    trace, places = error.__traceback__, []
    while trace:
        places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(places)


if __name__ == "__main__":
    sys.exit(main())
