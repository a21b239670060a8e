"""What a reload would do: the configuration in force, and what it says now, compared.

Which wins: what changed in the configuration since it was last applied is applied, over whatever the API has set. What
did not change there stays as the API has set it, and the answer lists it under `kept`. So an operator's drain or weight
survives a reload that is about something else, and an edited file does what it says.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from pydantic import BaseModel, SecretStr
from typing_extensions import TypedDict

from balancer.balancing import strategies
from balancer.balancing.backends import Backend
from balancer.balancing.members import PoolChanges
from balancer.balancing.options import StrategyOptions
from balancer.balancing.pool import DEFAULT_POOL, BackendPool
from balancer.balancing.pools import Pools
from balancer.balancing.strategies import Strategy
from balancer.config.settings import NEEDS_RESTART, TABLES, Settings, prefix_of, show
from balancer.config.tables import Named
from balancer.config.values import BackendSettings, Values
from balancer.errors import SettingsError
from balancer.protocol.origin import Origin

HASH_KEY = os.urandom(32)
NOTHING = Settings(backends=())
BACKEND_FIELDS = ("url", "weight", "max_connections", "drain_timeout")

Sources = Mapping[str, str]
Plain = str | float | bool | None


ChangeView = TypedDict("ChangeView", {"what": str, "from": Plain, "to": Plain})


class PlanView(TypedDict):
    """`hash` in If-Match applies this plan and no other."""

    applied: bool
    hash: str
    changes: list[ChangeView]
    kept: list[str]
    needs_restart: list[str]
    shares: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class Change:
    """One difference, in the words of the configuration: `backends.blue.weight` from 3 to 5."""

    what: str
    before: Any
    after: Any

    def __str__(self) -> str:
        told = self.describe()
        return f"{self.what}: {show(told['from'])} -> {show(told['to'])}"

    def describe(self) -> ChangeView:
        before, after = _plain(self.before), _plain(self.after)
        if before == after:  # as far as it is shown: secrets, and values of header rules, are not
            after = f"{after} (values changed)"
        return {"what": self.what, "from": before, "to": after}


@dataclass(slots=True)
class Plan:
    """What a reload would do."""

    changes: list[Change] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    needs_restart: list[str] = field(default_factory=list)
    pools: dict[str, PoolChanges] = field(default_factory=dict)  # by name
    shares: dict[str, float] | None = None

    @property
    def hash(self) -> str:
        """Of what it would change, secrets included, and of all that it tells. It says nothing of the secrets."""
        changes = [(change.what, _known(change.before), _known(change.after)) for change in self.changes]
        told = repr((changes, self.kept, self.needs_restart, self.shares))
        return blake2b(told.encode(), key=HASH_KEY, digest_size=16).hexdigest()

    def describe(self, applied: bool) -> PlanView:
        return {
            "applied": applied,
            "hash": self.hash,
            "changes": [change.describe() for change in self.changes],
            "kept": self.kept,
            "needs_restart": self.needs_restart,
            "shares": self.shares,
        }


def compare(base: Settings, wanted: Settings, sources: Sources, pools: Pools) -> Plan:
    """What leads from `base`, the one in force, to `wanted`. Raises SettingsError for an unknown algorithm."""
    plan = Plan()
    for name in Settings.model_fields:
        before, after = getattr(base, name), getattr(wanted, name)
        if name in ("backends", "pools") or before == after:
            continue
        if name in NEEDS_RESTART:
            plan.needs_restart.append(name)
        elif name in TABLES:
            plan.changes += _compare_table(name, before, after)
        else:
            plan.changes.append(Change(name, before, after))
    if base is not NOTHING:  # these stay as they are, for pools too
        wanted = wanted.model_copy(update={name: getattr(base, name) for name in plan.needs_restart})
    plan.changes += _compare_sources(base, wanted)
    old, new = base.by_pool(), wanted.by_pool()
    plan.changes += [Change(f"pools.{name}", name, None) for name in old if name not in new]
    ids = {backend.id for settings in new.values() for backend in settings.backends}
    for name, settings in new.items():
        source = sources["backends" if name == DEFAULT_POOL else "pools"]
        ComparedPool(plan, name, pools.get(name), old.get(name, NOTHING), settings, source, ids).compare()
    return plan


def _compare_table(name: str, before: Sequence[Named], after: Sequence[Named]) -> Iterator[Change]:
    """By name: the order says nothing."""
    old, new = ({each.name: each for each in table} for table in (before, after))
    for each in old | new:
        if old.get(each) != new.get(each):
            yield Change(f"{name}.{each}", old.get(each), new.get(each))


def _compare_sources(base: Settings, wanted: Settings) -> Iterator[Change]:
    """What is looked up: it is where it stands, whatever is found there."""
    old, new = (
        {f"{prefix_of(pool)}backends.{key}": entry for key, (pool, entry) in config.discovered().items()}
        for config in (base, wanted)
    )
    for what in {**old, **new}:
        if old.get(what) != new.get(what):
            yield Change(what, old.get(what), new.get(what))


@dataclass(slots=True)
class ComparedPool:
    """One pool, for which this fills `plan`. There is no `pool` if it is new, and its `base` has nothing. `ids` are of
    all backends that are wanted anywhere."""

    plan: Plan
    name: str
    pool: BackendPool | None
    base: Settings
    wanted: Settings
    source: str
    ids: Collection[str]
    changes: PoolChanges = field(default_factory=PoolChanges)
    prefix: str = field(default="", init=False)

    def compare(self) -> None:
        self.prefix = prefix_of(self.name)
        self.plan.pools[self.name] = self.changes
        if self.pool is None:
            self.plan.changes.append(Change(f"pools.{self.name}", None, self.name))
        else:
            self._compare_own()
        strategy = self._compare_strategy()
        planned = list(self._compare_backends())
        shares = strategy.expected_shares([backend for backend in planned if backend.is_wanted])
        if shares is not None:
            known = self.plan.shares or {}
            self.plan.shares = {**known, **{backend.id: shares.get(backend.id, 0.0) for backend in planned}}

    def _compare_own(self) -> None:
        """What it has, or had, instead of the settings of the top level, whose changes are told there."""
        own = {
            name
            for settings in (self.base, self.wanted)
            for each in settings.pools
            if each.name == self.name
            for name in each.own
        }
        for name in Values.model_fields:
            before, after = getattr(self.base, name), getattr(self.wanted, name)
            if name in own and name != "backends" and before != after:
                self.plan.changes.append(Change(self.prefix + name, before, after))

    def _compare_strategy(self) -> Strategy:
        """The one that it will have."""
        wanted, base = self.wanted, self.base
        algorithm, options = wanted.algorithm, wanted.options(StrategyOptions)
        strategy = self._strategy(algorithm, options)
        if self.pool is None:
            self.changes.strategy = strategy
            return strategy
        if algorithm == base.algorithm != self.pool.algorithm:
            self.plan.kept.append(f"{self.prefix}algorithm: {self.pool.algorithm} (set by the API)")
            strategy = strategies.create(self.pool.algorithm, options)
        if algorithm != base.algorithm or options != base.options(StrategyOptions):
            self.changes.strategy = strategy
        return strategy

    def _strategy(self, algorithm: str, options: StrategyOptions) -> Strategy:
        try:
            return strategies.create(algorithm, options)
        except SettingsError as error:
            raise SettingsError(f"{self.prefix}algorithm: {error}" if self.prefix else str(error)) from None

    def _compare_backends(self) -> Iterator[Backend]:
        """Yields the backends as they will be, if all are up."""
        new = {backend.id: backend for backend in self.wanted.backends}
        live = {backend.id: backend for backend in self.pool.backends() if not backend.is_leaving} if self.pool else {}
        old = {backend.id: backend for backend in self.base.backends}
        update: dict[str, dict[str, Any]] = {}
        add: list[Backend] = []
        for backend_id, now in new.items():
            if backend_id in live:
                fields = self._changed_fields(live[backend_id], old.get(backend_id), now)
                update[backend_id] = {**fields, "source": short(self.source), "configured": configured(now)}
                yield _as_it_will_be(live[backend_id], fields)
            elif backend_id in old and old[backend_id] == now:
                self.plan.kept.append(f"{self.prefix}backends.{backend_id}: removed (by the API)")
            else:
                add.append(make_backend(now, self.source))
                if self.pool is not None:  # else it came with its pool
                    self.plan.changes.append(Change(f"{self.prefix}backends.{backend_id}", None, now))
                yield add[-1]
        remove = [each for each in live if each not in new and (each in old or each in self.ids)]
        for backend_id, backend in live.items():
            if backend_id in remove:
                before = old.get(backend_id, backend.origin.url)
                self.plan.changes.append(Change(f"{self.prefix}backends.{backend_id}", before, None))
            elif backend_id not in new:
                if backend.source == "api":  # else a source has found it
                    self.plan.kept.append(f"{self.prefix}backends.{backend_id}: added (by the API)")
                yield backend
        self.changes.add, self.changes.update, self.changes.remove = add, update, remove

    def _changed_fields(self, live: Backend, old: BackendSettings | None, now: BackendSettings) -> dict[str, Any]:
        """The fields of one backend that the configuration changes."""
        fields: dict[str, Any] = {}
        if live.admin_state != "ready":
            self.plan.kept.append(f"{self.prefix}backends.{live.id}.admin_state: {live.admin_state} (set by the API)")
        for name in BACKEND_FIELDS:
            current, after = live.setting(name), getattr(now, name)
            if old is not None and getattr(old, name) == after:
                if current != after:
                    self.plan.kept.append(f"{self.prefix}backends.{live.id}.{name}: {show(current)} (set by the API)")
            elif current != after:
                self.plan.changes.append(Change(f"{self.prefix}backends.{live.id}.{name}", current, after))
                fields["origin" if name == "url" else name] = Origin.parse(after) if name == "url" else after
        return fields


def _as_it_will_be(live: Backend, fields: Mapping[str, Any]) -> Backend:
    return Backend(live.id, live.origin, fields.get("weight", live.weight), admin_state=live.admin_state)


def make_backend(settings: BackendSettings, source: str) -> Backend:
    """A Backend as the configuration has it; `source` is where its list came from."""
    return Backend(
        settings.id,
        Origin.parse(settings.url),
        settings.weight,
        settings.max_connections,
        drain_timeout=settings.drain_timeout,
        source=short(source),
        configured=configured(settings),
    )


def configured(settings: BackendSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in BACKEND_FIELDS}


def short(source: str) -> str:
    """`file balancer.toml` is `file` where one word is expected."""
    return source.partition(" ")[0]


def _known(value: Any) -> Any:
    """With its secrets, in which alone two values may differ."""
    if isinstance(value, BaseModel):
        return [(name, _known(one)) for name, one in value]
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _plain(value: Any) -> Plain:
    """As JSON can hold it; secrets are hidden."""
    return value if value is None or isinstance(value, bool | int | float) else show(value)
