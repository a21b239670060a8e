"""Settings: who wins, what is refused and how it is said, and that secrets stay secret."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from support import another_value

from balancer.balancing.options import PoolOptions
from balancer.config.settings import SECRETS, Settings, add_arguments, describe, load, show
from balancer.config.values import BackendSettings, Values
from balancer.control.access import AccessOptions
from balancer.edge.listener import ClientLimits, PortOptions
from balancer.errors import SettingsError
from balancer.fleet.health import HealthOptions
from balancer.forwarding.route import RouteOptions
from balancer.observe.accesslog import LogOptions
from balancer.upstream.transport import Timeouts


def settings(
    *flags: str, env: dict[str, str] | None = None, toml: str | None = None, tmp_path: Path | None = None
) -> tuple[Settings, dict[str, str]]:
    """Settings from a command line, an environment and a file."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    file = None
    if toml is not None:
        assert tmp_path is not None
        file = tmp_path / "balancer.toml"
        file.write_text(toml, encoding="utf-8")
    return load(vars(parser.parse_args(flags)), env or {}, file)


def refusal(*flags: str, **given_otherwise: Any) -> str:
    """The text of the SettingsError, which is one line."""
    with pytest.raises(SettingsError) as caught:
        settings(*flags, **given_otherwise)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(config: Settings) -> list[tuple[str, str, int]]:
    return [(backend.id, backend.url, backend.weight) for backend in config.backends]


# Who wins.


def test_the_defaults_are_the_demo() -> None:
    config, sources = settings()
    assert (config.id, config.host, config.port, config.algorithm) == ("lb-1", "127.0.0.1", 9000, "weighted")
    assert ids(config) == [(f"backend_{n}", f"http://127.0.0.1:{5000 + n}", 4 - n) for n in (1, 2, 3)]
    assert set(sources.values()) == {"default"}
    assert set(sources) == set(Settings.model_fields)


@pytest.mark.parametrize(
    ("flag", "env", "toml", "expected", "source"),
    [
        ("9001", "9002", "9003", 9001, "flag"),
        (None, "9002", "9003", 9002, "environment"),
        (None, None, "9003", 9003, "file"),
        (None, None, None, 9000, "default"),
        ("9001", None, "9003", 9001, "flag"),
        (None, "   ", "9003", 9003, "file"),
    ],
)
def test_flag_over_environment_over_file_over_default(
    tmp_path: Path, flag: str | None, env: str | None, toml: str | None, expected: int, source: str
) -> None:
    config, sources = settings(
        *(["--port", flag] if flag else []),
        env={"LB_PORT": env} if env else {},
        toml=f"port = {toml}" if toml else "",
        tmp_path=tmp_path,
    )
    assert config.port == expected
    assert sources["port"].split()[0] == source
    assert source != "file" or sources["port"] == f"file {tmp_path / 'balancer.toml'}"


@pytest.mark.parametrize("name", [name for name in Values.model_fields if name not in {"backends", *SECRETS}])
def test_every_setting_has_a_flag_and_a_variable_of_its_name(name: str) -> None:
    value = show(another_value(name))
    by_flag, flag_sources = settings(f"--{name.replace('_', '-')}={value}")
    by_variable, variable_sources = settings(env={f"LB_{name.upper()}": value})
    assert by_flag == by_variable
    assert (flag_sources[name], variable_sources[name]) == ("flag", "environment")


PARTS = [AccessOptions, ClientLimits, HealthOptions, LogOptions, PoolOptions, RouteOptions, PortOptions, Timeouts]


@pytest.mark.parametrize("kind", PARTS)
def test_what_a_part_gets_of_the_settings_has_their_types(kind: type[Any]) -> None:
    types = get_type_hints(Settings) | {
        name: get_type_hints(value.fget)["return"]
        for name, value in vars(Values).items()
        if isinstance(value, property)
    }
    for name, its_type in get_type_hints(kind).items():
        assert its_type == types[name], name


def test_every_setting_has_a_meaning_in_the_help() -> None:
    assert all(field.description for field in Settings.model_fields.values())


