"""The certificate that clients are shown, and its key: read from files, tried out, and as Granian takes them.

What rustls does not take ends the process that starts it, for Granian panics there: keys on P-521 for one, which
Python's `ssl` does take. So a child process starts the pair first, and what it took is what is used, byte for byte,
whatever becomes of the files meanwhile. The bytes go to Granian by way of files in memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from balancer.errors import SettingsError
from balancer.protocol.files import read_whole
from balancer.protocol.texts import quoted

CHECK_SECONDS = 30.0  # a tenth of a second, unless the machine is busy
DAY = 86400.0
WARN_DAYS = (14, 3, 0)  # before the end
NAMES_TOLD = 3

# The worker of `granian.Worker`, as far as it takes TLS, on a socket that nobody knows, and a client; argv: folder of
# Granian, files. In TLS 1.3 the client has all that the server shows before it is asked for its own certificate.
CHECK = """
import os, resource, socket, ssl, sys, threading
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.path.insert(0, sys.argv[1])
import granian._granian as native
from granian.constants import HTTPModes
from granian.http import HTTP1Settings, HTTP2Settings
certificate, key, ca = sys.argv[2:]
listener, ended = socket.socket(socket.AF_UNIX), threading.Event()
listener.bind("")
listener.listen()
listener.setblocking(False)
address, problem = listener.getsockname(), None
holder = native.SocketHolder(listener.detach(), True, 1)
tls = (True, certificate, key, None, "tls1.2", ca or None, [], bool(ca), (None, None))
limits = (None, 1, 512, 1, 30, 1, HTTPModes.auto, HTTP1Settings(), HTTP2Settings(), False, None)
class Loop:
    def call_soon_threadsafe(self, *arguments, **named): pass
    call_soon = call_soon_threadsafe
loop = Loop()
signal, scheduler = native.WorkerSignal(), native.CallbackScheduler(loop, print, None, None, None)
scheduler._schedule_fn = print
signal.add_cb(ended.set)
native.ASGIWorker(1, (None, holder), *limits, *tls).serve_async_uds(scheduler, loop, signal)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
context.minimum_version = ssl.TLSVersion.TLSv1_3
try:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(address)
        context.wrap_socket(client).close()
except OSError as error:
    reason = getattr(error, "reason", None) or str(error)
    problem = "clients fail: " + reason.replace("_", " ").lower()
