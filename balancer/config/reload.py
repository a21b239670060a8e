"""The configuration while the balancer runs: reading it again, and applying what has changed in it.

Which wins: what changed in the configuration since it was last applied is applied, over whatever the API has set. What
did not change there stays as the API has set it, and the answer lists it under `kept`. So an operator's drain or weight
survives a reload that is about something else, and an edited file does what it says.

A bad file changes nothing. What cannot change while running is named in `needs_restart`, the rest is applied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from threading import Lock
from typing import Any, cast

from pydantic import SecretStr
from typing_extensions import TypedDict

from balancer.balancing import strategies
from balancer.balancing.backends import Backend, Source
from balancer.balancing.members import PoolChanges
from balancer.balancing.options import StrategyOptions
from balancer.balancing.pool import BackendPool
from balancer.config import environment
from balancer.config.settings import NEEDS_RESTART, TABLES, Settings, show
from balancer.config.tables import Named
from balancer.config.values import BackendSettings
from balancer.errors import BalancerError, SettingsError
from balancer.protocol.origin import Origin

HASH_KEY = os.urandom(32)
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


class ConfigView(TypedDict):
    file: str | None
    loaded_at: float
    last_error: str | None


class SettingView(TypedDict):
    name: str
    value: str
    source: str
    needs_restart: bool


class SettingsView(ConfigView):
    settings: list[SettingView]


class PlanChanged(BalancerError):
    """A reload would do something else than what was looked at before."""


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
    pool: PoolChanges = field(default_factory=PoolChanges)
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


class Configuration:
    """The settings in force and how to read them anew.

    `_lock` is held for a whole reload, file reading included: two at once would compare with the same past. Nothing
    else waits for it. The other attributes are replaced under it and may be read without.
    """

    def __init__(self, settings: Settings, sources: Sources | None = None) -> None:
        self.settings = settings
        self.sources: Sources = sources or dict.fromkeys(Settings.model_fields, "default")
        self.file: Path | None = None
        self.read: Callable[[], tuple[Settings, Sources]] | None = None  # none: there is nothing to read again
        self.loaded_at = time.time()
        self.last_error: str | None = None
        self._named = _files(settings)  # the files that settings have named since the start
        self._lock = Lock()

    @property
    def can_reload(self) -> bool:
        """A certificate can be read again without a file of settings."""
        return self.read is not None or self.settings.tls_certificate is not None

    def reload(
        self,
        pool: BackendPool,
        check: Callable[[Settings, Plan], None],
        apply: Callable[[Settings, Plan], None],
        *,
        dry_run: bool = False,
        accepts: Callable[[str], bool] = lambda hash: True,
    ) -> Plan:
        """Read, compare, `check` and, unless `dry_run`, `apply`. Raises SettingsError, or PlanChanged if `accepts` does
        not take the hash of the plan; then nothing has changed."""
        with self._lock:
            if not self.can_reload:
                how = "" if "program" in self.sources.values() else "; start with --config FILE"
                raise SettingsError(f"there is no configuration file to reload{how}")
            try:
                wanted, sources = (self.settings, self.sources) if self.read is None else self.read()
                self._named |= _files(wanted)
                if sources["backends"] == "default" != self.sources["backends"]:
                    # An emptied or half-written file must not bring the demo's backends.
                    raise SettingsError(f"{self.file} names no backends any more; backends = [] if that is meant")
                plan = compare(self.settings, wanted, sources, pool)
                check(wanted, plan)
            except SettingsError as error:
                if not dry_run and self.read is not None:
                    self.last_error = str(error)
                raise
            if not accepts(plan.hash):
                raise PlanChanged("the configuration would change something else by now; look at it with dry_run=1")
            if not dry_run:
                # Restart-only settings stay as they are in force, or the next reload would not name them again.
                still = {name: getattr(self.settings, name) for name in plan.needs_restart}
                wanted = wanted.model_copy(update=still)
                sources = {**sources, **{name: self.sources[name] for name in still}}
                apply(wanted, plan)
                self.settings, self.sources = wanted, sources
                self.loaded_at, self.last_error = time.time(), None
            return plan

    def describe(self, algorithm: str, whole: bool = True) -> SettingsView:
        """Every setting with its value, source, and whether it can change while running; secrets are hidden, and unless
        `whole` the folders of files too."""
        told = str if whole else self.without_folders
        rows: list[SettingView] = []
        for name in Settings.model_fields:
            value, source = getattr(self.settings, name), self.sources[name]
            if name == "algorithm" and algorithm != value:
                value, source = algorithm, "api"
            needs_restart = name in NEEDS_RESTART
            rows.append(
                {"name": name, "value": told(show(value)), "source": told(source), "needs_restart": needs_restart}
            )
        return {**self.summary(whole), "settings": rows}

    def summary(self, whole: bool = True) -> ConfigView:
        told = str if whole else self.without_folders
        file, error = (None if text is None else told(str(text)) for text in (self.file, self.last_error))
        return {"file": file, "loaded_at": self.loaded_at, "last_error": error}

    def without_folders(self, text: str) -> str:
        """`text` with the names alone of files that the configuration consists of: for readers without a token."""
        for file in (self.file, *self._named, *environment.secret_files(os.environ)):
            if file is not None:
                text = text.replace(str(file), Path(file).name)
        return text


def _files(settings: Settings) -> set[Path]:
    return {value for _, value in settings if isinstance(value, Path)}


def compare(base: Settings, wanted: Settings, sources: Sources, pool: BackendPool) -> Plan:
    """What leads from `base`, the one in force, to `wanted`. Raises SettingsError for an unknown algorithm."""
    options = wanted.options(StrategyOptions)
    strategy = strategies.create(wanted.algorithm, options)
    plan = Plan()
    for name in Settings.model_fields:
        before, after = getattr(base, name), getattr(wanted, name)
        if name == "backends" or before == after:
            continue
        if name in NEEDS_RESTART:
            plan.needs_restart.append(name)
        elif name in TABLES:
            plan.changes += _compare_table(name, before, after)
        else:
            plan.changes.append(Change(name, before, after))
    if wanted.algorithm == base.algorithm != pool.algorithm:
        plan.kept.append(f"algorithm: {pool.algorithm} (set by the API)")
        strategy = strategies.create(pool.algorithm, options)
    if wanted.algorithm != base.algorithm or options != base.options(StrategyOptions):
        plan.pool.strategy = strategy
    planned = list(_compare_backends(base, wanted, sources["backends"], pool, plan))
    shares = strategy.expected_shares([backend for backend in planned if backend.is_wanted])
    plan.shares = None if shares is None else {backend.id: shares.get(backend.id, 0.0) for backend in planned}
    return plan


def _compare_table(name: str, before: Sequence[Named], after: Sequence[Named]) -> Iterator[Change]:
    """By name: the order says nothing."""
    old, new = ({each.name: each for each in table} for table in (before, after))
    for each in old | new:
        if old.get(each) != new.get(each):
            yield Change(f"{name}.{each}", old.get(each), new.get(each))


def _compare_backends(
    base: Settings, wanted: Settings, source: str, pool: BackendPool, plan: Plan
) -> Iterator[Backend]:
    """Fills `plan`; yields the backends as they will be, if all are up."""
    old = {backend.id: backend for backend in base.backends}
    new = {backend.id: backend for backend in wanted.backends}
    live = {backend.id: backend for backend in pool.backends() if not backend.is_leaving}
    update: dict[str, dict[str, Any]] = {}
    add: list[Backend] = []
    for backend_id, now in new.items():
        if backend_id in live:
            fields = _changed_fields(live[backend_id], old.get(backend_id), now, plan)
            update[backend_id] = {**fields, "source": short(source), "configured": configured(now)}
            yield _as_it_will_be(live[backend_id], fields)
        elif backend_id in old and old[backend_id] == now:
            plan.kept.append(f"backends.{backend_id}: removed (by the API)")
        else:
            add.append(make_backend(now, source))
            plan.changes.append(Change(f"backends.{backend_id}", None, now))
            yield add[-1]
    remove = [backend_id for backend_id in old if backend_id not in new and backend_id in live]
    plan.changes += [Change(f"backends.{backend_id}", old[backend_id], None) for backend_id in remove]
    for backend_id, backend in live.items():
        if backend_id not in new and backend_id not in remove:
            plan.kept.append(f"backends.{backend_id}: added (by the API)")
            yield backend
    plan.pool.add, plan.pool.update, plan.pool.remove = add, update, remove


def _changed_fields(live: Backend, old: BackendSettings | None, now: BackendSettings, plan: Plan) -> dict[str, Any]:
    """The fields of one backend that the configuration changes."""
    fields: dict[str, Any] = {}
    if live.admin_state != "ready":
        plan.kept.append(f"backends.{live.id}.admin_state: {live.admin_state} (set by the API)")
    for name in BACKEND_FIELDS:
        current, after = live.setting(name), getattr(now, name)
        if old is not None and getattr(old, name) == after:
            if current != after:
                plan.kept.append(f"backends.{live.id}.{name}: {show(current)} (set by the API)")
        elif current != after:
            plan.changes.append(Change(f"backends.{live.id}.{name}", current, after))
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


def short(source: str) -> Source:
    """`file balancer.toml` is `file` where one word is expected."""
    return cast(Source, source.partition(" ")[0])


def _known(value: Any) -> Any:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _plain(value: Any) -> Plain:
    """As JSON can hold it; secrets are hidden."""
    return value if value is None or isinstance(value, bool | int | float) else show(value)