@pytest.mark.parametrize(
    ("env", "name", "expected"),
    [
        ({"LB_ID": "edge-1  "}, "id", "edge-1"),
        ({"LB_PORT": " 9100 "}, "port", 9100),
        ({"ALGORITHM": "round_robin "}, "algorithm", "round_robin"),
        ({"ALGORITHM": "round_robin", "LB_ALGORITHM": "weighted"}, "algorithm", "weighted"),
        ({"LB_EXPOSE_BACKEND": "true"}, "expose_backend", True),
        ({"LB_EXPOSE_BACKEND": "0"}, "expose_backend", False),
        ({"LB_TRUSTED_PROXIES": "10.0.0.0/8, ::1,"}, "trusted_proxies", ("10.0.0.0/8", "::1")),
        ({"LB_CORS_ORIGINS": "https://ops.example"}, "cors_origins", ("https://ops.example",)),
        ({"LB_CONTROL_PREFIX": "/lb/"}, "control_prefix", "/lb"),
        ({"LB_CPU_AFFINITY": "0,2"}, "cpu_affinity", "0,2"),
        ({"LB_HOST": "  "}, "host", "127.0.0.1"),
    ],
)
def test_the_environment_is_read_without_the_blanks_that_cmd_leaves(
    env: dict[str, str], name: str, expected: object
) -> None:
    assert getattr(settings(env=env)[0], name) == expected


@pytest.mark.parametrize(("flags", "expected"), [((), False), (("--expose-backend",), True)])
def test_a_switch_needs_no_value(flags: tuple[str, ...], expected: bool) -> None:
    assert settings(*flags)[0].expose_backend is expected


def test_a_switch_can_be_turned_off_again() -> None:
    config, _ = settings("--expose-backend", "false", env={"LB_EXPOSE_BACKEND": "true"})
    assert config.expose_backend is False


def test_settings_do_not_change() -> None:
    with pytest.raises(ValidationError):
        settings()[0].port = 1  # type: ignore[misc]


# Backends.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://127.0.0.1:80", ("backend_1", "http://127.0.0.1:80", 1)),
        ("a=http://h:81@5", ("a", "http://h:81", 5)),
        ("a=http://h@0", ("a", "http://h:80", 0)),
        (" a = https://h ", ("a", "https://h:443", 1)),
        ("http://[::1]:80@256", ("backend_1", "http://[::1]:80", 256)),
        ("a.b-c_1=http://h/@2", ("a.b-c_1", "http://h:80", 2)),
    ],
)
def test_the_short_form_of_a_backend(text: str, expected: tuple[str, str, int]) -> None:
    assert ids(settings("--backend", text)[0]) == [expected]
    assert ids(settings(env={"LB_BACKENDS": text})[0]) == [expected]


def test_backends_are_given_by_repeating_the_flag_or_with_commas() -> None:
    expected = [("a", "http://x:1", 2), ("backend_2", "http://x:2", 1)]
    assert ids(settings("--backend", "a=http://x:1@2", "--backend", "http://x:2")[0]) == expected
    assert ids(settings(env={"LB_BACKENDS": "a=http://x:1@2 , http://x:2,"})[0]) == expected


def test_backends_are_tables_or_short_forms_in_a_file(tmp_path: Path) -> None:
    toml = """
        backends = [
            {id = "a", url = "http://x:1", weight = 2, max_connections = 9},
            {url = "http://x:2"},
            "c=http://x:3@3",
        ]"""
    config, sources = settings(toml=toml, tmp_path=tmp_path)
    assert ids(config) == [("a", "http://x:1", 2), ("backend_2", "http://x:2", 1), ("c", "http://x:3", 3)]
    assert [backend.max_connections for backend in config.backends] == [9, None, None]
    assert sources["backends"].startswith("file ")
    tables = '[[backends]]\nid = "a"\nurl = "http://x:1"\n[[backends]]\nurl = "http://x:2"\n'
    assert ids(settings(toml=tables, tmp_path=tmp_path)[0]) == [("a", "http://x:1", 1), ("backend_2", "http://x:2", 1)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://h/path", "path"),
        ("ftp://h", "http://HOST:PORT"),
        ("http://h:70000", "range"),
        ("http://h:80@257", "257"),
        ("http://h:80@1.5", "1.5"),
        ("http://h:80@-1", "-1"),
        ("=http://h:x", "Port"),
        ("a b=http://h", "a b"),
        ("a/b=http://h", "a/b"),
        ("x" * 65 + "=http://h", "id"),
        ("http://h@" + "9" * 5000, "url"),
    ],
    ids=lambda text: ascii(text)[:40],
)
def test_a_wrong_backend_is_named(text: str, said: str) -> None:
    for told in (refusal("--backend", "http://good:80", "--backend", text), refusal(env={"LB_BACKENDS": text})):
        assert "backend" in told and said in told


def test_two_backends_of_one_id_are_refused() -> None:
    assert "'a'" in refusal("--backend", "a=http://x:1", "--backend", "a=http://x:2")
    assert "backend_2" in refusal("--backend", "backend_2=http://x:1", "--backend", "http://x:2")


# What is refused, and how.

