"""Break one machine of the cluster at a time while tasks run, and count what becomes of them.

Like lab/faults.py it runs on the host, in a Compose project of its own, which it removes in the end.

python3 -m lab.cluster_faults                                   everything on both stores, then a table: half an hour
python3 -m lab.cluster_faults leader-killed master-frozen       these faults only; --help lists them
python3 -m lab.cluster_faults --store rabbitmq --tasks 300      one store only, and fewer tasks
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from lab.faults import AWAY, STORES, TASKS, Failed, Fault, Row, Stack, killed, nothing, table, try_faults

NODES = ("rabbitmq", "rabbitmq-2", "rabbitmq-3")
SENTINELS = ("sentinel", "sentinel-2", "sentinel-3")


class Cluster(Stack):
    """The demo's services with three nodes of each server."""

    command = (*Stack.command, "-f", "lab/docker-compose.cluster.yml")

    def leader(self) -> str:
        """Return the RabbitMQ node that leads the queue tasks. Raises Failed."""
        queues = json.loads(self.rabbitmqctl("list_queues", "-p", "demo", "name", "leader", "--formatter", "json"))
        leaders: dict[str, str] = {queue["name"]: queue["leader"] for queue in queues}
        return leaders["tasks"].partition("@")[2]

    def master(self) -> str:
        """Return the Redis that Sentinel has made the master. Raises Failed."""
        ask = "REDISCLI_AUTH=$(cat /run/admin/password) redis-cli -p 26379 --user admin sentinel master mymaster"
        words = self.compose("exec", "-T", "sentinel-3", "sh", "-c", ask).split()
        return words[words.index("ip") + 1]

    @contextmanager
    def apart(self, *services: str) -> Iterator[None]:
        """Take services off their networks, into one where they see each other and nobody else."""
        side, taken = f"{self.project}_side", []
        self.run("docker", "network", "create", side)
        try:
            for service in services:
                container = self.container(service)
                found = json.loads(self.run("docker", "inspect", container))[0]["NetworkSettings"]["Networks"]
                for network in found:
                    self.run("docker", "network", "disconnect", network, container)
                    taken.append((network, service, container))
                self.run("docker", "network", "connect", "--alias", service, side, container)
            yield
        finally:
            for service in services:
                self.run("docker", "network", "disconnect", side, self.container(service))
            for network, service, container in taken:
                self.run("docker", "network", "connect", "--alias", service, network, container)
            self.run("docker", "network", "rm", side)


def for_a_while(stack: Stack, *services: str) -> None:
    """Kill services with SIGKILL, and start them after a while."""
    stack.compose("kill", *services)
    time.sleep(AWAY)
    stack.compose("start", *services)


def leader_killed(stack: Cluster) -> None:
    """Kill the node that leads the queue tasks."""
    for_a_while(stack, stack.leader())


def rolling(stack: Cluster) -> None:
    """Restart each node, the next when the last has joined, as an upgrade does."""
    for node in NODES:
        stack.compose("stop", node)
        stack.compose("up", "--detach", "--wait", "--no-deps", node)


def leader_cut_off(stack: Cluster) -> None:
    """Take the node that leads the queue tasks off the network."""
    with stack.apart(stack.leader()):
        time.sleep(AWAY)


def node_cut_off(stack: Cluster) -> None:
    """Take the node that client and worker are connected to off the network, longer than anybody should wait for it."""
    with stack.apart(NODES[0]):
        time.sleep(3 * AWAY)


def master_killed(stack: Cluster) -> None:
    """Kill the Redis master; it comes back when another one is the master."""
    for_a_while(stack, stack.master())


def master_frozen(stack: Cluster) -> None:
    """Freeze the Redis master; it wakes up when another one is the master, and does not know it."""
    master = stack.master()
    stack.compose("kill", "--signal", "SIGSTOP", master)
    time.sleep(AWAY)
    stack.compose("kill", "--signal", "SIGCONT", master)


def master_stopped(stack: Cluster) -> None:
    """Stop the Redis master in order."""
    master = stack.master()
    stack.compose("stop", master)
    time.sleep(AWAY)
    stack.compose("start", master)


def sentinel_lost(stack: Cluster) -> None:
    """Kill the first Sentinel, then the Redis master: two must do."""
    for_a_while(stack, SENTINELS[0], stack.master())


def two_sides(stack: Cluster) -> None:
    """Cut the network in two: the worker with a node of each server, the client with the others."""
    replica = next(node for node in ("redis-3", "redis-2") if node != stack.master())
    with stack.apart("worker", NODES[2], replica, SENTINELS[2]):
        time.sleep(AWAY)


FAULTS = [
    Fault("none", "nothing", nothing),
    Fault("leader-killed", f"the leader of `tasks` killed for {AWAY} s", leader_killed),
    Fault("node-killed", f"the client's own RabbitMQ node killed for {AWAY} s", for_a_while, NODES[:1]),
    Fault("rolling", "each RabbitMQ node stopped and started in turn", rolling),
    Fault("leader-cut-off", f"the leader of `tasks` cut off from all others for {AWAY} s", leader_cut_off),
    Fault("node-cut-off", f"the client's own RabbitMQ node cut off from all others for {3 * AWAY} s", node_cut_off),
    Fault("two-killed", f"two of three RabbitMQ nodes killed for {AWAY} s", for_a_while, NODES[1:]),
    Fault("master-killed", f"the Redis master killed for {AWAY} s", master_killed),
    Fault("master-frozen", f"the Redis master frozen for {AWAY} s", master_frozen),
    Fault("master-stopped", f"the Redis master stopped for {AWAY} s", master_stopped),
    Fault("master-restarted", "the Redis master killed, and started at once", killed, ("redis",)),
    Fault("sentinel-lost", f"a Sentinel and the Redis master killed for {AWAY} s", sentinel_lost),
    Fault("two-sides", f"the worker and a node of each server cut off from the client for {AWAY} s", two_sides),
]


def main() -> int:
    """Try the faults, print the table, and return 0 if every result was fetched."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [fault.name for fault in FAULTS]
    parser.add_argument("fault", nargs="*", help=", ".join(names))
    parser.add_argument("--store", choices=STORES)
    parser.add_argument("--tasks", type=int, default=TASKS)
    arguments = parser.parse_args()
    if unknown := set(arguments.fault) - set(names):
        parser.error(f"there is no fault {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    rows: list[Row] = []
    failures = 0
    try:
        for store in [arguments.store] if arguments.store else STORES:
            print(f"Starting the cluster, results in {store}.", file=sys.stderr, flush=True)
            chosen = [
                replace(fault, client=("stream", str(arguments.tasks)))
                for fault in FAULTS
                if fault.name in (arguments.fault or names)
            ]
            failures += try_faults(Cluster(store, "cluster"), chosen, rows)
    except (Failed, KeyboardInterrupt) as exc:
        failures += 1
        print(f"\ncluster_faults: {str(exc) or 'interrupted'}", file=sys.stderr)
    if rows:
        print(table(rows, [row.fault for row in rows if row.store == rows[0].store]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
