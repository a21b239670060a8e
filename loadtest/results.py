"""From a run to numbers: plain JSON values in the units of their names; the report and the checks only read them."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from loadtest.latencies import Latencies
from loadtest.recording import Recording, Run, Slow, Tally

RANKS = {"p50": 500, "p75": 750, "p90": 900, "p95": 950, "p99": 990, "p99_9": 999}  # in per mille
TIMES = ("min", "mean", "stdev", *RANKS, "max")
SATURATED_CPU = 0.9  # of one core: one interpreter uses no more
LATE = 0.010  # seconds behind the schedule that are no longer a hiccup
LEAST = 0.5  # seconds: a shorter run says nothing about who was the limit
MISSED = 0.95  # of a rate, if that is
BEHIND = 0.1  # seconds too
HELD_UP = 0.0005  # seconds that a thread with nothing to do is late at its turns, if that is half of a latency too
BODY, TAIL = 9, 4  # buckets of the histogram up to p99, and beyond
STEP = 1.1  # from one to the next, at least, beyond p99
DIGITS = 3  # of their bounds
Json = dict[str, Any]


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 4)


def times_ms(latencies: Latencies) -> Json:
    """Null in every field if there is nothing to tell."""
    if not len(latencies):
        return dict.fromkeys(TIMES)
    low, high = latencies.limits()
    found = [low, *latencies.mean_and_deviation(), *latencies.percentiles(list(RANKS.values())), high]
    return {name: milliseconds(value) for name, value in zip(TIMES, found, strict=True)}


def histogram(latencies: Latencies, bounds: Sequence[float]) -> list[Json]:
    """`bounds` in milliseconds; without any in logarithmic steps, BODY of them to p99 and TAIL to the slowest: a few
    slow answers must not press all the others into one. A last `le_ms` of null has no bound."""
    if not len(latencies):
        return []
    low, high = (1000 * value for value in latencies.limits())
    chosen = list(bounds) or _fitting(low, 1000 * latencies.percentiles([990])[0], high)
    if high > chosen[-1] * (1 + 1e-9):
        chosen.append(math.inf)
    counts = latencies.counts([bound / 1000 * (1 + 1e-12) for bound in chosen])
    pairs = zip(chosen, counts, strict=True)
    return [{"le_ms": None if bound == math.inf else bound, "count": count} for bound, count in pairs]


def _fitting(low: float, high: float, highest: float) -> list[float]:
    tail = min(TAIL, math.ceil(math.log(highest / high) / math.log(STEP))) if highest > high else 0
    return sorted({*_steps(low, high, BODY), *_steps(high, highest, tail)})


def _steps(low: float, high: float, number: int) -> list[float]:
    """So many bounds from `low` to `high`, each as many times the last, rounded up."""
    low = max(low, 1e-6)
    return [_round_up(low * (high / low) ** (place / number)) for place in range(1, number + 1)]


def _round_up(value: float) -> float:
    unit = 10.0 ** (math.floor(math.log10(value)) - DIGITS + 1)
    return round(math.ceil(value / unit - 1e-9) * unit, 9)


def describe(run: Run, expected: Mapping[str, float], known: Iterable[str], bounds: Sequence[float]) -> Json:
    """`expected` shares of the backends, and the ids `known` beforehand, which are listed even without an answer."""
    recording, latency = run.recording, run.recording.latency()
    errors = [
        {"reason": reason, "detail": detail or None, "backend": backend, "count": count}
        for (reason, detail, backend), count in recording.errors.most_common()
    ]
    return {
        "interrupted": run.interrupted,
        "summary": _summary(run),
        "latency_ms": times_ms(latency),
        "latency_raw_ms": None if recording.raw is None else times_ms(recording.raw),
        "ttfb_ms": times_ms(recording.first_byte),
        "connect_ms": times_ms(recording.connect),
        "histogram": histogram(latency, bounds),
        "status_codes": {str(code): count for code, count in sorted(recording.statuses.items())},
        "errors": errors,
        "backends": _backends(recording.backends, known, expected),
        "timeline": _timeline(recording),
        "slowest": [_slow(slow) for slow in sorted(recording.slowest, reverse=True)],
        "clients": _clients(recording.identities),
        "client": _client(run, latency),
        "note": None,
    }


def _summary(run: Run) -> Json:
    recording, seconds = run.recording, run.seconds
    requests, failed, pace = recording.requests, recording.failed, run.pace
    return {
        "requests": requests,
        "ok": requests - failed,
        "failed": failed,
        "error_rate": failed / requests if requests else None,
        "duration_s": round(seconds, 6),
        "rps": round((requests - failed) / seconds, 3) if seconds else None,
        "planned_rps": None if pace is None else round(pace.due, 3),
        "sent_rps": None if pace is None else round(pace.sent, 3),
        "rate_missed": pace is not None and pace.sent < MISSED * pace.due and pace.behind > BEHIND,
        "bytes": recording.bytes,
        "connections": run.connections,
        "warmup": run.warmup,
        "sent": requests - recording.unsent + run.cut_off + run.warmup,
        "answered": recording.statuses.total() + run.warmup,
        "cut_off": run.cut_off,
        "stale_retries": run.stale_retries,
    }


def _backends(tallies: dict[str | None, Tally], known: Iterable[str], expected: Mapping[str, float]) -> list[Json]:
    groups: dict[str | None, Tally] = {name: Tally() for name in (*known, *expected)}
    groups |= tallies
    named = sum(tally.count for name, tally in groups.items() if name is not None)
    return [_backend(name, tally, named, expected.get(name or "")) for name, tally in groups.items()]


def _backend(name: str | None, tally: Tally, named: int, expected: float | None) -> Json:
    share = tally.count / named if named and name is not None else None
    return {
        "id": name,
        "count": tally.count,
        "share": share,
        "expected_share": expected,
        "deviation": None if share is None or expected is None else share - expected,
        "errors": tally.errors,
        "latency_ms": times_ms(tally.latency),
    }


def _timeline(recording: Recording) -> list[Json] | None:
    """Each second, those without an answer too; None if it was not asked for."""
    if recording.timeline is None:
        return None
    seconds, last = recording.timeline, max(recording.timeline, default=-1)
    told = ((second, seconds.get(second, Tally())) for second in range(last + 1))
    ranks = ("p50", "p95", "p99", "max")
    return [
        {"second": second, "requests": tally.count, "failed": tally.errors}
        | {rank: times_ms(tally.latency)[rank] for rank in ranks}
        for second, tally in told
    ]


def _slow(slow: Slow) -> Json:
    return {
        "latency_ms": milliseconds(slow.latency),
        "offset_s": round(slow.offset, 6),
        "status": slow.status,
        "backend": slow.backend,
        "request_id": slow.request_id,
    }


def _clients(identities: Mapping[int, Counter[str | None]]) -> Json | None:
    """How many of the clients of --clients that had several answers had all of them from one backend."""
    if not identities:
        return None
    returning = [names for names in identities.values() if names.total() > 1]
    sticky = sum(len(names) == 1 for names in returning)
    return {"count": len(identities), "returning": len(returning), "sticky": sticky}


def _client(run: Run, latency: Latencies) -> Json:
    """Whether this program was the limit: then the numbers are its own, not the balancer's."""
    ratio = run.cpu / run.seconds if run.seconds else 0.0
    requests, failed = run.recording.requests, run.recording.failed
    tells = run.seconds >= LEAST and failed * 2 <= requests  # what is refused at once comes as fast as it is asked for
    lag, late = run.lag, 0
    wakeup = run.wakeup_lag.percentiles([500])[0] if len(run.wakeup_lag) else None
    held_up = wakeup is not None and len(latency) > 0 and wakeup > max(HELD_UP, latency.percentiles([500])[0] / 2)
    if lag is not None and len(lag):
        late = lag.counts([LATE, math.inf])[1]
    return {
        "cpu_ratio": round(ratio, 4),
        "cpu_us_per_request": round(run.cpu / requests * 1e6, 1) if requests else None,
        "saturated": tells and (ratio > SATURATED_CPU or held_up or late * 100 > requests > 0),
        "wakeup_lag_ms": milliseconds(wakeup),
        "max_schedule_lag_ms": milliseconds(lag.limits()[1]) if lag is not None and len(lag) else None,
        "late_sends": None if lag is None else late,
        "waited_for_connection": None if lag is None else run.overdue,
        "exact_percentiles": latency.is_exact,
    }
