"""The load that the options ask for."""

from loadtest import flags
from loadtest.options import Options
from loadtest.schedule import Load
from loadtest.screen import plain, plural


def warm_up_of(chosen: Options, load: Load) -> int:
    """Requests before those that are measured: by default enough to open the connections of a closed loop."""
    if chosen.warmup is not None:
        return chosen.warmup
    return max(flags.DEFAULT_WARMUP, load.concurrency if load.rate is None else 0)


def load_of(chosen: Options) -> Load:
    is_open = chosen.rate is not None
    default = flags.DEFAULT_OPEN_CONCURRENCY if is_open else flags.DEFAULT_CONCURRENCY
    return Load(
        requests=chosen.requests or (None if chosen.duration else flags.DEFAULT_REQUESTS),
        concurrency=chosen.concurrency or default,
        seconds=chosen.duration,
        rate=chosen.rate,
        ramp_up=chosen.ramp_up or 0.0,
        waits=chosen.wait is not False,
    )


def describe_load(load: Load, chosen: Options) -> str:
    parts = []
    if load.requests is not None:
        parts.append(plural(load.requests, "request"))
    if load.seconds is not None:
        parts.append(f"{load.seconds:g} s" + (", whichever ends first" if load.requests else ""))
    if load.rate is None:
        parts.append(plural(load.concurrency, "connection"))
    else:
        parts.append(f"{plain(load.rate)} a second over at most {plural(load.concurrency, 'connection')}")
    if load.ramp_up:
        parts.append(f"ramp-up {load.ramp_up:g} s")
    if chosen.clients:
        parts.append(plural(chosen.clients, "client"))
    if chosen.no_keepalive:
        parts.append("no keep-alive")
    return ", ".join([*parts, f"warm-up {warm_up_of(chosen, load)}"])
