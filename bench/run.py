"""CPU per proxied request of this balancer and of others, side by side in one run. Linux only.

python bench/run.py                            the contenders under wrk, a table and bench/results.json
python bench/run.py --require-ratio 15         the same; exit 1 unless the balancer needs 1/15 of the baseline
python bench/run.py --transfer 1GiB            that many bytes up and down; growth of the balancer's memory
python bench/run.py --concurrent 1000          that many requests in flight at once, to backends that take --delay
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import report
from checks import check_concurrency, check_transfer, parse_size
from contenders import BALANCER, CONTENDERS, HERE, Contender, find_program
from processes import BenchError
from speed import Load, measure_all

OUR_NAME = "balancer"
OPTIONAL = {"haproxy"}  # in the default selection, left out where it is not installed


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, leave)
    try:
        check_requirements(options)
        return run_checks(options) if options.transfer or options.concurrent else run_speed(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench: interrupted; everything it started is stopped", file=sys.stderr)
        return 130


def leave(number: int, frame: FrameType | None) -> None:
    """SIGTERM unwinds the stack as Ctrl-C does, so that every started process is stopped."""
    raise KeyboardInterrupt


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--seconds", type=positive, default=5, help="of load per contender and round (default 5)")
    parser.add_argument("--connections", type=numbers, default=[32], metavar="N[,N...]", help="default 32")
    parser.add_argument("--contenders", type=names, metavar="NAME[,NAME...]", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", metavar="FILE")
    parser.add_argument("--require-ratio", type=float, metavar="R", help=f"exit 1 unless the {OUR_NAME} reaches 1/R")
    parser.add_argument("--transfer", metavar="SIZE", help="check memory with a body of this size, such as 1GiB")
    parser.add_argument("--max-growth", default="32MiB", metavar="SIZE", help="allowed by --transfer (default 32MiB)")
    parser.add_argument("--concurrent", type=positive, metavar="N", help="check N requests in flight at once")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds a backend takes then (default 0.2)")
    options = parser.parse_args()
    if options.contenders is None:
        options.contenders = default_contenders(options)
    if options.require_ratio and not {OUR_NAME, report.BASELINE} <= set(options.contenders):
        parser.error(f"--require-ratio needs the contenders {OUR_NAME} and {report.BASELINE}")
    return options


def positive(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def numbers(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in CONTENDERS]:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(CONTENDERS)}")
    return chosen


def default_contenders(options: argparse.Namespace) -> list[str]:
    if options.transfer or options.concurrent:
        return [OUR_NAME]
    return [name for name in CONTENDERS if name not in OPTIONAL or find_program(name)]


def check_requirements(options: argparse.Namespace) -> None:
    if sys.platform != "linux":
        raise BenchError("Linux only: processes are measured from /proc")
    programs = {program for name in options.contenders for program in CONTENDERS[name].programs}
    if not (options.transfer or options.concurrent):
        programs |= {"nginx", "wrk"}
    if missing := sorted(program for program in programs if not find_program(program)):
        raise BenchError(f"not installed: {', '.join(missing)}; on Debian: apt-get install {' '.join(missing)}")
    if importlib.util.find_spec("flask") is None or importlib.util.find_spec("requests") is None:
        raise BenchError("flask and requests are missing here: pip install -r requirements.txt")
    if OUR_NAME in options.contenders and not BALANCER.exists():
        raise BenchError(f"{BALANCER} is missing")


def run_checks(options: argparse.Namespace) -> int:
    faults = []
    for contender in (CONTENDERS[name] for name in options.contenders):
        if options.transfer:
            faults += check_transfer(contender, parse_size(options.transfer), parse_size(options.max_growth))
        if options.concurrent:
            faults += check_concurrency(contender, options.concurrent, options.delay)
    return fail(faults)


def run_speed(options: argparse.Namespace) -> int:
    loads = [Load(connections, options.seconds) for connections in sorted(options.connections)]
    chosen = [CONTENDERS[name] for name in options.contenders]
    host = report.machine()
    samples = measure_all(options.rounds, loads, chosen)
    summaries = report.summarise(samples)
    print(report.speed_table(summaries))
    for warning in report.warnings(samples, summaries):
        print(f"warning: {warning}")
    settings = {"rounds": options.rounds, "loads": [asdict(load) for load in loads], "about": about(chosen)}
    write_json(options.json, report.document(settings, host, samples))
    return fail(report.missed_ratio(summaries, OUR_NAME, options.require_ratio) if options.require_ratio else [])


def about(chosen: list[Contender]) -> dict[str, str]:
    return {contender.name: contender.about for contender in chosen}


def fail(reasons: list[str]) -> int:
    for reason in reasons:
        print(f"FAILED: {reason}", file=sys.stderr)
    return 1 if reasons else 0


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
