"""The settings: from where they are read, and how they are shown.

A setting's name is the same everywhere: `health_interval` is `--health-interval`, `LB_HEALTH_INTERVAL`, and
`health_interval` in the TOML file. A flag wins over the environment, that over the file, that over the default.
Unknown keys of the file and wrong values are refused at the start, in one line that names the value and where it came
from; unknown variables are only told (`environment`).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_origin

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator

from balancer.balancing.pool import DEFAULT_POOL
from balancer.config import environment, validation
from balancer.config.auth import AuthSettings, ControlTokenSettings
from balancer.config.limits import LimitSettings
from balancer.config.routes import ExpectSettings, RouteSettings
from balancer.config.scaling import ScalingSettings
from balancer.config.tables import Named, PoolSettings, Table
from balancer.config.values import DEFAULT_BACKENDS, RESTART, BackendSettings, Listed, Values
from balancer.errors import SettingsError
from balancer.protocol.addresses import is_loopback
from balancer.protocol.files import read_whole, utf8
from balancer.protocol.headerrules import NO_RULES, HeaderRules
from balancer.protocol.texts import quoted

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

NAMING_BACKENDS = ("pools", "backends_file", "docker", "scaling")  # beside `backends`
SHORT_FORMS = {"flag": "--backend {}", "environment": "backend {} of LB_BACKENDS"}  # where backends are told by number


class Settings(Values):
    """All settings, checked. Tables stand in the file alone: they have neither flags nor variables."""

    pools: Table[PoolSettings] = Field((), description="pools of backends beside those of `backends`")
    routes: Table[RouteSettings] = Field((), description="which requests go where; the best match counts")
    auth: Table[AuthSettings] = Field((), description="ways to know who sends a request, for routes to name")
    limits: Table[LimitSettings] = Field((), description="how much a client may ask for, where a route names them")
    expect: tuple[ExpectSettings, ...] = Field((), description="requests, and which route and pool each must take")
    scaling: Table[ScalingSettings] = Field((), description="pools whose backends come and go with the requests")
    control_tokens: Table[ControlTokenSettings] = Field((), description="tokens for the control API, each with a role")

    @field_validator("control_tokens")
    @classmethod
    def _check_tokens(cls, tokens: tuple[ControlTokenSettings, ...]) -> tuple[ControlTokenSettings, ...]:
        if len({token.sha256 for token in tokens}) < len(tokens):
            raise ValueError("two have the same sha256; a token belongs to one name")
        return tokens

    @model_validator(mode="before")
    @classmethod
    def _leave_the_demo_out(cls, values: Any) -> Any:
        """Its backends are for those who name none."""
        names_some = isinstance(values, dict) and any(values.get(name) for name in NAMING_BACKENDS)
        return {"backends": (), **values} if names_some else values

    @model_validator(mode="after")
    def _check_ids(self) -> Settings:
        backends = chain(self.backends, *(pool.backends for pool in self.pools))
        ids = Counter(backend.id for backend in backends)
        if twice := [backend_id for backend_id, count in ids.items() if count > 1]:
            raise ValueError(f"two backends have the id {twice[0]!r}; ids must differ over all pools")
        return self

    @model_validator(mode="after")
    def _check_names(self) -> Settings:
        """What tables name must be there."""
        known = {
            "pool": {DEFAULT_POOL, *(pool.name for pool in self.pools)},
            **{kind: {each.name for each in getattr(self, kind, ())} for kind in ("auth", "limits", "routes")},
        }
        same: dict[Any, str] = {}
        for each in self.scaling:
            if each.name not in known["pool"]:
                raise ValueError(
                    f"scaling: pool {each.name!r} is unknown; there are: {', '.join(sorted(known['pool']))}"
                )
        for route in self.routes:
            for kind, names in (("pool", _pools(route)), ("auth", route.auth), ("limits", route.limits)):
                if unknown := [name for name in names if name not in known[kind]]:
                    told = ", ".join(sorted(known[kind])) or f"none is defined, add [[{kind}]]"
                    raise ValueError(f"routes.{route.name}: {kind} {unknown[0]!r} is unknown; there are: {told}")
            other = same.setdefault(route.requests, route.name)
            if other != route.name:
                raise ValueError(f"routes.{route.name} matches the same requests as routes.{other}; leave out one")
        for expected in self.expect:
            if expected.route and expected.route not in known["routes"]:
                raise ValueError(f"expect {expected.request!r}: there is no route {expected.route!r}")
        return self

    @property
    def has_default_pool(self) -> bool:
        """Whether the pool `default` has backends, or may have: sources and scaling bring some."""
        is_scaled = any(each.name == DEFAULT_POOL for each in self.scaling)
        return bool(self.backends or self.backends_file or self.docker or is_scaled)

    def by_pool(self) -> dict[str, Settings]:
        """The settings of each pool by its name: its own, and for all else those of the top level. Without backends
        that are looked up."""
        own = {each.name: self.model_copy(update={**each.own, "backends": _here(each.backends)}) for each in self.pools}
        here = _here(self.backends)
        usual = self if here == self.backends else self.model_copy(update={"backends": here})
        return {DEFAULT_POOL: usual, **own}

    def discovered(self) -> dict[str, Listed]:
        """Those that are looked up, by their ids."""
        listed = [(DEFAULT_POOL, self.backends), *((pool.name, pool.backends) for pool in self.pools)]
        return {each.id: (name, each) for name, backends in listed for each in backends if each.discovered}

    def options(self, kind: type[Options]) -> Options:
        """What one part needs to know: a dataclass whose fields have the names of settings, or of properties here."""
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})


def _here(backends: tuple[BackendSettings, ...]) -> tuple[BackendSettings, ...]:
    return tuple(backend for backend in backends if not backend.discovered)


def _pools(route: RouteSettings) -> list[str]:
    """All that it names."""
    return [*route.pools, *([route.mirror.pool] if route.mirror is not None else [])]


TABLES = frozenset(Settings.model_fields.keys() - Values.model_fields.keys() - {"expect"})  # by their names
NEEDS_RESTART = frozenset(name for name, field in Settings.model_fields.items() if RESTART in field.metadata)
# Never shown, and no flags.
SECRETS = frozenset(name for name, field in Settings.model_fields.items() if field.annotation == SecretStr | None)
HIDDEN = SECRETS | {"redis_url"}  # which has a flag, for most have no password in it
# Of tables: somebody may put into the first two what only its digest should be, and into the others a password.
SECRET_FIELDS = frozenset({"keys", "sha256", "command", "webhook"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag per setting; all default to None, which means 'not given'."""
    for name, field in Values.model_fields.items():
        flag, text = "--" + name.replace("_", "-"), (field.description or "").replace("%", "%%")
        if name == "backends":
            default = ", ".join(f"{backend.url}@{backend.weight}" for backend in DEFAULT_BACKENDS)
            help_text = f"a backend; repeat it for more ({default})"
            parser.add_argument("--backend", action="append", dest=name, metavar="[ID=]URL[@WEIGHT]", help=help_text)
        elif name in SECRETS:
            continue  # a secret on a command line can be read by every user of the machine
        elif field.annotation is bool:
            parser.add_argument(
                flag, nargs="?", const="true", metavar="true|false", help=f"{text} ({default_of(name)})"
            )
        else:
            parser.add_argument(flag, metavar=name.rpartition("_")[2].upper(), help=f"{text} ({default_of(name)})")


