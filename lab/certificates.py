"""Make a certificate authority, and a certificate for each server, when there are none or they end within a month.

python -m lab.certificates FOLDER NAME... writes for each server FOLDER/NAME/server.pem and server.key, good for the
host names NAME, localhost and 127.0.0.1, and the authority's ca.pem beside them and into FOLDER/ca. NAME,NAME,NAME is
a cluster, whose nodes share what is in the folder of the first. Nobody keeps the authority's key.
lab/docker-compose.tls.yml runs it before the servers; each folder is a volume of its server alone.
"""

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography import x509

VALID = timedelta(days=365)
RENEW = timedelta(days=30)  # before they end


def are_good(folder: Path, names: list[str]) -> bool:
    """Tell whether every certificate is there, for all names, of the authority that clients know, and lasts."""
    authorities = set()
    for nodes in [["ca"], *(several.split(",") for several in names)]:
        try:
            authorities.add(folder.joinpath(nodes[0], "ca.pem").read_bytes())
            if nodes == ["ca"]:
                continue
            certificate = x509.load_pem_x509_certificate(folder.joinpath(nodes[0], "server.pem").read_bytes())
        except FileNotFoundError:
            return False
        good_for = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        if not set(nodes) <= set(good_for.get_values_for_type(x509.DNSName)):
            return False
        if certificate.not_valid_after_utc - datetime.now(UTC) < RENEW:
            return False
    return len(authorities) == 1


def make(folder: Path, names: list[str]) -> None:
    """Write an authority's certificate, and one with its key for each server."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca/ca.pem"))
    for name, *others in (several.split(",") for several in names):
        own = authority.issue_cert(name, *others, "localhost", "127.0.0.1", not_after=datetime.now(UTC) + VALID)
        authority.cert_pem.write_to_path(str(folder / name / "ca.pem"))
        own.private_key_pem.write_to_path(str(folder / name / "server.key"))
        for number, part in enumerate(own.cert_chain_pems):
            part.write_to_path(str(folder / name / "server.pem"), append=number > 0)


if __name__ == "__main__":
    target, servers = Path(sys.argv[1]), sys.argv[2:]
    if not are_good(target, servers):
        make(target, servers)
