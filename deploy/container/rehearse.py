"""Takes the steps of the Dockerfile without a container engine, and starts what comes out as an engine would.

sudo python3 deploy/container/rehearse.py FOLDER      (Linux; needs debootstrap, and some 2 GB in FOLDER)

In the place of python:3.14-slim stands the Debian whose own Python is that one. Namespaces and chroot are the
container: a read-only root, no capabilities, the user of the image, its command as process 1. What is tried: nothing of
the root can be written, HEALTHCHECK says yes, STOPSIGNAL ends it with exit code 0.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RELEASE = "testing"  # has Python 3.14, as the image
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
LENT = ("/etc/resolv.conf", "/etc/ssl/certs", "/dev")  # of this machine, while a step runs
SECONDS = 60.0


@dataclass
class Image:
    """A stage of the Dockerfile, as far as it has got."""

    root: Path
    folder: str = "/"
    user: str = "0:0"
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin"})
    health: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    stop_signal: str = "SIGTERM"


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    image = build(ROOT / "Dockerfile", folder)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    image.environment |= {"LB_PORT": str(port), "LB_BACKENDS": "http://127.0.0.1:9"}
    container = Container(image)
    try:
        container.run(["sh", "-c", "! touch /anywhere /opt/load-balancer/x"], "the root is read-only")
        wait_until(lambda: container.run(image.health) == 0, "HEALTHCHECK says yes")
        status = Path(f"/proc/{container.pid}/status").read_text(encoding="ascii")
        told = dict(line.split(":\t", 1) for line in status.splitlines())
        assert told["Uid"].split() == [image.user.partition(":")[0]] * 4, told["Uid"]
        assert {told[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        print(f"runs as {told['Uid'].split()[0]}, process {told['NSpid'].split()[-1]} of its own, no capabilities")
        os.kill(container.pid, getattr(signal, image.stop_signal))
        assert container.process.wait(SECONDS) == 0
    finally:
        container.process.kill()
    print("HEALTHCHECK said yes; ended with 0 after", image.stop_signal)
    return 0


# Building.


def build(dockerfile: Path, folder: Path) -> Image:
    """The last stage."""
    base = folder / "base"
    if not base.exists():
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", RELEASE, f"{base}.new")
        for name in ("python", "pip"):  # as that image has it
            Path(f"{base}.new", "usr/local/bin", name).symlink_to(f"/usr/bin/{name}3")
        Path(f"{base}.new").rename(base)
    stages: dict[str, Image] = {}
    image = Image(base)
    for word, text in instructions(dockerfile):
        print(f"{word} {text}", flush=True)
        if word == "FROM":
            name = text.partition(" AS ")[2] or str(len(stages))
            image = stages[name] = Image(folder / name)
            shutil.rmtree(image.root, ignore_errors=True)
            run("cp", "--archive", "--reflink=auto", str(base), str(image.root))
        elif word != "ARG":
            step(image, word, text, stages)
    return image


def instructions(dockerfile: Path) -> Iterator[tuple[str, str]]:
    text = re.sub(r"(?m)^#.*\n", "", dockerfile.read_text(encoding="utf-8")).replace("\\\n", "")
    for line in text.splitlines():
        if line.strip():
            word, _, rest = line.partition(" ")
            yield word, " ".join(rest.split()) if word != "RUN" else rest


def step(image: Image, word: str, text: str, stages: dict[str, Image]) -> None:
    if word == "WORKDIR":
        image.folder = text
        (image.root / text.strip("/")).mkdir(parents=True, exist_ok=True)
    elif word == "RUN":
        run_in(image, ["/bin/sh", "-c", text])
    elif word == "COPY":
        copy(image, shlex.split(text), stages)
    elif word == "ENV":
        for pair in shlex.split(text):
            name, _, value = pair.partition("=")
            image.environment[name] = re.sub(r"\$(\w+)", lambda found: image.environment[found[1]], value)
    elif word == "HEALTHCHECK":
        image.health = json.loads(text.partition("CMD ")[2])
    elif word == "ENTRYPOINT":
        image.command = json.loads(text)
    elif word == "USER":
        image.user = text
    elif word == "STOPSIGNAL":
        image.stop_signal = text
    elif word != "EXPOSE":
        raise SystemExit(f"rehearse: {word} is not known here; add it")


def copy(image: Image, words: Sequence[str], stages: dict[str, Image]) -> None:
    *sources, to = [word for word in words if not word.startswith("--")]
    target = image.root / os.path.join(image.folder, to).strip("/")
    for option in words:
        if option.startswith("--from="):
            source = stages[option.removeprefix("--from=")].root / sources[0].strip("/")
            shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
            return
    for source in sources:
        for file in (ROOT / source).rglob("*") if source == "." else [ROOT / source]:
            name = file.relative_to(ROOT)
            if file.is_file() and not is_ignored(name):
                (target / name.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target / name)


def is_ignored(name: Path) -> bool:
    """By .dockerignore: the last line that fits the file or a folder above it counts."""
    above = [str(name), *(str(parent) for parent in name.parents if str(parent) != ".")]
    ignored = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and any(fits(each, pattern, "**/" in line) for each in above):
            ignored = not line.startswith("!")
    return ignored


def fits(name: str, pattern: str, anywhere: bool) -> bool:
    return fnmatch(Path(name).name if anywhere else name, pattern) and (
        anywhere or name.count("/") == pattern.count("/")
    )


def run_in(image: Image, command: Sequence[str]) -> None:
    """As root, in its folder, with what a step may use of this machine."""
    lend = "; ".join(f"mount --rbind {place} {image.root}{place}" for place in LENT)
    for place in LENT:
        there = Path(f"{image.root}{place}")
        if Path(place).is_dir():
            there.mkdir(parents=True, exist_ok=True)
        else:
            there.touch()
    script = f"{lend}; exec chroot {image.root} /usr/bin/env -i --chdir={image.folder} " + '"$@"'
    variables = {name: value for name, value in os.environ.items() if name.startswith("PIP_")} | image.environment
    pairs = [f"{name}={value}" for name, value in variables.items()]
    isolated = ["unshare", "--mount", "--pid", "--fork", f"--mount-proc={image.root}/proc"]
    run(*isolated, "sh", "-ec", script, "sh", *pairs, *command)


def run(*command: str) -> None:
    subprocess.run(command, check=True)


# Running.


class Container:
    """`docker run --read-only --cap-drop ALL --security-opt no-new-privileges --tmpfs /var/lib/load-balancer`"""

    def __init__(self, image: Image) -> None:
        self.image = image
        user, group = image.user.split(":")
        pairs = [f"{name}={value}" for name, value in image.environment.items()]
        self.inside = ["chroot", str(image.root), "/usr/bin/setpriv", f"--reuid={user}", f"--regid={group}"]
        self.inside += ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
        self.inside += ["/usr/bin/env", "-i", f"--chdir={image.folder}", *pairs]
        mounts = f"mount --bind {image.root} {image.root}; mount --options remount,bind,ro {image.root}; "
        mounts += f"mount -t tmpfs -o uid={user},gid={group},mode=0700 tmpfs {image.root}{image.folder}; "
        mounts += f"mount -t proc proc {image.root}/proc; mount --rbind /dev {image.root}/dev"
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", mounts + '; exec "$@"', "sh"]
        self.process = subprocess.Popen([*isolated, *self.inside, *image.command])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.pid = int(wait_until(children.read_text, "it has begun"))
        wait_until(lambda: "load-balancer" in Path(f"/proc/{self.pid}/cmdline").read_text(), "it is the command")

    def run(self, command: Sequence[str], what: str = "") -> int:
        """Like `docker exec`. Its exit code; if there is a `what`, it must be 0."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid"]
        done = subprocess.run([*enter, *self.inside, *command], capture_output=True, text=True)
        if what:
            assert done.returncode == 0, done.stdout + done.stderr
            print(what)
        return done.returncode


def wait_until(predicate, what: str):  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + SECONDS
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {SECONDS:g} s: {what}"
        time.sleep(0.1)
    return value


if __name__ == "__main__":
    if len(sys.argv) != 2 or os.geteuid() != 0:
        raise SystemExit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve()))
