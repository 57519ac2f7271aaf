"""Every behaviour of a result, with both stores, in one table.

python -m lab.compare starts a worker and a client for each store, with a RabbitMQ virtual host and a Redis database
of their own, and removes all of it at the end. The servers are those of RABBITMQ_URL and REDIS_URL; RESULT_STORE is
not read. The exit code is 0 only if every behaviour could be observed with both stores.
"""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis

from lab.behaviours import BEHAVIOURS
from lab.client import TIMEOUT, describe
from lab.servers import ROOT, STORES, Worker, markdown, own_servers

RUN_TIMEOUT = 600.0  # seconds for everything that the clients observe; on a quiet machine it takes one minute


def observe() -> None:
    """Observe every behaviour with the store of RESULT_STORE, each in a process of its own."""
    for name in BEHAVIOURS:
        process = multiprocessing.get_context("fork").Process(target=observe_one, args=(name,))
        process.start()
        process.join()


def observe_one(name: str) -> None:
    """Observe one behaviour, and print it as a line of JSON."""
    say(f"{os.environ['RESULT_STORE']}: {BEHAVIOURS[name].sentence} ...")
    try:
        print(json.dumps([name, BEHAVIOURS[name].observe()]), flush=True)
    except Exception as exc:
        say(f"{os.environ['RESULT_STORE']}: could not be observed: {describe(exc)}")


# --- The whole comparison ---------------------------------------------------------------------------------


def say(line: str) -> None:
    """Show progress; the table alone goes to standard output."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def killed_at_the_end(process: subprocess.Popen[Any]) -> Iterator[None]:
    """Kill a process and its children when all is over, however that came."""
    try:
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(TIMEOUT)


def observe_both() -> tuple[str, dict[str, dict[str, str]]]:
    """Run a worker and a client for each store. Return the versions, and each store's observations."""
    with ExitStack() as cleanup:
        logs = Path(cleanup.enter_context(TemporaryDirectory()))
        stores = [cleanup.enter_context(own_servers(store, "compare")) for store in STORES]
        workers = []
        for own in stores:
            say(f"{own.store}: starting a worker ...")
            # Reserving more than celeryconfig.py allows halves the time that 2,000 short tasks take.
            options = ("--include", "lab.compare_tasks", "--prefetch-multiplier", "32")
            workers.append(Worker(logs / f"{own.store}.log", *options, env=own.env))
            cleanup.enter_context(killed_at_the_end(workers[-1].process))
        clients = {}
        for own, worker in zip(stores, workers, strict=True):
            worker.wait_ready()
            clients[own.store] = subprocess.Popen(
                [sys.executable, "-m", "lab.compare", "--observe"],
                cwd=ROOT,
                env={**os.environ, **own.env},
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            cleanup.enter_context(killed_at_the_end(clients[own.store]))
        deadline = time.monotonic() + RUN_TIMEOUT
        lines = {store: output_of(client, deadline) for store, client in clients.items()}
        versions = ", ".join(f"{name} {version}" for name, version in stores[0].versions().items())
        return versions, {store: dict(map(json.loads, lines[store])) for store in STORES}


def output_of(client: subprocess.Popen[str], deadline: float) -> list[str]:
    """Return what a client has printed when it ends, or when the time is over."""
    try:
        return client.communicate(timeout=max(0.0, deadline - time.monotonic()))[0].splitlines()
    except subprocess.TimeoutExpired:
        os.killpg(client.pid, signal.SIGKILL)
        return client.communicate(timeout=TIMEOUT)[0].splitlines()


def table(seen_with: dict[str, dict[str, str]]) -> list[str]:
    """Return a Markdown table, a row for each behaviour."""
    rows = [["behaviour", *STORES]]
    for name, row in BEHAVIOURS.items():
        cells = [row.sentence, *(seen_with[store].get(name, "NOT OBSERVED") for store in STORES)]
        rows.append([cell.replace("|", r"\|") for cell in cells])
    return markdown(rows)


def reasons(seen_with: dict[str, dict[str, str]]) -> list[str]:
    """Return a line of why and what to do for the behaviours in which the stores differ."""
    lines: dict[str, list[str]] = {}
    for name, row in BEHAVIOURS.items():
        if len({seen_with[store].get(name) for store in STORES}) > 1:
            lines.setdefault(row.why or "NOT EXPLAINED", []).append(row.sentence)
    return [f"- {'; '.join(sentences)}: {why}" for why, sentences in lines.items()]


def main() -> int:
    """Compare, print the table and the reasons, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--observe", action="store_true", help="observe one store, the one of RESULT_STORE")
    if parser.parse_args().observe:
        observe()
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("compare: stopped"))  # clean up then, too
    try:
        version_line, seen_with = observe_both()
    except (OSError, RuntimeError, redis.RedisError) as exc:
        say(f"compare: {exc}. Check RABBITMQ_URL, RABBITMQ_API (the management API) and REDIS_URL.")
        return 1
    except KeyboardInterrupt:
        return 130
    print(version_line, "", *table(seen_with), sep="\n")
    print("", "Where they differ, why and what to do:", "", *reasons(seen_with), sep="\n")
    return 0 if all(set(seen_with[store]) == set(BEHAVIOURS) for store in STORES) else 1


if __name__ == "__main__":
    sys.exit(main())