def default_of(name: str) -> str:
    """A setting's default with its unit, as `--help` and the documentation show it."""
    field = Settings.model_fields[name]
    if field.default in (None, "", (), NO_RULES):
        return "none"
    extra = field.json_schema_extra
    unit = str(extra["unit"]) if isinstance(extra, dict) else ""
    return f"{show(field.default)} {unit.replace('seconds', 's')}".rstrip()


def load(
    arguments: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
    handed: Mapping[str, Any] | None = None,
) -> tuple[Settings, dict[str, str]]:
    """(settings, where each one came from). What sockets stand for that were `handed` over wins. Raises SettingsError
    with one line per wrong setting."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = dict.fromkeys(Settings.model_fields, "default")
    flags = {name: value for name, value in arguments.items() if value is not None}
    for source, told in (
        ("file", _from_file(file)),
        ("environment", environment.read(environ, Values.model_fields)),
        ("flag", flags),
        ("systemd", handed or {}),
    ):
        for name, value in told.items():
            values[name] = _split(name, value)
            sources[name] = f"file {file}" if source == "file" else source
    return _checked(values, sources), sources


def given(values: Mapping[str, Any]) -> tuple[Settings, dict[str, str]]:
    """The same for a program that names settings itself: neither a file nor the environment is read."""
    sources = dict.fromkeys(Settings.model_fields, "default") | dict.fromkeys(values, "program")
    return _checked({name: _split(name, value) for name, value in values.items()}, sources), sources


def _checked(values: Mapping[str, Any], sources: Mapping[str, str]) -> Settings:
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("; ".join(_explain(detail, sources, values) for detail in error.errors())) from None


def warnings(environ: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each variable that looks like a setting and is none."""
    return environment.unknown(environ, Values.model_fields)


def advice(config: Settings) -> list[str]:
    """A line for each setting that does not do what its owner may expect of it."""
    lines = []
    if config.allow_file_origin:
        lines.append("allow_file_origin does nothing any more: a page from disk needs a token, set LB_PAGE_TOKEN")
    has_tokens = config.admin_token or config.page_token or config.control_tokens
    if not has_tokens and config.control_reads != "open" and not is_loopback(config.host):
        lines.append(f"host {config.host} without a token: the control API only answers probes, set LB_ADMIN_TOKEN")
    if config.control_reads == "token" and not has_tokens:
        lines.append('control_reads = "token" without a token: nobody can read, set LB_ADMIN_TOKEN')
    named = {name for route in config.routes for name in route.auth}
    for each in config.auth:
        lines += [f"auth {each.name}: {text}" for text in each.advice]
        if each.name not in named:
            lines.append(f"auth {each.name}: no route names it, so it guards nothing")
    return lines


