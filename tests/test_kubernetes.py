"""deploy/kubernetes: manifests that Kubernetes takes, and Deployments that restart without a lost request."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from cluster import BASE, cluster, documents, rolled
from support import ROOT

from balancer import __version__
from balancer.config import settings

KUBERNETES = ROOT / "deploy" / "kubernetes"
PACE = 0.2  # of the manifest's times
VERSIONS = ("1.31", "1.34", "1.37")
NOT_OF_KUBERNETES = ("kustomization.yaml", "adapter-rules.yaml", "httproute.yaml")
MANIFESTS = sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name not in NOT_OF_KUBERNETES)
KUSTOMIZATIONS = sorted(KUBERNETES.rglob("kustomization.yaml"))


@pytest.fixture
def deployment() -> dict[str, Any]:
    (found,) = documents(BASE / "deployment.yaml")
    return found


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid(path: Path) -> None:
    images = re.findall(r"image: (.*)", path.read_text(encoding="utf-8"))
    assert set(images) <= {f"load-balancer:{__version__}", "redis:7.4"}
    for document in documents(path):
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(document | {"nonsense": 1}, VERSIONS[0], strict=True)


@pytest.mark.parametrize("path", KUSTOMIZATIONS, ids=lambda path: path.parent.name)
def test_what_a_kustomization_names_is_there_and_its_configuration_is_valid(path: Path) -> None:
    (found,) = documents(path)
    for name in found["resources"]:
        assert (path.parent / name / "kustomization.yaml" if "/" in name else path.parent / name).is_file()
    named = {name for name in found["resources"] if "/" not in name} | {"adapter-rules.yaml", "kustomization.yaml"}
    assert {each.name for each in path.parent.glob("*.yaml")} <= named
    (file,) = [path.parent / name for each in found["configMapGenerator"] for name in each["files"]]
    config, _ = settings.load({}, {}, file)
    (deployment,) = documents(BASE / "deployment.yaml")
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
        "http": config.port,
        "control": config.control_port,
    }
    stopping = container["lifecycle"]["preStop"]["sleep"]["seconds"] + config.shutdown_delay + config.drain_timeout
    assert pod["terminationGracePeriodSeconds"] >= stopping + 5


def test_what_selects_pods_finds_them(deployment: dict[str, Any]) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [deployment["spec"]["selector"]["matchLabels"]]
    (service,), (budget,) = documents(BASE / "service.yaml"), documents(BASE / "disruptionbudget.yaml")
    selectors += [service["spec"]["selector"], budget["spec"]["selector"]["matchLabels"]]
    spread = deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
    selectors += [each["labelSelector"]["matchLabels"] for each in spread]
    assert all(selector == labels for selector in selectors)


def test_ten_rolling_restarts_lose_no_request(deployment: dict[str, Any], tmp_path: Path) -> None:
    """The Deployment of one replica; tests/cluster.py does it with all of them, in real time."""
    with cluster(deployment, PACE, 1, tmp_path) as made:
        seen = rolled(made, 10)
    assert made.wrong == []
    assert set(seen) == {"200"} and seen["200"] > 100


def test_without_time_for_endpoints_to_go_requests_are_lost(deployment: dict[str, Any], tmp_path: Path) -> None:
    """Or the test before this one would show nothing."""
    hasty = copy.deepcopy(deployment)
    (container,) = hasty["spec"]["template"]["spec"]["containers"]
    container["lifecycle"]["preStop"]["sleep"]["seconds"] = 0
    container["env"].append({"name": "LB_SHUTDOWN_DELAY", "value": "0"})
    with cluster(hasty, PACE, 1, tmp_path) as made:
        seen = rolled(made, 1)
    assert set(seen) > {"200"}


def test_a_balancer_that_scales_may_do_so_with_its_deployment_alone() -> None:
    overlay = KUBERNETES / "overlays" / "scaling"
    config, _ = settings.load({}, {}, overlay / "balancer.toml")
    role, _ = documents(overlay / "scaling-role.yaml")
    (rule,), (scaled,) = role["rules"], config.scaling
    assert [f"deployment/{name}" for name in rule["resourceNames"]] == [scaled.kubernetes]
    assert (rule["resources"], rule["verbs"]) == (["deployments/scale"], ["get", "patch"])
