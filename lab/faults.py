"""Break one thing at a time while tasks run, and count what becomes of them.

It runs on the host and needs nothing there but Docker and Python 3.11. It starts the demo's services in a Compose
project of its own, beside a running demo, and removes it in the end.

python3 -m lab.faults                               everything on both stores, then a table: half an hour
python3 -m lab.faults redis-killed worker-killed    these faults only; --help lists them
python3 -m lab.faults --store rabbitmq              one store only
python3 -m lab.faults --load                        nothing breaks: does anything grow without end? 40 minutes
python3 -m lab.faults --load 3                      the same with 3 minutes of steady load in place of 10

--load queues 2,000 tasks for each minute at once, and fetches them; then, for so many minutes, it queues 20 tasks a
second and never reads each tenth result. Results expire after 4 minutes.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
STORES = ("redis", "rabbitmq")
TASKS = 1000
AWAY = 20  # seconds for which a server is away, or a network cut
TIMEOUT = 300.0  # seconds that any single thing may take
BURST, RATE = 2_000, 20  # with --load: tasks at once for each minute, then tasks a second
EXPIRES = 240  # seconds until a result expires with --load


class Failed(Exception):
    """The run itself has failed; the message says what."""


class Stack:
    """The demo's services in a Compose project of their own."""

    command: tuple[str, ...] = ("docker", "compose", "-f", "docker-compose.yml", "-f", "lab/faults.yml")

    def __init__(self, store: str, purpose: str = "faults", **env: str) -> None:
        self.store, self.project = store, f"celery-result-backends-{purpose}-{store}"
        own = {"COMPOSE_PROJECT_NAME": self.project, "RESULT_STORE": store, "FLOWER_PORT": "0", "RABBITMQ_PORT": "0"}
        self.env = {**os.environ, "COMPOSE_DISABLE_ENV_FILE": "1", **own, **env}

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

    def container(self, service: str) -> str:
        """Return the id of a service's first container. Raises Failed."""
        return self.compose("ps", "--all", "--quiet", service).split()[0]

    def redis(self, *command: str) -> str:
        """Run a command in redis-cli as admin. Raises Failed."""
        login = 'REDISCLI_AUTH=$(cat /run/admin/password) exec redis-cli --user admin "$@"'
        return self.compose("exec", "-T", "redis", "sh", "-c", login, "redis-cli", *command)

    def rabbitmqctl(self, *command: str) -> str:
        """Run a command in rabbitmqctl. Raises Failed."""
        return self.compose("exec", "-T", "rabbitmq", "rabbitmqctl", "--quiet", *command)

    def up(self, workers: int = 1) -> None:
        """Bring RabbitMQ, Redis and so many workers into a good state, whatever was broken. Raises Failed."""
        self.compose("up", "--detach", "--wait", "--no-build", f"--scale=worker={workers}", "worker")

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


