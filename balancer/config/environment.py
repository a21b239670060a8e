"""Settings from environment variables, and what else begins with LB_ there.

An unknown key of the file is refused, an unknown variable is only told: the environment belongs to others too, and no
neighbour's variable may keep the balancer from starting.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from balancer.config import validation
from balancer.errors import SettingsError
from balancer.protocol.files import utf8

# Names that are not LB_ + NAME: those of the earlier program. They count less than the regular ones.
LEGACY = {"ALGORITHM": "algorithm"}
PROTECTING = ("admin_token", "page_token", "sticky_secret")  # who sets one wants it
SECRET_FILES = {f"LB_{name.upper()}_FILE": name for name in (*PROTECTING, "redis_url")}
MAX_SECRET = 65536  # bytes of a secret's file: a device may have no end
NO_SETTINGS = ("LB_CONFIG", "LB_URL")  # the configuration file; where test_client.py looks for the balancer
TEST_CLIENT = "LB_TEST_"
# What Kubernetes tells every container of a Service called `lb` or `lb-...`, as Docker does of linked containers:
# kubernetes.io/docs/concepts/services-networking/service/#environment-variables.
SERVICE_NAME = re.compile(r"LB_(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://.+")  # in LB_PORT, which is a setting as well


def read(environ: Mapping[str, str], settings: Collection[str]) -> dict[str, str]:
    """The values of these settings. Raises SettingsError for a secret's file that cannot be read.

    Blanks around a value are not part of it: cmd.exe leaves them. An empty value counts as not set, but for a token: a
    command that was to bring one may have failed, and nothing would be protected.
    """
    given = {name: value.strip() for name, value in environ.items() if value.strip() and not _is_service(name, value)}
    found = {setting: given[name] for name, setting in (LEGACY | _names(settings)).items() if name in given}
    for name, setting in SECRET_FILES.items():
        variable = name.removesuffix("_FILE")
        path = given.get(name)
        if path is None and setting in PROTECTING and environ.get(variable, "-").strip() == "":
            raise SettingsError(f"{variable} is empty, so nothing would be protected; expected a token, or unset it")
        if path is not None:
            try:
                with Path(path).open("rb") as file:
                    secret = file.read(MAX_SECRET + 1)
                found[setting] = utf8(secret).strip()
            except (OSError, ValueError) as error:
                raise SettingsError(f"{name}={path}: {getattr(error, 'strerror', None) or error}") from None
            if len(secret) > MAX_SECRET:
                raise SettingsError(f"{name}={path}: more than {MAX_SECRET} bytes, expected a secret")
    return found


def secret_files(environ: Mapping[str, str]) -> list[str]:
    """Files that are named there, as they are named."""
    return [path for name in SECRET_FILES if (path := environ.get(name, "").strip())]


def unknown(environ: Mapping[str, str], settings: Collection[str]) -> list[str]:
    """A line for each LB_ variable that nobody reads, most likely a slip of the pen; values may be secret."""
    known = [*_names(settings), *SECRET_FILES, *NO_SETTINGS]
    lines = []
    for name in sorted(environ):
        if not name.startswith("LB_") or name.startswith(TEST_CLIENT) or name in known or not environ[name].strip():
            continue
        if not _is_service(name, environ[name]):
            hint = validation.meant(name, known)
            lines.append(f"the variable {name} is ignored, there is no such setting; {hint}")
    return lines


def _names(settings: Collection[str]) -> dict[str, str]:
    return {f"LB_{setting.upper()}": setting for setting in settings}


def _is_service(name: str, value: str) -> bool:
    """Whether this tells of a Service or a linked container."""
    return bool(SERVICE_NAME.fullmatch(name) or (name.endswith("_PORT") and SERVICE_ADDRESS.fullmatch(value.strip())))