signal.set()
ended.wait()
print(problem or "", end="", file=sys.stderr, flush=True)
os._exit(bool(problem))  # Granian's threads may be in Python still, and end badly in an interpreter that goes
"""
# What rustls or the client says, in words of the settings.
NO_SECTION = "has no line -----BEGIN CERTIFICATE-----; expected a PEM file"
TOO_MUCH = "has more than clients take; leave out what they need not be shown"
CAUSES = {
    "KeyMismatch": ("tls_key", "is not the key of tls_certificate"),
    "failed to parse private key": (
        "tls_key",
        "holds a key that cannot be used; expected RSA of 2048 bits or more, P-256, P-384 or Ed25519",
    ),
    "invalid key": ("tls_key", "holds a key that cannot be read; expected a PEM file"),
    "NoCertificatesPresented": ("tls_certificate", NO_SECTION),
    "NoRootAnchors": ("tls_client_ca", NO_SECTION),
    "Base64Decode": ("tls_certificate", "is damaged; expected a PEM file"),
    "length mismatch": ("tls_certificate", TOO_MUCH),  # a list of CAs beyond 64 KiB: its length has 16 bits
    "excessive message size": ("tls_certificate", TOO_MUCH),
    "asn1 lib": ("tls_certificate", "has a part that is no certificate"),
    "InvalidCertificate": ("tls_certificate", "is damaged or has what is not understood; expected X.509 version 3"),
}

ClientAuth = Literal["off", "optional", "require"]
TlsVersion = Literal["1.2", "1.3"]


@dataclass(frozen=True, slots=True)
class TlsOptions:
    """By the names of the settings."""

    tls_certificate: Path | None
    tls_key: Path | None
    tls_key_password_file: Path | None
    tls_min_version: TlsVersion
    tls_client_ca: Path | None
    tls_client_auth: ClientAuth
    http_redirect_port: int | None

    def check(self) -> None:
        """Raises SettingsError for what does not go together."""
        for name, needed in (
            ("tls_key", "tls_certificate"),
            ("tls_certificate", "tls_key"),
            ("tls_key_password_file", "tls_key"),
            ("tls_client_ca", "tls_certificate"),
            ("http_redirect_port", "tls_certificate"),
        ):
            if getattr(self, name) is not None and getattr(self, needed) is None:
                raise SettingsError(f"{name} without {needed}; set both or neither")
        if self.tls_client_auth != "off" and self.tls_client_ca is None:
            raise SettingsError(f"tls_client_auth = {self.tls_client_auth} without tls_client_ca; name a file of CAs")
        if self.tls_client_auth == "off" and self.tls_client_ca is not None:
            raise SettingsError("tls_client_ca without tls_client_auth; set optional or require")


@dataclass(frozen=True, slots=True)
class Files:
    """What the files hold, read once each."""

    certificate: bytes
    key: bytes = field(repr=False)
    password: bytes = field(repr=False)
    client_ca: bytes

    @property
    def digest(self) -> str:
        """The same for the same content."""
        parts = (self.certificate, self.key, self.password, self.client_ca)
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


@dataclass(frozen=True, slots=True)
class Certificate:
    """A pair that Granian takes. Of the chain only the first one is told, which is the server's own."""

    options: TlsOptions
    chain: bytes
    key: bytes = field(repr=False)
    client_ca: bytes
    digest: str
    names: tuple[str, ...]
    issuer: str
    starts_at: float  # epoch seconds
    expires_at: float
    read_at: float
    is_key_exposed: bool

    def __str__(self) -> str:
        more = len(self.names) - NAMES_TOLD
        names = ", ".join(self.names[:NAMES_TOLD]) + (f" and {more} more" if more > 0 else "")
        return f"{names}, valid until {_utc(self.expires_at)}"

    def why_invalid(self, now: float) -> str:
        """Empty if it is valid."""
        if now < self.starts_at:
            return f"is not valid before {_utc(self.starts_at)}"
        return "has expired" if now >= self.expires_at else ""

    def advice(self) -> list[str]:
        """A line for what its owner may not expect."""
        lines = []
        if self.is_key_exposed:
            lines.append(f"tls_key {self.options.tls_key} can be read by every user of the machine; chmod 640")
        now = time.time()
        if why := self.why_invalid(now):
            lines.append(f"the certificate {why}: {self}")
        elif (left := self.expires_at - now) <= WARN_DAYS[0] * DAY:
            lines.append(f"the certificate expires in {left / DAY:.0f} days: {self}")
        return lines

    @contextlib.contextmanager
    def arguments(self) -> Iterator[tuple[Any, ...]]:
        """What Granian's worker takes; it reads the files before it has begun."""
        with _in_memory(self.chain, self.key, self.client_ca) as (chain, key, client_ca):
            version, auth = f"tls{self.options.tls_min_version}", self.options.tls_client_auth
            yield (True, chain, key, None, version, client_ca or None, [], auth == "require")


def load(options: TlsOptions) -> Certificate | None:
    """None without TLS. Raises SettingsError, in one line."""
    options.check()
    if options.tls_certificate is None:
        return None
    if not hasattr(os, "memfd_create"):
        raise SettingsError("tls_certificate: TLS towards clients needs Linux; terminate it in front of the balancer")
    return checked(options, read(options))


def read(options: TlsOptions) -> Files:
    """Raises SettingsError for a file that is not there or no file of text."""
    names = ("tls_certificate", "tls_key", "tls_key_password_file", "tls_client_ca")
    return Files(*(_read(name, getattr(options, name)) for name in names))


def _read(name: str, path: Path | None) -> bytes:
    if path is None:
        return b""
    try:
        content = read_whole(path, "a password" if name == "tls_key_password_file" else "a PEM file")
    except ValueError as error:
        raise _wrong(name, path, str(error)) from None
    if not content.strip():
        raise _wrong(name, path, "is empty")
    return content


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at))


def _wrong(name: str, path: Path | None, what: str) -> SettingsError:
    return SettingsError(f"{name} {quoted(str(path))}: {what}")


def checked(options: TlsOptions, files: Files) -> Certificate:
    """A pair that may be started. Raises SettingsError."""
    for name, content in (
        ("tls_certificate", files.certificate),
        ("tls_key", files.key),
        ("tls_client_ca", files.client_ca),
    ):
        if content.count(b"-----BEGIN ") > content.count(b"-----END "):
            raise _wrong(name, getattr(options, name), "is cut off: an END is missing; expected a PEM file")
    key = _plain_key(options, files)
    with _in_memory(files.certificate, key, files.client_ca) as paths:
        facts = _facts(options, paths[0])
        if options.tls_client_ca is not None:
            _try_client_ca(options.tls_client_ca, paths[2])
        _try_out(options, paths)
    assert options.tls_key is not None
    return Certificate(
        options,
        files.certificate,
        key,
        files.client_ca,
        files.digest,
        **facts,
        read_at=time.time(),
        is_key_exposed=_is_readable_by_all(options.tls_key),
    )