class Client:
    """lab/fault_client.py in a container, and what it has said so far."""

    def __init__(self, stack: Stack, *arguments: str, text: str = "") -> None:
        self.stack, self.name = stack, f"{stack.project}-client-{time.monotonic_ns()}"
        options = ("--rm", "-T", "--no-deps", "--name", self.name)
        self.process = subprocess.Popen(
            [*stack.command, "run", *options, "producer", "python", "-m", "lab.fault_client", *arguments],
            cwd=ROOT,
            env=stack.env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin
        self.process.stdin.write(text)
        self.process.stdin.close()
        self.said: list[dict[str, Any]] = []
        self.ended = False
        self.errors: list[str] = []
        self.changed = threading.Condition()
        for read in (self._read_output, self._read_errors):
            threading.Thread(target=read, daemon=True).start()

    def _read_output(self) -> None:
        for line in self.process.stdout or ():
            with self.changed:
                self.said.append(json.loads(line) if line.startswith("{") else {"output": line})
                self.changed.notify_all()
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    def _read_errors(self) -> None:
        self.errors.extend(self.process.stderr or ())

    def wait_for(self, key: str, at_least: Any = 0, timeout: float = TIMEOUT) -> dict[str, Any]:
        """Return the first line with a key whose value is so high. Raises Failed after timeout seconds."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while True:
                for line in self.said:
                    if key in line and line[key] >= at_least:
                        return line
                if self.ended or time.monotonic() > deadline:
                    raise Failed(f"the client does not say {key!r}: {''.join(self.errors)[-1000:]}")
                self.changed.wait(1)

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


@dataclass(frozen=True)
class Fault:
    """One thing that is broken while tasks run."""

    name: str
    text: str
    inject: Callable[..., None]
    what: tuple[str, ...] = ()  # services or networks
    workers: int = 1
    client: tuple[str, ...] = ("stream", str(TASKS))
    cold: bool = False  # each pool process runs one task: none has sent a result before


def nothing(stack: Stack) -> None:
    """Break nothing."""


def killed(stack: Stack, *services: str) -> None:
    """Kill services with SIGKILL, and start them 2 seconds later."""
    stack.compose("kill", *services)
    time.sleep(2)
    stack.compose("start", *services)


def restarted(stack: Stack, *services: str) -> None:
    """Stop services with SIGTERM, and start them again."""
    stack.compose("stop", *services)
    stack.compose("start", *services)


def stopped(stack: Stack, service: str) -> None:
    """Stop a service, and start it after a while."""
    stack.compose("stop", service)
    time.sleep(AWAY)
    stack.compose("start", service)


def paused(stack: Stack, service: str) -> None:
    """Freeze a service for a while; its connections stay open and nobody answers."""
    stack.compose("pause", service)
    time.sleep(AWAY)
    stack.compose("unpause", service)


def cut_off(stack: Stack, *networks: str) -> None:
    """Take the worker off networks for a while; packets vanish."""
    worker = stack.container("worker")
    for network in networks:
        stack.run("docker", "network", "disconnect", f"{stack.project}_{network}", worker)
    time.sleep(AWAY)
    for network in networks:
        stack.run("docker", "network", "connect", f"{stack.project}_{network}", worker)


def kill_pool_processes(stack: Stack) -> None:
    """Kill processes of the worker's pool in mid-task, as the kernel does when memory runs out."""
    kill_first_child = "import os; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), 9)"
    for _ in range(4):
        stack.compose("exec", "-T", "worker", "python", "-c", kill_first_child)
        time.sleep(2)


def lose_one_worker(stack: Stack) -> None:
    """Kill a worker; it does not come back."""
    stack.run("docker", "kill", stack.container("worker"))


def fill_redis(stack: Stack) -> None:
    """Let Redis refuse every write for a while."""
    limit = stack.redis("config", "get", "maxmemory").split()[-1]
    stack.redis("config", "set", "maxmemory", "1")
    time.sleep(AWAY)
    stack.redis("config", "set", "maxmemory", limit)


def raise_memory_alarm(stack: Stack) -> None:
    """Let RabbitMQ block everybody who publishes for a while."""
    stack.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "1")
    time.sleep(AWAY)
    stack.rabbitmqctl("set_vm_memory_high_watermark", "absolute", "600000000")  # as in docker-compose.yml


FAULTS = [
    Fault("none", "nothing", nothing),
    Fault("pool-killed", "four processes of the worker's pool killed", kill_pool_processes),
    Fault("poison", "a task kills its process each time", nothing, client=("stream", str(TASKS), "--poison")),
    Fault("worker-killed", "worker killed", killed, ("worker",)),
    Fault("worker-restarted", "worker stopped and started", restarted, ("worker",)),
    Fault("worker-lost", "one of two workers killed for good", lose_one_worker, workers=2),
    Fault("worker-cut-off", f"worker without network for {AWAY} s", cut_off, ("default", "results")),
    Fault("worker-cut-off-redis", f"worker cut off from Redis for {AWAY} s", cut_off, ("results",)),
    Fault("rabbitmq-restarted", "RabbitMQ stopped and started", restarted, ("rabbitmq",)),
    Fault(
        "rabbitmq-restarted-cold",
        "RabbitMQ stopped and started, with a new pool process for each task",
        restarted,
        ("rabbitmq",),
        cold=True,
    ),
    Fault(
        "rabbitmq-together",
        "RabbitMQ stopped and started inside a block of `together()`",
        restarted,
        ("rabbitmq",),
        client=("together", str(TASKS)),
    ),
    Fault("rabbitmq-stopped", f"RabbitMQ stopped for {AWAY} s", stopped, ("rabbitmq",)),
    Fault("rabbitmq-killed", "RabbitMQ killed", killed, ("rabbitmq",)),
    Fault("rabbitmq-paused", f"RabbitMQ frozen for {AWAY} s", paused, ("rabbitmq",)),
    Fault("rabbitmq-alarm", f"RabbitMQ blocks publishers for {AWAY} s", raise_memory_alarm),
    Fault("redis-restarted", "Redis stopped and started", restarted, ("redis",)),
    Fault("redis-stopped", f"Redis stopped for {AWAY} s", stopped, ("redis",)),
    Fault("redis-killed", "Redis killed", killed, ("redis",)),
    Fault("redis-paused", f"Redis frozen for {AWAY} s", paused, ("redis",)),
    Fault("redis-full", f"Redis full for {AWAY} s", fill_redis),
    Fault("all-restarted", "all of them stopped and started", restarted, ("worker", "rabbitmq", "redis")),
    Fault("producer-killed", "producer killed, a new one fetches by id", nothing, client=("queue", str(TASKS))),
]
NOT_PROMISED = {("rabbitmq", "producer-killed"): "the reply queue belongs to the process that queued the tasks"}


