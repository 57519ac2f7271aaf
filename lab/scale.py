"""How far it scales: tasks a second with one, two and three RabbitMQ nodes, and what a cluster costs.

It runs on the host, in a Compose project of its own, and removes it in the end.

python3 -m lab.scale                     both stores, a quarter of an hour; nothing else should run meanwhile
python3 -m lab.scale --store redis       one store only

Each worker is a machine with one CPU. A RabbitMQ node gets so little of a CPU that all of this machine is enough for
three of them, and that it is what is missing first: the last columns say whether that is so.
"""

import argparse
import statistics
import sys
import time

from lab.stack import NODES, SENTINELS, STORES, Client, Failed, Stack

NODE_CPU, WORKER_CPU = 0.25, 1.0
PERIOD = 10_000  # microseconds in which a node may use its share; Docker's own 100,000 would be pauses of 80 ms
WORKERS = 3
QUEUES = ("tasks", "imports", "mails")
TASKS, WAITING, TRIPS, REPLIES, ROUNDS = 2_000, 600, 200, 300, 3
IDLE = 10  # seconds
OTHERS = ("redis", "redis-2", "redis-3", *SENTINELS)
HEAD = ["store", "nodes", "queues", "led by", "tasks/s, ratio", "tasks/s", "RabbitMQ's CPU a task"]
HEAD += ["busiest node uses", "worker", "client"]
CPU_NS = "cat /sys/fs/cgroup/cpuacct/cpuacct.usage 2>&- || awk '/usage_usec/ {print $2 * 1000}' /sys/fs/cgroup/cpu.stat"


def seconds_of_cpu(stack: Stack, service: str) -> float:
    """Return what the service's busiest container has used. Raises Failed."""
    return max(
        float(stack.run("docker", "exec", container, "sh", "-c", CPU_NS)) / 1e9
        for container in stack.containers(service)
    )


def measure(stack: Stack, what: str, count: int, *more: str) -> dict[str, float]:
    """Let a client measure, and return its figures. Raises Failed."""
    client = Client(stack, "scale_client", what, str(count), *more)
    client.go()
    figures = client.wait_for("spread" if what == "waiting" else what)
    client.wait()
    return figures


def start(stack: Stack, nodes: tuple[str, ...]) -> None:
    """Start the cluster, and take the other RabbitMQ nodes out of it again. Raises Failed."""
    stack.compose("up", "--detach", "--no-build", "--no-deps", "--wait", *NODES, *OTHERS)
    for node in set(NODES) - set(nodes):
        stack.compose("stop", node)
        stack.rabbitmqctl("forget_cluster_node", f"rabbit@{node}")


def run_workers(stack: Stack, count: int) -> None:
    """Run so many workers. Raises Failed."""
    number = f"--scale=worker={count}"
    stack.compose("up", "--detach", "--no-build", "--no-deps", "--no-recreate", "--wait", number, "worker")
    stack.run("docker", "update", "--cpus", str(WORKER_CPU), *stack.containers("worker"))


def rates(stack: Stack, nodes: tuple[str, ...], queues: tuple[str, ...]) -> dict[str, list[float]]:
    """Return for each round tasks/s, CPU of all nodes for a task, and what each kind uses of its own. Raises Failed."""
    found: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        client = Client(stack, "scale_client", "spread", str(TASKS), ",".join(queues))
        client.wait_for("begins")
        before = {service: seconds_of_cpu(stack, service) for service in (*nodes, "worker")}
        client.go()
        figures = client.wait_for("spread")
        used = {service: seconds_of_cpu(stack, service) - before[service] for service in before}
        client.wait()
        seconds, of_nodes = figures["spread"], [used[node] for node in nodes]
        for name, value in {
            "per_s": TASKS / seconds,
            "cpu_ms": 1000 * sum(of_nodes) / TASKS,
            "busiest node": max(of_nodes) / seconds / NODE_CPU,
            "worker": used["worker"] / seconds / WORKER_CPU,
            "client": figures["cpu"] / seconds,
        }.items():
            found.setdefault(name, []).append(value)
    return found


