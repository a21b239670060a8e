"""Option values: from text to what they mean. Each is an argparse type that says what it wants instead."""

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Callable
from typing import Any

TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"  # RFC 9110 section 5.6.2
MAX_REQUESTS = 1_000_000_000
MAX_CONCURRENCY = 1000  # a thread each
MAX_CLIENTS = 100_000  # as many addresses of 198.18.0.0/15 are handed out
MAX_BUCKETS = 40
MAX_BODY = 64 * 1024 * 1024  # bytes; the body is held in memory
MAX_TOKEN = 65_536
SUFFIXES = {"": 1, "k": 1_000, "m": 1_000_000}
UNITS = {"us": 1e-6, "ms": 1e-3, "": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def checked(pattern: str, meaning: str, convert: Callable[[re.Match[str]], Any] = lambda match: match[0]) -> Any:
    """An argparse type: the whole text matches, and `convert` makes a value of it, or None if it is out of range."""

    def parse(text: str) -> Any:
        match = re.fullmatch(pattern, text)
        value = convert(match) if match else None
        if value is None:
            raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
        return value

    return parse


def count(limit: int, least: int = 1) -> Any:
    def convert(match: re.Match[str]) -> int | None:
        value = int(match[1]) * SUFFIXES[match[2].lower()]
        return value if least <= value <= limit else None

    return checked("([0-9]{1,10})([kKmM]?)", f"a whole number from {least} to {limit}", convert)


def _to_rate(match: re.Match[str]) -> float | None:
    rate = float(match[1]) * SUFFIXES[match[2].lower()]
    return rate if 0.001 <= rate <= 1_000_000 else None


def _to_seconds(match: re.Match[str]) -> float | None:
    seconds = float(match[1]) * UNITS[match[2]]
    return seconds if 0 < seconds <= 86_400 else None


def _to_shares(match: re.Match[str]) -> dict[str, float] | None:
    pairs = [item.rpartition("=") for item in match[0].split(",")]
    shares = {name.strip(): percent(value.strip()) / 100 for name, _, value in pairs}
    return None if "" in shares or len(shares) < len(pairs) or sum(shares.values()) > 1.0001 else shares


def _to_delays(match: re.Match[str]) -> dict[str, float] | None:
    pairs = [item.rpartition("=") for item in match[0].split(",")]
    delays = {name.strip(): limit(value.strip()) for name, _, value in pairs}
    return None if "" in delays or len(delays) < len(pairs) else delays


def _to_bounds(match: re.Match[str]) -> list[float] | None:
    """Upper bounds in milliseconds; an empty list means that they are made to fit."""
    if match[0] == "auto":
        return []
    bounds = [round(limit(item.strip()) * 1000, 6) for item in match[0].split(",")]
    return bounds if bounds == sorted(set(bounds)) and len(bounds) <= MAX_BUCKETS else None


def _to_names(match: re.Match[str]) -> list[str] | None:
    names = [name.strip() for name in match[0].split(",")]
    return names if all(names) and len(set(names)) == len(names) else None


def _to_statuses(match: re.Match[str]) -> frozenset[int]:
    found: set[int] = set()
    for item in match[0].split(","):
        digit = int(item[0])
        found.update(range(digit * 100, digit * 100 + 100) if item.endswith("xx") else [int(item)])
    return frozenset(found)


def _read_token(match: re.Match[str]) -> str | None:
    with contextlib.suppress(OSError, ValueError), open(match[0], encoding="ascii") as file:
        return token[0] if (token := re.fullmatch(r"[\x21-\x7e]+", file.read(MAX_TOKEN).strip())) else None
    return None


def limit(text: str) -> float:
    """A duration that says its unit: of "200" for an answer nobody knows whether seconds are meant."""
    if re.fullmatch("[0-9]+([.][0-9]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} has no unit: {text}ms or {text}s?")
    seconds: float = duration(text)
    return seconds


def old_report(name: str) -> dict[str, Any]:
    """The report that --json has written before."""
    report: Any = None
    with contextlib.suppress(OSError, ValueError, RecursionError), open(name, encoding="utf-8") as file:
        report = json.load(file)
    known = report if isinstance(report, dict) else {}
    if not all(isinstance(known.get(part), dict) for part in ("summary", "latency_ms")):
        raise argparse.ArgumentTypeError(f"{name!r} is not a report that --json has written")
    return known


def body_file(name: str) -> bytes:
    """The bytes of a file, or of standard input for "-"."""
    try:
        if name == "-" and sys.stdin is None:
            raise OSError("there is no standard input")
        if name == "-":
            body = sys.stdin.buffer.read(MAX_BODY + 1)
        else:
            with open(name, "rb") as file:
                body = file.read(MAX_BODY + 1)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"cannot read {name!r}: {why}") from None
    if len(body) > MAX_BODY:
        raise argparse.ArgumentTypeError(f"{name!r} is larger than {MAX_BODY >> 20} MiB")
    return body


rate = checked("([0-9]{1,9}(?:[.][0-9]{1,9})?)([kKmM]?)", "a rate per second such as 50, 0.5 or 2k", _to_rate)
duration = checked("([0-9]{1,9}(?:[.][0-9]{1,9})?)(us|ms|s|m|h|)", "a duration such as 200ms, 10s or 1m", _to_seconds)
percent = checked("([0-9]{1,2}([.][0-9]{1,9})?|100)%?", "a number from 0 to 100", lambda m: float(m[1]))
shares = checked("[^,]*=[^,]*(,[^,]*=[^,]*)*", "like b1=50,b2=33 (each backend once, at most 100 in all)", _to_shares)
delays = checked("[^,]*=[^,]*(,[^,]*=[^,]*)*", "like backend_2=200ms (each backend once)", _to_delays)
credentials = checked("[^:\x00-\x1f\x7f]+:[^\x00-\x1f\x7f]*", "a name and a password with a colon between them")
bounds = checked("auto|[^,]+(,[^,]+)*", f"auto or up to {MAX_BUCKETS} rising durations such as 1ms,5ms,1s", _to_bounds)
names = checked("[^,]+(,[^,]+)*", "a list of different names such as round_robin,weighted", _to_names)
statuses = checked(
    "[1-5]([0-9]{2}|xx)(,[1-5]([0-9]{2}|xx))*", "a list of statuses such as 200,404 or 2xx", _to_statuses
)
method = checked(TOKEN, "an HTTP method", lambda m: m[0].upper())
header_name = checked(TOKEN, "the name of a header")
path = checked(r"/[\x21\x22\x24-\x7e]*", "a path (it starts with / and has no blank; write %20)")
header = checked(rf"({TOKEN}):[ \t]*([\t\x20-\x7e\x80-\xff]*)", "like 'Name: value'", lambda m: (m[1], m[2].strip()))
text = checked(r"[\t\x20-\x7e\x80-\xff]+", "text without control characters", lambda m: m[0].strip() or None)
token_file = checked(".+", "a readable file with one token", _read_token)
