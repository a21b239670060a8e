"""The authenticators that settings define, made of their tables and of the files that these name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple

from balancer.errors import SettingsError
from balancer.filters.apikeys import ApiKeys
from balancer.filters.auth import SUBJECT, Auth, Authenticator, AuthWithCookies
from balancer.filters.forwardauth import ForwardAuth
from balancer.observe.refusals import Refusals
from balancer.protocol.addresses import Network
from balancer.protocol.files import read_whole
from balancer.protocol.messages import CREDENTIALS
from balancer.protocol.origin import Endpoint
from balancer.upstream.dialer import Dialer

if TYPE_CHECKING:
    from balancer.filters.jwks import News  # which loads what few need

FILES = ("users_file", "secret_file", "jwks_file")
INSTALL = "pip install 'python-load-balancer[auth]'"


class Definition(NamedTuple):
    """All that one depends on. `table` has the fields of its settings."""

    table: Any
    content: bytes  # of the file that it names
    networks: tuple[Network, ...]


class Authentication:
    """Those in force, by name. One that is defined as before stays, with all that it has learnt.

    `_lock` guards `_used`, `_filters` and `_is_running`. Whoever reloads has `_checked` for itself.
    """

    def __init__(self, dialer: Dialer, note: Callable[[News, str], None], refusals: Refusals) -> None:
        self._dialer, self._note, self._refusals = dialer, note, refusals
        self._lock = Lock()
        self._used: dict[str, tuple[Definition, Authenticator]] = {}
        self._checked = self._used
        self._filters: dict[tuple[str, ...], Auth] = {}
        self._is_running = False

    @property
    def ours(self) -> frozenset[bytes]:
        """Fields that no client may send, on whichever route: backends would believe them."""
        used = [each for _, each in self._used.values()]
        return frozenset({SUBJECT}).union(*(each.ours for each in used)) - CREDENTIALS if used else frozenset()

    def check(self, tables: Sequence[Any], networks: tuple[Network, ...]) -> list[str]:
        """Make what `use` will put in force. Returns the names of those whose file alone is another one. Raises
        SettingsError, in one line without anything that is in a file."""
        checked, changed = {}, []
        for table in tables:
            definition, before = Definition(table, _content(table), networks), self._used.get(table.name)
            if before is not None and before[0] == definition:
                checked[table.name] = before
                continue
            checked[table.name] = definition, self._made(definition)
            if before is not None and before[0].table == table and before[0].content != definition.content:
                changed.append(table.name)
        self._checked = checked
        return changed

    def use(self) -> None:
        with self._lock:
            before, self._used, self._filters = self._used, self._checked, {}
            is_running = self._is_running
        if is_running:
            old, new = ({each for _, each in table.values()} for table in (before, self._used))
            for each in new - old:
                each.start()
            for each in old - new:
                each.stop()

    def start(self) -> None:
        with self._lock:
            self._is_running = True
        for _, each in self._used.values():
            each.start()

    def stop(self) -> None:
        with self._lock:
            self._is_running = False
        for _, each in self._used.values():
            each.stop()

    def filter(self, names: tuple[str, ...]) -> Auth:
        """What lets in whom one of these knows; the same for all routes that name the same."""
        with self._lock:
            if (found := self._filters.get(names)) is None:
                chosen = [self._used[name][1] for name in names]
                kind = AuthWithCookies if any(each.sets_cookies for each in chosen) else Auth
                found = self._filters[names] = kind(chosen, self._refusals)
            return found

    def _made(self, definition: Definition) -> Authenticator:
        table = definition.table
        try:
            match table.type:
                case "api_key":
                    return ApiKeys(table.name, {bytes.fromhex(key.sha256): key.id for key in table.keys})
                case "basic":
                    from balancer.filters import basic

                    return basic.Basic(table.name, basic.read_users(definition.content), definition.networks)
                case "jwt":
                    return self._jwt(table, definition.content)
                case _:
                    copied = [name.encode() for name in table.copy_headers]
                    return ForwardAuth(table.name, Endpoint.parse(table.url), copied, self._dialer)
        except ImportError:
            text = f"auth {table.name}: type {table.type} needs the extra auth: {INSTALL}"
            raise SettingsError(text) from None
        except ValueError as error:
            raise _wrong(table, str(error)) from None

    def _jwt(self, table: Any, content: bytes) -> Authenticator:
        from balancer.filters import jwks, jwt

        keys: jwks.Keys | jwks.RemoteKeys
        if table.jwks_url is not None:
            keys = jwks.RemoteKeys(table.name, Endpoint.parse(table.jwks_url), self._dialer, self._note)
        else:
            keys = jwt.secret_key(content) if table.secret_file is not None else jwks.read_keys(content)
        options = jwt.JwtOptions(table.algorithms, table.issuer, table.audience, table.require, table.forward_token)
        return jwt.Jwt(table.name, options, keys)


def _content(table: Any) -> bytes:
    _, path = _file(table)
    try:
        return b"" if path is None else read_whole(path)
    except ValueError as error:
        raise _wrong(table, str(error)) from None


def _file(table: Any) -> tuple[str, Path | None]:
    """The name of the setting, and what it names."""
    return next(((name, path) for name in FILES if (path := getattr(table, name, None)) is not None), ("", None))


def _wrong(table: Any, text: str) -> SettingsError:
    name, path = _file(table)
    return SettingsError(f"auth {table.name}: {name} {path}: {text}")
