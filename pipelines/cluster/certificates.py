"""Certificates for traffic between Ray's nodes: the cluster's own authority, and one certificate per node.

    python -m pipelines.cluster.certificates authority FOLDER               # ca.crt, ca.key
    python -m pipelines.cluster.certificates node AUTHORITY FOLDER NAME...   # ca.crt, tls.crt, tls.key; names

Ray checks both sides of every connection: nodes and drivers need a certificate of the authority.
"""

import datetime
import ipaddress
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_AUTHORITY_DAYS = 3650
_CLOCKS_APART = datetime.timedelta(hours=1)


def tls_environment(folder: Path | str) -> dict[str, str]:
    """Environment variables that make Ray use a node's certificate."""
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": f"{folder}/tls.crt",
        "RAY_TLS_SERVER_KEY": f"{folder}/tls.key",
        "RAY_TLS_CA_CERT": f"{folder}/ca.crt",
    }


def make_authority(folder: Path) -> None:
    """Write ca.crt and ca.key. Raises FileExistsError rather than invalidate existing certificates."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "ca.key").exists():
        raise FileExistsError(f"{folder}/ca.key is there already; its certificates would be worth nothing")
    key, name = ec.generate_private_key(ec.SECP256R1()), _name("dreambooth's authority")
    ends = _now() + datetime.timedelta(days=_AUTHORITY_DAYS)
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # signs certificates
    certificate = (
        _builder(name, name, key.public_key(), ends)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", _pem(key))
    _write(folder / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM))


def make_node_certificate(authority: Path, folder: Path, names: Sequence[str]) -> None:
    """Write tls.crt and tls.key for a node with these names and addresses, beside a copy of ca.crt.

    The certificate also covers this machine's own host name, and expires with its authority.
    """
    content = (authority / "ca.crt").read_bytes()
    issuer = x509.load_pem_x509_certificate(content)
    signer = serialization.load_pem_private_key((authority / "ca.key").read_bytes(), password=None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise ValueError(f"{authority}/ca.key is no key that this program made")
    key = ec.generate_private_key(ec.SECP256R1())
    subjects = [_subject(name) for name in dict.fromkeys(("localhost", "127.0.0.1", *names))]
    certificate = (
        _builder(_name(subjects[-1].value), issuer.subject, key.public_key(), issuer.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName(subjects), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .sign(signer, hashes.SHA256())
    )
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "tls.key", _pem(key))
    _write(folder / "tls.crt", certificate.public_bytes(serialization.Encoding.PEM))
    _write(folder / "ca.crt", content)


def _subject(name: str) -> x509.DNSName | x509.IPAddress:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, ends: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_now() - _CLOCKS_APART)
        .not_valid_after(ends)
    )


def _name(text: object) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, str(text)[:64])])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, content: bytes) -> None:
    """Write a file readable by its owner alone."""
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)
    path.write_bytes(content)


def main(arguments: Sequence[str]) -> None:
    """Run the command line."""
    match arguments:
        case ["authority", folder]:
            make_authority(Path(folder))
        case ["node", authority, folder, *names]:
            make_node_certificate(Path(authority), Path(folder), names)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
