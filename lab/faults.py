"""Break one thing at a time while tasks run, and count what becomes of them.

It runs on the host, in a Compose project of its own, beside a running demo, and removes it in the end.

python3 -m lab.faults                               everything on both stores, then a table: half an hour
python3 -m lab.faults redis-killed worker-killed    these faults only; --help lists them
python3 -m lab.faults --store rabbitmq              one store only
python3 -m lab.faults --cluster                     three RabbitMQ and three Redis, of which it breaks one: 25 minutes
python3 -m lab.faults --load                        nothing breaks: does anything grow without end? 25 minutes

--load queues 20 tasks a second for ten minutes, and never reads each tenth result. Results expire after 4 minutes.
"""

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lab.stack import NODES, SENTINELS, STORES, Client, Failed, Stack

TASKS = 1000
AWAY = 20  # seconds for which a server is away, or a network cut
MINUTES, RATE, EXPIRES = 10, 20, 240  # with --load: so many tasks a second, seconds until a result expires

Break = Callable[[Stack], None]


def nothing(stack: Stack) -> None:
    """Break nothing."""


def down(how: str, *services: str, seconds: float = AWAY) -> Break:
    """Kill, stop or pause services, or those that lead now, and have them back after some seconds."""

    def inject(stack: Stack) -> None:
        named = [stack.now(service) for service in services]
        stack.compose(how, *named)
        time.sleep(seconds)
        stack.compose("unpause" if how == "pause" else "start", *named)

    return inject


def apart(*services: str, seconds: float = AWAY) -> Break:
    """Take services, or those that lead now, off their networks; among themselves they see each other."""

    def inject(stack: Stack) -> None:
        with stack.apart(*map(stack.now, services)):
            time.sleep(seconds)

    return inject


def cut_off(*networks: str) -> Break:
    """Take the worker off networks for a while; packets vanish."""

    def inject(stack: Stack) -> None:
        worker = stack.containers("worker")[0]
        for network in networks:
            stack.run("docker", "network", "disconnect", f"{stack.project}_{network}", worker)
        time.sleep(AWAY)
        for network in networks:
            stack.run("docker", "network", "connect", f"{stack.project}_{network}", worker)

    return inject


def kill_pool_processes(stack: Stack) -> None:
    """Kill processes of the worker's pool in mid-task, as the kernel does when memory runs out."""
    kill_first_child = "import os; os.kill(int(open('/proc/1/task/1/children').read().split()[0]), 9)"
    for _ in range(4):
        stack.compose("exec", "-T", "worker", "python", "-c", kill_first_child)
        time.sleep(2)


def lose_one_worker(stack: Stack) -> None:
    """Kill a worker; it does not come back."""
    stack.run("docker", "kill", stack.containers("worker")[0])


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


def restart_each_node(stack: Stack) -> None:
    """Restart each node, the next when the last has joined, as an upgrade does."""
    for node in NODES:
        stack.compose("stop", node)
        stack.compose("up", "--detach", "--wait", "--no-deps", node)


@dataclass(frozen=True)
class Fault:
    """One thing that is broken while tasks run."""

    name: str
    text: str
    inject: Break
    workers: int = 1
    client: str = "stream"
    cold: bool = False  # each pool process runs one task: none has sent a result before


