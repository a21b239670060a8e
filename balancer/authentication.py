"""What `[[auth]]` in the settings stands for: authenticators, made from it and from the files that it names."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from balancer.config.auth import ApiKeySettings, AuthSettings, BasicSettings, ForwardSettings, JwtSettings
from balancer.config.settings import Settings
from balancer.errors import SettingsError
from balancer.filters.apikeys import ApiKeys
from balancer.filters.auth import SUBJECT, Auth, Authenticator, AuthWithCookies
from balancer.filters.forwardauth import ForwardAuth
from balancer.observe.events import Events
from balancer.observe.refusals import Refusals
from balancer.protocol.addresses import Network
from balancer.protocol.messages import CREDENTIALS
from balancer.protocol.origin import Endpoint
from balancer.upstream.dialer import Dialer

log = logging.getLogger("balancer.auth")

MAX_FILE = 1_048_576  # bytes: room for ten thousand users
FILES = ("users_file", "secret_file", "jwks_file")
INSTALL = "pip install 'python-load-balancer[auth]'"


class Definition(NamedTuple):
    """All that one depends on: if this is as before, so is the authenticator."""

    settings: AuthSettings
    content: bytes  # of the file that it names
    networks: tuple[Network, ...]


class Authentication:
    """The authenticators of the settings in force, by name. One whose definition is as before stays, with all that it
    has learnt.

    `_lock` guards `_used`, `_filters` and `_is_running`. Whoever reloads has `_checked` for itself.
    """

    def __init__(self, dialer: Dialer, events: Events, refusals: Refusals) -> None:
        self._dialer, self._events, self._refusals = dialer, events, refusals
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

    def check(self, config: Settings) -> None:
        """Make what `use` will put in force. Raises SettingsError, in one line without anything that is in a file."""
        checked = {}
        for settings in config.auth:
            definition = Definition(settings, _content(settings), config.networks)
            before = self._used.get(settings.name)
            same = before is not None and before[0] == definition
            checked[settings.name] = before if before is not None and same else (definition, self._make(definition))
        self._checked = checked

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

    def _make(self, definition: Definition) -> Authenticator:
        settings, name = definition.settings, definition.settings.name
        try:
            match settings:
                case ApiKeySettings():
                    return ApiKeys(name, {bytes.fromhex(key.sha256): key.id for key in settings.keys})
                case ForwardSettings():
                    copied = [name.encode() for name in settings.copy_headers]
                    return ForwardAuth(name, Endpoint.parse(settings.url), copied, self._dialer)
                case BasicSettings():
                    from balancer.filters import basic

                    return basic.Basic(name, basic.read_users(definition.content), definition.networks)
                case JwtSettings():
                    return self._jwt(name, settings, definition.content)
        except ImportError:
            text = f"auth {name}: type {settings.type} needs the extra auth: {INSTALL}"
            raise SettingsError(text) from None
        except ValueError as error:
            raise _wrong(settings, str(error)) from None

    def _jwt(self, name: str, settings: JwtSettings, content: bytes) -> Authenticator:
        from balancer.filters import jwks, jwt

        def told(is_good: bool, text: str) -> None:
            if is_good:
                self._events.add("keys_found", None, f"{name}: {text}")
            else:
                self._events.add("keys_kept", None, f"{name}: {text}", "warning")
            log.log(logging.INFO if is_good else logging.WARNING, "%s: %s", name, text)

        options = jwt.JwtOptions(
            *(settings.algorithms, settings.issuer, settings.audience, settings.require, settings.forward_token)
        )
        if settings.jwks_url is not None:
            return jwt.Jwt(name, options, jwks.RemoteKeys(Endpoint.parse(settings.jwks_url), self._dialer, told))
        read: Callable[[bytes], jwks.Keys] = jwt.secret_key if settings.secret_file is not None else jwks.read_keys
        return jwt.Jwt(name, options, read(content))


def _content(settings: AuthSettings) -> bytes:
    _, path = _file(settings)
    if path is None:
        return b""
    try:
        if not path.is_file():  # a pipe could keep us waiting for ever
            raise _wrong(settings, "no such file")
        with path.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: NUL in a path
        raise _wrong(settings, str(getattr(error, "strerror", None) or error)) from None
    if len(content) > MAX_FILE:
        raise _wrong(settings, f"more than {MAX_FILE} bytes")
    return content


def _file(settings: AuthSettings) -> tuple[str, Path | None]:
    """The name of the setting, and what it names."""
    return next(((name, path) for name in FILES if (path := getattr(settings, name, None)) is not None), ("", None))


def _wrong(settings: AuthSettings, text: str) -> SettingsError:
    name, path = _file(settings)
    return SettingsError(f"auth {settings.name}: {name} {path}: {text}")
