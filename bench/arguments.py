"""The options of bench/run.py, with what an option that was not given stands for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from contenders import CONTENDERS, HERE
from loads import LOADS, QUICK
from report import BASELINE, OURS

PARTS = ("speed", "stalls", "quality")
SHORT = {"rounds": 2, "seconds": 1, "choice_seconds": 12, "stall_seconds": 60}
FULL = {"rounds": 5, "seconds": 5, "choice_seconds": 30, "stall_seconds": 60}


def parse(about: str | None, given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the long run, for the documentation")
    parser.add_argument("--parts", type=some_of(PARTS), metavar="NAME[,NAME...]", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--contenders", type=some_of(CONTENDERS), metavar="...", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--loads", type=some_of(LOADS), metavar="...", help=f"of {', '.join(LOADS)}; or all")
    parser.add_argument("--rounds", type=positive, help="of the loads and of the choice; default 2; 5 with --full")
    parser.add_argument(
        "--seconds", type=positive, help="of load per contender, load and round; default 1; 5 if --full"
    )
    parser.add_argument(
        "--stall-seconds",
        type=positive,
        help=f"of the search for stalls, per contender; default {SHORT['stall_seconds']}",
    )
    parser.add_argument("--choice-seconds", type=positive, help="per way to choose and round; default 12; 30 if --full")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="renew docs/performance.md too (--full does)")
    parser.add_argument(
        "--render",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="only renew docs/performance.md, from the JSON files of runs; what was measured again is taken from the "
        "later file",
    )
    parser.add_argument(
        "--python",
        metavar="PROGRAM",
        help="interpreter of all Python contenders and of the benchmark, in an environment of its own (bench/.venv); "
        "default: of run.sh /usr/bin/python3, if it is 3.11 or newer, of run.py the one that runs it",
    )
    add_checks(parser)
    options = parser.parse_args(given)
    fill_in(options)
    if options.require_ratio and not {OURS, BASELINE} <= set(options.contenders):
        parser.error(f"--require-ratio needs the contenders {OURS} and {BASELINE}")
    return options


def add_checks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--require-ratio", type=float, metavar="R", help=f"exit 1 unless the {OURS} reaches 1/R")
    parser.add_argument("--transfer", metavar="SIZE", help="check memory with a body of this size, such as 1GiB")
    parser.add_argument("--max-growth", default="32MiB", metavar="SIZE", help="allowed by --transfer (default 32MiB)")
    parser.add_argument("--concurrent", type=positive, metavar="N", help="check N requests in flight at once")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds a backend takes then (default 0.2)")


def fill_in(options: argparse.Namespace) -> None:
    """What was not said, by the length of the run."""
    numbers = FULL if options.full else SHORT
    names = {
        "parts": list(PARTS),
        "contenders": [OURS] if options.transfer or options.concurrent else list(CONTENDERS),
        "loads": list(LOADS if options.full else QUICK),
    }
    for name, value in (*numbers.items(), *names.items()):
        if getattr(options, name) is None:
            setattr(options, name, value)


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def some_of(known: Iterable[str]) -> Callable[[str], list[str]]:
    names = list(known)

    def parse(text: str) -> list[str]:
        chosen = names if text == "all" else [name.strip() for name in text.split(",")]
        if unknown := sorted(set(chosen) - set(names)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(names)}")
        return list(dict.fromkeys(chosen))

    return parse
