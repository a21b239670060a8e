"""GET /status with only what has changed: whoever goes by that has what a whole answer says, whatever happened."""

from __future__ import annotations

from typing import Any

from control import add_records, check_all, make_app
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from balancer.control.revisions import KEPT, Revisions

Json = dict[str, Any]
SCALARS = st.none() | st.integers(0, 2) | st.sampled_from(["up", ""])
FIELDS = st.recursive(
    st.dictionaries(st.sampled_from("abc"), SCALARS, max_size=3),
    lambda inner: st.dictionaries(st.sampled_from("abcd"), SCALARS | inner, max_size=4),
    max_leaves=6,
)
ANSWER = st.tuples(st.permutations(["x", "y"]) | st.just(["x"]), st.lists(FIELDS, min_size=2, max_size=2))


def merged(target: Any, patch: Any) -> Any:
    """RFC 7396 section 2."""
    if not isinstance(patch, dict):
        return patch
    found = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = merged(found.get(name), value)
    return found


def without_nulls(value: Any) -> Any:
    return merged({}, value)


class Reader:
    """Goes by what has changed."""

    def __init__(self) -> None:
        self.revision, self.backends = 0, dict[str, Json]()

    def take(self, revision: int, whole: list[Json], changed: dict[str, Json] | None) -> None:
        assert revision > self.revision
        self.revision = revision
        if changed is None:
            self.backends = {backend["id"]: backend for backend in whole}
        for key, patch in (changed or {}).items():
            assert patch, "it has not changed"
            self.backends[key] = merged(self.backends[key], patch)

    def has(self, whole: list[Json]) -> bool:
        mine = [without_nulls(backend) for backend in self.backends.values()]
        return mine == [without_nulls(backend) for backend in whole]


@given(st.lists(st.tuples(ANSWER, st.integers(0, 2)), min_size=2))
def test_what_has_changed_makes_the_whole_answer_for_each_of_several_readers(
    answers: list[tuple[tuple[list[str], list[Json]], int]],
) -> None:
    revisions, readers = Revisions(), [Reader() for _ in range(3)]
    for (ids, fields), turn in answers:
        whole = [{"id": key, **each} for key, each in zip(ids, fields, strict=False)]
        reader = readers[turn]
        revision, changed = revisions.since(reader.revision, whole)
        reader.take(revision, whole, changed)
        assert reader.has(whole)


def test_only_the_newest_answers_are_kept() -> None:
    revisions = Revisions()
    first, changed = revisions.since(0, [{"id": "a", "n": 0}])
    assert changed is None
    for n in range(1, KEPT + 1):
        assert revisions.since(first, [{"id": "a", "n": n}])[1] == {"a": {"n": n}}
    assert revisions.since(first, [{"id": "a", "n": 0}])[1] is None


def asked(client: FlaskClient, query: str = "") -> Any:
    return client.get(f"/status?{query}").json


def test_a_page_that_says_what_it_has_is_told_what_has_changed() -> None:
    app = make_app()
    client = app.test_client()
    check_all(app)
    reader = Reader()
    for records in (0, 3, 0, 1):
        add_records(app, records)
        answer = asked(client, f"window=60&since={reader.revision}")
        reader.take(answer["revision"], answer["backend_servers"], answer["changed_backends"])
        assert reader.has(asked(client, "window=60")["backend_servers"])
    assert answer["backend_servers"] == [] and list(answer["changed_backends"]) == ["a"]
    client.delete("/backends/b", json={})
    answer = asked(client, f"since={reader.revision}")
    assert [backend["id"] for backend in answer["backend_servers"]] == ["a", "c"]
    assert answer["changed_backends"] is None


def test_times_only_of_those_that_are_asked_for() -> None:
    app = make_app()
    add_records(app, 3)
    answer = asked(app.test_client(), "timed=b,zzz")
    timed = {backend["id"]: "latency" in backend for backend in answer["backend_servers"]}
    assert timed == {"a": False, "b": True, "c": True}  # c has had none: there is nothing to work out
    checked = ["last_check" in backend["health"] for backend in answer["backend_servers"]]
    assert checked == [False, True, False]
    assert answer["backend_servers"][0]["total_requests"] == 3 and "latency" not in answer["statistics"]
