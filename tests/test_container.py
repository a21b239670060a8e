"""Dockerfile and compose.yaml: in order, and true of what they start. deploy/container/rehearse.py takes the steps."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from exposition import promtool
from support import ROOT

from balancer import __version__
from balancer.commandline import make_parser
from balancer.config import settings

COMPOSE = ROOT / "compose.yaml"
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
SHARE = "/opt/load-balancer/share/load-balancer/"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    return found


def test_the_dockerfile_is_in_order(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = run(hadolint, ROOT / "Dockerfile")
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.replace("USER 10001:10001", "USER root"), encoding="utf-8")
    assert "DL3002" in run(hadolint, tmp_path / "Dockerfile").stdout


def test_the_compose_file_is_valid(tmp_path: Path) -> None:
    check = [Path(sys.executable).with_name("check-jsonschema"), "--builtin-schema", "vendor.compose-spec"]
    done = run(*check, COMPOSE)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "compose.yaml").write_text(COMPOSE.read_text(encoding="utf-8").replace("cap_drop:", "capdrop:"))
    assert run(*check, tmp_path / "compose.yaml").returncode != 0


def test_its_commands_and_settings_are_ours(services: dict[str, dict[str, Any]]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    installed = project["tool"]["setuptools"]["data-files"]["share/load-balancer"]
    backends = [service for name, service in services.items() if name.startswith("backend_")]
    for service in backends:
        program = service["entrypoint"][1]
        assert program.startswith(SHARE) and program.removeprefix(SHARE) in installed
        command, *flags = service["healthcheck"]["test"][1:]
        assert command == "load-balancer" and make_parser().parse_args(flags).probe == "health"
    environment = {name: str(value) for name, value in services["balancer"]["environment"].items() if value is not None}
    assert settings.warnings(services["balancer"]["environment"] | environment) == []
    config, _ = settings.load({}, environment)
    assert [backend.id for backend in config.backends] == [name for name in services if name.startswith("backend_")]
    assert (
        float(services["balancer"]["stop_grace_period"].rstrip("s")) >= config.shutdown_delay + config.drain_timeout + 5
    )
    for service in (services["balancer"], *backends):
        assert service["image"] == f"load-balancer:{__version__}"
        assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert not services["balancer"]["ports"][0].startswith("9000")  # this machine alone


def test_what_is_mounted_is_there(services: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    mounted = [each for service in services.values() for each in service.get("volumes", []) if each.startswith("./")]
    assert len(mounted) == 5
    for each in mounted:
        assert (ROOT / each.split(":")[0]).is_file()
    for name in ("container/prometheus.yml", "prometheus/alerts.yml"):
        shutil.copy(ROOT / "deploy" / name, tmp_path)
    checked = promtool("check", "config", str(tmp_path / "prometheus.yml"))
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_image_asks_itself_by_a_command_that_there_is() -> None:
    (health,) = re.findall(r"(?m)^HEALTHCHECK .* CMD (\[.*\])$", DOCKERFILE)
    command, *flags = json.loads(health)
    assert command == "load-balancer" and make_parser().parse_args(flags).probe == "readyz"
    (entry,) = re.findall(r"(?m)^ENTRYPOINT (\[.*\])$", DOCKERFILE)
    assert json.loads(entry) == ["load-balancer"]
    variables = dict(re.findall(r"\b(LB_[A-Z_]+)=(\S+)", DOCKERFILE))
    assert variables and settings.warnings(variables) == []
