"""amqps:// and rediss:// URLs need no edit of celeryconfig.py, and the servers' certificates are verified.

A proxy speaks TLS in front of the real RabbitMQ and Redis.
"""

import sys
from pathlib import Path

import pytest
import trustme

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
