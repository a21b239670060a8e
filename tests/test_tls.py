"""TLS towards clients: what is spoken, what reaches backends, which files are refused, and how."""

from __future__ import annotations

import json
import os
import re
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import AF_UNIX, socket
from typing import Any

import pytest
from certificates import Files, Pair, make_pair, pem
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, PrivateFormat
from support import (
    PYTHON,
    ROOT,
    Balancer,
    Process,
    connect,
    fetch,
    free_port,
    get,
    read_all,
    split_response,
    wait_until,
)
from test_http2 import run
from wire import WireBackend

from balancer.errors import SettingsError
from balancer.loadbalancer import LoadBalancer
from balancer.protocol.texts import quoted


@pytest.fixture(scope="module")
def ca() -> Pair:
    return make_pair("the CA", is_ca=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, ca: Pair) -> Files:
    """A chain of two, and `ca.pem` for clients."""
    folder = tmp_path_factory.mktemp("tls")
    pair = make_pair(signed_by=ca)
    (folder / "ca.pem").write_bytes(ca.certificate)
    return Files(folder, pair._replace(certificate=pair.certificate + ca.certificate))


@pytest.fixture(scope="module")
def secure(files: Files, scripted: WireBackend) -> Iterator[Balancer]:
    """A balancer whose clients speak TLS; every other port is there as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(files.certificate.parent / "ca.pem"))  # which OpenSSL takes for the system's
        flags = [f"--control-port={free_port()}", f"--http-redirect-port={free_port()}"]
        with Balancer(
            f"--backend=only={scripted.url}", *files.flags, *flags, "--control-reads=open", wait_ready=False
        ) as balancer:
            control = balancer.library.urls[1]
            wait_until(lambda: fetch(f"{control}/readyz")[0] == 200, "balancer is ready")
            yield balancer


def trusting(files: Files, *protocols: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=files.certificate.parent / "ca.pem")
    context.set_alpn_protocols(protocols)
    return context


def shaken(balancer: Balancer, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A connection after the handshake."""
    with connect(balancer.port) as sock:
        return context.wrap_socket(sock, server_hostname="lb.test")


def version_of(balancer: Balancer, context: ssl.SSLContext) -> str | None:
    with shaken(balancer, context) as sock:
        return sock.version()


# What is spoken.


@pytest.mark.parametrize(("flag", "version"), [("--http1.1", "1.1"), ("--http2", "2")])
def test_both_versions_of_http_and_no_client_says_by_itself_how_it_came(
    secure: Balancer, files: Files, scripted: WireBackend, flag: str, version: str
) -> None:
    scripted.reset()
    claims = ["-H", "X-Forwarded-Proto: http", "-H", "Forwarded: proto=http", "-H", "X-Forwarded-Ssl: off"]
    trust = ["--cacert", str(files.certificate.parent / "ca.pem"), "--resolve", f"lb.test:{secure.port}:127.0.0.1"]
    url = f"https://lb.test:{secure.port}/"
    assert run("curl", "-sS", flag, *trust, *claims, "-o", "/dev/null", "-w", "%{http_version} %{http_code}", url) == (
        f"{version} 200"
    )
    (request,) = scripted.requests
    assert request.values(b"X-Forwarded-Proto") == [b"https"]
    assert request.values(b"Forwarded") == request.values(b"X-Forwarded-Ssl") == []


def test_the_control_port_speaks_it_too_and_tells_of_the_certificate(secure: Balancer) -> None:
    main, control, redirect = secure.library.urls
    assert [url.partition(":")[0] for url in (main, control, redirect)] == ["https", "https", "http"]
    told = json.loads(fetch(f"{control}/status")[2])["tls"]
    assert told["names"] == ["lb.test", "127.0.0.1"] and told["issuer"] == "the CA" and told["last_error"] is None
    assert told["pending"] is False
    metrics = dict(re.findall(r"^(lb_tls_\w+) (\S+)", fetch(f"{control}/metrics")[2].decode(), re.MULTILINE))
    assert float(metrics["lb_tls_certificate_expiry_timestamp_seconds"]) == told["expires_at"]
    assert metrics["lb_tls_reload_success"] == "1.0"


