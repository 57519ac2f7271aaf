"""amqps:// and rediss:// URLs need no edit of celeryconfig.py, and the servers' certificates are verified.

A proxy speaks TLS in front of the real RabbitMQ and Redis. With TLS of their own, .ci/closed.py looks at them.
"""

import ssl
import sys
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from kombu.exceptions import OperationalError

from lab import certificates
from lab.servers import Worker, run
from tests.conftest import Stack
from tests.proxy import Proxy


@pytest.fixture
def authority(tmp_path: Path) -> tuple[trustme.CA, dict[str, str]]:
    """A certificate authority, and the standard variable that makes clients trust it."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    return ca, {"SSL_CERT_FILE": str(tmp_path / "ca.pem")}


def test_a_result_travels_over_tls_only(stack: Stack, authority: tuple[trustme.CA, dict[str, str]]) -> None:
    ca, trust = authority
    certificate = ca.issue_cert("localhost")
    with (
        Proxy(stack.broker_url, certificate) as mq,
        Proxy(stack.redis_url, certificate) as redis,
    ):
        env = {**stack.env, **trust, "RABBITMQ_URL": mq.url("localhost"), "REDIS_URL": redis.url("localhost")}
        with Worker(stack.logs / "tls.log", env=env):
            tour = run(sys.executable, "producer.py", "value", "where", env=env)
            assert tour.returncode == 0, tour.stdout + tour.stderr
        assert mq.accepted > 0
        assert redis.accepted > 0


def test_each_node_of_a_cluster_is_checked_against_its_own_name(
    rabbitmq_stack: Stack, authority: tuple[trustme.CA, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ca, trust = authority
    names = ("localhost", "127.0.0.1")
    with (
        Proxy(rabbitmq_stack.broker_url, ca.issue_cert(names[0])) as first,
        Proxy(rabbitmq_stack.broker_url, ca.issue_cert(names[1])) as second,
        Proxy(rabbitmq_stack.broker_url, ca.issue_cert("elsewhere.example")) as wrong,
    ):
        monkeypatch.setenv("SSL_CERT_FILE", trust["SSL_CERT_FILE"])
        urls = [node.url(name) for node, name in ((first, names[0]), (second, names[1]), (wrong, names[0]))]
        app = rabbitmq_stack.load("tasks").app
        app.conf.broker_url = ";".join(urls)
        app.conf.broker_use_ssl = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": None}
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)
            first.cut()
            connection.collect()
            connection.ensure_connection(max_retries=5, interval_start=0.1)
            second.cut()
            first.restore()
            connection.collect()
            connection.ensure_connection(max_retries=5, interval_start=0.1)
            assert (first.accepted, second.accepted) == (2, 1)
            first.cut()
            connection.collect()
            with pytest.raises(OperationalError):
                connection.ensure_connection(max_retries=2, interval_start=0.1)
        first.restore()
        second.restore()
        assert wrong.accepted == 0
        assert app.conf.broker_use_ssl["server_hostname"] is None


@pytest.mark.parametrize("wrong", ["authority", "host name", "plain text"])
def test_what_is_not_verified_is_refused(
    wrong: str, stack: Stack, authority: tuple[trustme.CA, dict[str, str]]
) -> None:
    ca, trust = authority
    issuer = trustme.CA() if wrong == "authority" else ca
    certificate = issuer.issue_cert("localhost" if wrong != "host name" else "elsewhere.example")
    with (
        Proxy(stack.broker_url, certificate) as mq,
        Proxy(stack.redis_url, certificate) as redis,
    ):
        broker, store = mq.url("localhost"), redis.url("localhost")
        if wrong == "plain text":
            broker, store = broker.replace("amqps:", "amqp:"), store.replace("rediss:", "redis:")
        # Celery's own clients, not the witnesses: first the broker, then the result backend.
        publish = "import tasks; c = tasks.app.connection_for_write(); c.connect(); print('connected')"
        ping = "import tasks; tasks.app.backend.client.ping(); print('connected')"
        for code, env in (
            (publish, {**stack.env, "RABBITMQ_URL": broker}),
            (ping, {**stack.env, "RESULT_STORE": "redis", "REDIS_URL": store}),
        ):
            done = run(sys.executable, "-c", code, env={**env, **trust})
            assert done.returncode != 0
            assert "connected" not in done.stdout
            if wrong != "plain text":
                assert "CERTIFICATE_VERIFY_FAILED" in done.stderr
        # and the witnesses
        done = run(sys.executable, "producer.py", "value", env={**stack.env, **trust, "RABBITMQ_URL": broker})
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert mq.accepted == redis.accepted == 0


def test_certificates_are_made_once_and_again_before_they_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ca", "rabbitmq", "redis"):
        (tmp_path / name).mkdir()
    servers = ["rabbitmq", "redis"]
    command = (sys.executable, "-m", "lab.certificates", str(tmp_path), *servers)

    def content() -> dict[str, bytes]:
        return {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.glob("*/*")}

    assert run(*command, env={}).returncode == 0
    first = content()
    own = {f"{name}/{file}" for name in servers for file in ("ca.pem", "server.pem", "server.key")}
    assert set(first) == {"ca/ca.pem", *own}
    certificate = x509.load_pem_x509_certificate(first["redis/server.pem"])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["redis", "localhost"]
    assert run(*command, env={}).returncode == 0
    assert content() == first
    assert not certificates.are_good(tmp_path, ["rabbitmq,rabbitmq-2", "redis"])
    monkeypatch.setattr(certificates, "VALID", certificates.RENEW)
    certificates.make(tmp_path, servers)
    short_lived = content()
    assert not certificates.are_good(tmp_path, servers)
    assert run(*command, env={}).returncode == 0
    assert certificates.are_good(tmp_path, servers)
    assert not set(content().values()) & set(short_lived.values())
