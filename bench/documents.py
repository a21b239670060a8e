"""The documentation's figures: tables between markers in docs/performance.md, plots and the JSON file beside it."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import tables
from charts import Bar, Group, chart
from contenders import HERE
from loads import LOADS
from machine import about, pace
from processes import BenchError
from report import OURS, Spread, Summary, latencies, summarise, unequal_machines
from results import ChoiceRun, Results, Run, Sample

DOCS = HERE.parent / "docs"
PAGE = "performance.md"
DATA = "performance.json"


def write(results: Results, directory: Path = DOCS) -> list[Path]:
    """Put the results into the directory; returns the files written. Raises BenchError if the page lacks a marker."""
    page = directory / PAGE
    files = {page: fill(page.read_text(), results), directory / DATA: as_text(results)}
    files |= {directory / name: content for name, content in plots(results).items()}
    for path, content in files.items():
        path.write_text(content)
    return list(files)


def as_text(results: Results) -> str:
    summaries = [asdict(summary) for summary in summarise(results.samples)]
    return json.dumps(results.as_json() | {"summaries": summaries}, indent=1) + "\n"


# The page.


def about_run(run: Run) -> str:
    facts, others = run.machine, max(run.others_shares, default=0.0)
    return (
        f"- {covers(run)}: {facts['date']}, commit {facts['commit']}, others at most {others:.1%}, {pace(facts)}; "
        f"`{run.options['command']}`"
    )


def covers(run: Run) -> str:
    found = []
    if run.samples:
        loads = dict.fromkeys(sample.load for sample in run.samples)
        found.append(f"{', '.join(loads)} ({rounds_of(run.samples)} of {run.options['seconds']} s)")
    if run.stalls:
        found.append("stalls")
    if run.choices:
        found.append(f"choice ({rounds_of(run.choices)} of {run.options['choice_seconds']} s)")
    return "; ".join(found)


def rounds_of(measured: list[Sample] | list[ChoiceRun]) -> str:
    count = len({one.round for one in measured})
    return f"{count} round{'s' if count > 1 else ''}"


def about_runs(results: Results) -> str:
    places: dict[str, list[str]] = {}
    for run in results.runs:
        places.setdefault(about(run.machine), []).append(about_run(run))
    blocks = ["\n".join([f"On {place}:", "", *lines]) for place, lines in places.items()]
    return "\n\n".join([*blocks, *(f"{text[0].upper()}{text[1:]}." for text in unequal_machines(results))])


SECTIONS: dict[str, Callable[[Results], str]] = {
    "runs": about_runs,
    "summary": lambda results: tables.summary_table(results).markdown(),
    "goals": lambda results: tables.goal_table(results).markdown(),
    "speed": lambda results: tables.speed_table(results).markdown(),
    "latency": lambda results: tables.latency_table(results).markdown(),
    "stalls": lambda results: tables.stall_table(results).markdown(),
    "choice": lambda results: tables.choice_table(results).markdown(),
    "simulation": lambda results: tables.simulation_table(results).markdown(),
}


def fill(page: str, results: Results) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- end -->`, for every section."""
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        content = section(results)
        page, count = pattern.subn(lambda match, content=content: f"{match[1]}{content}\n{match[2]}", page)  # type: ignore[misc]
        if count != 1:
            raise BenchError(f"{PAGE} has {count} places for {name!r}, expected one: <!-- {name} --> ... <!-- end -->")
    return page


# The plots.


def plots(results: Results) -> dict[str, str]:
    summaries = summarise(results.samples)
    found = {
        "performance-cpu.svg": chart(
            "CPU per request", "microseconds, less is better", groups(summaries, "cpu_us_per_request")
        ),
        "performance-rate.svg": chart(
            "Requests per second", "more is better", groups(summaries, "requests_per_second")
        ),
        "performance-memory.svg": chart("Peak memory", "MiB, less is better", groups(summaries, "peak_rss_mib")),
        "performance-latency.svg": chart("Added latency at one connection", "ms", latency_groups(results), digits=3),
        "performance-choice.svg": chart("Unequal backends", "ms, less is better", choice_groups(results)),
    }
    return found


def groups(summaries: list[Summary], figure: str) -> list[Group]:
    found: dict[str, list[Bar]] = {}
    for summary in summaries:
        if (spread := summary.spreads[figure]) is not None:
            bar = Bar(summary.contender, spread, summary.contender == OURS)
            found.setdefault(summary.load, []).append(bar)
    return [Group(LOADS[load].about, bars) for load, bars in found.items()]


def latency_groups(results: Results) -> list[Group]:
    rows = latencies(results.samples)
    return [
        Group(name, [Bar(x.contender, spread, x.contender == OURS) for x in rows if (spread := x.added[name])])
        for name in ("p50", "p99")
        if rows
    ]


def choice_groups(results: Results) -> list[Group]:
    """Without those that ignore speed and load: the queue at the slow backend grows for as long as the run is, and
    their bars would hide all others."""
    ways = [runs for runs in tables.by_p99(results.choices) if runs[0].method not in ("round_robin", "weighted")]
    figures: dict[str, Callable[[ChoiceRun], float]] = {
        "p50": lambda run: run.p50,
        "p99": lambda run: run.p99,
        "p99.9": lambda run: run.p999,
    }
    return [Group(name, [choice_bar(runs, figure) for runs in ways]) for name, figure in figures.items() if ways]


def choice_bar(runs: list[ChoiceRun], figure: Callable[[ChoiceRun], float]) -> Bar:
    values = sorted(map(figure, runs))
    spread = Spread(statistics.median(values), values[0], values[-1])
    return Bar(f"{runs[0].contender} {runs[0].method}", spread, runs[0].contender == OURS)
