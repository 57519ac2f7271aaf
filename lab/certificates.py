"""Make a certificate authority, and a certificate for each server, when there are none or they end within a month.

python -m lab.certificates FOLDER NAME... writes for each server FOLDER/NAME/server.pem and server.key, good for the
host names NAME, localhost and 127.0.0.1, and the authority's ca.pem beside them and into FOLDER/ca. Nobody keeps the
authority's key. lab/docker-compose.tls.yml runs it before the servers; each folder is a volume of its server alone.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509

VALID = timedelta(days=365)
RENEW = timedelta(days=30)  # before they end


def are_good(folder: Path, names: list[str]) -> bool:
    """Tell whether every certificate is there, of the authority that clients know, and lasts."""
    try:
        authorities = {folder.joinpath(name, "ca.pem").read_bytes() for name in ["ca", *names]}
        certificates = [
            x509.load_pem_x509_certificate(folder.joinpath(name, "server.pem").read_bytes()) for name in names
        ]
    except FileNotFoundError:
        return False
    lasting = all(certificate.not_valid_after_utc - datetime.now(UTC) > RENEW for certificate in certificates)
    return lasting and len(authorities) == 1


def make(folder: Path, names: list[str]) -> None:
    """Write an authority's certificate, and one with its key for each server."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca/ca.pem"))
    for name in names:
        own = authority.issue_cert(name, "localhost", "127.0.0.1", not_after=datetime.now(UTC) + VALID)
        authority.cert_pem.write_to_path(str(folder / name / "ca.pem"))
        own.private_key_pem.write_to_path(str(folder / name / "server.key"))
        for number, part in enumerate(own.cert_chain_pems):
            part.write_to_path(str(folder / name / "server.pem"), append=number > 0)


if __name__ == "__main__":
    target, servers = Path(sys.argv[1]), sys.argv[2:]
    if not are_good(target, servers):
        make(target, servers)