def show(*cells: object) -> None:
    """Print a row."""
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def try_nodes(store: str, count: int, one: list[float], notes: list[str]) -> None:
    """Print the rows of so many nodes; one: the rates of one node with one queue. Raises Failed."""
    nodes = NODES[:count]
    stack = Stack(store, "scale", nodes, QUEUES=",".join(QUEUES), PREFETCH="32")
    with stack.cleared_away():
        start(stack, nodes)
        if count == 1:
            alone = []
            for workers in range(1, WORKERS + 1):
                run_workers(stack, workers)
                alone.append(WAITING * workers / measure(stack, "waiting", WAITING * workers, QUEUES[0])["spread"])
            ratio = ", ".join(f"{rate / alone[0]:.1f}" for rate in alone)
            notes.append(
                f"{store}: tasks that wait for 10 ms, with 1, 2 and 3 workers: {ratio} times as many a second."
            )
        run_workers(stack, WORKERS)
        if not any("Celery" in note for note in notes):
            notes.insert(0, stack.conditions())
        trip = measure(stack, "trips", TRIPS)["trips"]
        notes.append(f"{store}, {count} of {len(NODES)} nodes: a task and its result take {trip:.1f} ms.")
        if count == len(NODES):
            notes.append(extras(stack))
        for node in nodes:
            quota = str(int(NODE_CPU * PERIOD))
            stack.run("docker", "update", "--cpu-period", str(PERIOD), "--cpu-quota", quota, stack.containers(node)[0])
        for queues in (QUEUES[:1], QUEUES):
            found = rates(stack, nodes, queues)
            per_s = found["per_s"]
            one.extend(per_s if not one else [])
            middle = {name: statistics.median(values) for name, values in found.items()}
            show(
                store,
                count,
                len(queues),
                len({stack.leaders()[queue] for queue in queues}),
                f"{middle['per_s'] / statistics.median(one):.2f}",
                f"{middle['per_s']:.0f} ({min(per_s):.0f} to {max(per_s):.0f})",
                f"{middle['cpu_ms']:.2f} ms",
                *(f"{100 * middle[name]:.0f} %" for name in ("busiest node", "worker", "client")),
            )


def extras(stack: Stack) -> str:
    """Return what a copy of a result costs, or a reply queue on three nodes. Raises Failed."""
    if stack.store == "redis":
        figures = measure(stack, "copies", TRIPS)
        ratio = figures["copies"] / figures["stored"]
        return f"redis: a result that waits for its copy takes {ratio:.1f} times as long to store."

    def idle() -> float:
        before = seconds_of_cpu(stack, NODES[0])
        time.sleep(IDLE)
        return (seconds_of_cpu(stack, NODES[0]) - before) / IDLE

    before, idle_before = stack.rabbitmq_mb(), idle()
    took = measure(stack, "replies", REPLIES)["replies"]
    cpu, memory = idle() - idle_before, (stack.rabbitmq_mb() - before) / REPLIES
    trip = measure(stack, "trips", TRIPS)["trips"]
    return (
        f"rabbitmq: {REPLIES} more reply queues took {took:.0f} ms each to declare, {memory:.2f} MB each on each node, "
        f"and {100 * cpu:.1f} % of a CPU; a task and its result then take {trip:.1f} ms."
    )


def main() -> int:
    """Measure, print the table and the notes, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=STORES)
    store = parser.parse_args().store
    notes: list[str] = []
    show(*HEAD)
    show(*["---"] * len(HEAD))
    try:
        for each in [store] if store else STORES:
            one: list[float] = []
            for count in range(1, len(NODES) + 1):
                print(f"{each}: {count} of {len(NODES)} nodes", file=sys.stderr, flush=True)
                try_nodes(each, count, one, notes)
    except (Failed, KeyboardInterrupt) as exc:
        print(f"scale: {str(exc) or 'interrupted'}", file=sys.stderr)
        return 1
    print("", *(f"- {note}" for note in notes), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
