"""The client of lab/scale.py: each call measures one thing, and prints it as a line of JSON.

python -m lab.scale_client spread 1000 tasks,imports   queue tasks on these queues at once, and fetch their results
python -m lab.scale_client waiting 1000 tasks          the same with tasks that wait for 10 ms
python -m lab.scale_client trips 200                   one task after the other
python -m lab.scale_client copies 200                  store results with and without waiting for a replica to copy them
python -m lab.scale_client replies 200                 make reply queues, as so many clients do
"""

import json
import statistics
import sys
import time

from celery import uuid

from hardening import sentinel
from hardening.publishing import together
from lab.more_tasks import app, work
from lab.servers import clocked

TIMEOUT = 120.0  # seconds for a result
WARM = 30  # tasks for each queue before it counts


def spread(count: int, queues: str, seconds: float = 0.0) -> dict[str, float]:
    """Queue tasks on each queue in turn, fetch their results, and return how long it took, and the CPU."""
    names = queues.split(",")

    def run() -> None:
        with together():
            results = [work.apply_async((number, seconds), queue=names[number % len(names)]) for number in range(count)]
        if [result.get(timeout=TIMEOUT) for result in results] != list(range(count)):
            raise RuntimeError("wrong values")

    first = [work.apply_async((0,), queue=name) for name in names * WARM]
    for result in first:
        result.get(timeout=TIMEOUT)
    print(json.dumps({"begins": count}), flush=True)
    sys.stdin.readline()
    cpu = time.process_time()
    return {"spread": clocked(run), "cpu": time.process_time() - cpu}


def waiting(count: int, queues: str) -> dict[str, float]:
    """Do the same with tasks that wait, as for a database."""
    return spread(count, queues, 0.01)


def trips(count: int) -> dict[str, float]:
    """Queue a task when the result of the last one is there, and return the median, in ms."""
    return {
        "trips": 1000 * statistics.median(clocked(lambda: work.delay(1).get(timeout=TIMEOUT)) for _ in range(count))
    }


def copies(count: int) -> dict[str, float]:
    """Store results in turn with and without WAIT, and return the medians, in ms."""
    app.backend.store_result(uuid(), 1, "SUCCESS")
    writes = set(sentinel.WRITES)
    times: dict[str, list[float]] = {"copies": [], "stored": []}
    for number in range(2 * count):
        name = list(times)[number % 2]
        sentinel.WRITES = writes if name == "copies" else set()
        times[name].append(clocked(lambda: app.backend.store_result(uuid(), 1, "SUCCESS")))
    return {name: 1000 * statistics.median(values) for name, values in times.items()}


def replies(count: int) -> dict[str, float]:
    """Declare reply queues like this client's, and return how long one takes, in ms."""
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        seconds = clocked(lambda: [app.backend._queue(uuid())(channel).declare() for _ in range(count)])
        return {"replies": 1000 * seconds / count}


if __name__ == "__main__":
    what, number, *more = sys.argv[1:]
    print(json.dumps(globals()[what](int(number), *more)), flush=True)
