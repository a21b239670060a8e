"""The tables of a run, and docs/performance.md: goals, one plot, one table, the JSON file beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from contenders import BASELINE, HERE, OURS, PEERS
from machine import about, pace
from processes import BenchError
from results import Row, Run, Spread, as_text, goals, noise, rows_in
from speed import LOADS

DOCS = HERE.parent / "docs"
PAGE, DATA, PLOT = "performance.md", "performance.json", "performance-cpu.svg"
RIVALS = ("envoy", "caddy")
RANGE = " (min..max)"  # ends the heading of a column that shows the spread


@dataclass(frozen=True)
class Table:
    """The first columns are text, one or more, the others are figures."""

    headings: list[str]
    rows: list[list[str]]
    texts: int = 1

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        lines = [self.headings, ["-" * width for width in widths], *self.rows]
        return "\n".join(self._align(line, widths) for line in lines)

    def _align(self, cells: list[str], widths: list[int]) -> str:
        columns = enumerate(zip(cells, widths, strict=True))
        return "  ".join(c.ljust(width) if i < self.texts else c.rjust(width) for i, (c, width) in columns).rstrip()

    def markdown(self) -> str:
        rule = ["---"] * self.texts + ["---:"] * (len(self.headings) - self.texts)
        return "\n".join(f"| {' | '.join(line)} |" for line in (self.headings, rule, *self.rows))


# By part: the columns that say whose row it is, then those of figures with the digits of a median; a count needs none.
WHOSE = {
    **{"speed": ["contender", "load"], "stalls": ["contender"]},
    **{"choice": ["contender", "method"], "simulation": ["method"]},
}
SIMULATION = {
    "requests": 0, "failed": 0, "p50 ms": 1, f"p99 ms{RANGE}": 0, f"p99.9 ms{RANGE}": 0,
    "to fast %": 0, "to slow %": 0, "to stalling %": 0,
}  # fmt: skip
COLUMNS = {
    "speed": {
        "req/s": 0, "errors": 0, f"CPU us/req{RANGE}": 1, f"ours/this{RANGE}": 2, "baseline/this": 1, "switches/req": 2,
        "p50 ms": 2, "p99 ms": 2, "peak MiB": 1, "others %": 1,
    },
    "stalls": {
        "requests/s": 0, "seconds": 0, "failed": 0, "held": 0, "p50 ms": 2, "p99 ms": 2, "p99.9 ms": 2, "worst ms": 1,
        "stalls": 0, "of its own": 0, "worst direct ms": 1, "others %": 1,
    },
    "choice": SIMULATION | {"held": 0, "worst direct ms": 1, "others %": 1},
    "simulation": SIMULATION,
}  # fmt: skip


def cell(row: Row | None, heading: str, digits: int) -> str:
    name = heading.removesuffix(RANGE)
    found = row.figures.get(name) if row else None
    if not isinstance(found, Spread):
        return "-" if found is None else str(found)
    if heading.endswith(RANGE):
        return found.told(digits)
    return f"{found.high if name.startswith('worst') else found.median:.{digits}f}"


def speed_rows(run: Run) -> list[Row]:
    order = list(LOADS)
    return sorted(rows_in(run, "speed"), key=lambda row: order.index(row.load))


def table(run: Run, part: str) -> Table:
    """The best way to choose comes first."""
    rows = speed_rows(run) if part == "speed" else rows_in(run, part)
    if part in ("choice", "simulation"):
        rows.sort(key=lambda row: row.spread("p99 ms") or Spread(0, 0, 0))
    whose, columns = WHOSE[part], COLUMNS[part]
    lines = [[*(getattr(row, name) for name in whose), *(cell(row, *one) for one in columns.items())] for row in rows]
    return Table([*whose, *columns], lines, len(whose))


def summary_table(run: Run) -> Table:
    """One line per load: what a request costs here and there."""
    found = {(row.load, row.contender): row for row in speed_rows(run)}
    rows = []
    for load in dict.fromkeys(load for load, _ in found):
        costs = [cell(found.get((load, who)), "CPU us/req", 0) for who in (OURS, *PEERS)]
        ratios = [cell(found.get((load, who)), f"ours/this{RANGE}", 2) for who in RIVALS]
        rows.append([LOADS[load].about, *costs, *ratios])
    return Table(["load", OURS, *PEERS, *(f"{OURS}/{who}{RANGE}" for who in RIVALS)], rows)


def goal_table(run: Run) -> Table:
    words = {True: "yes", False: "no", None: "not measured"}
    rows = [[text, measured, words[is_reached]] for text, measured, is_reached in goals(run)]
    return Table(["goal", "measured (min..max)", "reached"], rows, texts=3)


# The page.


def about_run(run: Run) -> str:
    facts, rows = run.machine, rows_in(run, "speed")
    rounds = max((row.rounds for row in rows), default=0)
    told = [
        f"{facts['date']}, commit {facts['commit']}, {rounds} rounds of {run.options['seconds']} s, {pace(facts)}, on "
        f"{about(facts)}; `{run.options['command']}`.",
        *(f"**Not a quiet machine:** {text}." for text in noise(run)),
    ]
    return "\n\n".join(told)


SECTIONS: dict[str, Callable[[Run], str]] = {
    "run": about_run,
    "goals": lambda run: goal_table(run).markdown(),
    "table": lambda run: summary_table(run).markdown(),
}


def fill(page: str, run: Run) -> str:
    """Replace what stands between `<!-- name -->` and `<!-- end -->`, for every section."""
    for name, section in SECTIONS.items():
        before, marker, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        if not end or marker in after:
            raise BenchError(f"{PAGE}: expected one place for {name!r}: <!-- {name} --> ... <!-- end -->")
        page = f"{before}{marker}{section(run)}\n{end}{after}"
    return page


def write_docs(run: Run, directory: Path = DOCS) -> list[Path]:
    """Returns the files written. Raises BenchError if the page lacks a marker."""
    page = fill((directory / PAGE).read_text(), run)
    files = {directory / name: text for name, text in ((PAGE, page), (DATA, as_text(run)), (PLOT, plot(run)))}
    for path, content in files.items():
        path.write_text(content)
    return list(files)


# The plot: a few rectangles need no library.

WIDTH, LABEL_WIDTH, VALUE_WIDTH, BAR, STEP = 760, 90, 70, 14, 17
COLOURS = {OURS: "#1769aa"}


def plot(run: Run) -> str:
    """CPU per request: the medians as bars, lowest to highest as a line across the end of each. Each load has a scale
    of its own: what is compared stands together. Without the baseline, beside which all others would be dots."""
    parts, y, shown = [], 40, [row for row in speed_rows(run) if row.contender != BASELINE]
    for load in dict.fromkeys(row.load for row in shown):
        bars = [(row.contender, spread) for row in shown if row.load == load and (spread := row.spread("CPU us/req"))]
        scale = (WIDTH - LABEL_WIDTH - VALUE_WIDTH) / max((spread.high for _, spread in bars), default=1.0)
        parts.append(label(8, y + 11, LOADS[load].about, 'font-weight="bold"'))
        for name, spread in bars:
            y += STEP
            low, end, high = (LABEL_WIDTH + value * scale for value in (spread.low, spread.median, spread.high))
            bar = f'x="{LABEL_WIDTH}" y="{y}" width="{end - LABEL_WIDTH:.1f}" height="{BAR}"'
            line = f'x1="{low:.1f}" x2="{high:.1f}" y1="{y + BAR // 2}" y2="{y + BAR // 2}"'
            parts.append(label(LABEL_WIDTH - 8, y + 11, name, 'text-anchor="end"'))
            parts.append(f'<rect {bar} fill="{COLOURS.get(name, "#9aa7b4")}"/><line {line} stroke="#333"/>')
            parts.append(label(round(high) + 6, y + 11, f"{spread.median:,.0f}"))
        y += 2 * STEP
    title = "CPU per request (microseconds, less is better; median, lowest to highest)"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}" role="img" '
    head += f'font-family="sans-serif" font-size="12" fill="#222"><title>{title}</title>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', label(8, 22, title), *parts, "</svg>\n"])


def label(x: int, y: int, content: str, style: str = "") -> str:
    return f'<text x="{x}" y="{y}" {style}>{escape(content)}</text>'
