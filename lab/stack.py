"""The demo in a Compose project of its own, and a client in it, for what stops, kills and measures containers.

It runs on the host and needs nothing there but Docker and Python 3.11.
"""

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STORES = ("redis", "rabbitmq")
NODES = ("rabbitmq", "rabbitmq-2", "rabbitmq-3")
SENTINELS = ("sentinel", "sentinel-2", "sentinel-3")
TIMEOUT = 300.0  # seconds that any single thing may take


class Failed(Exception):
    """The run itself has failed; the message says what."""


class Stack:
    """The demo's services, or those of the cluster, for clients and workers that know some of its RabbitMQ nodes."""

    def __init__(self, store: str, purpose: str, nodes: tuple[str, ...] = (), **env: str) -> None:
        self.store, self.project = store, f"celery-result-backends-{purpose}-{store}"
        files = ["docker-compose.yml", *(["lab/docker-compose.cluster.yml"] if nodes else []), "lab/stack.yml"]
        self.command = ["docker", "compose", *(word for file in files for word in ("-f", file))]
        self.env = {
            **os.environ,
            "COMPOSE_DISABLE_ENV_FILE": "1",
            "COMPOSE_PROJECT_NAME": self.project,
            "RESULT_STORE": store,
            "FLOWER_PORT": "0",
            "RABBITMQ_PORT": "0",
            "NODES": ";".join(f"amqp://demo@{node}:5672/demo" for node in nodes or NODES[:1]),
            **env,
        }

    def run(self, *command: str) -> str:
        """Run a command and return its output. Raises Failed."""
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=TIMEOUT, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise Failed(str(exc)) from None
        if done.returncode:
            raise Failed(f"{' '.join(command)}: {done.stderr.strip()[-1000:]}")
        return done.stdout

    def compose(self, *command: str) -> str:
        """Run a docker compose command. Raises Failed."""
        return self.run(*self.command, *command)

    def containers(self, service: str) -> list[str]:
        """Return the ids of a service's containers. Raises Failed."""
        return self.compose("ps", "--all", "--quiet", service).split()

    def redis(self, *command: str) -> str:
        """Run a command in redis-cli as admin. Raises Failed."""
        return self._redis_cli("redis", *command)

    def _redis_cli(self, service: str, *command: str) -> str:
        login = 'REDISCLI_AUTH=$(cat /run/admin/password) exec redis-cli --user admin "$@"'
        return self.compose("exec", "-T", service, "sh", "-c", login, "redis-cli", *command)

    def rabbitmqctl(self, *command: str) -> str:
        """Run a command in rabbitmqctl. Raises Failed."""
        return self.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", *command)

    def rabbitmq_mb(self) -> float:
        """Return the memory that RabbitMQ says it uses, in MB. Raises Failed."""
        return int(self.rabbitmqctl("eval", "erlang:memory(total).")) / 1e6

    def leaders(self) -> dict[str, str]:
        """Return the RabbitMQ node that leads each queue. Raises Failed."""
        queues = json.loads(self.rabbitmqctl("list_queues", "-p", "demo", "name", "leader", "--formatter", "json"))
        return {queue["name"]: queue["leader"].partition("@")[2] for queue in queues}

    def now(self, service: str) -> str:
        """Return who is the "leader" of the queue tasks, the Redis "master" or a "replica"; a service is itself."""
        if service == "leader":
            return self.leaders()["tasks"]
        if service in ("master", "replica"):
            words = self._redis_cli(SENTINELS[2], "-p", "26379", "sentinel", "master", "mymaster").split()
            master = words[words.index("ip") + 1]
            return master if service == "master" else next(node for node in ("redis-3", "redis-2") if node != master)
        return service

    def up(self, workers: int = 1) -> None:
        """Bring RabbitMQ, Redis and so many workers into a good state, whatever was broken. Raises Failed."""
        self.compose("up", "--detach", "--wait", "--no-build", f"--scale=worker={workers}", "worker")

    def conditions(self) -> str:
        """Return what runs, and where, for the page with the table. Raises Failed."""
        celery = self.compose("exec", "-T", "worker", "python", "-c", "import celery; print(celery.__version__)")
        redis = self.redis("info", "server").partition("redis_version:")[2].split()[0]
        versions = f"Celery {celery.strip()}, RabbitMQ {self.rabbitmqctl('version').strip()}, Redis {redis}"
        return f"{versions}; {os.cpu_count()} processors, {datetime.now():%Y-%m-%d}"

    def down(self) -> None:
        """Remove containers, networks and volumes. Raises Failed."""
        self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")

    @contextmanager
    def cleared_away(self) -> Iterator[None]:
        """Begin with nothing and leave nothing behind."""
        self.down()
        try:
            self.compose("build", "worker")
            yield
        finally:
            self.down()

    @contextmanager
    def apart(self, *services: str) -> Iterator[None]:
        """Take services off their networks, into one where they see each other and nobody else."""
        side, taken = f"{self.project}_side", []
        self.run("docker", "network", "create", side)
        try:
            for service in services:
                container = self.containers(service)[0]
                found = json.loads(self.run("docker", "inspect", container))[0]["NetworkSettings"]["Networks"]
                for network in found:
                    self.run("docker", "network", "disconnect", network, container)
                    taken.append((network, service, container))
                self.run("docker", "network", "connect", "--alias", service, side, container)
            yield
        finally:
            for service in services:
                self.run("docker", "network", "disconnect", side, self.containers(service)[0])
            for network, service, container in taken:
                self.run("docker", "network", "connect", "--alias", service, network, container)
            self.run("docker", "network", "rm", side)


class Client:
    """A client of the lab in a container, which prints a JSON object on each line."""

    def __init__(self, stack: Stack, module: str, *arguments: str) -> None:
        self.stack, self.name = stack, f"{stack.project}-client-{time.monotonic_ns()}"
        options = ("--rm", "-T", "--no-deps", "--name", self.name)
        self.process = subprocess.Popen(
            [*stack.command, "run", *options, "producer", "python", "-m", f"lab.{module}", *arguments],
            cwd=ROOT,
            env=stack.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed: list[str] = []

    def _read(self) -> Iterator[str]:
        for line in self.process.stdout or ():
            self.printed.append(line)
            yield line

    def wait_for(self, key: str, at_least: Any = 0) -> dict[str, Any]:
        """Return the first line with a key whose value is so high. Raises Failed, after TIMEOUT at the latest."""
        give_up = threading.Timer(TIMEOUT, self.process.kill)
        give_up.start()
        try:
            for line in chain(tuple(self.printed), self._read()):
                said: dict[str, Any] = json.loads(line) if line.startswith("{") else {}
                if key in said and said[key] >= at_least:
                    return said
        finally:
            give_up.cancel()
        raise Failed(f"the client does not say {key!r}: {''.join(self.printed)[-1000:]}")

    def go(self) -> None:
        """Let it go on, if it waits for that."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)

    def kill(self) -> None:
        """Kill it with SIGKILL. Raises Failed."""
        self.stack.run("docker", "kill", self.name)
        self.wait()

    def wait(self) -> None:
        """Wait until it has ended. Raises Failed."""
        try:
            self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired as exc:
            raise Failed(str(exc)) from None
