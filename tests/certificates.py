"""Certificates and keys of every kind, for tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import NameOID

KEYS = {
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "RSA-2048": lambda: rsa.generate_private_key(65537, 2048),
    "RSA-1024": lambda: rsa.generate_private_key(65537, 1024),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
    "Ed448": ed448.Ed448PrivateKey.generate,
}
PLAIN = serialization.NoEncryption()
CA_USAGE = x509.KeyUsage(True, False, False, False, False, True, True, False, False)  # signs data, certificates, lists


class Pair(NamedTuple):
    """A certificate and its key as PEM, and what `signed_by` takes."""

    certificate: bytes
    key: bytes
    name: x509.Name
    private: Any


def make_pair(
    name: str = "lb.test", kind: str = "P-256", *, days: float = 30, signed_by: Pair | None = None, is_ca: bool = False
) -> Pair:
    """For `name` and 127.0.0.1, valid for so many more days; signed by itself unless it is told."""
    private: Any = KEYS[kind]()
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    until = datetime.now(UTC) + timedelta(days=days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(signed_by.name if signed_by else subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(until - timedelta(days=90))
        .not_valid_after(until)
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name), x509.IPAddress(ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), True)
    )
    if is_ca:  # what clients in Python 3.13 and later insist upon
        builder = builder.add_extension(CA_USAGE, True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(private.public_key()), False)
    if signed_by:
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signed_by.private.public_key())
        builder = builder.add_extension(issuer, False)
    has_own_hash = kind.startswith("Ed") if signed_by is None else False
    made = builder.sign(signed_by.private if signed_by else private, None if has_own_hash else hashes.SHA256())
    return Pair(made.public_bytes(serialization.Encoding.PEM), pem(private), subject, private)


def pem(
    private: Any,
    encryption: serialization.KeySerializationEncryption = PLAIN,
    form: serialization.PrivateFormat = serialization.PrivateFormat.PKCS8,
) -> bytes:
    found: bytes = private.private_bytes(serialization.Encoding.PEM, form, encryption)
    return found


class Files:
    """A certificate and its key in a folder, as the settings name them."""

    def __init__(self, folder: Path, pair: Pair | None = None) -> None:
        self.certificate, self.key = folder / "cert.pem", folder / "key.pem"
        self.write(pair or make_pair())

    def write(self, pair: Pair) -> None:
        self.certificate.write_bytes(pair.certificate)
        self.key.write_bytes(pair.key)
        self.key.chmod(0o600)

    @property
    def settings(self) -> dict[str, Any]:
        return {"tls_certificate": self.certificate, "tls_key": self.key}

    @property
    def flags(self) -> list[str]:
        return [f"--tls-certificate={self.certificate}", f"--tls-key={self.key}"]
