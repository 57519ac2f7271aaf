"""Servers and processes to try things with: a RabbitMQ virtual host, a Redis database, workers and clients.

The comparison and the tests use them beside a running demo, and leave nothing behind.
"""

import base64
import json
import os
import signal
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import celery
import redis

from hardening.environment import service_url
from lab.stack import ROOT as ROOT
from lab.stack import STORES as STORES

TAKEN = "taken"  # the key that marks a Redis database as somebody's own
# In one step, and without a connection to a database that somebody else counts connections and commands in.
TAKE = """
for database = ARGV[1] - 1, 1, -1 do
  redis.call('SELECT', database)
  if redis.call('DBSIZE') == 0 then
    redis.call('SET', KEYS[1], '1', 'EX', 3600)
    return database
  end
end
return 0
"""


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 120.0, interval: float = 0.05) -> Any:
    """Return the condition's first true value. Raises TimeoutError after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {timeout} s")
        time.sleep(interval)
    return value


def clocked(call: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def as_admin(url: str) -> str:
    """Return a server's URL with the login of its administrator: the demo's own user has a user's rights alone.

    docker-compose.yml sets ADMIN_PASSWORD_FILE; without it, the URL's own user is the administrator.
    """
    path = os.environ.get("ADMIN_PASSWORD_FILE")
    if not path:
        return url
    parts = urlsplit(url)
    return parts._replace(netloc=f"admin:{Path(path).read_text().strip()}@{parts.netloc.rpartition('@')[2]}").geturl()


class RabbitMQ:
    """RabbitMQ's management API, as its administrator."""

    def __init__(self, broker_url: str) -> None:
        self.broker, self.admin = urlsplit(broker_url), urlsplit(as_admin(broker_url))
        self.api = os.environ.get("RABBITMQ_API") or f"http://{self.broker.hostname}:15672"

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request and return the answer. Raises OSError."""
        user, password = unquote(self.admin.username or "guest"), unquote(self.admin.password or "guest")
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        request = urllib.request.Request(
            f"{self.api}/api/{path}",
            method=method,
            data=json.dumps(body or {}).encode(),
            headers={"Authorization": f"Basic {login}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=10) as response:
            text = response.read()
        return json.loads(text) if text else None

    def create_vhost(self, name: str) -> str:
        """Create a virtual host for the broker URL's user, and return its URL."""
        self.request("PUT", f"vhosts/{name}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.request("PUT", f"permissions/{name}/{quote(self.broker.username or 'guest')}", everything)
        return self.broker._replace(path=f"/{name}").geturl()

    def delete_vhost(self, name: str) -> None:
        """Delete a virtual host with its queues."""
        self.request("DELETE", f"vhosts/{name}")

    def queues(self, vhost: str) -> list[dict[str, Any]]:
        """Return the queues of a virtual host."""
        queues: list[dict[str, Any]] = self.request(
            "GET", f"queues/{vhost}?disable_stats=true&enable_queue_totals=true"
        )
        return queues


def _redis_admin(url: str) -> redis.Redis:
    return redis.Redis.from_url(as_admin(url), decode_responses=True, socket_timeout=10)


def free_redis_database(url: str) -> str:
    """Return the URL of an empty Redis database, marked as taken."""
    with _redis_admin(url) as client:
        databases = int(client.config_get("databases")["databases"])
        taken = client.eval(TAKE, 1, TAKEN, databases)
    if not taken:
        raise RuntimeError(f"every Redis database from 1 to {databases - 1} has keys in it")
    return urlsplit(url)._replace(path=f"/{taken}").geturl()


@dataclass(frozen=True)
class OwnServers:
    """A result store to try, with a virtual host and a Redis database that nobody else uses."""

    store: str
    rabbitmq: RabbitMQ
    vhost: str
    broker_url: str
    redis_url: str

    @property
    def env(self) -> dict[str, str]:
        """The environment in which workers and clients use them."""
        return {"RESULT_STORE": self.store, "RABBITMQ_URL": self.broker_url, "REDIS_URL": self.redis_url}

    def redis_admin(self) -> redis.Redis:
        """Return a client of the Redis database, as its administrator."""
        return _redis_admin(self.redis_url)

    def versions(self) -> dict[str, str]:
        """Return the versions of Celery and of both servers, as these report them."""
        with self.redis_admin() as client:
            redis_version: str = client.info("server")["redis_version"]
        rabbitmq_version: str = self.rabbitmq.request("GET", "overview")["rabbitmq_version"]
        return {"Celery": celery.__version__, "RabbitMQ": rabbitmq_version, "Redis": redis_version}


@contextmanager
def own_servers(store: str, purpose: str) -> Iterator[OwnServers]:
    """Make a virtual host and take a Redis database, and clear both away. Raises OSError or redis.RedisError."""
    rabbitmq = RabbitMQ(service_url("RABBITMQ"))
    vhost = f"{purpose}-{uuid.uuid4().hex[:8]}"
    with ExitStack() as cleanup:
        broker_url = rabbitmq.create_vhost(vhost)
        cleanup.callback(rabbitmq.delete_vhost, vhost)
        redis_url = free_redis_database(service_url("REDIS"))
        cleanup.callback(_flush, redis_url)
        yield OwnServers(store, rabbitmq, vhost, broker_url, redis_url)


def _flush(redis_url: str) -> None:
    with _redis_admin(redis_url) as client:
        client.flushdb()


def markdown(rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return [f"| {line} |" for line in lines]


def run(
    *command: str, env: dict[str, str], timeout: float = 60.0, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project as a user would, and return its exit code and output."""
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout, check=False
    )


class Worker:
    """A real worker process with a prefork pool, in a process group of its own."""

    def __init__(
        self, log: Path, *options: str, env: dict[str, str], cwd: Path = ROOT, app: str = "tasks", lean: bool = True
    ) -> None:
        """Start it. lean: as in docker-compose.yml, without a look for its neighbours."""
        self.log = log
        command = ["celery", "-A", app, "-q", "worker", "-l", "INFO", "-c", "2", *options]
        command += ["--without-mingle", "--without-gossip"] * lean
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "-n", f"{log.stem}@%h"],
                cwd=cwd,
                env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until it consumes."""
        wait_until(lambda: self.says(" ready.") or self.process.poll() is not None, f"worker ready, {self.log}")
        if self.process.poll() is not None:
            raise RuntimeError(f"the worker has ended: {self.log.read_text()}")

    def __enter__(self) -> "Worker":
        """Wait until it consumes."""
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Kill it: a stop takes as long as a start, and what a stop does is the subject of a few tests alone."""
        if self.process.poll() is None:
            self.kill()

    def says(self, text: str) -> bool:
        """Tell whether the text stands in its log."""
        return text in self.log.read_text()

    def kill(self) -> None:
        """Kill the worker and its pool with SIGKILL, as the end of stop_grace_period does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> int:
        """Stop it as Compose does, with SIGTERM, and return its exit code."""
        self.process.terminate()
        return self.process.wait(60)
