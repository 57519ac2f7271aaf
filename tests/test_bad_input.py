"""Bad input gets one clear line, a non-zero exit and no traceback, within seconds."""

import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from hardening.environment import service_url
from lab.servers import run
from tests.conftest import Stack

PRODUCER = (sys.executable, "producer.py", "value")
WORKER = (sys.executable, "-m", "celery", "-A", "tasks", "-q", "worker", "-l", "WARNING", "-c", "1")
BOTH = pytest.mark.parametrize("command", [PRODUCER, WORKER], ids=["producer", "worker"])
SECONDS = 90.0  # the noisiest machine; without load it takes one to ten
REDIS = {"RESULT_STORE": "redis"}  # with the servers of the tests: nothing is put on them here


def _one_line(command: tuple[str, ...], env: dict[str, str]) -> str:
    """Run the command; check that it fails with one line, and return that line."""
    done = run(*command, timeout=SECONDS, env=env)
    output = [
        line
        for line in (done.stdout + done.stderr).splitlines()
        if line.strip() and "SecurityWarning" not in line and not _about_root(line)
    ]
    assert done.returncode != 0
    assert len(output) == 1, "\n".join(output)
    assert "Traceback" not in output[0]
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
def test_unknown_result_store(command: tuple[str, ...]) -> None:
    line = _one_line(command, {**REDIS, "RESULT_STORE": "memcached"})
    assert line == "celeryconfig: RESULT_STORE is 'memcached', but it must be redis or rabbitmq."


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("RABBITMQ_URL", "amqp://demo:secret/word@rabbitmq:5672/demo"),
        ("RABBITMQ_URL", "amqp://demo:secretword@rabbitmq:port/demo"),
        ("RABBITMQ_URL", "redis://demo:secretword@rabbitmq:5672/demo"),
        ("RABBITMQ_URL", "amqp://demo:12#secretword@rabbitmq:5672/demo"),
        ("RABBITMQ_URL", "amqp://demo:12/secretword@rabbitmq:5672/demo"),
        ("RABBITMQ_URL", "amqp://demo:se;cretword@rabbitmq:5672/demo"),
        ("RABBITMQ_URL", "amqp://demo:secretword@rabbitmq:70000/demo"),
        ("RABBITMQ_URL", "amqp://demo:secretword@rabbitmq:5672/demo?heartbeat=10"),
        ("RABBITMQ_URL", "rabbitmq:5672"),
        ("RABBITMQ_URL", "amqp://demo:secretword@mq1/demo;amqps://demo:secretword@mq2/demo"),
        ("RABBITMQ_URL", "amqp://demo:secretword@mq1/demo;amqp://demo:secretword@mq2/other"),
        ("RABBITMQ_URL", "amqp://demo:secretword@mq1/demo;mq2"),
        ("REDIS_URL", "sentinel://demo:secretword@s1;demo:secretword@s2/0"),
        ("REDIS_URL", "sentinel://demo:secretword@s1;s2:port/0"),
        ("REDIS_URL", "redis+socket://:secretword@"),
        ("REDIS_URL", "redis://:secretword@redis:6379/first"),
        ("REDIS_URL", "http://:secretword@redis:6379/0"),
        ("REDIS_URL", "redis://:secret#word@redis:6379/0"),
        ("REDIS_URL", "redis://redis:6379/\u0663"),
    ],
)
def test_malformed_url(name: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, url)
    with pytest.raises(SystemExit) as end:
        service_url(name.removesuffix("_URL"))
    line = str(end.value)
    assert line.startswith(f"celeryconfig: {name} is malformed. It must look like ")
    assert "secret" not in line
    assert "cretword" not in line


@BOTH
@pytest.mark.parametrize("name", ["RABBITMQ_URL", "REDIS_URL"])
def test_a_malformed_url_ends_the_process(command: tuple[str, ...], name: str) -> None:
    line = _one_line(command, {**REDIS, name: "http://:secretword@elsewhere"})
    assert line.startswith(f"celeryconfig: {name} is malformed. It must look like ")
    assert "secretword" not in line


