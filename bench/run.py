"""This balancer beside others: CPU per request, speed, latency, memory, and how well it chooses. Linux only.

./bench/run.sh                                 installs what is missing, then a quick run: table, bench/results.json
./bench/run.sh --full                          every load and contender, long; renews docs/performance.md and its plots
./bench/run.sh --parts speed --loads small-32,small-256 --rounds 5 --seconds 10 --contenders balancer,baseline
./bench/run.sh --render bench/results.json     renews the documentation from a file, without measuring
./bench/run.sh --transfer 1GiB                 that many bytes up and down; growth of the balancer's memory
./bench/run.sh --concurrent 1000               that many requests in flight at once, to backends that take --delay
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

import documents
import report
import tables
from checks import check_concurrency, check_transfer, parse_size
from contenders import BALANCER, CONTENDERS, HERE, Contender, find_program
from loads import LOADS, QUICK
from processes import BENCH_CPUS, BenchError
from quality import measure_quality, methods, simulate_all
from report import OURS, Results
from speed import measure_all
from stalls import measure_stalls

PARTS = ("speed", "stalls", "quality")
QUICK_STALLS = ("balancer", "caddy")
SHORT = {"rounds": 2, "seconds": 1, "stall_seconds": 5, "choice_seconds": 12}
FULL = {"rounds": 5, "seconds": 5, "stall_seconds": 60, "choice_seconds": 60}


def main() -> int:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, leave)
    try:
        if options.render:
            return render(documents.read(options.render))
        check_requirements(options)
        os.sched_setaffinity(0, BENCH_CPUS)
        return run_checks(options) if options.transfer or options.concurrent else run_parts(options)
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
    parser.add_argument("--full", action="store_true", help="the long run, for the documentation")
    parser.add_argument("--parts", type=some_of(PARTS), metavar="NAME[,NAME...]", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--contenders", type=some_of(CONTENDERS), metavar="...", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--loads", type=some_of(LOADS), metavar="...", help=f"of {', '.join(LOADS)}")
    parser.add_argument("--rounds", type=positive, help="default 2; 5 with --full")
    parser.add_argument(
        "--seconds", type=positive, help="of load per contender, load and round; default 1; 5 if --full"
    )
    parser.add_argument("--stall-seconds", type=positive, help="of the search for stalls; default 5; 60 with --full")
    parser.add_argument("--choice-seconds", type=positive, help="per way to choose and round; default 12; 60 if --full")
    parser.add_argument("--json", type=Path, default=HERE / "results.json", metavar="FILE")
    parser.add_argument("--docs", action="store_true", help="renew docs/performance.md too (--full does)")
    parser.add_argument("--render", type=Path, metavar="FILE", help="renew docs/performance.md from a JSON file only")
    parser.add_argument("--require-ratio", type=float, metavar="R", help=f"exit 1 unless the {OURS} reaches 1/R")
    parser.add_argument("--transfer", metavar="SIZE", help="check memory with a body of this size, such as 1GiB")
    parser.add_argument("--max-growth", default="32MiB", metavar="SIZE", help="allowed by --transfer (default 32MiB)")
    parser.add_argument("--concurrent", type=positive, metavar="N", help="check N requests in flight at once")
    parser.add_argument("--delay", type=float, default=0.2, help="seconds a backend takes then (default 0.2)")
    options = parser.parse_args()
    fill_in(options)
    if options.require_ratio and not {OURS, report.BASELINE} <= set(options.contenders):
        parser.error(f"--require-ratio needs the contenders {OURS} and {report.BASELINE}")
    return options


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
        chosen = [name.strip() for name in text.split(",")]
        if unknown := sorted(set(chosen) - set(names)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(names)}")
        return list(dict.fromkeys(chosen))

    return parse


def check_requirements(options: argparse.Namespace) -> None:
    if sys.platform != "linux":
        raise BenchError("Linux only: processes are measured from /proc")
    programs = {program for name in options.contenders for program in CONTENDERS[name].programs}
    if not (options.transfer or options.concurrent):
        programs |= {"nginx", "wrk"}
    if missing := sorted(program for program in programs if not find_program(program)):
        raise BenchError(f"not installed: {', '.join(missing)}; bench/run.sh installs them on Debian")
    modules = ["flask", "requests", *(["aiohttp"] if "aiohttp" in options.contenders else [])]
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise BenchError(f"missing here: {', '.join(missing)}; pip install -r bench/requirements.txt")
    if OURS in options.contenders and not BALANCER.exists():
        raise BenchError(f"{BALANCER} is missing")


def run_checks(options: argparse.Namespace) -> int:
    faults = []
    for contender in chosen(options):
        if options.transfer:
            faults += check_transfer(contender, parse_size(options.transfer), parse_size(options.max_growth))
        if options.concurrent:
            faults += check_concurrency(contender, options.concurrent, options.delay)
    return fail(faults)


def chosen(options: argparse.Namespace) -> list[Contender]:
    return [CONTENDERS[name] for name in options.contenders]


def run_parts(options: argparse.Namespace) -> int:
    results = Results(report.machine(), describe(options))
    if "speed" in options.parts:
        loads = [LOADS[name] for name in options.loads]
        results.samples = measure_all(options.rounds, options.seconds, loads, chosen(options))
        show("Speed and cost", tables.speed_table(results))
        show("Latency added at one connection", tables.latency_table(results))
    if "stalls" in options.parts:
        searched = [c for c in chosen(options) if options.full or c.name in QUICK_STALLS]
        results.stalls = measure_stalls(searched, options.stall_seconds)
        show("Stalls at half load", tables.stall_table(results))
    if "quality" in options.parts:
        results.simulated = simulate_all(options.rounds)
        show("Unequal backends, simulated", tables.simulation_table(results))
        ways = methods(options.contenders, quick=not options.full)
        results.choices = measure_quality(choice_rounds(options), options.choice_seconds, ways)
        show("Unequal backends", tables.choice_table(results))
    for warning in report.warnings(results):
        print(f"warning: {warning}")
    options.json.write_text(documents.as_text(results))
    print(f"written: {options.json}")
    if options.full or options.docs:
        render(results)
    return fail(report.missed_ratio(results.samples, options.require_ratio) if options.require_ratio else [])


def choice_rounds(options: argparse.Namespace) -> int:
    return min(options.rounds, 3) if options.full else 1


def describe(options: argparse.Namespace) -> dict[str, object]:
    said = {name: value for name, value in vars(options).items() if isinstance(value, int | str | list)}
    about = {name: CONTENDERS[name].about for name in options.contenders}
    return said | {"command": " ".join(["./bench/run.sh", *sys.argv[1:]]), "about": about}


def show(title: str, table: tables.Table) -> None:
    if table.rows:
        print(f"\n{title}\n\n{table.text()}", flush=True)


def render(results: Results) -> int:
    for path in documents.write(results):
        print(f"written: {path}")
    return 0


def fail(reasons: list[str]) -> int:
    for reason in reasons:
        print(f"FAILED: {reason}", file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
