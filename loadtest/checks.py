"""What must hold: thresholds, shares and the balancer's own count."""

from typing import Any

from loadtest.control import COUNTERS
from loadtest.options import Options

Json = dict[str, Any]


def check(part: str | None, name: str, actual: float | None, op: str, limit: float, unit: str) -> Json:
    holds = actual is not None and (actual <= limit + 1e-9 if op == "<=" else actual >= limit)
    return {"part": part, "name": name, "op": op, "limit": limit, "actual": actual, "unit": unit, "passed": holds}


def error_rate(part: str | None, result: Json, options: Options) -> list[Json]:
    """Nothing to judge before the first answer."""
    rate = result["summary"]["error_rate"]
    return [] if rate is None else [check(part, "error rate", rate * 100, "<=", options.max_error_rate, "%")]


def thresholds(part: str | None, result: Json, options: Options) -> list[Json]:
    if not result["summary"]["requests"]:
        return []
    limits = {"p50": options.max_p50, "p95": options.max_p95, "p99": options.max_p99}
    found = [
        check(part, rank, result["latency_ms"][rank], "<=", limit * 1000, "ms")
        for rank, limit in limits.items()
        if limit is not None
    ]
    if options.min_rps is not None:
        found.append(check(part, "rate", result["summary"]["rps"], ">=", options.min_rps, "req/s"))
    return found


def against(result: Json, options: Options) -> list[Json]:
    """As good as in the old report, but for so many percent."""
    if options.against is None or not result["summary"]["requests"]:
        return []
    share, old, found = options.max_regression / 100, options.against, []
    for rank in ("p50", "p95", "p99"):
        if isinstance(before := old["latency_ms"].get(rank), (int, float)):
            limit = before * (1 + share)
            found.append(check("against", rank, result["latency_ms"][rank], "<=", limit, "ms"))
    if isinstance(before := old["summary"].get("rps"), (int, float)):
        found.append(check("against", "rate", result["summary"]["rps"], ">=", before * (1 - share), "req/s"))
    if isinstance(before := old["summary"].get("error_rate"), (int, float)):
        limit = 100 * before * (1 + share)
        found.append(check("against", "error rate", 100 * result["summary"]["error_rate"], "<=", limit, "%"))
    return found


def counted(balancer: Json) -> list[Json]:
    """The balancer must have counted every answer we got. More is no fault: others may send too."""
    if balancer["after"] is None:
        return [check("balancer", "/status answers at the end", None, ">=", 1, "")]
    delta = balancer["delta"].get("total_requests")
    if delta is None or delta < 0:
        return []
    return [check("balancer", "requests counted", delta, ">=", balancer["answered"], "")]


def balancer_part(before: Json, after: Json | None, sent: int, answered: int) -> Json:
    """The balancer's counters beside ours."""
    old, new = before["counters"], after["counters"] if after else None
    return {
        "algorithm": before["algorithm"],
        "before": old,
        "after": new,
        "delta": {name: new[name] - old[name] for name in COUNTERS if new and name in new and name in old},
        "sent": sent,
        "answered": answered,
    }
