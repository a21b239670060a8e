"""This balancer beside others: CPU per request, speed, latency, memory, and how well it chooses. Linux only.

./bench/run.sh                                 11 minutes: installs what is missing, tables, bench/results.json
./bench/run.sh --full                          70 minutes: everything; renews docs/performance.md and its plots
./bench/run.sh --parts speed --loads small-32,small-256 --rounds 5 --seconds 10 --contenders balancer,baseline
./bench/run.sh --render bench/results.json     seconds: renews the documentation from files, without measuring
./bench/run.sh --transfer 1GiB                 that many bytes up and down; growth of the balancer's memory
./bench/run.sh --concurrent 1000               that many requests in flight at once, to backends that take --delay

Every run begins with how long it will take. bench/README.md shows how to measure in parts, with a file for each.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from pathlib import Path
from types import FrameType

import arguments
import documents
import environment
import report
from checks import check_concurrency, check_transfer, parse_size
from contenders import BALANCER, CONTENDERS, chosen, find_program
from machine import about, machine, pace
from processes import BENCH_CPUS, BenchError
from report import OURS
from results import Results, Run, combine, read


def main() -> int:
    options = arguments.parse(__doc__)
    signal.signal(signal.SIGTERM, leave)
    try:
        if options.render:
            return render(options.render)
        if options.python:
            environment.enter(options.python)
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
    if not options.json.parent.is_dir():
        raise BenchError(f"--json {options.json}: {options.json.parent} is no directory")


def run_checks(options: argparse.Namespace) -> int:
    faults = []
    for contender in chosen(options.contenders):
        if options.transfer:
            faults += check_transfer(contender, parse_size(options.transfer), parse_size(options.max_growth))
        if options.concurrent:
            faults += check_concurrency(contender, options.concurrent, options.delay)
    return fail(faults)


def run_parts(options: argparse.Namespace) -> int:
    from parts import PARTS, expected_seconds  # they run our strategies: --help needs no installed package

    run = Run(machine(), describe(options))
    results = Results([run])
    print(
        f"{about(run.machine)}, {pace(run.machine)}\nThis takes about {minutes(expected_seconds(options))}", flush=True
    )
    warn(results)  # of a slow interpreter, before the time is spent
    for part in options.parts:
        PARTS[part](options, run)
        options.json.write_text(documents.as_text(results))  # after each, for an interrupted run to leave something
    print(f"written: {options.json}")
    warn(results)
    if options.full or options.docs:
        write_documents(results)
    return fail(report.missed_ratio(run.samples, options.require_ratio) if options.require_ratio else [])


def minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def describe(options: argparse.Namespace) -> dict[str, object]:
    said = {name: value for name, value in vars(options).items() if isinstance(value, int | str | list)}
    about = {name: CONTENDERS[name].about for name in options.contenders}
    return said | {"command": " ".join(["./bench/run.sh", *sys.argv[1:]]), "about": about}


def render(files: list[Path]) -> int:
    results = combine([run for path in files for run in read(path)])
    warn(results)
    measured = {"speed": results.samples, "stalls": results.stalls, "quality": results.choices}
    if empty := [part for part, found in measured.items() if not found]:
        print(f"warning: none of the files has {', '.join(empty)}; the page says nothing there")
    return write_documents(results)


def warn(results: Results) -> None:
    for warning in report.warnings(results):
        print(f"warning: {warning}")


def write_documents(results: Results) -> int:
    for path in documents.write(results):
        print(f"written: {path}")
    return 0


def fail(reasons: list[str]) -> int:
    for reason in reasons:
        print(f"FAILED: {reason}", file=sys.stderr)
    return 1 if reasons else 0


if __name__ == "__main__":
    sys.exit(main())
