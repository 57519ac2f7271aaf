"""Break one thing at a time while tasks run, and count what becomes of them.

It runs on the host and needs nothing there but Docker and Python: ``python3 lab/faults.py``. It starts the demo's
services in a Compose project of its own, beside a running demo, and removes it in the end. A part of it:

  python3 lab/faults.py --list                        what is broken
  python3 lab/faults.py redis-killed worker-killed    these only, on both stores
  python3 lab/faults.py --store rabbitmq              one store only
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROJECT = "celery-result-backends-faults"
STORES = ("redis", "rabbitmq")
TASKS = 1000
AWAY = 20  # seconds for which a server is paused or a network is cut
ROW_TIMEOUT = 300  # seconds; a row that takes longer has failed


class Stack:
    """The demo's services in a Compose project of their own."""

    def __init__(self, store: str) -> None:
        self.store = store
        self.env = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_DISABLE_ENV_FILE": "1",
            "RESULT_STORE": store,
            "FLOWER_PORT": "0",  # any free one
            "RABBITMQ_PORT": "0",
        }

    def docker(self, *command: str, stdin: str | None = None, timeout: float = 180.0) -> str:
        """Run a docker command and return its output. Raises CalledProcessError or TimeoutExpired."""
        done = subprocess.run(
            ["docker", *command],
            cwd=ROOT,
            env=self.env,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
        return done.stdout

    def compose(self, *command: str, **options: Any) -> str:
        """Run a docker compose command."""
        return self.docker("compose", "-f", "docker-compose.yml", "-f", "lab/faults.yml", *command, **options)

    def up(self, workers: int = 1) -> None:
        """Bring everything into the state in which each row begins."""
        self.compose("up", "--detach", "--wait", "--no-build", f"--scale=worker={workers}", "worker", timeout=300)

    def start(self, *services: str) -> None:
        """Start services again, and wait until they are healthy."""
        self.compose("start", *services)

    def down(self) -> None:
        """Remove containers, networks and volumes."""
        self.compose("--profile", "*", "down", "--volumes", "--remove-orphans", "--timeout", "5")

    def container(self, service: str) -> str:
        """Return the id of a service's first container."""
        return self.compose("ps", "--all", "--quiet", service).split()[0]

    def redis(self, *command: str) -> str:
        """Run a command in redis-cli."""
        return self.compose("exec", "-T", "redis", "redis-cli", *command)

    def executions(self, since: float) -> Counter[str]:
        """Count how often each task was begun, from the workers' logs."""
        log = self.compose("logs", "--no-color", "--no-log-prefix", "--since", f"{since:.3f}", "worker")
        return Counter(line.rpartition(" ")[2] for line in log.splitlines() if " executed " in f"{line} ")

    def client(self, *arguments: str, name: str) -> "Client":
        """Start the client in a container of its own."""
        return Client(self, name, arguments)


class Client:
    """A running lab/fault_client.py, and what it has said so far."""

    def __init__(self, stack: Stack, name: str, arguments: tuple[str, ...]) -> None:
        self.stack, self.name = stack, f"{PROJECT}-{name}"
        self.said: list[dict[str, Any]] = []
        self.changed = threading.Condition()
        self.process = subprocess.Popen(
            # fmt: off
            [
                "docker",
                "compose",
                "-f",
                "docker-compose.yml",
                "-f",
                "lab/faults.yml",
                "run",
                "--rm",
                "-T",
                "--no-deps",
                "--name",
                self.name,
                "producer",
                "python",
                "-m",
                "lab.fault_client",
                *arguments,
            ],
            # fmt: on
            cwd=ROOT,
            env=stack.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._read_errors, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            with self.changed:
                self.said.append(json.loads(line))
                self.changed.notify_all()
        with self.changed:
            self.changed.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr
        self.errors.extend(self.process.stderr)

    def wait_for(self, key: str, at_least: int = 1) -> Any:
        """Return the value that the client gives for a key, once it is so high. Raises RuntimeError or TimeoutError."""
        deadline = time.monotonic() + ROW_TIMEOUT
        with self.changed:
            while True:
                for said in self.said:
                    if key in said and (not isinstance(said[key], int) or said[key] >= at_least):
                        return said[key]
                if self.process.poll() is not None:
                    raise RuntimeError(f"the client has ended: {''.join(self.errors)[-2000:]}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the client does not say {key!r}: {''.join(self.errors)[-2000:]}")
                self.changed.wait(1)

    def report(self) -> dict[str, Any]:
        """Wait for the last line."""
        self.wait_for("accepted", 0)
        self.process.wait(60)
        return self.said[-1]

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        self.stack.docker("kill", self.name)
        self.process.wait(60)


@dataclass(frozen=True)
class Fault:
    """What is broken while tasks run."""

    name: str
    text: str
    inject: Callable[[Stack], None]
    workers: int = 1
    options: tuple[str, ...] = ()
    not_promised: dict[str, str] = field(default_factory=dict)  # store: why it cannot promise to keep the results


def nothing(stack: Stack) -> None:
    """Break nothing."""


def kill_pool_process(stack: Stack) -> None:
    """Kill both processes of the worker's pool in mid-task."""
    children = "/proc/1/task/1/children"
    for _ in range(2):
        stack.compose(
            "exec", "-T", "worker", "python", "-c",
            f"import os; os.kill(int(open({children!r}).read().split()[0]), 9)",
        )  # fmt: skip
        time.sleep(1)


def killed(*services: str) -> Callable[[Stack], None]:
    """Kill services with SIGKILL, and start them after 2 seconds."""

    def inject(stack: Stack) -> None:
        stack.compose("kill", *services)
        time.sleep(2)
        stack.start(*services)

    return inject


def restarted(*services: str) -> Callable[[Stack], None]:
    """Stop services with SIGTERM and start them again."""

    def inject(stack: Stack) -> None:
        stack.compose("stop", *services)
        stack.start(*services)

    return inject


def paused(service: str) -> Callable[[Stack], None]:
    """Freeze a service."""

    def inject(stack: Stack) -> None:
        stack.compose("pause", service)
        time.sleep(AWAY)
        stack.compose("unpause", service)

    return inject


def cut_off(*networks: str) -> Callable[[Stack], None]:
    """Take the worker off networks."""

    def inject(stack: Stack) -> None:
        worker = stack.container("worker")
        for network in networks:
            stack.docker("network", "disconnect", f"{PROJECT}_{network}", worker)
        time.sleep(AWAY)
        for network in networks:
            stack.docker("network", "connect", "--alias", "worker", f"{PROJECT}_{network}", worker)

    return inject


def lose_one_worker(stack: Stack) -> None:
    """Kill one of two workers; it does not come back."""
    stack.docker("kill", stack.container("worker"))


def redis_full(stack: Stack) -> None:
    """Let Redis refuse to take anything more."""
    limit = stack.redis("config", "get", "maxmemory").split()[-1]
    stack.redis("config", "set", "maxmemory", "1")
    time.sleep(AWAY)
    stack.redis("config", "set", "maxmemory", limit)


def rabbitmq_alarm(stack: Stack) -> None:
    """Let RabbitMQ block everybody who publishes, as it does when it runs out of memory."""
    stack.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "set_vm_memory_high_watermark", "absolute", "1")
    time.sleep(AWAY)
    stack.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "-q", "set_vm_memory_high_watermark", "0.6")