def _plain_key(options: TlsOptions, files: Files) -> bytes:
    """As Granian takes it: without a password."""
    if not re.search(rb"^-----BEGIN ([A-Z0-9]+ )*PRIVATE KEY-----", files.key, re.MULTILINE):
        raise _wrong("tls_key", options.tls_key, "holds no private key; expected a PEM file")
    if not re.search(rb"BEGIN ENCRYPTED PRIVATE KEY|^Proc-Type: 4,ENCRYPTED", files.key, re.MULTILINE):
        return files.key
    if options.tls_key_password_file is None:
        raise _wrong("tls_key", options.tls_key, "is encrypted; name a file with its password, tls_key_password_file")
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError:
        install = "pip install 'python-load-balancer[tls]'"
        raise _wrong("tls_key", options.tls_key, f"is encrypted, which needs the extra tls: {install}") from None
    try:
        key = serialization.load_pem_private_key(files.key, files.password.rstrip(b"\r\n"))
    except Exception:  # many kinds, and what they say may quote what is secret
        raise _wrong(
            "tls_key", options.tls_key, "cannot be decrypted with the password in tls_key_password_file"
        ) from None
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _facts(options: TlsOptions, path: str) -> dict[str, Any]:
    decode: Any = ssl._ssl._test_decode_cert  # type: ignore[attr-defined]  # what `getpeercert` gives, of a file
    try:
        found: Mapping[str, Any] = decode(path)
        starts_at, expires_at = (ssl.cert_time_to_seconds(found[name]) for name in ("notBefore", "notAfter"))
    except (OSError, ValueError, KeyError):  # ssl.SSLError is an OSError
        raise _wrong("tls_certificate", options.tls_certificate, "holds no certificate; expected a PEM file") from None
    names = tuple(value for kind, value in found.get("subjectAltName", ()) if kind in ("DNS", "IP Address"))
    return {
        "names": names or (_name_in(found["subject"]),),
        "issuer": _name_in(found["issuer"]),
        "starts_at": float(starts_at),
        "expires_at": float(expires_at),
    }


def _name_in(parts: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    """The common name, or all there is."""
    fields = [field for part in parts for field in part]
    named = dict(fields)
    return named.get("commonName") or ", ".join(value for _, value in fields) or "(no name)"


def _try_client_ca(path: Path, copy: str) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(copy)
    except OSError:
        raise _wrong("tls_client_ca", path, "holds no CA certificate; expected a PEM file") from None


def _try_out(options: TlsOptions, paths: list[str]) -> None:
    """Raises SettingsError that names the file to blame."""
    said = _trial(options, *paths)
    if not said:
        return
    unknown = "tls_certificate", f"cannot be used: {said}"
    name, cause = next((found for sign, found in CAUSES.items() if sign in said), unknown)
    certificate, key, client_ca = paths
    if client_ca and not _trial(options, certificate, key, ""):
        name = "tls_client_ca"
    raise _wrong(name, getattr(options, name), cause)


def _trial(options: TlsOptions, *paths: str) -> str:
    """What went wrong, as the child says it. Raises SettingsError if it could not be tried."""
    found = importlib.util.find_spec("granian")  # which is not imported here
    assert found is not None and found.origin is not None
    folder = str(Path(found.origin).parents[1])
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", CHECK, folder, *paths],
            pass_fds=[int(path.rpartition("/")[2]) for path in paths if path],
            # What this machine's OpenSSL may do says nothing of clients.
            env={**os.environ, "RUST_BACKTRACE": "0", "OPENSSL_CONF": os.devnull},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise _wrong(
            "tls_certificate", options.tls_certificate, f"its trial took more than {CHECK_SECONDS:g} s"
        ) from None
    except OSError as error:
        raise _wrong("tls_certificate", options.tls_certificate, f"could not be tried out: {error}") from None
    if child.returncode == 0:
        return ""
    said = child.stderr.decode(errors="replace").splitlines()
    lines = [line for line in said if line and not line.startswith(("thread ", "note:", "stack "))]
    told = lines[-1] if lines else f"the trial ended with {child.returncode}"
    return re.sub(r"^called `Result::unwrap\(\)` on an `Err` value: ", "", told)


def _is_readable_by_all(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return bool(path.stat().st_mode & stat.S_IROTH)
    return False


@contextlib.contextmanager
def _in_memory(*contents: bytes) -> Iterator[list[str]]:
    """The path of each in this process and in children that get the descriptor; "" for an empty one."""
    with contextlib.ExitStack() as stack:
        paths = []
        for content in contents:
            if not content:
                paths.append("")
                continue
            file = stack.enter_context(os.fdopen(os.memfd_create("tls"), "wb", buffering=0))
            file.write(content)
            paths.append(f"/proc/self/fd/{file.fileno()}")
        yield paths
