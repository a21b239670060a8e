"""This balancer beside others: CPU per request, speed, latency, memory, and how well it chooses. Linux only.

./bench/run.sh                                 9 minutes: installs what is missing, a table, goals, bench/results.json
./bench/run.sh --docs                          the same; renews docs/performance.md, its data and its plot too
./bench/run.sh --loads small-32,small-256 --rounds 5 --seconds 10 --contenders balancer,baseline
./bench/run.sh --parts stalls,quality          13 minutes: stalls at half load, and how well each way to choose does
./bench/run.sh --render bench/results.json     seconds: renews the page from a file, without measuring
./bench/run.sh --transfer 1GiB                 that many bytes up and down; growth of the balancer's memory
./bench/run.sh --concurrent 1000               that many requests in flight at once, to backends that take --delay

Every run begins with how long it will take.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import render
from contenders import BASELINE, CONTENDERS, HERE, OURS, PEERS, Contender
from machine import about, machine, pace
from processes import BENCH_CPUS, BenchError
from results import Run, Sample, as_text, missed_ratio, read, rows_of, warnings
from script import Parser, at_least, ended, require
from speed import LOADS, USUAL, measure_all

PARTS = ("speed", "stalls", "quality")
# Beside the measured seconds: start, warm-up, waiting for the last answers, stop.
SPEED_OVERHEAD, STALL_OVERHEAD, CHOICE_OVERHEAD, SIMULATION = 3.2, 4.0, 3.0, 6.0
PYTHON = (
    "interpreter of all Python contenders, for which run.sh makes an environment of its own (bench/.venv); default: "
    "/usr/bin/python3, if it is 3.11 or newer"
)


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    everybody = [OURS, *PEERS]
    for name, known, usual in (
        ("--parts", PARTS, ["speed"]),
        ("--contenders", CONTENDERS, everybody),
        ("--loads", LOADS, USUAL),
    ):
        text = f"of {', '.join(known)}; or all; default {', '.join(usual)}"
        add(name, type=some_of(list(known)), default=usual, metavar="NAME[,NAME...]", help=text)
    add("--rounds", type=at_least(1), default=3, help="of the loads and of the choice; default 3")
    add("--seconds", type=at_least(1), default=1, help="of load per contender, load and round; default 1")
    add("--stall-seconds", type=at_least(1), default=60, help="of the search for stalls, per contender; default 60")
    add("--choice-seconds", type=at_least(1), default=12, help="per way to choose and round; default 12")
    add("--json", type=Path, default=HERE / "results.json", metavar="FILE", help="default bench/results.json")
    add("--docs", action="store_true", help="renew docs/performance.md too, which takes the speed alone")
    add("--render", type=Path, metavar="FILE", help="only renew docs/performance.md, from the file of a run")
    add("--python", metavar="PROGRAM", help=PYTHON)
    add("--require-ratio", type=float, metavar="R", help=f"exit 1 unless the {OURS} reaches 1/R of the {BASELINE}")
    add("--transfer", type=size, metavar="SIZE", help="check memory with a body of this size, such as 1GiB")
    add("--max-growth", type=size, default="32MiB", metavar="SIZE", help="allowed by --transfer (default 32MiB)")
    add("--concurrent", type=at_least(1), metavar="N", help="check N requests in flight at once")
    add("--delay", type=at_least(0.0), default=0.2, help="seconds a backend takes then (default 0.2)")
    options = parser.parse_args(given)
    if (options.transfer or options.concurrent) and options.contenders is everybody:
        options.contenders = [OURS]
    if options.require_ratio and not {OURS, BASELINE} <= set(options.contenders):
        parser.error(f"--require-ratio needs the contenders {OURS} and {BASELINE}")
    return options


def size(text: str) -> int:
    """`1GiB`, `32MiB`, `4096`."""
    units = {"GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
    number, unit = (text[:-3], units[text[-3:]]) if text[-3:] in units else (text, 1)
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"not a size: {text!r} (for example 1GiB)") from None


def some_of(names: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = names if text == "all" else [name.strip() for name in text.split(",")]
        if unknown := sorted(set(chosen) - set(names)):
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: expected some of {', '.join(names)}")
        return list(dict.fromkeys(chosen))

    return parse


def main() -> int:
    options = parse()
    return ended(lambda: bench(options))


def bench(options: argparse.Namespace) -> int:
    if options.render:
        run = read(options.render)
        warn(run)
        write_docs(run)
        return 0
    check_requirements(options)
    os.sched_setaffinity(0, BENCH_CPUS)
    faults = list(run_checks(options) if options.transfer or options.concurrent else run_parts(options))
    print(*(f"FAILED: {fault}\n" for fault in faults), sep="", end="", file=sys.stderr)
    return 1 if faults else 0


def check_requirements(options: argparse.Namespace) -> None:
    wanted = {one.program for one in contenders(options) if one.program}
    if not (options.transfer or options.concurrent):
        wanted |= {"nginx", "wrk"}
    require(wanted)
    if not options.json.parent.is_dir():
        raise BenchError(f"--json {options.json}: {options.json.parent} is no directory")


def contenders(options: argparse.Namespace) -> list[Contender]:
    return [CONTENDERS[name] for name in options.contenders]


def run_checks(options: argparse.Namespace) -> Iterator[str]:
    from checks import check_concurrency, check_transfer  # --help and --render need no installed package

    for contender in contenders(options):
        if options.transfer:
            yield from check_transfer(contender, options.transfer, options.max_growth)
        if options.concurrent:
            yield from check_concurrency(contender, options.concurrent, options.delay)


def run_parts(options: argparse.Namespace) -> Iterator[str]:
    said = {"seconds": options.seconds, "choice_seconds": options.choice_seconds}
    run = Run(machine(), {"command": " ".join(["./bench/run.sh", *sys.argv[1:]]), **said})
    minutes = expected_seconds(options) / 60
    length = f"{minutes:.0f} minutes" if minutes > 1.5 else f"{minutes * 60:.0f} s"
    print(f"{about(run.machine)}, {pace(run.machine)}\nThis takes about {length}", flush=True)
    warn(run)  # of a slow interpreter, before the time is spent
    for part in options.parts:
        measure(part, options, run)
        options.json.write_text(as_text(run))  # after each, for an interrupted run to leave something
    print(f"written: {options.json}")
    warn(run)
    if options.docs:
        write_docs(run)
    return missed_ratio(run, options.require_ratio) if options.require_ratio else iter(())


def expected_seconds(options: argparse.Namespace) -> float:
    from quality import methods

    many, ways = len(options.contenders), len(methods(options.contenders))
    parts: dict[str, float] = {
        "speed": options.rounds * len(options.loads) * many * (options.seconds + SPEED_OVERHEAD),
        "stalls": many * (options.stall_seconds + STALL_OVERHEAD),
        "quality": options.rounds * (SIMULATION + ways * (options.choice_seconds + CHOICE_OVERHEAD)),
    }
    return sum(parts[part] for part in options.parts)


def measure(part: str, options: argparse.Namespace, run: Run) -> None:
    """Add what it finds to the run, and print its tables."""
    from openloop import measure_stalls
    from quality import measure_quality, methods, simulate_all

    def show(kind: str, title: str, samples: list[Sample]) -> None:
        run.rows.extend(rows_of(samples))
        print(f"\n{title}\n\n{render.table(run, kind).text()}", flush=True)

    if part == "speed":
        loads = [LOADS[name] for name in options.loads]
        show(part, "Speed and cost", measure_all(options.rounds, options.seconds, loads, contenders(options)))
        print(f"\nCPU us per request\n\n{render.summary_table(run).text()}")
        print(f"\nGoals\n\n{render.goal_table(run).text()}", flush=True)
    elif part == "stalls":
        show(part, "Stalls at half load", measure_stalls(contenders(options), options.stall_seconds))
    else:
        show("simulation", "Unequal backends, simulated", simulate_all(options.rounds))
        if ways := methods(options.contenders):
            show("choice", "Unequal backends", measure_quality(options.rounds, options.choice_seconds, ways))


def warn(run: Run) -> None:
    for warning in warnings(run):
        print(f"warning: {warning}")


def write_docs(run: Run) -> None:
    for path in render.write_docs(run):
        print(f"written: {path}")


if __name__ == "__main__":
    sys.exit(main())
