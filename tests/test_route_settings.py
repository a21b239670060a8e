"""What may stand in [[routes]] and [[expect]], and in one line what is wrong with the rest."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from balancer.config import settings
from balancer.config.routes import ExpectSettings, RouteSettings
from balancer.config.settings import Settings
from balancer.errors import SettingsError
from balancer.protocol.paths import Rewriting

BACKENDS = {"backends": ["http://127.0.0.1:1"]}
WRONG_PATH = "expected a path such as /v1"
WRONG_REDIRECT = "expected a URL such as"


def checked(**tables: Any) -> Settings:
    return settings.given({**BACKENDS, **tables})[0]


def complaint(**tables: Any) -> str:
    with pytest.raises(SettingsError) as error:
        checked(**tables)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        *(({"host": host}, "routes.v1.host = ") for host in ("a b", "a:80", "*.*.test", "*", "a.*", "", "http://a")),
        *(({"path": path}, WRONG_PATH) for path in ("v1", "/v1/../x", "/a//b", "/a%2fb", "/a;b", "/a?b", "/é", "==/a")),
        ({"methods": ["get"]}, "'get' is no method that is forwarded"),
        ({"methods": ["TRACE"]}, "'TRACE' is no method that is forwarded"),
        ({"match_headers": {"a b": "1"}}, "'a b' is no name"),
        ({"match_headers": {"a": ""}}, "a: expected the value that it must have"),
        ({"match_query": {"a": 1}}, "routes.v1.match_query.a = 1"),
        ({"pool": "api"}, "routes.v1: pool 'api' is unknown; there are: default"),
        ({"auth": ["partners"]}, "routes.v1: auth 'partners' is unknown"),
        ({"limits": ["much"]}, "routes.v1: limits 'much' is unknown"),
        ({"pool": "default", "redirect": "https://a"}, "has pool and redirect; expected one of"),
        ({"pool": "default", "status": 410}, "has pool and status; expected one of"),
        *(
            ({"redirect": redirect}, WRONG_REDIRECT)
            for redirect in (
                *(
                    "{path}",
                    "//a{path}",
                    "/{path}",
                    "/\\a",
                    "a",
                    "javascript:a",
                    "https://",
                    "https://a@b/",
                    "https:///a",
                ),
                *("https://a{query}", "https://{host}{host}", "https://{host}.a/", "https://a\r\nb"),
            )
        ),
        ({"redirect": "https://a{user}"}, "'{user}' means nothing"),
        ({"redirect": "https://a", "redirect_status": 200}, "expected 301, 302, 303, 307 or 308"),
        ({"redirect_status": 302}, "has redirect_status without redirect"),
        ({"body": "x"}, "has body without status"),
        ({"status": 99}, "expected a whole number from 200 to 599"),
        ({"status": 204, "body": "x"}, "has a body, but answers with 204 have none"),
        ({"path": "/v1", "strip_prefix": "/v"}, "takes off a prefix that its path '/v1' does not begin with"),
        ({"path": "/v1", "replace_prefix": ["/v1"]}, "expected two paths"),
        ({"strip_prefix": "/", "replace_prefix": ["/", "/a"]}, "has strip_prefix and replace_prefix"),
        ({"rewrite_answers": True}, "has rewrite_answers, but neither strip_prefix nor replace_prefix"),
        ({"redirect": "https://a", "strip_prefix": "/"}, "rewrites a path, but has a redirect instead of a pool"),
        ({"ambiguous_paths": "allow"}, "expected reject or forward"),
        ({"colour": 1}, "unknown setting 'routes.v1.colour'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(given: dict[str, Any], told: str) -> None:
    assert told in complaint(routes=[{"name": "v1", **given}])


def test_no_value_of_a_header_rule_is_repeated() -> None:
    wrong = {"request_headers": {"set": {"X-A": "secret", "Host": "a"}}, "path": "/v1", "strip_prefix": "/v2"}
    assert "secret" not in complaint(routes=[{"name": "v1", **wrong}])
    assert "secret" not in complaint(routes=[{"name": "v1", **wrong, "request_headers": {"set": {"X-A": "secret"}}}])


@pytest.mark.parametrize(
    "twins",
    [
        ({}, {"path": "/"}),
        ({"path": "/a"}, {"path": "/%61/"}),
        ({"host": "A.test."}, {"host": "a.test"}),
        ({"methods": ["GET", "PUT"]}, {"methods": ["PUT", "GET"]}),
        ({"match_headers": {"X-A": "1"}}, {"match_headers": {"x-a": "1"}}),
    ],
)
def test_two_routes_may_not_be_for_the_same_requests(twins: tuple[dict[str, Any], ...]) -> None:
    told = complaint(routes=[{"name": name, **route} for name, route in zip("ab", twins, strict=True)])
    assert told.startswith("routes.b matches the same requests as routes.a")


def test_expectations_are_checked() -> None:
    for expect, told in (
        ({"request": "GET /x", "route": "a"}, "expected a method and a URL"),
        ({"request": "GET http://x"}, "nothing is expected"),
        ({"request": "GET http://x", "route": "a"}, "there is no route 'a'"),
    ):
        assert told in complaint(expect=[expect])


def test_a_route_is_what_it_says() -> None:
    route = {"name": "v1", "host": "API.test.", "path": "/v1/", "replace_prefix": ["/v1", "/api/"], "retries": 0}
    (made,) = checked(routes=[route]).routes
    assert (made.host, made.pool, made.own, made.is_guarded) == ("api.test", "default", {"retries": 0}, True)
    assert (made.match_path, made.rewriting) == (b"/v1", Rewriting(b"/v1", b"/api"))
    for redirect in (
        "https://a.test{path}",
        "https://{host}:8443{path}?{query}",
        "/new{path}",
        "/",
        "http://[::1]:8/x",
    ):
        assert checked(routes=[{"name": "a", "redirect": redirect}]).routes[0].pool is None


SOME = st.sampled_from(["/v1", "*.a.b", "GET", "default", "https://a{path}", "a", "", 410, -1, True, None, 0.5])
VALUES = st.one_of(SOME, st.lists(SOME, max_size=2), st.dictionaries(st.sampled_from(["set", "add", "X-A", ""]), SOME))


def rows(model: type[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(SOME, st.dictionaries(st.sampled_from([*model.model_fields, "colour"]), VALUES, max_size=4))


@given(st.lists(rows(RouteSettings), max_size=2), st.lists(rows(ExpectSettings), max_size=2))
def test_whatever_stands_there_is_right_or_told_in_one_line(routes: list[Any], expect: list[Any]) -> None:
    try:
        checked(routes=routes, expect=expect)
    except SettingsError as error:
        assert "\n" not in str(error)