# Values that are wrong for a setting, blanks between.
WRONG = {
    "port": "-1 65536 http 1.5",
    "control_port": "0 70000",
    "id": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "control_prefix": "lb /a//b /<a /lb?x",
    "connect_timeout": "0 -1 nan",
    "response_timeout": "inf",
    "idle_timeout": "1e9",
    "health_interval": "-inf",
    "health_timeout": "soon",
    "drain_timeout": "-0.1 NaN",
    "retries": "-1 11",
    "max_request_body": "-1 1GB",
    "trusted_proxies": "10.0.0.1/8 here",
    "cors_origins": "ops.example https://ops.example/path *",
    "expose_backend": "maybe",
    "health_path": "health",
    "backend_host": "http://a",
    "backend_sni": "a:443",
    "health_fall": "0",
    "health_rise": "0",
    "max_threads": "0",
    "max_queued": "-1",
    "max_header_bytes": "10",
    "control_reads": "closed",
    "cpu_affinity": "all 0, -1",
    "log_level": "loud",
}
WITH_BLANKS = [("id", "two words"), ("control_prefix", "/a b"), ("health_path", "/a b"), ("health_host", "a b")]


@pytest.mark.parametrize(
    ("name", "value"), [*WITH_BLANKS, *((name, value) for name, text in WRONG.items() for value in text.split())]
)
def test_a_wrong_value_is_named_with_its_setting_and_source(tmp_path: Path, name: str, value: str) -> None:
    flag = "--" + name.replace("_", "-")
    toml = f'{name} = ["{value}"]' if name in ("trusted_proxies", "cors_origins") else f'{name} = "{value}"'
    said = {
        "flag": refusal(f"{flag}={value}"),
        "environment": refusal(env={f"LB_{name.upper()}": value}),
        "file": refusal(toml=toml, tmp_path=tmp_path),
    }
    for source, text in said.items():
        assert name in text and value[:60] in text and source in text


WRONG_TYPES = ["connect_timeout = true", "port = [9000]", "id = 7", "backends = 3", "backends = {a = 1}"]
WRONG_TYPES += ["backends = [{url = 3}]", 'backends = [{url = "http://a", wieght = 1}]', "expose_backend = 3"]
WRONG_TYPES += [f'backends = [{{url = "http://a", {field}}}]' for field in ("weight = true", "weight = 1.5")]
WRONG_TYPES += ['backends = [{url = "http://a", max_connections = 0}]']


@pytest.mark.parametrize("line", WRONG_TYPES)
def test_a_value_of_the_wrong_type_in_a_file_is_refused(tmp_path: Path, line: str) -> None:
    assert line.split(" ")[0] in refusal(toml=line, tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("port = 65536", "port = 65536 (file): expected a whole number from 0 to 65535"),
        ("port = true", "port = true (file): expected a whole number from 0 to 65535"),
        ("control_port = 0", "control_port = 0 (file): expected a whole number from 1 to 65535"),
        ("health_timeout = '5s'", "health_timeout = '5s' (file): expected a number of seconds from 0.001 to 86400"),
        ("health_interval = 1e-9", "health_interval = 1e-09 (file): expected a number of seconds from 0.001 to 86400"),
        ("drain_timeout = nan", "drain_timeout = nan (file): expected a number of seconds from 0 to 86400"),
        ("retry_budget = 2", "retry_budget = 2 (file): expected a number from 0 to 1"),
        ("max_request_body = '1GB'", "max_request_body = '1GB' (file): expected a whole number of bytes, 0 or more"),
        ("min_body_rate = -1", "min_body_rate = -1 (file): expected a whole number of bytes/s from 0 to 1000000000"),
        ("expose_backend = 'maybe'", "expose_backend = 'maybe' (file): expected true or false"),
        ("log_level = 'loud'", "log_level = 'loud' (file): expected debug, info, warning or error"),
        ("health_path = 'x'", "health_path = 'x' (file): expected a path such as /health, without blanks"),
        ("backend_sni = 'a/b'", "backend_sni = 'a/b' (file): expected a name such as api.example.com"),
        ("trusted_proxies = 3", "trusted_proxies = 3 (file): expected a list: networks whose X-Forwarded-* and "),
        ("trusted_proxies = ['10.1.2.3/8']", "'10.1.2.3/8' is an address in a network; expected 10.0.0.0/8 for all"),
        ("backends = ['a=http://x', 'a=http://y']", "backends (file): two backends have the id 'a'; ids must differ"),
        ("backends = [3]", "backends.0 = 3 (file): expected a table of id, url, weight, max_connections"),
        ("backends = [{id = 'a'}]", "backends.0.url (file): is missing; expected http://HOST:PORT or https://HOST"),
        ("cpu_affinity = true", "cpu_affinity = true (file): expected text: auto pins to one CPU, none to no CPU, or"),
    ],
)
def test_a_refusal_says_what_is_accepted(tmp_path: Path, line: str, said: str) -> None:
    assert said in refusal(toml=line, tmp_path=tmp_path).replace(str(tmp_path / "balancer.toml"), "").replace(" )", ")")


