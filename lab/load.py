"""Many tasks at once, and a steady stream: does anything grow without end?

It runs on the host like lab/faults.py, starts the demo's services in a Compose project of its own and removes it.
On each store: 20,000 tasks are queued at once and then fetched; then, for 10 minutes, 20 tasks a second of which
each tenth result is never read. Results expire after 4 minutes. The whole takes about 40 minutes.

python3 -m lab.load
python3 -m lab.load --store redis --burst 2000 --minutes 3
"""

import argparse
import sys
import time

from lab.faults import STORES, Client, Failed, Stack, failed

RATE = 20  # tasks a second
EXPIRES = 240  # seconds
WORKERS = 2


class Memory:
    """What producer, workers, Redis and RabbitMQ hold, as a table that grows on screen."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def measure(self, client: Client | None) -> list[float]:
        """Return MB of producer, workers, Redis and RabbitMQ; the servers' own figures, not the containers'."""
        workers = self.stack.compose("ps", "--quiet", "worker").split()
        names = [client.name, *workers] if client else workers
        used = self.stack.run("docker", "stats", "--no-stream", "--format", "{{.MemUsage}}", *names).splitlines()
        megabytes = [_megabytes(line.partition(" / ")[0]) for line in used]
        producer = megabytes.pop(0) if client else 0.0
        redis = self.stack.redis("info", "memory").partition("used_memory:")[2].split()[0]
        rabbitmq = self.stack.rabbitmqctl("eval", "erlang:memory(total).")
        return [producer, sum(megabytes), int(redis) / 1e6, int(rabbitmq) / 1e6]

    def row(self, moment: str, client: Client | None = None) -> None:
        """Measure, and print a row of the table."""
        cells = " | ".join(f"{megabytes:.0f}" if megabytes else "-" for megabytes in self.measure(client))
        print(f"| {self.stack.store} | {moment} | {cells} |", flush=True)


def _megabytes(text: str) -> float:
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "kB": 1e3, "MB": 1e6, "GB": 1e9, "B": 1.0}
    for unit, factor in units.items():
        if text.endswith(unit):
            return float(text.removesuffix(unit)) * factor / 1e6
    raise Failed(f"docker stats shows {text!r} for a container")


def run(stack: Stack, burst: int, minutes: int) -> None:
    """Print the rows of one store. Raises Failed, also when a result is lost."""
    memory = Memory(stack)
    stack.up(WORKERS)
    Client(stack, "stream", "100").wait_for("accepted")  # what is allocated once, is
    memory.row("before")
    client = Client(stack, "burst", str(burst))
    client.wait_for("queued", timeout=1200)
    memory.row(f"{burst:,} tasks queued", client)
    client.wait_for("fetched", at_least=burst // 2, timeout=1200)
    memory.row("half of the results fetched", client)
    _all_there(client)
    memory.row("all fetched", client)
    client.kill()
    time.sleep(EXPIRES)
    memory.row(f"{EXPIRES} s later, results have expired")
    tasks = minutes * 60 * RATE
    client = Client(stack, "steady", str(tasks), "--rate", str(RATE))
    for minute in range(1, minutes + 1):
        client.wait_for("fetched", at_least=minute * (60 * RATE * 9 // 10) - 150)
        memory.row(f"{RATE} tasks a second, minute {minute}", client)
    _all_there(client)
    client.kill()


def _all_there(client: Client) -> None:
    report = client.wait_for("accepted", timeout=1200)
    if report["lost"] or report["wrong"]:
        raise Failed(f"{report['lost']} results are lost, {len(report['wrong'])} are wrong")


def main() -> int:
    """Run both stores, and return 0 if no result was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=STORES)
    parser.add_argument("--burst", type=int, default=20_000, help="tasks that are queued at once")
    parser.add_argument("--minutes", type=int, default=10, help="of the steady stream")
    arguments = parser.parse_args()
    print("| store | moment | producer, MB | two workers, MB | Redis, MB | RabbitMQ, MB |")
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    try:
        for store in [arguments.store] if arguments.store else STORES:
            stack = Stack(store, "load", RESULT_EXPIRES=str(EXPIRES))
            with stack.cleared_away():
                run(stack, arguments.burst, arguments.minutes)
    except (Failed, KeyboardInterrupt) as exc:
        return failed("load", exc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
