"""The backends' shares of the work: what is to be expected, and whether it came so."""

from loadtest.checks import Json, check
from loadtest.options import Options
from loadtest.screen import label

DEFAULT_TOLERANCE = 5.0  # points of share
NAMED = 3  # strange names in a note


def expected(options: Options, status: Json) -> dict[str, float]:
    """From the command line, else from what the balancer said in /status."""
    if options.expect:
        return options.expect
    found: dict[str, float] = status["by_weight"] if options.expect_weights else status["expected"]
    return found


def why_not_judged(options: Options, result: Json, before: Json, after: Json | None) -> str | None:
    """What makes it senseless to judge shares, if anything; those that were given are always judged."""
    if options.expect:
        return None
    if not expected(options, before):
        return "the balancer expects no certain shares of this algorithm, so they are only reported"
    return why_unknown(options, result, before, after)


def why_unknown(options: Options, result: Json, before: Json, after: Json | None) -> str | None:
    """What makes it impossible to tell the shares of this balancer's backends, if anything."""
    if all(row["id"] is None or not row["count"] for row in result["backends"]):
        return "answers do not name their backend (see expose_backend, --backend-field), so shares are unknown"
    if strange := _unknown_names(result, before, after):
        return (
            f"answers call themselves {strange}, which are no ids of this balancer, so shares cannot be compared; "
            "start it with --expose-backend or give --backend-header"
        )
    if after and expected(options, after) != expected(options, before):
        return "the expected shares changed during the test (a backend came or went), so they are not judged"
    return None


def _unknown_names(result: Json, before: Json, after: Json | None) -> str:
    """Whom answers name that is no backend to the balancer: a server may call itself what it likes."""
    ids = before["healthy"].keys() | (after["healthy"].keys() if after else ())
    names = sorted(label(row["id"]) for row in result["backends"] if row["count"] and row["id"] not in (None, *ids))
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def check_shares(part: str | None, result: Json, options: Options) -> list[Json]:
    """None if there are no shares to expect, or a note says why they are not judged."""
    judged = [row for row in result["backends"] if row["expected_share"] is not None]
    requests = result["summary"]["requests"]
    if not judged or not requests or result["note"]:
        return []
    off = [100 * abs(row["deviation"]) for row in judged if row["deviation"] is not None]
    limit = _tolerance(requests) if options.tolerance is None else options.tolerance
    return [check(part, "share off by", max(off, default=None), "<=", limit, "points")]


def _tolerance(requests: int) -> float:
    """Room for two requests: of 10 requests a perfect third is 3 or 4, which is up to 7 points away."""
    return max(DEFAULT_TOLERANCE, 200 / requests)


def are_judged(options: Options) -> bool:
    """In a load run only if that was asked for: there, shares may rightly move."""
    return bool(options.expect) or options.expect_weights or options.tolerance is not None
