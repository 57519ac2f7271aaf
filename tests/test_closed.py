"""Closed by default: what the demo's user may not do, and what a container may not.

All other tests run as that user, so its rights are enough. What only the host can see, .ci/closed.py looks at.
"""

import os
import sys
import urllib.error
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import redis

import witness
from hardening.environment import service_url
from lab.servers import RabbitMQ, run

pytestmark = pytest.mark.skipif("ADMIN_PASSWORD_FILE" not in os.environ, reason="not the servers of docker-compose.yml")


@pytest.fixture
def client() -> Iterator[redis.Redis]:
    """Redis as the demo's user, in the demo's database."""
    with witness.redis_client(service_url("REDIS")) as client:
        yield client


@pytest.mark.parametrize(
    "command",
    [
        "GET elsewhere",
        "SET elsewhere 1",
        "DEL elsewhere",
        "MGET celery-demo:mine elsewhere",
        "PUBLISH elsewhere 1",
        "SUBSCRIBE elsewhere",
        "PSUBSCRIBE *",
        "KEYS *",
        "SCAN 0",
        "DBSIZE",
        "FLUSHDB",
        "FLUSHALL",
        "INFO",
        "MONITOR",
        "CLIENT LIST",
        "CLIENT KILL TYPE normal",
        "CONFIG GET *",
        "CONFIG SET maxmemory 1",
        "ACL LIST",
        "ACL WHOAMI",
        "EVAL return 0",
        "SCRIPT FLUSH",
        "SHUTDOWN",
        "SAVE",
        "MODULE LIST",
    ],
)
def test_redis_refuses_what_a_result_backend_does_not_need(command: str, client: redis.Redis) -> None:
    with pytest.raises(redis.exceptions.NoPermissionError):
        client.execute_command(*command.split())  # type: ignore[no-untyped-call]


def test_the_witness_says_that_rights_are_missing() -> None:
    with pytest.raises(witness.Refused, match="gives the user too few rights"):
        witness.find_result_key(service_url("REDIS"), "elsewhere")


def test_a_script_has_no_more_rights_than_its_caller(client: redis.Redis) -> None:
    script = client.register_script("return redis.call('GET', 'elsewhere')")
    with pytest.raises(redis.exceptions.ResponseError, match="permissions"):
        script()


@pytest.mark.parametrize("login", ["", ":demo@", "default:demo@", "admin:demo@", "demo:wrong@", "demo:@"])
def test_redis_knows_no_other_login(login: str) -> None:
    parts = urlsplit(service_url("REDIS"))
    url = parts._replace(netloc=login + parts.netloc.rpartition("@")[2]).geturl()
    with pytest.raises(witness.Refused), witness.redis_client(url):
        pass


@pytest.mark.parametrize("login", ["guest:guest", "admin:demo", "admin:admin", "demo:wrong"])
def test_rabbitmq_knows_no_other_login(login: str) -> None:
    parts = urlsplit(service_url("RABBITMQ"))
    for url in (
        parts._replace(netloc=f"{login}@{parts.netloc.rpartition('@')[2]}"),
        parts._replace(netloc=f"{login}@{parts.netloc.rpartition('@')[2]}", path="//"),
    ):
        with pytest.raises(witness.Refused, match="refuses the user"), witness.rabbitmq_channel(url.geturl()):
            pass


def test_rabbitmq_lets_the_user_into_no_other_virtual_host(foreign_vhost: str) -> None:
    url = urlsplit(service_url("RABBITMQ"))._replace(path=f"/{foreign_vhost}").geturl()
    with pytest.raises(witness.Refused, match="no right to use it"), witness.rabbitmq_channel(url):
        pass


@pytest.fixture
def foreign_vhost() -> Iterator[str]:
    """A virtual host that exists, and that is not for the demo's user."""
    admin, name = RabbitMQ(service_url("RABBITMQ")), f"test-{uuid.uuid4().hex[:8]}"
    admin.request("PUT", f"vhosts/{name}")
    yield name
    admin.delete_vhost(name)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "vhosts/mine"),
        ("PUT", "users/mine"),
        ("GET", "users"),
        ("PUT", "permissions/demo/demo"),
        ("PUT", "policies/demo/mine"),
        ("GET", "definitions"),
        ("GET", "nodes"),
    ],
)
def test_the_management_api_refuses_the_user_what_is_an_administrators(method: str, path: str) -> None:
    user = RabbitMQ(service_url("RABBITMQ"))
    assert user.request("GET", "whoami")["name"] == "admin"
    user.admin = user.broker
    assert user.request("GET", "whoami") == {"name": "demo", "tags": ["management"], "is_internal_user": True}
    with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
        user.request(method, path, {})


def test_the_process_has_no_rights_and_cannot_get_any() -> None:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert status["Uid"].split() == [str(os.getuid())] * 4 != ["0"] * 4
    assert {name: int(status[name], 16) for name in status if name.startswith("Cap")} == {
        "CapInh": 0,
        "CapPrm": 0,
        "CapEff": 0,
        "CapBnd": 0,
        "CapAmb": 0,
    }
    assert status["NoNewPrivs"] == "1"


def test_the_container_can_write_to_tmp_alone() -> None:
    assert os.statvfs("/").f_flag & os.ST_RDONLY
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    writable = {path for path in mounts if Path(path).is_dir() and os.access(path, os.W_OK)}
    assert {path for path in writable if not path.startswith("/dev")} == {"/tmp"}


def test_memory_and_processes_are_limited() -> None:
    cgroup = Path("/sys/fs/cgroup")
    if (cgroup / "memory.max").exists():  # version 2
        memory, processes = (cgroup / "memory.max").read_text(), (cgroup / "pids.max").read_text()
    else:
        memory = (cgroup / "memory/memory.limit_in_bytes").read_text()
        processes = (cgroup / "pids/pids.max").read_text()
    assert (int(memory), int(processes)) == (4 * 2**30, 500)  # mem_limit of the service tests


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["RABBITMQ", "REDIS"])
@pytest.mark.parametrize("password", ["p@ss:w/o%r#d x'\"$\\é", "%70%40", " "])
def test_no_error_shows_a_password(wrong: str, password: str) -> None:
    """Neither as it is nor as it stands in a URL: in the producer, the worker, and in Celery and the witnesses."""
    env = {"RESULT_STORE": "redis", f"{wrong}_PASSWORD": password}
    publish = "import tasks; tasks.app.connection_for_write().connect()"
    fetch = "import tasks; tasks.app.backend.client.ping()"
    for command in (
        (sys.executable, "producer.py", "value"),
        (sys.executable, "-m", "lab.wire"),
        ("celery", "-A", "tasks", "worker"),
        ("celery", "-A", "tasks", "inspect", "ping"),
        ("celery", "-A", "tasks", "report"),
        (sys.executable, "-c", publish if wrong == "RABBITMQ" else fetch),
    ):
        done = run(*command, env=env)
        output = done.stdout + done.stderr
        assert done.returncode != 0 or command[-1] in ("ping", "report"), output
        assert output
        assert password == " " or password not in output
        assert f":{quote(password, safe='')}@" not in output
