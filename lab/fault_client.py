"""The client of the fault run: it queues tasks, fetches their results, and carries on whatever happens.

``python -m lab.fault_client stream 1000`` queues that many tasks while it fetches, ``queue`` queues them and waits to be
killed, ``fetch`` fetches the ids that it reads. Each line of its output is a JSON object; the last one is the report.
"""

import argparse
import json
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any

from celery import chord, group, uuid
from celery.backends.base import BaseKeyValueStoreBackend
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis import RedisError

from lab.fault_tasks import add_up, app, poison, work

GET_TIMEOUT = 5.0  # seconds that one get() may take
PATIENCE = 60.0  # seconds without any result after which the rest counts as lost
WINDOW = 300  # tasks that are out at the same time
AWAY = (OperationalError, RedisError, RuntimeError, OSError)  # a server cannot be reached

noticed: Counter[str] = Counter()  # what queue() and fetch() ran into


def queue(signature: Any) -> Any:
    """Queue a task, group or chord, and try again until a server has taken it.

    After an error nobody knows whether the message arrived. The task keeps its id, so a second message repeats the
    task and overwrites its result, and nothing waits for a third.
    """
    while True:
        try:
            return signature.apply_async()
        except AWAY as exc:
            noticed[f"delay: {type(exc).__name__}"] += 1
            time.sleep(1)


def fetch(result: AsyncResult[Any]) -> Any:
    """Return the task's value, or the exception that it raised. Raises TimeoutError after GET_TIMEOUT seconds."""
    try:
        return result.get(timeout=GET_TIMEOUT, propagate=False)
    except ResultTimeout:
        noticed["get: TimeoutError"] += 1
        raise
    except AWAY as exc:
        noticed[f"get: {type(exc).__name__}"] += 1
        time.sleep(1)
        raise ResultTimeout(str(exc)) from exc


def jobs(count: int) -> Iterator[tuple[Any, list[int]]]:
    """Yield signatures for at least so many tasks, and the values that they must return."""
    number = 0
    while number < count:
        for _ in range(36):
            yield work.s(number, 0.0).set(task_id=uuid()), [number]
            number += 1
        for _ in range(2):
            yield work.s(number, 1.0).set(task_id=uuid()), [number]
            number += 1
        values = list(range(number, number + 6))
        yield group(work.s(value, 0.0) for value in values), values
        number += 6
        values = list(range(number, number + 5))
        header = [work.s(value, 0.0) for value in values]
        if isinstance(app.backend, BaseKeyValueStoreBackend):  # the others cannot do chords
            yield chord(header, add_up.s()), [*values, sum(values)]
        else:
            yield group([*header, work.s(number + 5, 0.0)]), [*values, number + 5]
        number += 6


def flat(result: Any) -> list[AsyncResult[Any]]:
    """Return the single results of a task, a group or a chord."""
    if results := getattr(result, "results", None):
        return list(results)
    return [*flat(result.parent), result] if result.parent else [result]


class Fetcher:
    """Fetches results, the oldest first, and keeps the report."""

    def __init__(self) -> None:
        self.outstanding: deque[tuple[AsyncResult[Any], Any]] = deque()
        self.accepted = self.fetched = 0
        self.wrong: list[str] = []
        self.longest_get = self.longest_pause = 0.0
        self.last_news = time.monotonic()

    def add(self, results: list[AsyncResult[Any]], values: list[Any]) -> None:
        """Wait for these results, too."""
        self.outstanding.extend(zip(results, values, strict=True))
        self.accepted += len(results)

    def fetch_one(self) -> None:
        """Fetch the oldest result; if it does not come, go on with the next one."""
        result, value = self.outstanding.popleft()
        started = time.monotonic()
        try:
            got = fetch(result)
        except ResultTimeout:
            self.outstanding.append((result, value))
        else:
            self.fetched += 1
            if got != value:
                self.wrong.append(f"{result.id}: {got!r}")
            self.longest_pause = max(self.longest_pause, time.monotonic() - self.last_news)
            self.last_news = time.monotonic()
            if self.fetched % 50 == 0:
                say(fetched=self.fetched)
        self.longest_get = max(self.longest_get, time.monotonic() - started)

    @property
    def patient(self) -> bool:
        """Tell whether a result may still come."""
        return bool(self.outstanding) and time.monotonic() - self.last_news < PATIENCE

    def report(self) -> None:
        """Print what became of the tasks."""
        say(
            accepted=self.accepted,
            lost=len(self.outstanding),
            lost_ids=[result.id for result, _ in self.outstanding][:5],
            wrong=self.wrong[:5],
            longest_get=round(self.longest_get, 1),
            longest_pause=round(self.longest_pause, 1),
            noticed=dict(noticed),
        )


def say(**what: Any) -> None:
    """Print a line for lab/faults.py."""
    print(json.dumps(what), flush=True)


def main() -> int:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["stream", "queue", "fetch"])
    parser.add_argument("count", type=int, nargs="?", default=1000)
    parser.add_argument("--poison", action="store_true", help="queue a task among them that kills its process")
    arguments = parser.parse_args()
    fetcher = Fetcher()
    if arguments.part == "fetch":
        for line in sys.stdin:
            task_id, value = json.loads(line)
            fetcher.add([app.AsyncResult(task_id)], [value])
    elif arguments.part == "queue":
        for number in range(arguments.count):
            say(queued=[queue(work.s(number, 0.0).set(task_id=uuid())).id, number])
        say(done=True)
        time.sleep(600)  # to be killed
    else:
        poisoned = queue(poison.s()) if arguments.poison else None
        for signature, values in jobs(arguments.count):
            fetcher.add(flat(queue(signature)), values)
            while len(fetcher.outstanding) > WINDOW and fetcher.patient:
                fetcher.fetch_one()
        if poisoned:
            say(poison=repr(poisoned.get(timeout=60, propagate=False)))
    while fetcher.patient:
        fetcher.fetch_one()
    fetcher.report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
