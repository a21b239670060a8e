"""The configuration while the balancer runs: reading it again, and applying what has changed in it.

A bad file changes nothing. What cannot change while running is named in `needs_restart`, the rest is applied.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from typing_extensions import TypedDict

from balancer.balancing.pools import Pools
from balancer.config import environment
from balancer.config.comparison import Plan, Sources, compare
from balancer.config.decisions import Decisions
from balancer.config.settings import NEEDS_RESTART, Settings, rows, show
from balancer.errors import BalancerError, SettingsError


class ConfigView(TypedDict):
    file: str | None
    loaded_at: float
    last_error: str | None


class SettingView(TypedDict):
    """`by` decided it at run time, `until` if it is for a time."""

    name: str
    value: str
    source: str
    since: float
    by: str | None
    until: float | None
    needs_restart: bool


class SettingsView(ConfigView):
    settings: list[SettingView]


class PlanChanged(BalancerError):
    """A reload would do something else than what was looked at before."""


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
        self._since = dict.fromkeys(Settings.model_fields, self.loaded_at)  # when each was set to what it is
        self._named = _files(settings)  # the files that settings have named since the start
        self._lock = Lock()

    @property
    def can_reload(self) -> bool:
        """A certificate can be read again without a file of settings."""
        return self.read is not None or self.settings.tls_certificate is not None

    def reload(
        self,
        pools: Pools,
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
                if not _is_demo(self.settings, self.sources) and _is_demo(wanted, sources):
                    # An emptied or half-written file must not bring the demo's backends.
                    raise SettingsError(f"{self.file} names no backends any more; backends = [] if that is meant")
                plan = compare(self.settings, wanted, sources, pools)
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
                changed = [
                    name for name in Settings.model_fields if getattr(self.settings, name) != getattr(wanted, name)
                ]
                self.settings, self.sources = wanted, sources
                self.loaded_at, self.last_error = time.time(), None
                self._since |= dict.fromkeys(changed, self.loaded_at)
            return plan

    def describe(self, decisions: Decisions, whole: bool = True) -> SettingsView:
        """Every setting with its value, source, since when, and whether it can change while running, and what was
        decided over them; secrets are hidden, and unless `whole` the folders of files too."""
        told = str if whole else self.without_folders
        found: dict[str, SettingView] = {
            name: {
                "name": name,
                "value": told(show(value)),
                "source": told(source),
                "since": self._since[name.partition(".")[0]],
                "by": None,
                "until": None,
                "needs_restart": name in NEEDS_RESTART,
            }
            for name, (value, source) in rows(self.settings, self.sources).items()
        }
        for name, each in decisions.describe().items():
            found[name] = {"name": name, **each, "needs_restart": False}
        return {**self.summary(whole), "settings": list(found.values())}

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


def _is_demo(settings: Settings, sources: Sources) -> bool:
    """Nothing names any backends."""
    return sources["backends"] == "default" and settings.backends != ()


def _files(settings: Settings) -> set[Path]:
    return {value for _, value in settings if isinstance(value, Path)}
