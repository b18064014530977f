"""Certificates made on the spot."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def write_certificates(directory: Path) -> None:
    """An authority and one certificate for 127.0.0.1, which gateway and workers show each other."""
    now = datetime.datetime.now(datetime.UTC)
    validity = now - datetime.timedelta(hours=1), now + datetime.timedelta(days=1)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])

    def builder(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        built = x509.CertificateBuilder().issuer_name(authority_name).subject_name(subject).public_key(public_key)
        return built.serial_number(x509.random_serial_number()).not_valid_before(validity[0]).not_valid_after(validity[1])

    authority = builder(authority_name, authority_key.public_key())
    authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "mobula")])
    certificate = builder(subject, key.public_key()).add_extension(address, critical=False)
    pem = serialization.Encoding.PEM
    (directory / "ca.pem").write_bytes(authority.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    (directory / "cert.pem").write_bytes(certificate.sign(authority_key, hashes.SHA256()).public_bytes(pem))
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (directory / "key.pem").write_bytes(key.private_bytes(pem, *plain))