@dataclass(frozen=True)
class Row:
    """What became of the tasks."""

    store: str
    fault: Fault
    accepted: int
    lost: int
    wrong: list[str]
    twice: int
    longest_pause: float
    longest_get: float
    longest_delay: float
    noticed: dict[str, int]

    @property
    def good(self) -> bool:
        """Tell whether every result that the store promises to keep was fetched."""
        return not self.wrong and (not self.lost or (self.store, self.fault.name) in NOT_PROMISED)


def executions(stack: Stack, since: float) -> Counter[str]:
    """Count how often each task was begun, from the workers' logs. Raises Failed."""
    log = stack.compose("logs", "--no-color", "--no-log-prefix", "--since", f"{since:.3f}", "worker")
    return Counter(line.rpartition(" ")[2] for line in log.splitlines() if ": executed " in line)


def try_fault(stack: Stack, fault: Fault) -> Row:
    """Break one thing while tasks run, and count. Raises Failed."""
    stack.env["MAX_TASKS_PER_CHILD"] = "1" if fault.cold else ""
    stack.up(fault.workers)
    since = time.time()
    client = Client(stack, *fault.client)
    if fault.client[0] == "queue":
        client.wait_for("queued")
        client.kill()
        ids = "".join(f"{json.dumps(line)}\n" for line in client.said if "id" in line)
        client = Client(stack, "fetch", text=ids)
    else:
        client.wait_for("sent" if fault.client[0] == "together" else "fetched", at_least=100)
        fault.inject(stack, *fault.what)
    report = client.wait_for("accepted")
    client.wait()
    if "--poison" in fault.client and "exited prematurely" not in client.wait_for("poison", "")["poison"]:
        raise Failed("the poison task did not end as a WorkerLostError")
    return Row(
        stack.store,
        fault,
        report["accepted"],
        report["lost"],
        report["wrong"],
        sum(times > 1 for times in executions(stack, since).values()),
        report["longest_pause"],
        report["longest_get"],
        report["longest_delay"],
        report["noticed"],
    )


def table(rows: list[Row], faults: Sequence[Fault] = FAULTS) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| broken | store | accepted | fetched | lost | run twice | longest pause | longest `get(timeout=5)` "
        "| longest `delay()` | the client noticed |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fault in faults:
        for row in (row for row in rows if row.fault is fault):
            noticed = ", ".join(f"{times} x {what}" for what, times in row.noticed.items()) or "nothing"
            lost = f"{row.lost:,}\\*" if (row.store, fault.name) in NOT_PROMISED else f"{row.lost:,}"
            fetched = row.accepted - row.lost - len(row.wrong)
            lines.append(
                f"| {fault.text} | {row.store} | {row.accepted:,} | {fetched:,} | {lost} "
                f"| {row.twice} | {row.longest_pause:.0f} s | {row.longest_get:.0f} s | {row.longest_delay:.0f} s "
                f"| {noticed} |"
            )
    for row in rows:
        if why := NOT_PROMISED.get((row.store, row.fault.name)):
            lines.append(f"\n\\* {row.store}: {why}.")
    return "\n".join(lines)