RESTART = down("stop", "rabbitmq", seconds=0)
FAULTS = [
    Fault("none", "nothing", nothing),
    Fault("pool-killed", "four processes of the worker's pool killed", kill_pool_processes),
    Fault("poison", "a task kills its process each time", nothing, client="poison"),
    Fault("worker-killed", "worker killed", down("kill", "worker", seconds=2)),
    Fault("worker-restarted", "worker stopped and started", down("stop", "worker", seconds=0)),
    Fault("worker-lost", "one of two workers killed for good", lose_one_worker, workers=2),
    Fault("worker-cut-off", f"worker without network for {AWAY} s", cut_off("default", "results")),
    Fault("worker-cut-off-redis", f"worker cut off from Redis for {AWAY} s", cut_off("results")),
    Fault("rabbitmq-restarted", "RabbitMQ stopped and started", RESTART),
    Fault("cold", "RabbitMQ stopped and started, with a new pool process for each task", RESTART, cold=True),
    Fault("together", "RabbitMQ stopped and started inside a block of `together()`", RESTART, client="together"),
    Fault("rabbitmq-stopped", f"RabbitMQ stopped for {AWAY} s", down("stop", "rabbitmq")),
    Fault("rabbitmq-killed", "RabbitMQ killed", down("kill", "rabbitmq", seconds=2)),
    Fault("rabbitmq-paused", f"RabbitMQ frozen for {AWAY} s", down("pause", "rabbitmq")),
    Fault("rabbitmq-alarm", f"RabbitMQ blocks publishers for {AWAY} s", raise_memory_alarm),
    Fault("redis-restarted", "Redis stopped and started", down("stop", "redis", seconds=0)),
    Fault("redis-stopped", f"Redis stopped for {AWAY} s", down("stop", "redis")),
    Fault("redis-killed", "Redis killed", down("kill", "redis", seconds=2)),
    Fault("redis-paused", f"Redis frozen for {AWAY} s", down("pause", "redis")),
    Fault("redis-full", f"Redis full for {AWAY} s", fill_redis),
    Fault("all-restarted", "all of them stopped and started", down("stop", "worker", "rabbitmq", "redis", seconds=0)),
    Fault("producer-killed", "producer killed, a new one fetches by id", nothing, client="queue"),
]
NOT_PROMISED = {("rabbitmq", "producer-killed"): "the reply queue belongs to the process that queued the tasks"}

OWN = NODES[0]  # what client and worker are connected to
SIDE = ("worker", NODES[2], "replica", SENTINELS[2])
CLUSTER_FAULTS = [
    Fault("none", "nothing", nothing),
    Fault("leader-killed", f"the leader of `tasks` killed for {AWAY} s", down("kill", "leader")),
    Fault("node-killed", f"the client's own RabbitMQ node killed for {AWAY} s", down("kill", OWN)),
    Fault("rolling", "each RabbitMQ node stopped and started in turn", restart_each_node),
    Fault("leader-cut-off", f"the leader of `tasks` cut off from all others for {AWAY} s", apart("leader")),
    Fault(
        "node-cut-off",  # for longer than anybody should wait for it
        f"the client's own RabbitMQ node cut off from all others for {3 * AWAY} s",
        apart(OWN, seconds=3 * AWAY),
    ),
    Fault("two-killed", f"two of three RabbitMQ nodes killed for {AWAY} s", down("kill", *NODES[1:])),
    Fault("master-killed", f"the Redis master killed for {AWAY} s", down("kill", "master")),
    Fault("master-frozen", f"the Redis master frozen for {AWAY} s", down("pause", "master")),
    Fault("master-stopped", f"the Redis master stopped for {AWAY} s", down("stop", "master")),
    Fault("master-restarted", "the Redis master killed for 2 s", down("kill", "master", seconds=2)),
    Fault("sentinel-lost", f"a Sentinel and the Redis master killed for {AWAY} s", down("kill", "sentinel", "master")),
    Fault("two-sides", f"the worker and a node of each server cut off from the client for {AWAY} s", apart(*SIDE)),
]


# --- What becomes of the tasks ----------------------------------------------------------------------------


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


def try_fault(stack: Stack, fault: Fault, tasks: int) -> Row:
    """Break one thing while tasks run, and count. Raises Failed."""
    stack.env["MAX_TASKS_PER_CHILD"] = "1" if fault.cold else ""
    stack.up(fault.workers)
    since = time.time()
    name = f"{fault.name}-{since}"
    client = Client(stack, "fault_client", fault.client, str(tasks), name)
    if fault.client == "queue":
        client.wait_for("queued")
        client.kill()
        client = Client(stack, "fault_client", "fetch", str(tasks), name)
    else:
        client.wait_for("sent" if fault.client == "together" else "fetched", at_least=100)
        fault.inject(stack)
    report = client.wait_for("accepted")
    client.wait()
    if fault.client == "poison" and "exited prematurely" not in client.wait_for("poison", "")["poison"]:
        raise Failed("the poison task did not end as a WorkerLostError")
    return Row(stack.store, fault, twice=sum(times > 1 for times in executions(stack, since).values()), **report)


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


