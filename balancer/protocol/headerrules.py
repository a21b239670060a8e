"""What the operator wants changed in header sections: rules that are worked out once for each section that is kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from balancer.errors import SettingsError
from balancer.protocol.messages import HOP_BY_HOP, Line

MOST_RULES, MOST_BYTES = 64, 4096  # of one direction: each message carries what they put in
SHAPE = '{ set = { NAME = "value" }, add = { NAME = "value" }, remove = ["NAME"] }'
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_VALUE = re.compile(r"(?:[\x21-\x7e\x80-\xff](?:[\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?)?")  # section 5.5
_FRAMING = HOP_BY_HOP | {b"content-length", b"expect"}
_KEPT = dict.fromkeys(_FRAMING, "it belongs to one connection, or says where a message ends") | {
    b"x-request-id": "it ties a request to its answer, its record and its log line"
}
# Names that are not for rules, and why.
OF_REQUESTS = _KEPT | {b"host": "backend_host sets it", b"via": "without it a request could go round in circles"}
OF_RESPONSES = _KEPT | {b"x-served-by": "expose_backend sets it"}


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """First all lines of a name in `remove` or `set` go, then those of `set` and of `add` come. Names in lower case."""

    set: tuple[Line, ...] = ()
    add: tuple[Line, ...] = ()
    remove: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, given: object, kept: Mapping[bytes, str]) -> HeaderRules:
        """From what has SHAPE, with none of the names that are `kept`. Raises SettingsError, whose text holds no value:
        it may be a secret."""
        if not isinstance(given, Mapping) or not given.keys() <= {"set", "add", "remove"}:
            raise SettingsError(f"expected {SHAPE}")
        made = cls(_lines("set", given, kept), _lines("add", given, kept), _names(given, kept))
        count = len(made.set) + len(made.add) + len(made.remove)
        if len(dict(made.set)) < len(made.set):
            raise SettingsError("set: a name stands there twice; names are the same in upper and in lower case")
        if count > MOST_RULES or made.size > MOST_BYTES:
            told = f"{count} rules with lines of {made.size} bytes"
            raise SettingsError(f"{told}; at most {MOST_RULES} with {MOST_BYTES} bytes together are accepted")
        return made

    @property
    def size(self) -> int:
        """Bytes of the lines that they put in."""
        return sum(len(name) + len(value) + len(b": \r\n") for name, value in (*self.set, *self.add))

    def __bool__(self) -> bool:
        return bool(self.set or self.add or self.remove)

    def __str__(self) -> str:
        """What they are about, without values: these may be secret, and this is logged when it changes."""
        named = {"set": [n for n, _ in self.set], "add": [n for n, _ in self.add], "remove": self.remove}
        told = [f"{kind} {b', '.join(names).decode()}" for kind, names in named.items() if names]
        return "; ".join(told) or "(empty)"

    def written(self) -> str:
        """As in a TOML file, values included."""
        parts = [f"{kind} = {_table(lines)}" for kind, lines in (("set", self.set), ("add", self.add)) if lines]
        if self.remove:
            parts.append(f"remove = {json.dumps([name.decode() for name in self.remove])}")
        return f"{{ {', '.join(parts)} }}"

    def then(self, later: HeaderRules) -> HeaderRules:
        """What it is to apply these, and then `later`."""
        gone = {*later.remove, *(name for name, _ in later.set)}
        return HeaderRules(
            (*(line for line in self.set if line[0] not in gone), *later.set),
            (*(line for line in self.add if line[0] not in gone), *later.add),
            (*self.remove, *(name for name, _ in self.set), *later.remove),
        )

    def applied(self, lines: Iterable[Line]) -> list[Line]:
        replaced = {*self.remove, *(name for name, _ in self.set)}
        return [*(line for line in lines if line[0] not in replaced), *self.set, *self.add]


NO_RULES = HeaderRules()


def is_token(name: object) -> bool:
    return isinstance(name, bytes) and _NAME.fullmatch(name.decode("latin-1")) is not None


def check_filtered(lines: list[Line], before: Sequence[Line] = ()) -> None:
    """What filters made of the lines `before`: names and values are such, and framing is as it was. Raises ValueError;
    its text holds no value."""
    if lines[: len(before)] == [*before]:  # most filters only add some
        lines, before = lines[len(before) :], ()
    for name, value in lines:
        if not is_token(name):
            raise ValueError(f"a filter gave a line the name {name!r:.80}; expected bytes: letters, digits and hyphens")
        if not (isinstance(value, bytes) and _VALUE.fullmatch(value.strip(b" \t").decode("latin-1"))):
            raise ValueError(f"a filter gave {name!r:.80} no header value; expected bytes without control characters")
    if _framing(lines) != _framing(before):
        raise ValueError(f"a filter changed one of {sorted(_FRAMING)}, which are not for filters")


def _framing(lines: Iterable[Line]) -> list[Line]:
    """Those that belong to one connection, or say where a message ends."""
    return [line for line in lines if line[0].lower() in _FRAMING]


def _table(lines: Iterable[Line]) -> str:
    pairs = [f"{json.dumps(name.decode())} = {json.dumps(value.decode('latin-1'))}" for name, value in lines]
    return f"{{ {', '.join(pairs)} }}"


def _lines(kind: str, given: Mapping[str, object], kept: Mapping[bytes, str]) -> tuple[Line, ...]:
    table = given.get(kind, {})
    if not isinstance(table, Mapping):
        raise SettingsError(f'{kind}: expected a table such as {{ X-Team = "a" }}')
    return tuple((_name(kind, name, kept), _value(kind, name, value)) for name, value in table.items())


def _names(given: Mapping[str, object], kept: Mapping[bytes, str]) -> tuple[bytes, ...]:
    names = given.get("remove", [])
    if not isinstance(names, list):
        raise SettingsError('remove: expected a list such as ["X-Team"]')
    return tuple(_name("remove", name, kept) for name in names)


def _name(kind: str, name: object, kept: Mapping[bytes, str]) -> bytes:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SettingsError(f"{kind}: {name!r:.80} is no header name; expected letters, digits and hyphens")
    found = name.lower().encode()
    if found in kept:
        raise SettingsError(f"{kind}: {name} is not for rules, {kept[found]}; leave it out")
    return found


def _value(kind: str, name: str, value: object) -> bytes:
    if not isinstance(value, str) or not _VALUE.fullmatch(value):
        raise SettingsError(
            f"{kind}: the value of {name:.80} is no header value; expected text in Latin-1 without control characters, "
            "and without blanks around it"
        )
    return value.encode("latin-1")
