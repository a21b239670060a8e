"""The three parts of a run: each measures, prints its tables, and leaves what it found in the run."""

from __future__ import annotations

import argparse

import tables
from contenders import Contender, chosen
from loads import LOADS
from quality import measure_quality, methods, simulate_all
from report import OURS
from results import Results, Run
from speed import measure_all
from stalls import measure_stalls

QUICK_STALLS = (OURS, "nginx", "haproxy", "caddy")
# Beside the measured seconds: start, warm-up, waiting for the last answers, stop.
SPEED_OVERHEAD, STALL_OVERHEAD, CHOICE_OVERHEAD, SIMULATION = 3.2, 4.0, 3.0, 6.0


def expected_seconds(options: argparse.Namespace) -> float:
    """How long a run with these options takes."""
    ways = methods(options.contenders, quick=not options.full)
    parts: dict[str, float] = {
        "speed": options.rounds * len(options.loads) * len(options.contenders) * (options.seconds + SPEED_OVERHEAD),
        "stalls": len(searched(options)) * (options.stall_seconds + STALL_OVERHEAD),
        "quality": options.rounds * (SIMULATION + len(ways) * (options.choice_seconds + CHOICE_OVERHEAD)),
    }
    return sum(parts[part] for part in options.parts)


def measure_speed(options: argparse.Namespace, run: Run) -> None:
    loads = [LOADS[name] for name in options.loads]
    run.samples = measure_all(options.rounds, options.seconds, loads, chosen(options.contenders))
    show("Speed and cost", tables.speed_table(Results([run])))
    show("CPU per request", tables.summary_table(Results([run])))
    show("Latency added at one connection", tables.latency_table(Results([run])))


def search_stalls(options: argparse.Namespace, run: Run) -> None:
    run.stalls = measure_stalls(searched(options), options.stall_seconds)
    show("Stalls at half load", tables.stall_table(Results([run])))


def searched(options: argparse.Namespace) -> list[Contender]:
    return [one for one in chosen(options.contenders) if options.full or one.name in QUICK_STALLS]


def compare_choices(options: argparse.Namespace, run: Run) -> None:
    run.simulated = simulate_all(options.rounds)
    show("Unequal backends, simulated", tables.simulation_table(Results([run])))
    ways = methods(options.contenders, quick=not options.full)
    run.choices = measure_quality(options.rounds, options.choice_seconds, ways)
    show("Unequal backends", tables.choice_table(Results([run])))


PARTS = {"speed": measure_speed, "stalls": search_stalls, "quality": compare_choices}


def show(title: str, table: tables.Table) -> None:
    if table.rows:
        print(f"\n{title}\n\n{table.text()}", flush=True)