def test_a_wrong_backend_is_named_as_it_was_written() -> None:
    told = "url = 'junk' ({}): backend URL 'junk': expected http://HOST:PORT or https://HOST:PORT, or http+unix:///PATH"
    assert refusal("--backend=http://x", "--backend=junk") == f"--backend 2: {told.format('flag')}"
    assert refusal(env={"LB_BACKENDS": "junk"}) == f"backend 1 of LB_BACKENDS: {told.format('environment')}"


@pytest.mark.parametrize("name", [name for name in Values.model_fields if name not in SECRETS])
def test_every_setting_of_a_wrong_type_is_refused_in_our_words(tmp_path: Path, name: str) -> None:
    for value in ("{a = {}}", "1979-05-27", "[[true]]"):
        text = refusal(toml=f"{name} = {value}", tmp_path=tmp_path)
        assert ": expected " in text and not re.search("[Ii]nput|[Ss]tring|valid", text)


def test_all_wrong_settings_are_told_at_once() -> None:
    text = refusal("--port=x", "--retries=99", env={"LB_ID": "a b"})
    assert all(part in text for part in ("port", "retries", "id", "flag", "environment"))


@pytest.mark.parametrize("line", ["prot = 1", "backend = 1", "[health]\ninterval = 1", "Port = 1"])
def test_an_unknown_key_of_the_file_is_refused(tmp_path: Path, line: str) -> None:
    text = refusal(toml=line, tmp_path=tmp_path)
    assert "unknown setting" in text and line.strip("[").replace("]", " ").split()[0] in text
    assert str(tmp_path) in text


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("algoritm = 'random'", "did you mean algorithm?"),
        ("xyzzy = 1", "see --help"),
        ("[[backends]]\nurl = 'http://a'\nwieght = 2", "did you mean weight?"),
        ("[[routes]]\nname = 'a'\npaht = '/'", "did you mean path?"),
        ("[[routes]]\nname = 'a'\nurl = 'http://a'", "see docs/settings.md"),  # which is known elsewhere
    ],
)
def test_a_slip_of_the_pen_gets_a_hint(tmp_path: Path, line: str, hint: str) -> None:
    assert refusal(toml=line, tmp_path=tmp_path).endswith(hint)


def test_one_port_for_two_listeners_is_refused() -> None:
    assert "9000" in refusal("--control-port", "9000")