def test_what_is_too_old_is_refused(secure: Balancer, files: Files) -> None:
    context = trusting(files)
    assert version_of(secure, context) == "TLSv1.3"
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert version_of(secure, context) == "TLSv1.2"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with pytest.warns(DeprecationWarning):
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(OSError):
        version_of(secure, context)


@pytest.mark.parametrize("protocol", ["", "http/1.1", "h2"])
def test_who_says_nothing_after_the_handshake_is_cut_off_as_without_tls(files: Files, protocol: str) -> None:
    with (
        Balancer("--backend=http://127.0.0.1:1", *files.flags, "--header-timeout=1", wait_ready=False) as balancer,
        shaken(balancer, trusting(files, *filter(None, [protocol]))) as sock,
    ):
        if protocol == "h2":
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)))  # an empty SETTINGS
        read_all(sock)  # in time, or the test fails


@pytest.mark.parametrize(
    ("auth", "shows", "works"),
    [
        ("optional", None, True),
        ("optional", "good", True),
        ("optional", "other", False),
        ("require", None, False),
        ("require", "good", True),
    ],
)
def test_certificates_of_clients(
    tmp_path: Path, files: Files, ca: Pair, auth: str, shows: str | None, works: bool, scripted: WireBackend
) -> None:
    context = trusting(files)
    if shows is not None:
        client = Files(tmp_path, make_pair("client", signed_by=ca if shows == "good" else None))
        context.load_cert_chain(client.certificate, client.key)
    flags = [f"--tls-client-ca={files.certificate.parent / 'ca.pem'}", f"--tls-client-auth={auth}"]
    flags.append("--tls-min-version=1.3")
    with Balancer(f"--backend={scripted.url}", *files.flags, *flags, wait_ready=False) as balancer:
        assert is_answered(balancer, context) is works
        context.maximum_version = ssl.TLSVersion.TLSv1_2
        assert not is_answered(balancer, context)


def is_answered(balancer: Balancer, context: ssl.SSLContext) -> bool:
    """In TLS 1.3 the client learns after its handshake what the server thinks of its certificate."""
    try:
        with shaken(balancer, context) as sock:
            sock.sendall(b"GET /livez HTTP/1.1\r\nHost: lb.test\r\nConnection: close\r\n\r\n")
            return sock.recv(12) == b"HTTP/1.1 200"
    except OSError:
        return False


def test_a_unix_socket_speaks_it_too(tmp_path: Path, files: Files) -> None:
    path = tmp_path / "lb.sock"
    with Balancer(f"--host=unix:{path}", "--backend=http://127.0.0.1:1", *files.flags, wait_ready=False) as balancer:
        assert balancer.url == f"https+unix://{path}"
        with socket(AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(path))
            with trusting(files).wrap_socket(client, server_hostname="lb.test") as secure:
                secure.sendall(get(b"/livez"))
                assert read_all(secure).startswith(b"HTTP/1.1 200")


# From the plain port to the other one.


@pytest.mark.parametrize(
    ("host", "target", "where"),
    [
        (b"lb.test", b"/a%2Fb?c=d&e=http://x", b"lb.test:{port}/a%2Fb?c=d&e=http://x"),
        (b"LB.test:8080", b"//evil.example/", b"LB.test:{port}//evil.example/"),
        (b"[::1]:80", b"/", b"[::1]:{port}/"),
        (b"lb.test", b"/status", b"lb.test:{port}/status"),
        (b"evil.example/x", b"/", None),
        (b"a@evil.example", b"/", None),
        (b'"><script>', b"/", None),
        (b"", b"/", None),
        (b"lb.test", b"*", None),
    ],
)
@pytest.mark.parametrize("method", [b"GET", b"POST"])
def test_the_plain_port_sends_everybody_to_https(
    secure: Balancer, host: bytes, target: bytes, where: bytes | None, method: bytes
) -> None:
    method = b"OPTIONS" if target == b"*" else method
    with connect(int(secure.library.urls[2].rpartition(":")[2])) as sock:
        sock.sendall(method + b" " + target + b" HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")
        status, lines, body = split_response(read_all(sock))
    assert body == b"" and status == (400 if where is None else 308)
    locations = [value for name, value in lines if name == b"location"]
    assert locations == ([] if where is None else [b"https://" + where.replace(b"{port}", b"%d" % secure.port)])


