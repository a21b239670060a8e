"""A cluster in processes: pods of a Deployment, their probes and their end, and a Service that hears of it late.

`PYTHONPATH=. python tests/cluster.py` restarts deploy/kubernetes/base ten times with all times as they stand there.
"""

from __future__ import annotations

import http.client
import random
import subprocess
import tempfile
import threading
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from fleet import DemoBackend
from support import PYTHON, ROOT, Process, wait_until

BASE = ROOT / "deploy" / "kubernetes" / "base"
BACKEND = "http://api:8080"  # of balancer.toml
CLIENTS = 6
LATEST = 6.0  # seconds until an endpoint is removed: more than preStop, less than that and shutdown_delay


def documents(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return list(yaml.safe_load_all(file))


class Pod:
    """The very command of the container on an address of its own; only the program, its folder and BACKEND are here's.

    All seconds of the manifest are multiplied by `pace`, but for how long a probe may fail. `wrong` has what a kubelet
    would have had to do about it.
    """

    def __init__(
        self, name: str, address: str, spec: dict[str, Any], volume: Path, pace: float, wrong: list[str]
    ) -> None:
        self.name, self.address, self.pace, self.wrong = name, address, pace, wrong
        self.spec, self.container = spec, spec["containers"][0]
        self.is_ready = self.is_ending = False
        self.ports = {port["name"]: port["containerPort"] for port in self.container["ports"]}
        (mount,) = [mount for mount in self.container["volumeMounts"] if mount["name"] == "configuration"]
        assert self.container["command"] == ["load-balancer"]
        arguments = [word.replace(mount["mountPath"], str(volume)) for word in self.container["args"]]
        settings = tomllib.loads((volume / "balancer.toml").read_text(encoding="utf-8"))
        scaled = {f"LB_{each.upper()}": str(settings[each] * pace) for each in ("shutdown_delay", "drain_timeout")}
        env = {"LB_HOST": address, **scaled, **self._environment()}
        self.process = Process([PYTHON, str(ROOT / "load_balancer.py"), *arguments], env)
        self._kubelet = threading.Thread(target=self._probe, name=f"kubelet-{name}")
        self._kubelet.start()

    def _environment(self) -> dict[str, str]:
        """Its name is known; a secret that is optional is not there."""
        fields = {"metadata.name": self.name}
        found = {}
        for each in self.container["env"]:
            source = each.get("valueFrom", {})
            if "value" in each:
                found[each["name"]] = each["value"]
            elif "fieldRef" in source:
                found[each["name"]] = fields[source["fieldRef"]["fieldPath"]]
            else:
                assert source["secretKeyRef"]["optional"]
        return found

    def _probe(self) -> None:
        """Until it is to end."""
        kinds = {"startupProbe": 0.0}
        failures: Counter[str] = Counter()
        while not self.is_ending and self.process.popen.poll() is None:
            for kind, due in list(kinds.items()):
                if due > time.monotonic():
                    continue
                probe = self.container[kind]
                kinds[kind] = time.monotonic() + probe["periodSeconds"] * self.pace
                failures[kind] = 0 if self._answers(probe) else failures[kind] + 1
                has_failed = failures[kind] >= probe["failureThreshold"] / self.pace  # a start takes what it takes
                if kind == "readinessProbe":
                    self.is_ready = not failures[kind] or (self.is_ready and not has_failed)
                elif has_failed:
                    self.wrong.append(f"{self.name}: {kind} failed: {self.process.output}")
                elif kind == "startupProbe" and not failures[kind]:
                    kinds = {"readinessProbe": 0.0, "livenessProbe": 0.0}
            threading.Event().wait(0.02)

    def _answers(self, probe: dict[str, Any]) -> bool:
        asked = probe["httpGet"]
        with suppress(OSError, http.client.HTTPException):
            return ask(self.address, self.ports[asked["port"]], asked["path"], probe.get("timeoutSeconds", 1)) == 200
        return False

    def end(self) -> None:
        """preStop, SIGTERM, and what is left of the time that it has."""
        deadline = time.monotonic() + self.spec["terminationGracePeriodSeconds"] * self.pace
        self.is_ending = True
        self._kubelet.join()
        pause(self.container["lifecycle"]["preStop"]["sleep"]["seconds"] * self.pace)
        self.process.popen.terminate()
        try:
            code = self.process.popen.wait(max(0.1, deadline - time.monotonic()))
            if code != 0:
                self.wrong.append(f"{self.name} ended with {code}: {self.process.output}")
        except subprocess.TimeoutExpired:
            self.wrong.append(f"{self.name} was killed: {self.process.output}")
        self.process.stop()


class Cluster:
    """A Deployment with its Service. `endpoints` has pods that end for a while still."""

    def __init__(self, pace: float, deployment: dict[str, Any], folder: Path, backend: str) -> None:
        self.pace, self.folder = pace, folder
        self.spec = deployment["spec"]["template"]["spec"]
        strategy = deployment["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxUnavailable": 0, "maxSurge": 1}
        text = (BASE / "balancer.toml").read_text(encoding="utf-8")
        assert BACKEND in text
        (folder / "balancer.toml").write_text(text.replace(BACKEND, backend), encoding="utf-8")
        self.pods: list[Pod] = []
        self.endpoints: list[Pod] = []
        self.wrong: list[str] = []
        self._rng = random.Random(8)
        self._network = f"127.{random.randrange(1, 255)}.{random.randrange(255)}"
        self._started = 0
        self._ending: list[threading.Thread] = []

    def start_pod(self) -> None:
        """It is an endpoint once it is ready."""
        self._started += 1
        name = f"load-balancer-{self._started}"
        pod = Pod(name, f"{self._network}.{self._started}", self.spec, self.folder, self.pace, self.wrong)
        wait_until(lambda: pod.is_ready or self.wrong, f"{name} is ready")
        self.pods.append(pod)
        self.endpoints.append(pod)

    def restart(self) -> None:
        """One pod more, then one less, and so on: as maxSurge and maxUnavailable want it."""
        for pod in list(self.pods):
            self.start_pod()
            self.pods.remove(pod)
            for step in (pod.end, lambda pod=pod: self._remove(pod)):  # beside each other
                self._ending.append(threading.Thread(target=step, name=f"end of {pod.name}"))
                self._ending[-1].start()

    def _remove(self, pod: Pod) -> None:
        pause(self._rng.uniform(0, LATEST) * self.pace)
        self.endpoints.remove(pod)

    def address(self) -> tuple[str, int]:
        pod = random.choice(self.endpoints)
        return pod.address, pod.ports["http"]

    def finish(self) -> None:
        """Until everything that is to end has."""
        for thread in self._ending:
            thread.join()

    def stop(self) -> None:
        self.finish()
        for pod in self.pods:
            pod.is_ending = True
            pod.process.stop()


class Traffic:
    """Clients of a Service: each connection goes to whichever endpoint there is. Every second one keeps its connection
    for as long as it is let."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.seen: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(n % 2 == 0,), name=f"client-{n}") for n in range(CLIENTS)
        ]
        for thread in self._threads:
            thread.start()

    def _run(self, keeps: bool) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._over.is_set():
            if connection is None or connection.sock is None or not keeps:
                connection = http.client.HTTPConnection(*self.cluster.address(), timeout=20)
            try:
                connection.request("GET", "/")
                answer = connection.getresponse()
                answer.read()
                found = str(answer.status)
            except (OSError, http.client.HTTPException) as error:
                found = repr(error)
                connection.close()
            if not keeps:
                connection.close()
            with self._lock:
                self.seen[found] += 1
        if connection is not None:
            connection.close()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()


def ask(address: str, port: int, path: str, timeout: float) -> int:
    connection = http.client.HTTPConnection(address, port, timeout=timeout)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


@contextmanager
def cluster(deployment: dict[str, Any], pace: float, replicas: int, folder: Path) -> Iterator[Cluster]:
    with ExitStack() as stack:
        backend = DemoBackend("api", delay=0.02)
        stack.callback(backend.kill)
        made = Cluster(pace, deployment, folder, backend.url)
        stack.callback(made.stop)
        for _ in range(replicas):
            made.start_pod()
        yield made


def rolled(made: Cluster, restarts: int) -> Counter[str]:
    """What clients saw meanwhile."""
    traffic = Traffic(made)
    try:
        for _ in range(restarts):
            made.restart()
        made.finish()
    finally:
        traffic.stop()
    return traffic.seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        (manifest,) = documents(BASE / "deployment.yaml")
        with cluster(manifest, 1.0, manifest["spec"]["replicas"], Path(temporary)) as real:
            began = time.monotonic()
            seen = rolled(real, 10)
            print(
                f"ten restarts of {manifest['spec']['replicas']} pods in {time.monotonic() - began:.0f} s:", dict(seen)
            )
            print("\n".join(real.wrong) or "no pod was killed, no probe failed")