def try_faults(stack: Stack, chosen: list[Fault], rows: list[Row]) -> int:
    """Try faults on one store, and return how many of them went wrong. Raises Failed."""
    failures = 0
    with stack.cleared_away():
        for fault in chosen:
            started = time.monotonic()
            print(f"  {fault.text} ...", end=" ", file=sys.stderr, flush=True)
            try:
                rows.append(row := try_fault(stack, fault))
                verdict = f"{row.lost} of {row.accepted:,} lost"
                if not row.good:
                    verdict += f", NOT GOOD {row.wrong[:3]}"
                failures += not row.good
            except Failed as exc:
                verdict, failures = f"FAILED: {exc}", failures + 1
                stack.down()
            print(f"{verdict} ({time.monotonic() - started:.0f} s)", file=sys.stderr, flush=True)
    return failures


# --- Nothing breaks, and nothing may grow without end -----------------------------------------------------


def memory(stack: Stack, client: Client | None) -> list[float]:
    """Return MB of producer, workers, Redis and RabbitMQ; the servers' own figures, not the containers'."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "kB": 1e3, "B": 1.0}
    names = [*([client.name] if client else []), *stack.compose("ps", "--quiet", "worker").split()]
    used = stack.run("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", *names)
    megabytes = [
        float(value) * units[unit] / 1e6 for value, unit in re.findall(r"^([\d.]+)(\w+) /", used, re.MULTILINE)
    ]
    producer = megabytes.pop(0) if client else 0.0
    redis = stack.redis("info", "memory").partition("used_memory:")[2].split()[0]
    rabbitmq = stack.rabbitmqctl("eval", "erlang:memory(total).")
    return [producer, sum(megabytes), int(redis) / 1e6, int(rabbitmq) / 1e6]


def try_load(stack: Stack, minutes: int) -> None:
    """Print a row for each moment of one store. Raises Failed, also when a result is lost."""

    def row(moment: str, client: Client | None = None) -> None:
        cells = " | ".join(f"{megabytes:.0f}" if megabytes else "-" for megabytes in memory(stack, client))
        print(f"| {stack.store} | {moment} | {cells} |", flush=True)

    def all_there(client: Client) -> None:
        report = client.wait_for("accepted", timeout=1200)
        if report["lost"] or report["wrong"]:
            raise Failed(f"{report['lost']} results are lost, {len(report['wrong'])} are wrong")

    with stack.cleared_away():
        stack.up(workers=2)
        Client(stack, "stream", "100").wait_for("accepted")  # what is allocated once, is
        row("before")
        burst = minutes * BURST
        client = Client(stack, "burst", str(burst))
        client.wait_for("queued", timeout=1200)
        row(f"{burst:,} tasks queued", client)
        client.wait_for("fetched", at_least=burst // 2, timeout=1200)
        row("half of the results fetched", client)
        all_there(client)
        row("all fetched", client)
        client.kill()
        time.sleep(EXPIRES)
        row(f"{EXPIRES} s later, results have expired")
        client = Client(stack, "steady", str(minutes * 60 * RATE), "--rate", str(RATE))
        for minute in range(1, minutes + 1):
            client.wait_for("fetched", at_least=minute * (60 * RATE * 9 // 10) - 150)
            row(f"{RATE} tasks a second, minute {minute}", client)
        all_there(client)
        client.kill()


def main() -> int:
    """Try the faults or the load, print the table, and return 0 if every promised result was fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("fault", nargs="*", help=", ".join(names))
    parser.add_argument("--store", choices=STORES)
    parser.add_argument("--load", type=int, nargs="?", const=10, metavar="MINUTES", help="break nothing, and look")
    arguments = parser.parse_args()
    if unknown := set(arguments.fault) - set(names):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [fault for fault in FAULTS if fault.name in (arguments.fault or names)]
    rows: list[Row] = []
    failures = 0
    if arguments.load:
        print("| store | moment | producer, MB | two workers, MB | Redis, MB | RabbitMQ, MB |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
    try:
        for store in [arguments.store] if arguments.store else STORES:
            print(f"Starting the servers, results in {store}.", file=sys.stderr, flush=True)
            if arguments.load:
                try_load(Stack(store, RESULT_EXPIRES=str(EXPIRES)), arguments.load)
            else:
                failures += try_faults(Stack(store), chosen, rows)
    except (Failed, KeyboardInterrupt) as exc:
        failures += 1
        print(f"\nfaults: {str(exc) or 'interrupted'}", file=sys.stderr)
    if rows:
        print(table(rows))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
