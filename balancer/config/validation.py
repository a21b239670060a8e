"""What is wrong with a value, in our words. Pydantic finds the error; the JSON schema of the model says what fits."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, SecretStr

from balancer.balancing.backends import ID_PATTERN
from balancer.protocol.origin import AUTHORITY_PATTERN, IPV6_PATTERN, NAME_PATTERN, Endpoint
from balancer.protocol.requestkey import KEY_PATTERN, TOKEN_PATTERN

Schema = Mapping[str, Any]

MAX_SHOWN = 120  # characters of a wrong value
ID = f"^{ID_PATTERN}$"
ID_OR_NONE = f"^(?:{ID_PATTERN})?$"
PATH = r"^/[\x21-\x7e]*$"
NAME = f"^{NAME_PATTERN}$"
HOST = f"^{AUTHORITY_PATTERN}$"
KEY = f"^{KEY_PATTERN}$"
ROUTE_HOST = rf"(?:\*\.)?{NAME_PATTERN}|\[{IPV6_PATTERN}\]"
EXPECTED_REQUEST = rf"^[A-Z-]+ https?://{AUTHORITY_PATTERN}(?:/[\x21-\x7e]*)?$"
SHA256 = r"^[0-9a-f]{64}$"
LIMIT_KEY = f"^(?:client_ip|subject|route|global|header:{TOKEN_PATTERN})$"
RATE = "^[1-9][0-9]{0,6}/[smh]$"
ID_WORDS = "up to 64 letters (a to z), digits, dots, hyphens and underscores, no dot in front"
DURATION = r"^[1-9][0-9]{0,3}[smhd]$"
MODE = r"^0?[0-7]{3}$"
DEPLOYMENT = r"^deployment/[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?$"
OWNER = r"^(?:[A-Za-z0-9_.-]+|[A-Za-z0-9_.-]*:[A-Za-z0-9_.-]+)$"
PATTERNS = {ID: ID_WORDS, ID_OR_NONE: ID_WORDS, PATH: "a path such as /health, without blanks"}
PATTERNS |= {MODE: 'octal digits as text, such as "0660"', OWNER: "USER, USER:GROUP or :GROUP"}
PATTERNS |= {SHA256: "a SHA-256 digest of 64 hexadecimal digits, as load-balancer new-key prints it"}
PATTERNS |= {KEY: "client_ip, path, header:NAME, cookie:NAME or query:NAME"}
PATTERNS |= {EXPECTED_REQUEST: 'a method and a URL, as "GET http://api.example.com/v1/x"'}
PATTERNS |= {LIMIT_KEY: "client_ip, subject, header:NAME, route or global", RATE: "N/s, N/m or N/h, such as 100/m"}
PATTERNS |= {DEPLOYMENT: "deployment/NAME"}
PATTERNS |= {DURATION: "a time such as 90s, 15m, 2h or 7d"}
PATTERNS |= {NAME: "a name such as api.example.com", HOST: "a host such as api.example.com, with or without a port"}


def no_truth_value(value: Any) -> Any:
    """A truth value is no number, though Python and pydantic take it for 1."""
    if isinstance(value, bool):
        raise AssertionError  # no ValueError, whose text would be the complaint
    return value


def check_url(url: str) -> str:
    Endpoint.parse(url)
    return url


def check_redis_url(url: SecretStr) -> SecretStr:
    """Nothing of it may be in the complaint."""
    try:
        parts = urlsplit(url.get_secret_value())
        is_good = parts.path.startswith("/") if parts.scheme == "unix" else bool(parts.hostname) and parts.port != 0
        number = "" if parts.scheme == "unix" else parts.path.strip("/")
    except ValueError:
        is_good, number = False, ""
    if not is_good or parts.scheme not in ("redis", "rediss", "unix") or not (number or "0").isdecimal():
        raise ValueError("expected redis://[USER:PASSWORD@]HOST[:PORT][/NUMBER], rediss:// with TLS, or unix:///PATH")
    return url


def meant(name: str, known: Iterable[str], where: str = "--help") -> str:
    """What to do about a name that nobody knows, most likely a slip of the pen; `where` says which there are."""
    near = difflib.get_close_matches(name, [other for other in known if other != name], 1, 0.7)
    return f"did you mean {near[0]}?" if near else f"see {where}"


def names(path: Sequence[str | int], model: type[BaseModel]) -> Iterable[str]:
    """Of all that there may be in this table of it."""
    known: Schema = _schema_of(path, model)["properties"]
    return known


def complaint(error: Mapping[str, Any], model: type[BaseModel]) -> str:
    """What is wrong, and what is accepted."""
    if error["type"] == "value_error":  # from a validator of ours
        return str(error["msg"]).removeprefix("Value error, ")
    schema = _schema_of(error["loc"], model)
    if error["type"] == "missing":
        return f"is missing; expected {schema.get('description', _expected(schema))}"
    return f"expected {_expected(schema)}"


def shown(value: Any, hide: bool = False) -> str:
    """The value as it was written, or nearly; `hide` if it has an @, for a URL with user info holds a password."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    if hide and "@" in text:
        return "(hidden)"
    return text if len(text) <= MAX_SHOWN else text[:MAX_SHOWN] + "..."


@cache
def _root_of(model: type[BaseModel]) -> Schema:
    """Each takes a while, and a table may have many faults."""
    return model.model_json_schema()


def _schema_of(path: Sequence[str | int], model: type[BaseModel]) -> Schema:
    root = schema = _root_of(model)
    for step in path:
        if isinstance(step, int):
            inner = schema["items"]
        elif "discriminator" in schema:  # the step is the type
            inner = {"$ref": schema["discriminator"]["mapping"][step]}
        else:
            inner = schema["properties"][step] if "properties" in schema else schema["additionalProperties"]
        # Of what may be null the other choice; a reference is to another model.
        choices = [choice for choice in inner.get("anyOf", [inner]) if choice.get("type") != "null"]
        reference = choices[0].get("$ref", "").rpartition("/")[2]
        schema = {**inner, **choices[0], **(root["$defs"][reference] if reference else {})}
    return schema


def _expected(schema: Schema) -> str:
    if "discriminator" in schema:
        return f"a table with type {', '.join(schema['discriminator']['mapping'])}"
    kind, unit = schema.get("type"), schema.get("unit")
    if options := schema.get("enum"):
        return f"{', '.join(map(str, options[:-1]))} or {options[-1]}"
    if kind in ("integer", "number"):
        return (
            ("a whole number" if kind == "integer" else "a number") + (f" of {unit}" if unit else "") + _range(schema)
        )
    if kind == "boolean":
        return "true or false"
    if kind == "array":
        return f"a list: {schema['description']}" if "description" in schema else "a list"
    if kind == "object" and "properties" not in schema:
        return f"a table: {schema['description']}"
    if kind == "object":
        return f"a table of {', '.join(schema['properties'])}"
    if pattern := schema.get("pattern"):
        return PATTERNS[pattern]
    longest, meaning = schema.get("maxLength"), schema.get("description")
    noun = f"text of at most {longest} characters" if longest else "text"
    return f"{noun}: {meaning}" if meaning else noun


def _range(schema: Schema) -> str:
    least, most = schema.get("minimum"), schema.get("maximum")
    if least is None:  # a validator of ours has it
        return ""
    return f", {least} or more" if most is None else f" from {least} to {most}"