# What is refused at the start.


def refused(**settings: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        LoadBalancer("http://127.0.0.1:1", **settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["tls_certificate"], "tls_certificate without tls_key"),
        (["tls_key"], "tls_key without tls_certificate"),
        (["http_redirect_port"], "http_redirect_port without tls_certificate"),
        (["tls_client_ca"], "tls_client_ca without tls_certificate"),
        (["tls_certificate", "tls_key", "tls_client_auth"], "tls_client_auth = require without tls_client_ca"),
        (["tls_certificate", "tls_key", "tls_client_ca"], "tls_client_ca without tls_client_auth"),
    ],
)
def test_half_of_what_belongs_together(files: Files, given: list[str], said: str) -> None:
    values = {**files.settings, "http_redirect_port": 80, "tls_client_ca": "ca.pem", "tls_client_auth": "require"}
    assert said in refused(**{name: values[name] for name in given})


def test_versions_that_nobody_should_speak() -> None:
    assert "tls_min_version = '1.1' (program): expected 1.2 or 1.3" in refused(tls_min_version="1.1")


BAD_FILES: dict[str, bytes | str | None] = {
    "No such file": None,
    "is empty": b"  \n",
    "holds no": b"garbage\xff\x00",
    "not a regular file": "fifo",
    "Is a directory": "folder",
    "more than 1048576 bytes": b"-" * 1_048_577,
}


@pytest.mark.parametrize("said", BAD_FILES)
@pytest.mark.parametrize("name", ["tls_certificate", "tls_key", "tls_client_ca"])
def test_what_is_no_such_file(tmp_path: Path, files: Files, name: str, said: str) -> None:
    path, content = tmp_path / "file.pem", BAD_FILES[said]
    if content == "fifo":
        os.mkfifo(path)  # which nobody will ever write to
    elif content == "folder":
        path.mkdir()
        said = "Is a directory" if path.is_dir() else said
    elif isinstance(content, bytes):
        path.write_bytes(content)
    text = refused(**{**files.settings, "tls_client_auth": "require", "tls_client_ca": files.certificate, name: path})
    assert text.startswith(f"{name} {quoted(str(path))}: ") and said in text


@pytest.mark.parametrize("kind", ["P-521", "secp256k1", "Ed448", "RSA-1024"])
def test_keys_that_granian_does_not_take(tmp_path: Path, kind: str) -> None:
    """It would end the process."""
    assert "holds a key that cannot be used; expected RSA" in refused(**Files(tmp_path, make_pair(kind=kind)).settings)


def test_pairs_that_do_not_fit(tmp_path: Path) -> None:
    pair, other = make_pair(), make_pair()
    files = Files(tmp_path, pair._replace(key=other.key))
    assert "is not the key of tls_certificate" in refused(**files.settings)
    files.write(pair._replace(certificate=other.certificate + pair.certificate))  # a chain in the wrong order
    assert "is not the key of tls_certificate" in refused(**files.settings)
    files.write(pair._replace(certificate=pair.certificate[:200]))
    assert f"tls_certificate {str(files.certificate)!r}: is cut off" in refused(**files.settings)


