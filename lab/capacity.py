"""How many tasks a second one RabbitMQ and one Redis handle: each in turn gets so little CPU that it is the bottleneck.

It runs on the host like lab/faults.py, starts the servers in a Compose project of its own and removes it. Two workers
and two clients use our settings; docker update --cpus limits a server. It takes about four minutes.

python3 -m lab.capacity
"""

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

from lab.faults import STORES, Failed, Stack, failed

# The bottleneck, its CPUs, and where the results are.
LIMITS = [("rabbitmq", cpus, store) for cpus in (0.2, 0.4) for store in STORES]
LIMITS += [("redis", cpus, "redis") for cpus in (0.04, 0.08)]


def measure(stack: Stack, store: str, server: str) -> tuple[float, float]:
    """Return tasks a second, the median of three rounds, and how many CPUs a server used at most. Raises Failed."""
    client = ("run", "--rm", "-T", "--entrypoint", "python", "benchmark", "-m", "lab.capacity_client", store)
    stats = ("docker", "stats", "--no-stream", "--format", "{{.CPUPerc}}", stack.container(server))
    used = 0.0
    with ThreadPoolExecutor(1) as pool:
        rates = pool.submit(stack.compose, *client)
        while not rates.done():
            used = max(used, float(stack.run(*stats).strip().rstrip("%")) / 100)
    return statistics.median(map(float, rates.result().split())), used


def limited(stack: Stack, server: str, cpus: float, store: str) -> str:
    """Return the table's row for a server with so many CPUs. Raises Failed, also when it did not use them up."""
    stack.run("docker", "update", f"--cpus={cpus}", stack.container(server))
    per_s, used = measure(stack, store, server)
    if used < 0.9 * cpus:
        raise Failed(f"{server} used no more than {used:.2f} of {cpus} CPU: something else is the bottleneck")
    return f"| {server}, {cpus} CPU | {store} | {per_s:.0f} | {per_s / cpus:,.0f} |"


def main() -> int:
    """Print a table, and return 0 if everything was measured."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    stack = Stack("redis", "capacity")  # the client chooses the store itself
    try:
        with stack.cleared_away():
            stack.compose("up", "--detach", "--wait", "rabbitmq", "redis")
            everything = stack.run("docker", "info", "--format", "{{.NCPU}}").strip()
            print("| bottleneck | results in | tasks/s | tasks/s per CPU |\n| --- | --- | --- | --- |", flush=True)
            for store in STORES:
                per_s, _ = measure(stack, store, "redis")
                print(f"| all together, {everything} CPUs | {store} | {per_s:.0f} | |", flush=True)
            for server, cpus, store in LIMITS:
                print(limited(stack, server, cpus, store), flush=True)
                stack.run("docker", "update", f"--cpus={everything}", stack.container(server))
    except (Failed, KeyboardInterrupt) as exc:
        return failed("capacity", exc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
