"""Every behaviour of a result, with both stores, in one table.

python -m lab.compare starts two workers for each store, with a RabbitMQ virtual host and a Redis database of its own,
a client for each behaviour, and removes all of it at the end. The servers are those of RABBITMQ_URL and REDIS_URL;
RESULT_STORE is not read. The exit code is 0 only if every behaviour could be observed with both stores.
"""

import argparse
import inspect
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import redis

from lab import behaviours
from lab.servers import STORES, OwnServers, Worker, markdown, own_servers, run

RUN_TIMEOUT = 1200.0  # seconds for everything that the clients observe; on a quiet machine it takes two minutes
NOT_OBSERVED = "NOT OBSERVED"
SENTENCES = {
    name: (row.__doc__ or "").rstrip(".")
    for name, row in vars(behaviours).items()
    if inspect.isfunction(row) and row.__module__ == behaviours.__name__ and not name.startswith("_")
}
WORKERS = {
    # Reserving more than celeryconfig.py allows halves the time that 2,000 short tasks take.
    "worker": ("--include", "lab.more_tasks", "--prefetch-multiplier", "32"),
    "short-lived": ("-Q", behaviours.SHORT_LIVED, f"result.expires={behaviours.EXPIRES}"),
}


def observe(name: str, own: OwnServers, deadline: float) -> str:
    """Observe a behaviour with one store, in a client that is killed when that takes too long."""
    try:
        client = run(sys.executable, "-m", "lab.behaviours", name, env=own.env, timeout=deadline - time.monotonic())
    except subprocess.TimeoutExpired:
        return NOT_OBSERVED
    print(client.stderr, end="", file=sys.stderr)
    return client.stdout.strip() or NOT_OBSERVED


def compare() -> tuple[str, list[list[str]]]:
    """Run the workers and the clients. Return the versions, and the rows of the table."""
    with ExitStack() as cleanup:
        logs = Path(cleanup.enter_context(TemporaryDirectory()))
        servers = [cleanup.enter_context(own_servers(store, "compare")) for store in STORES]
        print("Starting the workers ...", file=sys.stderr)
        for own in servers:
            for name, options in WORKERS.items():
                cleanup.enter_context(Worker(logs / f"{own.store}-{name}.log", *options, env=own.env))
        deadline = time.monotonic() + RUN_TIMEOUT
        rows = []
        for name, sentence in SENTENCES.items():
            print(f"{sentence} ...", file=sys.stderr)
            rows.append([sentence, *(observe(name, own, deadline) for own in servers)])
        return ", ".join(f"{name} {version}" for name, version in servers[0].versions().items()), rows


def main() -> int:
    """Compare, print the table, and return the exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("compare: stopped"))  # clean up then, too
    try:
        versions, rows = compare()
    except (OSError, RuntimeError, redis.RedisError) as exc:
        print(f"compare: {exc}. Check RABBITMQ_URL, RABBITMQ_API (the management API) and REDIS_URL.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    table = [[cell.replace("|", r"\|") for cell in row] for row in [["behaviour", *STORES], *rows]]
    print(versions, "", *markdown(table), sep="\n")
    print("", "Where the stores differ, docs/side-by-side.md says why, and what to do.", sep="\n")
    return 1 if any(NOT_OBSERVED in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