DAMAGED = b"-----BEGIN %s-----\n%s\n-----END %s-----\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pair: pair._replace(key=pair.key[:100]), "tls_key '{}/key.pem': is cut off"),
        (
            lambda pair: pair._replace(key=DAMAGED % (b"PRIVATE KEY", b"@@@@", b"PRIVATE KEY")),
            "tls_key '{}/key.pem': holds a key that cannot be read",
        ),
        (
            lambda pair: pair._replace(certificate=b"\xef\xbb\xbf" + pair.certificate),
            "tls_certificate '{}/cert.pem': has no line -----BEGIN CERTIFICATE-----",
        ),
        (
            lambda pair: pair._replace(
                certificate=pair.certificate + DAMAGED % (b"CERTIFICATE", b"@@@@", b"CERTIFICATE")
            ),
            "tls_certificate '{}/cert.pem': is damaged",
        ),
        # What only a client finds.
        (
            lambda pair: pair._replace(
                certificate=pair.certificate + DAMAGED % (b"CERTIFICATE", b"AAAA", b"CERTIFICATE")
            ),
            "tls_certificate '{}/cert.pem': has a part that is no certificate",
        ),
        (
            lambda pair: pair._replace(certificate=pair.certificate * 300),
            "tls_certificate '{}/cert.pem': has more than clients take",
        ),
    ],
)
def test_files_that_cannot_be_used_are_named_in_plain_words(
    tmp_path: Path, change: Callable[[Pair], Pair], said: str
) -> None:
    assert said.format(tmp_path) in refused(**Files(tmp_path, change(make_pair())).settings)


def test_cas_of_clients_that_cannot_be_used(tmp_path: Path, files: Files) -> None:
    path, ca = tmp_path / "ca.pem", make_pair("a" * 60, is_ca=True).certificate
    settings = {**files.settings, "tls_client_ca": path, "tls_client_auth": "require"}
    for content, said in (
        (ca * 1200, "has more than clients take"),  # each is told whose certificate it may have
        (ca.replace(b" CERTIFICATE", b" TRUSTED CERTIFICATE"), "has no line -----BEGIN CERTIFICATE-----"),
    ):
        path.write_bytes(content)
        assert f"tls_client_ca {str(path)!r}: {said}" in refused(**settings)


def test_a_file_of_no_password(tmp_path: Path, files: Files) -> None:
    path = tmp_path / "password"
    path.write_bytes(b"-" * 2_000_000)
    text = refused(**files.settings, tls_key_password_file=path)
    assert text == f"tls_key_password_file {str(path)!r}: has more than 1048576 bytes; expected a password"


@pytest.mark.parametrize("kind", ["P-384", "RSA-2048", "Ed25519"])
def test_pairs_of_other_kinds(tmp_path: Path, kind: str) -> None:
    files = Files(tmp_path, make_pair(kind=kind))
    assert LoadBalancer("http://127.0.0.1:1", **files.settings).advice() == []


@pytest.mark.parametrize("form", [PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL])
def test_a_key_with_a_password(tmp_path: Path, form: PrivateFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, password = make_pair(), tmp_path / "password"
    files = Files(tmp_path, pair._replace(key=pem(pair.private, BestAvailableEncryption(b"the secret"), form)))
    assert "is encrypted; name a file with its password" in refused(**files.settings)
    password.write_text("another\n", encoding="ascii")
    settings = files.settings | {"tls_key_password_file": password}
    text = refused(**settings)
    assert "cannot be decrypted" in text and "another" not in text
    password.write_text("the secret\n", encoding="ascii")
    assert LoadBalancer("http://127.0.0.1:1", **settings).renewal.certificate is not None
    monkeypatch.setitem(__import__("sys").modules, "cryptography.hazmat.primitives", None)
    assert "pip install 'python-load-balancer[tls]'" in refused(**settings)


def test_it_ends_with_one_line_and_warns_of_what_is_allowed(tmp_path: Path) -> None:
    files = Files(tmp_path, make_pair(days=-1))
    files.key.chmod(0o644)
    with Process([PYTHON, str(ROOT / "load_balancer.py"), *files.flags, "--check-config"]) as process:
        assert process.wait() == 0
    assert len(process.lines) == 3 and process.lines[-1] == "configuration ok"
    assert "the certificate has expired: lb.test, 127.0.0.1, valid until" in process.output
    assert f"{files.key} can be read by every user of the machine" in process.output
    files.write(make_pair(days=100))
    (line,) = LoadBalancer("http://127.0.0.1:1", **files.settings).advice()
    assert line.startswith("the certificate is not valid before ") and "lb.test" in line
    files.key.write_bytes(b"nothing")
    with Process([PYTHON, str(ROOT / "load_balancer.py"), *files.flags]) as process:
        assert process.wait() == 2
    assert process.lines == [f"load_balancer.py: tls_key {str(files.key)!r}: holds no private key; expected a PEM file"]