FAULTS = [
    Fault("none", "nothing", nothing),
    Fault("pool-process-killed", "two processes of the worker's pool killed in mid-task", kill_pool_process),
    Fault("poison-task", "a task that kills its process each time", nothing, options=("--poison",)),
    Fault("worker-killed", "worker killed", killed("worker")),
    Fault("worker-restarted", "worker stopped and started", restarted("worker")),
    Fault("one-of-two-workers", "one of two workers killed for good", lose_one_worker, workers=2),
    Fault("rabbitmq-restarted", "RabbitMQ stopped and started", restarted("rabbitmq")),
    Fault("rabbitmq-killed", "RabbitMQ killed", killed("rabbitmq")),
    Fault("rabbitmq-paused", f"RabbitMQ frozen for {AWAY} s", paused("rabbitmq")),
    Fault("rabbitmq-alarm", f"RabbitMQ blocks publishers for {AWAY} s", rabbitmq_alarm),
    Fault("redis-restarted", "Redis stopped and started", restarted("redis")),
    Fault("redis-killed", "Redis killed", killed("redis")),
    Fault("redis-paused", f"Redis frozen for {AWAY} s", paused("redis")),
    Fault("redis-full", f"Redis full for {AWAY} s", redis_full),
    Fault("worker-cut-off", f"worker without network for {AWAY} s", cut_off("default", "results")),
    Fault("worker-cut-off-redis", f"worker cut off from Redis for {AWAY} s", cut_off("results")),
    Fault("all-restarted", "everything stopped and started", restarted("worker", "rabbitmq", "redis")),
]


def run_row(stack: Stack, fault: Fault) -> dict[str, Any]:
    """Break one thing, and return what became of the tasks."""
    stack.up(fault.workers)
    since = time.time()
    client = stack.client("stream", str(TASKS), *fault.options, name="client")
    client.wait_for("fetched", 100)
    fault.inject(stack)
    report = client.report()
    executed = stack.executions(since)
    report["twice"] = sum(1 for count in executed.values() if count > 1)
    report["poison"] = next((said["poison"] for said in client.said if "poison" in said), "")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", nargs="*")
    parser.add_argument("--store", choices=STORES)
    arguments = parser.parse_args()
    chosen = [fault for fault in FAULTS if not arguments.fault or fault.name in arguments.fault]
    for store in [arguments.store] if arguments.store else STORES:
        stack = Stack(store)
        stack.down()
        stack.compose("build", "worker", timeout=900)
        for fault in chosen:
            begun = time.monotonic()
            try:
                report = run_row(stack, fault)
            except Exception as exc:
                report = {"failed": repr(exc), "stderr": getattr(exc, "stderr", "")}
            print(f"{store:9} {fault.name:22} {time.monotonic() - begun:5.0f} s  {json.dumps(report)}", flush=True)
            if "failed" in report:
                stack.down()
        stack.down()
    return 0


if __name__ == "__main__":
    sys.exit(main())