def show(value: Any) -> str:
    """A setting's value as a person would write it; secrets are hidden."""
    if isinstance(value, SecretStr):
        return "(hidden)"
    if isinstance(value, tuple):
        return ", ".join(show(item) for item in value) or "(empty)"
    if isinstance(value, Named):
        return str(value)
    if isinstance(value, BackendSettings):
        return f"{value.id}={value.url}@{value.weight}"
    if value is None or value == "":
        return "(empty)"
    return str(value).lower() if isinstance(value, bool) else str(value)


def rows(settings: Settings, sources: Mapping[str, str]) -> dict[str, tuple[Any, str]]:
    """The value and source of each setting, and of those that one of a table has of its own: `pools.api.algorithm`."""
    found = {name: (getattr(settings, name), sources[name]) for name in Settings.model_fields}
    for table in Settings.model_fields:
        for each in getattr(settings, table) if table in TABLES else ():
            found |= {f"{table}.{each.name}.{name}": (value, sources[table]) for name, value in each.own.items()}
    return found


def prefix_of(pool: str) -> str:
    """What stands before the names of a pool's own settings."""
    return "" if pool == DEFAULT_POOL else f"pools.{pool}."


def describe(settings: Settings, sources: Mapping[str, str]) -> str:
    """A line per setting: name, value, source."""
    lines = [(name, _whole(value), source) for name, (value, source) in rows(settings, sources).items()]
    wide = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{name:{wide[0]}}  {value:{min(wide[1], 40)}}  {source}" for name, value, source in lines)


def _whole(value: Any) -> str:
    """As `show`, with the values of header rules: whoever can ask for this can read them anyway."""
    return value.written() if isinstance(value, HeaderRules) and value else show(value)


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        return tomllib.loads(utf8(read_whole(file)))
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, or brackets without end
        raise SettingsError(f"config file {file}: {error}") from None


def _split(name: str, value: Any) -> Any:
    """Lists are comma-separated in the environment and in flags; backends also have a short form."""
    field = Settings.model_fields.get(name)
    if isinstance(value, str) and field is not None and get_origin(field.annotation) is tuple:
        value = [item.strip() for item in value.split(",") if item.strip()]
    if name == "backends" and isinstance(value, list):
        return [BackendSettings.parse(item) if isinstance(item, str) else item for item in value]
    if name == "cpu_affinity" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() if isinstance(value, str) else value


def _explain(detail: Mapping[str, Any], sources: Mapping[str, str], values: Mapping[str, Any]) -> str:
    """One wrong setting in words: name, value, source, what is expected."""
    path: Sequence[Any] = detail["loc"]
    if not path:  # two settings that do not go together
        return validation.complaint(detail, Settings)
    name, where = str(path[0]), ".".join(map(str, _named(path, values)))
    if name == "backends" and len(path) > 1 and sources[name] in SHORT_FORMS:
        where = f"{SHORT_FORMS[sources[name]].format(path[1] + 1)}: {path[2]}"
    if detail["type"] == "extra_forbidden":
        where_all = "docs/settings.md" if path[1:] or sources.get(name) == "program" else "--help"
        hint = validation.meant(str(path[-1]), validation.names(path[:-1], Settings), where_all)
        return f"unknown setting {quoted(where)} ({sources.get(name, 'unknown')}); {hint}"
    told = f"({sources[name]}): {validation.complaint(detail, Settings)}"
    is_all = path[-1] in ("backends", "request_headers", "response_headers") or (name in TABLES and len(path) == 2)
    is_all = is_all and detail["type"] == "value_error"
    is_table = name in TABLES and isinstance(detail["input"], Mapping | list | tuple)
    if detail["type"] == "missing" or is_all or is_table:  # no value, or more than a line holds, maybe a secret
        return f"{where} {told}"
    is_secret = name in HIDDEN or not SECRET_FIELDS.isdisjoint(path)
    value = "(hidden)" if is_secret else validation.shown(detail["input"], hide=name in ("backends", "docker", *TABLES))
    return f"{where} = {value} {told}"


def _named(path: Sequence[Any], values: Mapping[str, Any]) -> Sequence[Any]:
    """One of a table by its name, if it has one, instead of its number."""
    if path[0] in TABLES and len(path) > 1:
        row = values[path[0]][path[1]]
        name = row.get("name", row.get("pool")) if isinstance(row, Mapping) else None
        if isinstance(name, str):
            return [path[0], validation.shown(name)[1:-1], *path[2:]]
    return path
