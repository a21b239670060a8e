"""What a worker has to know of the pools: read from those of the master, and made true in its own.

The master tells all that there is, and each worker what that changes for it. So one that has just been started hears no
other words, and nothing is lost if one of them has been told twice.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from balancer.balancing import strategies
from balancer.balancing.backends import Backend, Health
from balancer.balancing.ejection import KeptEjection
from balancer.balancing.members import PoolChanges
from balancer.balancing.options import PoolOptions, StrategyOptions
from balancer.balancing.pool import BackendPool
from balancer.config.settings import Settings
from balancer.edge.tls import Certificate

# Of a backend, beside its id: what the operator, the configuration or a reload may change.
FIELDS = (
    *("origin", "weight", "max_connections", "drain_timeout", "admin_state", "is_leaving"),
    *("source", "configured"),
)


@dataclass(frozen=True, slots=True)
class PoolNews:
    """`members` have FIELDS by the id of the backend, in their order; `health` is what was seen of each. With
    `may_grow` others come if requests wait."""

    algorithm: str
    may_grow: bool
    members: Mapping[str, Mapping[str, Any]]
    health: Mapping[str, Health]
    ejections: Mapping[str, KeptEjection]


@dataclass(frozen=True, slots=True)
class Start:
    """What a worker begins with. `roles` are those of the sockets that come beside this, `cpus` those to run on,
    `canaries` the shares that they have, `control_paths` what the master answers."""

    number: int
    settings: Settings
    sources: Mapping[str, str]
    certificate: Certificate | None
    pools: Mapping[str, PoolNews]
    canaries: Mapping[str, float]
    pseudonym: bytes
    salt: bytes
    control_paths: Collection[str]
    roles: Sequence[str]
    cpus: Sequence[int]


@dataclass(frozen=True, slots=True)
class Numbers:
    """What a worker tells once a second. `selected`, by pool and backend, and `limits`, as the Limiter counts, are what
    has come to them since; the others are as they are now. `alive` is when those last answered whose checks fail,
    `late` after how many seconds an answer is that, by pool."""

    queued: int
    idle: Mapping[str, Mapping[str, int]]
    selected: Mapping[str, Mapping[str, int]]
    alive: Mapping[str, Mapping[str, float]]
    limits: Mapping[str, int]
    dropped: int
    late: Mapping[str, float | None]


def news_of(pool: BackendPool) -> PoolNews:
    backends = pool.backends()
    return PoolNews(
        pool.algorithm,
        pool.may_grow,
        {backend.id: {name: getattr(backend, name) for name in FIELDS} for backend in backends},
        {backend.id: replace(backend.health) for backend in backends},
        pool.ejections(),
    )


def changes(pool: BackendPool | None, news: PoolNews, config: Settings, before: Settings) -> PoolChanges:
    """What makes it true. `config` are the settings of this pool, `before` those that were in force until now."""
    known = {} if pool is None else {backend.id: backend for backend in pool.backends()}
    options = config.options(StrategyOptions)
    is_new = pool is None or pool.algorithm != news.algorithm or options != before.options(StrategyOptions)
    return PoolChanges(
        add=[_backend(each, news) for each in news.members if each not in known],
        update={each: fields for each, fields in news.members.items() if each in known},
        remove=[each for each in known if each not in news.members],
        options=config.options(PoolOptions),
        strategy=strategies.create(news.algorithm, options) if is_new else None,
    )


def _backend(backend_id: str, news: PoolNews) -> Backend:
    fields = dict(news.members[backend_id])
    return Backend(backend_id, fields.pop("origin"), **fields, health=replace(news.health[backend_id]))
