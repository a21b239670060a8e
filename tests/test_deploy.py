"""deploy/: alert rules that fire when they should, and nothing that names a metric which is not there."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from certificates import Files
from exposition import Key, promtool, read, scrape
from support import ROOT, Balancer, fetch, free_port, wait_until
from wire import WireBackend

from balancer import LoadBalancer

DEPLOY = ROOT / "deploy"
PROMETHEUS = DEPLOY / "prometheus"
BY_SCRAPE = {"job", "instance"}  # labels that Prometheus adds
METRIC = re.compile(r"\b((?:lb|process)_[a-z_]+|up)\b")
SELECTOR = re.compile(r"\b((?:lb|process)_[a-z_]+|up)\{([^}]*)\}")
MATCHER = re.compile(r'([a-z_]+)\s*(=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Key, float]]:
    """/metrics of a balancer that has had good and bad traffic, and of one that has a certificate and a source."""
    folder = tmp_path_factory.mktemp("certificate")
    files, listed = Files(folder), folder / "backends.toml"
    listed.write_text("")
    with LoadBalancer([], backends_file=listed, **files.settings) as secure:
        wait_until(secure.control.discovery.has_looked)
        of_tls = read(secure.app.test_client().get("/metrics").text)
    with WireBackend() as good, WireBackend() as bad:
        bad.answer(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
        backends = {"good": good.url, "bad": bad.url, "gone": f"http://127.0.0.1:{free_port()}"}
        with Balancer(*(f"--backend={name}={url}" for name, url in backends.items())) as balancer:
            for _ in range(4):
                fetch(f"{balancer.url}/x", b"body")
            yield of_tls | scrape(balancer.url)


class Known:
    """Metrics with their labels and values, as told."""

    def __init__(self, told: dict[Key, float]) -> None:
        self.labels: dict[str, dict[str, set[str]]] = {"up": {}}
        for name, labels in told:
            known = self.labels.setdefault(name, {})
            for label, text in labels:
                known.setdefault(label, set()).add(text)

    def complaints(self, expression: str) -> list[str]:
        """What an expression names that is not there."""
        names = METRIC.findall(re.sub(r'"[^"]*"', '""', expression))
        wrong = [f"metric {name}" for name in names if name not in self.labels]
        allowed = BY_SCRAPE.union(*(self.labels.get(name, {}) for name in names))
        for group in GROUPING.findall(expression):
            wrong += [f"label {label} of none" for label in re.findall(r"[a-z_]+", group) if label not in allowed]
        for name, matchers in SELECTOR.findall(expression):
            for label, operator, wanted in MATCHER.findall(matchers):
                if label in BY_SCRAPE or wanted.startswith("$"):
                    continue
                values = self.labels.get(name, {}).get(label, set())
                parts = wanted.split("|") if operator in ("=~", "!~") else [re.escape(wanted)]
                wrong += [f"{name}: {label} {part}" for part in parts if not any(re.fullmatch(part, v) for v in values)]
        return wrong

    def labels_of(self, expression: str) -> set[str]:
        return BY_SCRAPE.union(*(self.labels.get(name, {}) for name in METRIC.findall(expression)))


@pytest.fixture(scope="module")
def known(told: dict[Key, float]) -> Known:
    return Known(told)


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("rate(lb_no_such_total[5m])", "metric lb_no_such_total"),
        ('lb_backend_state{state="sleeping"}', "lb_backend_state: state sleeping"),
        ('lb_requests_total{colour="red"}', "lb_requests_total: colour red"),
        ("sum by (colour) (lb_requests_total)", "label colour of none"),
        ('sum by (code) (lb_requests_total{code=~"5..|2..", job=~"$job"})', None),
    ],
)
def test_what_is_not_there_is_noticed(known: Known, expression: str, complaint: str | None) -> None:
    assert known.complaints(expression) == ([complaint] if complaint else [])


# Prometheus.


def rules() -> list[tuple[str, str]]:
    """(name, expression) of each alert; the file is plain enough to be read without a YAML parser."""
    blocks = re.split(r"(?m)^      - alert: ", (PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))[1:]
    found = []
    for block in blocks:
        name, _, rest = block.partition("\n")
        match = re.search(r"(?ms)^        expr: (?:\|\n)?(.*?)^        (?:for|labels):", rest)
        assert match, name
        found.append((name, " ".join(match[1].split())))
    return found


def test_the_scrape_configuration_and_the_rules_are_valid() -> None:
    checked = promtool("check", "config", str(PROMETHEUS / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert f"{len(rules())} rules found" in promtool("check", "rules", str(PROMETHEUS / "alerts.yml")).stdout


def test_the_rules_fire_when_they_should() -> None:
    tried = promtool("test", "rules", "alerts_test.yml", cwd=PROMETHEUS)
    assert tried.returncode == 0, tried.stdout + tried.stderr


@pytest.mark.parametrize(
    ("right", "wrong"), [("> 0.05", "> 0.5"), ('state=~"up|trial"', 'state=~"up"'), ("for: 30s", "for: 30m")]
)
def test_a_rule_that_is_wrong_is_noticed(tmp_path: Path, right: str, wrong: str) -> None:
    shutil.copytree(PROMETHEUS, tmp_path / "rules")
    file = tmp_path / "rules" / "alerts.yml"
    text = file.read_text(encoding="utf-8")
    assert right in text
    file.write_text(text.replace(right, wrong), encoding="utf-8")
    assert promtool("test", "rules", "alerts_test.yml", cwd=file.parent).returncode != 0


def test_every_rule_has_a_test_in_which_it_fires() -> None:
    tried = (PROMETHEUS / "alerts_test.yml").read_text(encoding="utf-8")
    names = [name for name, _ in rules()]
    assert len(names) == len(set(names)) >= 10
    assert {"LbNoHealthyBackend", "LbBackendFlapping", "LbHighErrorRatio", "LbHighLatencyP99"} <= set(names)
    assert set(re.findall(r'alertname="(\w+)"', tried)) == set(names)


@pytest.mark.parametrize(("name", "expression"), rules(), ids=[name for name, _ in rules()])
def test_a_rule_names_only_what_there_is(known: Known, name: str, expression: str) -> None:
    assert METRIC.search(expression)
    assert known.complaints(expression) == []


def test_a_text_of_a_rule_names_only_labels_that_it_has() -> None:
    text = (PROMETHEUS / "alerts.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"\$labels\.(\w+)", text)) <= BY_SCRAPE | {"backend", "pool", "queue", "source"}


def test_the_autoscaler_goes_by_a_metric_that_there_is(known: Known) -> None:
    for name in ("autoscaler.yaml", "adapter-rules.yaml"):
        text = (DEPLOY / "kubernetes" / "overlays" / "autoscaling" / name).read_text(encoding="utf-8")
        found = set(METRIC.findall(re.sub("(?m)#.*$", "", text)))
        assert found and found <= set(known.labels)


# Grafana.


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text(encoding="utf-8"))
    return loaded


def queries(dashboard: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(panel, expression, legend)"""
    found = [(p["title"], t["expr"], t["legendFormat"]) for p in dashboard["panels"] for t in p.get("targets", [])]
    return found + [(a["name"], a["expr"], a["titleFormat"]) for a in dashboard["annotations"]["list"]]


