"""Bad input gets one clear line, a non-zero exit and no traceback, within seconds."""

import sys
import time
from urllib.parse import urlsplit

import pytest

from tests.conftest import Stack
from tests.servers import run

PRODUCER = (sys.executable, "producer.py", "value")
WORKER = (sys.executable, "-m", "celery", "-A", "tasks", "-q", "worker", "-l", "WARNING", "-c", "1")
BOTH = pytest.mark.parametrize("command", [PRODUCER, WORKER], ids=["producer", "worker"])
SECONDS = 40.0  # the noisiest machine; without load it takes one to ten


def _one_line(command: tuple[str, ...], env: dict[str, str]) -> str:
    """Run the command; check that it fails with one line, and return that line."""
    started = time.monotonic()
    done = run(*command, timeout=SECONDS, env=env)
    output = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if line.strip() and "SecurityWarning" not in line and not _about_root(line)
    ]
    assert done.returncode != 0
    assert len(output) == 1, "\n".join(output)
    assert "Traceback" not in output[0]
    assert time.monotonic() - started < SECONDS
    return output[0]


def _about_root(line: str) -> bool:
    """Tell whether a line belongs to Celery's warning about a worker that root started (not so in the image)."""
    return any(text in line for text in ("absolutely not recommended", "--uid", "euid", "_warn_or_raise"))


def _with(url: str, **changes: str) -> str:
    parts = urlsplit(url)
    user = changes.get("user", parts.username or "")
    password = changes.get("password", parts.password or "")
    address = changes.get("address", f"{parts.hostname}:{parts.port or ''}".rstrip(":"))
    return parts._replace(netloc=f"{user}:{password}@{address}", path=changes.get("path", parts.path)).geturl()


@BOTH
def test_unknown_result_store(command: tuple[str, ...], redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, "RESULT_STORE": "memcached"})
    assert line == "celeryconfig: RESULT_STORE is 'memcached', but it must be redis or rabbitmq."


@BOTH
@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("RABBITMQ_URL", "amqp://demo:secret/word@rabbitmq:5672/demo"),
        ("RABBITMQ_URL", "amqp://demo:secretword@rabbitmq:port/demo"),
        ("RABBITMQ_URL", "redis://demo:secretword@rabbitmq:5672/demo"),
        ("RABBITMQ_URL", "rabbitmq:5672"),
        ("REDIS_URL", "redis://:secretword@redis:6379/first"),
        ("REDIS_URL", "http://:secretword@redis:6379/0"),
        ("REDIS_URL", "redis://:secret#word@redis:6379/0"),
    ],
)
def test_malformed_url(command: tuple[str, ...], name: str, url: str, redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, name: url})
    assert line.startswith(f"celeryconfig: {name} is malformed. It must look like ")
    assert "secret" not in line


@BOTH
def test_wrong_rabbitmq_password(command: tuple[str, ...], redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, "RABBITMQ_URL": _with(redis_stack.broker_url, password="wr0ng")})
    assert "refuses the user" in line
    assert "Check RABBITMQ_URL and RABBITMQ_PASSWORD" in line
    assert "docker compose down -v" in line
    assert "wr0ng" not in line


@BOTH
def test_unknown_virtual_host(command: tuple[str, ...], redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, "RABBITMQ_URL": _with(redis_stack.broker_url, path="/nowhere")})
    assert "has no virtual host 'nowhere'" in line


@BOTH
def test_wrong_redis_password(command: tuple[str, ...], redis_stack: Stack) -> None:
    url = _with(redis_stack.redis_url, user="nobody", password="wr0ng")
    line = _one_line(command, {**redis_stack.env, "REDIS_URL": url})
    assert "refuses the user or the password. Check REDIS_URL and REDIS_PASSWORD" in line
    assert "wr0ng" not in line


@pytest.mark.parametrize(
    ("address", "reason"), [("127.0.0.1:1", "Connection refused"), ("no-such-host.invalid:5672", "unknown host name")]
)
def test_rabbitmq_is_not_reachable(address: str, reason: str, redis_stack: Stack) -> None:
    url = _with(redis_stack.broker_url, address=address)
    line = _one_line(PRODUCER, {**redis_stack.env, "RABBITMQ_URL": url})
    assert f"producer: RabbitMQ at {address} cannot be reached ({reason})" in line
    assert "docker compose up -d rabbitmq" in line


@pytest.mark.parametrize(
    ("address", "reason"), [("127.0.0.1:1", "Connection refused"), ("no-such-host.invalid:6379", "unknown host name")]
)
def test_redis_is_not_reachable(address: str, reason: str, redis_stack: Stack) -> None:
    url = _with(redis_stack.redis_url, address=address)
    line = _one_line(PRODUCER, {**redis_stack.env, "REDIS_URL": url})
    assert f"producer: Redis at {address} cannot be reached ({reason})" in line
    assert "docker compose up -d redis" in line


def test_no_worker_consumes(stack: Stack) -> None:
    line = _one_line(PRODUCER, stack.env)
    assert line.startswith("producer: no worker consumes from the queue 'tasks', so no task would ever run.")
    assert "docker compose up -d worker" in line


@BOTH
@pytest.mark.parametrize("name", ["CELERY_RESULT_BACKEND", "RESULT_BACKEND", "CELERY_BROKER_URL", "BROKER_URL"])
def test_variables_that_override_ours(command: tuple[str, ...], name: str, redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, name: "redis://:secretword@elsewhere"})
    assert f"{name} is set in the environment and overrides" in line or f"CELERY_{name} is set" in line
    assert "unset it" in line
    assert "secretword" not in line


def test_the_same_value_in_such_a_variable_does_no_harm(shared_stack: Stack) -> None:
    done = run(*PRODUCER, env={**shared_stack.env, "BROKER_URL": shared_stack.broker_url})
    assert done.returncode == 0, done.stderr


@BOTH
def test_unreadable_password_file(command: tuple[str, ...], redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, "RABBITMQ_PASSWORD_FILE": "/run/secrets/missing"})
    assert line == (
        "celeryconfig: RABBITMQ_PASSWORD_FILE names /run/secrets/missing, which cannot be read: "
        "No such file or directory."
    )
