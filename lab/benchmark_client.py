"""A client of the benchmark: it measures once, and prints its figures as a line of JSON.

lab/benchmark.py starts one for each round, with the app of lab/benchmark_tasks.py and one worker, on a virtual host
and a Redis database that nobody else uses.
"""

import json
import os
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from celery import chord, group

from hardening.publishing import together
from lab.benchmark_tasks import DEFAULT, OURS, add, app, document, kind, total
from lab.servers import OwnServers, RabbitMQ, clocked, wait_until

STORE, BROKER = os.environ["RESULT_STORE"], os.environ["RABBITMQ_URL"]
SERVERS = OwnServers(STORE, RabbitMQ(BROKER), urlsplit(BROKER).path[1:], BROKER, os.environ["REDIS_URL"])
TIMEOUT = 600.0  # seconds for a result
LARGE = 100_000  # characters
CHUNK = 10  # calls in one task
SETTLED = 5.0  # seconds between RabbitMQ's statistics; Redis has freed the buffers of the last commands by then
Figures = dict[str, float]


def queue(count: int) -> list[Any]:
    """Queue so many tasks."""
    return [add.delay(number, 1) for number in range(count)]


def fetch(results: list[Any]) -> None:
    """Fetch their results. Raises RuntimeError if these are wrong."""
    check([result.get(timeout=TIMEOUT) for result in results])


def check(values: list[Any]) -> None:
    """Raise RuntimeError if these are not the results of such tasks."""
    if sorted(values) != list(range(1, len(values) + 1)):
        raise RuntimeError("wrong results")


# --- What is measured of all settings ---------------------------------------------------------------------


def one_at_a_time(count: int) -> Figures:
    """Queue the next task when the result has come."""
    seconds = sorted(clocked(lambda: fetch(queue(1))) for _ in range(count))
    return {"p50_ms": seconds[count // 2] * 1e3, "p99_ms": seconds[count * 99 // 100] * 1e3}


def all_at_once(count: int, worker: int) -> Figures:
    """Queue all tasks, then fetch all results; and who needs how much of the processors for it."""
    before, started = processor_time(worker), time.perf_counter()
    results = queue(count)
    queued = time.perf_counter()
    fetch(results)
    done, after = time.perf_counter(), processor_time(worker)
    rates = {"queued_per_s": count / (queued - started), "trips_per_s": count / (done - started)}
    return rates | {f"{who}_cpu_ms": (after[who] - before[who]) / count * 1e3 for who in after}


def processor_time(worker: int) -> Figures:
    """Return the seconds of processor time that each has used until now; the rest is RabbitMQ and the system."""
    ticks = os.sysconf("SC_CLK_TCK")

    def of(pid: int | str) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    pool = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    with SERVERS.redis_admin() as client:
        cpu = client.info("cpu")
    times = {"client": time.process_time(), "worker": of(worker), "pool": sum(map(of, pool))}
    times["redis"] = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
    user, nice, system, _idle, _waiting, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
    return {**times, "rest": (user + nice + system + sum(interrupts)) / ticks - sum(times.values())}


# --- What is measured of our settings and of Celery's defaults ---------------------------------------------


def queued_together(count: int) -> Figures:
    """Queue tasks with one wait for RabbitMQ's confirms; Celery's defaults have none, and wait for none."""
    started = time.perf_counter()
    with together():
        results = queue(count)
    seconds = time.perf_counter() - started
    fetch(results)
    return {"together_per_s": count / seconds}


def chunks(count: int) -> Figures:
    """Send ten calls in each task, and fetch the lists of their results."""
    calls = add.chunks([(number, 1) for number in range(count)], CHUNK).group()
    lists: list[list[int]] = []
    seconds = clocked(lambda: lists.extend(calls().get(timeout=TIMEOUT, interval=0)))
    check(list(chain.from_iterable(lists)))
    return {"chunks_per_s": count / seconds}


def groups(count: int) -> Figures:
    """Fetch a group's results in three ways, and where there are chords, sum them in another task."""
    members = [add.s(number, 1) for number in range(count)]
    signature = group(members)
    figures = {
        "one_by_one_ms": clocked(lambda: fetch(list(signature()))) * 1e3,
        "group_get_ms": clocked(lambda: signature().get(timeout=TIMEOUT)) * 1e3,
        "group_get_0_ms": clocked(lambda: signature().get(timeout=TIMEOUT, interval=0)) * 1e3,
    }
    if STORE == "redis":
        figures["chord_ms"] = clocked(lambda: chord(members, total.s())().get(timeout=TIMEOUT)) * 1e3
    return figures


def large(count: int) -> Figures:
    """Fetch a large result."""
    seconds = [clocked(lambda: document.delay(LARGE).get(timeout=TIMEOUT)) for _ in range(count)]
    return {"large_ms": sorted(seconds)[count // 2] * 1e3}


# --- What is measured once --------------------------------------------------------------------------------


def stored() -> tuple[int, float]:
    """Return how many results are in the store, and the bytes that it takes; RabbitMQ says it with a delay."""
    if STORE == "redis":
        with SERVERS.redis_admin() as client:
            return int(client.dbsize()), float(client.info("memory")["used_memory"])
    replies = SERVERS.rabbitmq.request("GET", f"queues/{SERVERS.vhost}/{app.backend.oid}")
    return replies.get("messages", 0), replies.get("memory", 0.0)


def unread(count: int) -> Figures:
    """Leave results where they are, look at what they take, and fetch them."""
    before, empty = stored() if STORE == "redis" else (0, 0.0)  # each result stays in Redis, but not in a queue
    with together():
        results = queue(count)
    wait_until(lambda: stored()[0] == before + count, f"{count} results", TIMEOUT, 0.2)
    if STORE == "rabbitmq":
        time.sleep(SETTLED)  # the first sample still has garbage in it
    full = stored()[1]
    seconds = clocked(lambda: fetch(results))
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        f"unread_{count}_store_mb": (full - empty) / 1e6,
        f"unread_{count}_client_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        f"unread_{count}_fetch_ms": seconds / count * 1e3,
    }


def main(what: str, started: float, worker: int, sizes: dict[str, Any]) -> Figures:
    """Measure speed or memory. started: by time.monotonic(), before this process was."""
    fetch(queue(1))
    figures = {"first_result_s": time.monotonic() - started}
    fetch(queue(20))
    if what == "memory":
        time.sleep(SETTLED)
        return {name: value for count in sizes["unread"] for name, value in unread(count).items()}
    figures |= one_at_a_time(sizes["trips"]) | all_at_once(sizes["tasks"], worker)
    if kind in (OURS, DEFAULT):
        figures |= queued_together(sizes["tasks"]) | chunks(sizes["calls"])
        figures |= groups(sizes["group"]) | large(sizes["large"])
    return figures


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))))