def try_faults(stack: Stack, chosen: list[Fault], tasks: int, rows: list[Row]) -> int:
    """Try faults on one store, and return how many of them went wrong. Raises Failed."""
    failures = 0
    with stack.cleared_away():
        stack.up()
        print(stack.conditions(), flush=True)
        for fault in chosen:
            started = time.monotonic()
            print(f"  {fault.text} ...", end=" ", file=sys.stderr, flush=True)
            try:
                rows.append(row := try_fault(stack, fault, tasks))
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
    names = [*([client.name] if client else []), *stack.containers("worker")]
    used = stack.run("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", *names)
    megabytes = [
        float(value) * units[unit] / 1e6 for value, unit in re.findall(r"^([\d.]+)(\w+) /", used, re.MULTILINE)
    ]
    producer = megabytes.pop(0) if client else 0.0
    redis = stack.redis("info", "memory").partition("used_memory:")[2].split()[0]
    return [producer, sum(megabytes), int(redis) / 1e6, stack.rabbitmq_mb()]


def try_load(stack: Stack) -> None:
    """Print a row for each minute of one store. Raises Failed, also when a result is lost."""

    def row(moment: str, client: Client | None = None) -> None:
        cells = " | ".join(f"{megabytes:.0f}" if megabytes else "-" for megabytes in memory(stack, client))
        print(f"| {stack.store} | {moment} | {cells} |", flush=True)

    with stack.cleared_away():
        stack.up(workers=2)
        print(f"{stack.conditions()}\n", flush=True)
        print("| store | moment | producer, MB | two workers, MB | Redis, MB | RabbitMQ, MB |")
        print("| --- | --- | --- | --- | --- | --- |")
        row("before")
        client = Client(stack, "fault_client", "steady", str(MINUTES * 60 * RATE))
        for minute in range(1, MINUTES + 1):
            client.wait_for("fetched", at_least=minute * (60 * RATE * 9 // 10) - 150)
            row(f"minute {minute}", client)
        report = client.wait_for("accepted")
        client.kill()
    if report["lost"] or report["wrong"]:
        raise Failed(f"{report['lost']} results are lost, {len(report['wrong'])} are wrong")


def main() -> int:
    """Try the faults or the load, print the table, and return 0 if every promised result was fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", nargs="*", help="; ".join(fault.name for fault in FAULTS))
    parser.add_argument("--store", choices=STORES)
    parser.add_argument("--cluster", action="store_true", help="; ".join(fault.name for fault in CLUSTER_FAULTS))
    parser.add_argument("--tasks", type=int, default=TASKS)
    parser.add_argument("--load", action="store_true", help="break nothing, and look at the memory")
    arguments = parser.parse_args()
    faults = CLUSTER_FAULTS if arguments.cluster else FAULTS
    if unknown := set(arguments.fault) - {fault.name for fault in faults}:
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; see --help")
    chosen = [fault for fault in faults if fault.name in arguments.fault or not arguments.fault]
    rows: list[Row] = []
    failures = 0
    try:
        for store in [arguments.store] if arguments.store else STORES:
            print(f"Starting the servers, results in {store}.", file=sys.stderr, flush=True)
            if arguments.load:
                try_load(Stack(store, "load", RESULT_EXPIRES=str(EXPIRES)))
            else:
                stack = Stack(store, *(["cluster", NODES] if arguments.cluster else ["faults"]))
                failures += try_faults(stack, chosen, arguments.tasks, rows)
    except (Failed, KeyboardInterrupt) as exc:
        failures += 1
        print(f"\nfaults: {str(exc) or 'interrupted'}", file=sys.stderr)
    if rows:
        print(table(rows, faults))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