def test_the_dashboard_can_be_imported(dashboard: dict[str, Any]) -> None:
    assert dashboard["uid"] and dashboard["title"] and dashboard["schemaVersion"] >= 36
    assert "id" not in dashboard  # a number of one Grafana's own
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids)) > 20
    variables = [variable["name"] for variable in dashboard["templating"]["list"]]
    assert variables == ["datasource", "job", "instance", "backend"]
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["type"] == "row" or panel["description"] and panel["targets"]


def test_no_panel_covers_another(dashboard: dict[str, Any]) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (column, line)
            for column in range(place["x"], place["x"] + place["w"])
            for line in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(column for column, _ in cells) < 24
        taken |= cells


def test_the_dashboard_names_only_what_there_is(known: Known, dashboard: dict[str, Any]) -> None:
    for title, expression, legend in queries(dashboard):
        assert METRIC.search(expression), title
        assert known.complaints(expression) == [], title
        assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= known.labels_of(expression), title
    for variable in dashboard["templating"]["list"][1:]:
        match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
        assert match and known.complaints(match[1]) == [] and match[2] in known.labels_of(match[1])


def test_prometheus_can_read_every_expression_of_the_dashboard(dashboard: dict[str, Any], tmp_path: Path) -> None:
    lines = ["groups:", "  - name: dashboard", "    rules:"]
    for number, (_, expression, _) in enumerate(queries(dashboard)):
        plain = re.sub(r"\$\w+", ".*", expression.replace("$__rate_interval", "1m"))
        lines += [f"      - record: panel:{number}", f"        expr: {json.dumps(plain)}"]
    file = tmp_path / "rules.yml"
    file.write_text("\n".join(lines), encoding="utf-8")
    checked = promtool("check", "rules", "--lint=none", str(file))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_readme_names_metrics_that_exist(known: Known) -> None:
    text = (DEPLOY / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"`(lb_[a-z_]+)`", text)
    assert len(names) > 4
    for name in names:
        assert name in known.labels or f"{name}_bucket" in known.labels, name
