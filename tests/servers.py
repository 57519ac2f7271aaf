"""The servers and processes under test: RabbitMQ's management API, a Redis database, workers and clients."""

import base64
import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import redis

import witness

ROOT = Path(__file__).parent.parent


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 30.0) -> Any:
    """Return the condition's first true value. Fails after timeout seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not after {timeout} s"
        time.sleep(0.05)
    return value


class RabbitMQ:
    """RabbitMQ's management API, with the user and password of the broker URL."""

    def __init__(self, broker_url: str) -> None:
        self.broker = urlsplit(broker_url)
        self.api = os.environ.get("RABBITMQ_API") or f"http://{self.broker.hostname}:15672"

    def request(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        user, password = unquote(self.broker.username or "guest"), unquote(self.broker.password or "guest")
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
        """Create a virtual host and return the URL of it."""
        self.request("PUT", f"vhosts/{name}")
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.request("PUT", f"permissions/{name}/{quote(self.broker.username or 'guest')}", everything)
        return self.broker._replace(path=f"/{name}").geturl()

    def delete_vhost(self, name: str) -> None:
        self.request("DELETE", f"vhosts/{name}")

    def queues(self, vhost: str) -> list[dict[str, Any]]:
        queues: list[dict[str, Any]] = self.request(
            "GET", f"queues/{vhost}?disable_stats=true&enable_queue_totals=true"
        )
        return queues

    def close_connections(self, vhost: str) -> int:
        """Close every AMQP connection to the virtual host, as a failing network would, and count them."""
        closed = 0
        for connection in self.request("GET", f"vhosts/{vhost}/connections"):
            try:
                self.request("DELETE", f"connections/{quote(connection['name'])}")
                closed += 1
            except urllib.error.HTTPError as exc:
                if exc.code != 404:  # 404: it is gone already
                    raise
        return closed


def free_redis_database(url: str) -> str:
    """Return the URL of an empty Redis database, marked as taken."""
    parts = urlsplit(url)
    for database in range(15, 0, -1):
        candidate = parts._replace(path=f"/{database}").geturl()
        with redis.Redis.from_url(candidate, socket_timeout=10) as client:
            if client.dbsize() == 0 and client.set("taken-by-tests", "1", nx=True, ex=3600):
                return candidate
    raise AssertionError("every Redis database from 1 to 15 has keys in it")


def run(
    *command: str, env: dict[str, str], timeout: float = 60.0, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command of the project as a user would, and return its exit code and output."""
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=timeout, check=False
    )


class Worker:
    """A real worker process with a prefork pool, in a process group of its own."""

    def __init__(self, log: Path, *options: str, env: dict[str, str], cwd: Path = ROOT, app: str = "tasks") -> None:
        self.log = log
        command = ["celery", "-A", app, "-q", "worker", "-l", "INFO", "-c", "2", *options]
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*command, "--without-mingle", "--without-gossip", "-n", f"{log.stem}@%h"],
                cwd=cwd,
                env={**os.environ, **env, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Worker":
        """Wait until it consumes."""
        try:
            wait_until(lambda: self.says(" ready.") or self.process.poll() is not None, f"worker ready, {self.log}")
            assert self.process.poll() is None, self.log.read_text()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop it, whatever its state."""
        if self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()

    def says(self, text: str) -> bool:
        return text in self.log.read_text()

    def pool_processes(self) -> list[int]:
        """Return the process ids of its prefork pool."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def kill(self) -> None:
        """Kill the worker and its pool with SIGKILL, as the end of stop_grace_period does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(30)

    def stop(self) -> int:
        """Stop it as Compose does, with SIGTERM, and return its exit code."""
        self.process.terminate()
        return self.process.wait(60)


def consumers(broker_url: str) -> int:
    """Return how many workers consume from the task queue."""
    return witness.count_consumers(broker_url, "tasks")