@BOTH
def test_wrong_rabbitmq_password(command: tuple[str, ...], redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, "RABBITMQ_URL": _with(redis_stack.broker_url, password="wr0ng")})
    assert "refuses the user" in line
    assert "Check RABBITMQ_URL and RABBITMQ_PASSWORD" in line
    # The demo may lose its volume, a project may not.
    assert ("rabbitmqctl change_password") in line
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


@BOTH
def test_unknown_redis_database(command: tuple[str, ...], redis_stack: Stack) -> None:
    line = _one_line(command, {**redis_stack.env, "REDIS_URL": _with(redis_stack.redis_url, path="/9999")})
    assert "DB index is out of range" in line
    assert "Is REDIS_URL right?" in line


def test_redis_url_that_leads_to_rabbitmq(redis_stack: Stack) -> None:
    broker = urlsplit(redis_stack.broker_url)
    url = _with(redis_stack.redis_url, address=f"{broker.hostname}:{broker.port or 5672}")
    line = _one_line(PRODUCER, {**redis_stack.env, "REDIS_URL": url})
    assert "s REDIS_URL right?" in line


def test_rabbitmq_url_that_leads_to_redis(redis_stack: Stack) -> None:
    redis = urlsplit(redis_stack.redis_url)
    url = _with(redis_stack.broker_url, address=f"{redis.hostname}:{redis.port or 6379}")
    line = _one_line(PRODUCER, {**redis_stack.env, "RABBITMQ_URL": url})
    assert "is RABBITMQ_URL right?" in line


def test_the_witness_reads_the_default_virtual_host_as_celery_does(redis_stack: Stack) -> None:
    """The default URL ends in //: the virtual host /, which needs a right that the tests' user may not have."""
    line = _one_line(PRODUCER, {**redis_stack.env, "RABBITMQ_URL": _with(redis_stack.broker_url, path="//")})
    assert "virtual host '/'" in line or "no worker consumes" in line


def test_the_worker_has_another_result_store(shared_stack: Stack) -> None:
    other = "redis" if shared_stack.store == "rabbitmq" else "rabbitmq"
    line = _one_line(PRODUCER, {**shared_stack.env, "RESULT_STORE": other})
    assert line.startswith("producer: shared@")
    assert "puts its results elsewhere: it was started with another RESULT_STORE than this producer" in line


def test_no_worker_consumes(stack: Stack) -> None:
    line = _one_line(PRODUCER, stack.env)
    assert line.startswith("producer: no worker consumes from the queue 'tasks', so no task would ever run.")
    assert "docker compose up -d worker" in line


@BOTH
@pytest.mark.parametrize("name", ["CELERY_RESULT_BACKEND", "RESULT_BACKEND", "CELERY_BROKER_URL", "BROKER_URL"])
def test_variables_that_override_ours(command: tuple[str, ...], name: str) -> None:
    line = _one_line(command, {**REDIS, name: "redis://:secretword@elsewhere"})
    assert f"{name} is set in the environment, or by the option " in line
    assert "unset it" in line
    assert "secretword" not in line


def test_the_same_value_in_such_a_variable_does_no_harm(shared_stack: Stack) -> None:
    done = run(*PRODUCER, env={**shared_stack.env, "BROKER_URL": shared_stack.broker_url})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_useless_password_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(content)
    line = _one_line(PRODUCER, {**REDIS, "REDIS_PASSWORD_FILE": str(tmp_path / "secret")})
    assert line.startswith(f"celeryconfig: REDIS_PASSWORD_FILE names {tmp_path}/secret, which ")


def test_two_passwords() -> None:
    env = {**REDIS, "REDIS_PASSWORD_FILE": "/run/secrets/redis", "REDIS_PASSWORD": "secretword"}
    line = _one_line(PRODUCER, env)
    assert line == "celeryconfig: REDIS_PASSWORD and REDIS_PASSWORD_FILE are both set: unset one of them."


@BOTH
def test_unreadable_password_file(command: tuple[str, ...]) -> None:
    line = _one_line(command, {**REDIS, "RABBITMQ_PASSWORD_FILE": "/run/secrets/missing"})
    assert line == (
        "celeryconfig: RABBITMQ_PASSWORD_FILE names /run/secrets/missing, which cannot be read: "
        "No such file or directory."
    )