def test_a_long_wrong_value_is_cut() -> None:
    assert len(refusal("--port", "9" * 5000)) < 1000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        (b"port = \n", "line 1"),
        (b"port = 1\nport = 2\n", "line 2"),
        (b"\xff\xfe", "line 1 is not UTF-8; save it"),
        (b"port = 1\nid = '\xe4'", "line 2 is not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "balancer.toml"
    if content is not None:
        file.write_bytes(content)
    for path in (file, tmp_path) if content is None else (file,):
        with pytest.raises(SettingsError) as caught:
            load({}, {}, path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert path is tmp_path or said in str(caught.value)


# Secrets.

PASSWORD = "hunter2-hunter2-"  # sixteen characters
SECRET_URLS = [
    f"http://user:{PASSWORD}@h:80",
    f"a=http://{PASSWORD}@h",
    f"http://user:{PASSWORD}@h:80@3",
    f"user:{PASSWORD}@h",
    f"http://user:{PASSWORD}{'x' * 200}@h",
]


@pytest.mark.parametrize("url", SECRET_URLS, ids=lambda url: ascii(url)[:40])
def test_a_password_in_a_backend_url_is_never_repeated(tmp_path: Path, url: str) -> None:
    text = refusal("--backend", url) + refusal(env={"LB_BACKENDS": url})
    text += refusal(toml=f'backends = [{{url = "{url}"}}]', tmp_path=tmp_path)
    text += refusal(toml=f'backends = ["{url}"]', tmp_path=tmp_path)
    text += refusal(toml=f'[[backends]]\nurl = "{url}"\nwieght = 3', tmp_path=tmp_path)
    assert PASSWORD not in text


def test_a_password_is_not_repeated_because_another_backend_is_wrong(tmp_path: Path) -> None:
    url = f"http://user:{PASSWORD}@h"
    assert PASSWORD not in refusal("--backend", url, "--backend", "http://x:0", "--port", "x")
    assert PASSWORD not in refusal(toml=f'[[backends]]\nid = "a"\nurl = "{url}"\n[[backends]]\n', tmp_path=tmp_path)
    assert PASSWORD not in refusal(toml=f'[backends]\nurl = "{url}"\n', tmp_path=tmp_path)


@pytest.mark.parametrize(
    "toml",
    [
        '[[backends]]\nurl = "dns+http://user:{}@h"\n',
        '[[backends]]\nurl = "kubernetes+http://{}@h"\n',
        'docker = "http://user:{}@h"\n',
        '[[scaling]]\nmax = 2\ncommand = "run --password {}"\n',
        '[[scaling]]\nmax = 2\nwebhook = "http://user:{}@h/"\n',
    ],
)
def test_a_password_of_a_source_or_of_a_command_is_not_repeated(tmp_path: Path, toml: str) -> None:
    assert PASSWORD not in refusal(toml=toml.format(PASSWORD), tmp_path=tmp_path)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_token_is_hidden(tmp_path: Path, name: str) -> None:
    variable = f"LB_{name.upper()}"
    config, sources = settings(env={variable: PASSWORD})
    assert getattr(config, name).get_secret_value() == PASSWORD
    assert PASSWORD not in describe(config, sources) + repr(config) + str(config)
    assert "(hidden)" in describe(config, sources)
    assert PASSWORD not in refusal("--port=x", env={variable: PASSWORD})
    assert PASSWORD not in refusal(toml=f'{name} = ["{PASSWORD}"]', tmp_path=tmp_path)
    assert PASSWORD not in refusal(toml=f'{name}x = "{PASSWORD}"', tmp_path=tmp_path)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_token_that_can_be_guessed_is_refused(tmp_path: Path, name: str) -> None:
    told = f"{name} = (hidden) (environment): has 15 characters, so it can be guessed; expected at least 16"
    assert refusal(env={f"LB_{name.upper()}": PASSWORD[:-1]}) == told
    assert "at least 16" in refusal(toml=f'{name} = "{PASSWORD[:-1]}"', tmp_path=tmp_path)


def test_a_token_has_no_flag() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert not any("--" + name.replace("_", "-") in parser.format_help() for name in SECRETS)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_token_is_read_from_a_file(tmp_path: Path, name: str) -> None:
    file = tmp_path / "token"
    file.write_text(f"{PASSWORD}\n", encoding="utf-8")
    variable = f"LB_{name.upper()}"
    config, sources = settings(env={f"{variable}_FILE": f" {file} ", variable: "other"})
    assert getattr(config, name).get_secret_value() == PASSWORD
    assert sources[name] == "environment"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe"], ids=repr)
def test_a_token_file_without_a_token_does_not_switch_the_protection_off(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    text = refusal(env={"LB_ADMIN_TOKEN_FILE": str(file)})
    assert "LB_ADMIN_TOKEN_FILE" in text or "admin_token" in text


def test_an_empty_token_in_a_file_of_settings_is_refused(tmp_path: Path) -> None:
    assert "admin_token" in refusal(toml='admin_token = ""', tmp_path=tmp_path)


# Showing.


def test_describe_has_a_line_per_setting_with_value_and_source() -> None:
    config, sources = settings("--port", "9001", "--backend", "a=http://x:1@2", env={"LB_ID": "edge"})
    rows = [line.split() for line in describe(config, sources).splitlines()]
    assert [row[0] for row in rows] == list(Settings.model_fields)
    shown = {row[0]: row[1:] for row in rows}
    assert shown["port"] == ["9001", "flag"]
    assert shown["id"] == ["edge", "environment"]
    assert shown["backends"] == ["a=http://x:1@2", "flag"]
    assert shown["expose_backend"] == ["false", "default"]
    assert shown["ca_file"] == ["(empty)", "default"]


@given(st.text(max_size=30))
def test_any_text_as_a_backend_is_taken_or_refused_in_one_line(text: str) -> None:
    try:
        config, _ = load({"backends": [text]}, {})
    except SettingsError as error:
        assert "\n" not in str(error)
    else:
        assert config.backends[0] == BackendSettings.model_validate(config.backends[0].model_dump())


@given(st.sampled_from([name for name in Values.model_fields if name != "backends"]), st.text(max_size=20))
def test_any_text_as_any_setting_is_taken_or_refused_in_one_line(name: str, text: str) -> None:
    try:
        load({name: text}, {})
    except SettingsError as error:
        assert name in str(error) and "\n" not in str(error)
