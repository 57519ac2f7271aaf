"""The client of the fault run: it queues, fetches, and carries on whatever happens.

python -m lab.fault_client stream 1000      queue that many tasks, and fetch their results meanwhile
python -m lab.fault_client poison 1000      the same, and among them one that kills its process
python -m lab.fault_client together 1000    queue them in one block of together(), then fetch their results
python -m lab.fault_client queue 1000 NAME  queue them, and wait to be killed
python -m lab.fault_client fetch 1000 NAME  fetch the results of those
python -m lab.fault_client steady 12000     queue 20 a second, and never read each tenth result

Each line of its output is a JSON object for lab/faults.py; the last one is the report.
"""

import argparse
import json
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import count
from typing import Any

from celery import chord, group, uuid
from celery.backends.base import BaseKeyValueStoreBackend
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis import RedisError

from hardening.publishing import NotPlaced, together
from lab.more_tasks import add_up, app, poison, work

GET_TIMEOUT = 5.0  # seconds that one get() may take
PATIENCE = 60.0  # seconds without any result after which the rest counts as lost
WINDOW = 100  # results that are waited for at the same time
AWAY = (OperationalError, RedisError)  # RabbitMQ or Redis cannot be reached

RATE = 20  # tasks a second, when they are queued steadily

noticed: Counter[str] = Counter()  # for the report


def queue(signature: Any, patience: float = PATIENCE) -> Any:
    """Queue a task. While RabbitMQ is away, try again; raise what it raises after so many seconds.

    After an error nobody knows whether the message has arrived. So the signature carries the task's id: if the task
    runs twice, both write the same result, and one that does no harm the second time loses nothing.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return signature.apply_async()
        except AWAY as exc:
            noticed[f"{type(exc).__name__} in apply_async()"] += 1
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


def queue_together(signatures: dict[str, Any]) -> None:
    """Queue tasks in one block, slowly, so that something can break meanwhile; and again those that it names."""
    while signatures:
        try:
            with together():
                for number, signature in enumerate(signatures.values(), 1):
                    queue(signature)
                    say(sent=number)
                    time.sleep(0.02)
            return
        except NotPlaced as exc:
            noticed[f"{len(exc.ids)} ids in NotPlaced"] += 1
            signatures = {task_id: signatures[task_id] for task_id in exc.ids}


def fetch(result: AsyncResult[Any]) -> Any:
    """Return the task's value, or its exception. Raises TimeoutError: it is late, or its server is away; ask again."""
    try:
        return result.get(timeout=GET_TIMEOUT, propagate=False)
    except ResultTimeout:
        noticed["TimeoutError in get()"] += 1
        raise


def task(number: int, seconds: float = 0.0) -> Any:
    """Return a task that returns the number, with an id."""
    return work.s(number, seconds).set(task_id=uuid())


def jobs(batches: int) -> Iterator[tuple[Any, list[int]]]:
    """Yield batches of 50 tasks, single, in a group and in a chord, two of them slow, and the values to come back."""
    numbers = count()
    for batch in range(batches):
        slow = 8.0 if batch == 2 else 1.0  # the long ones run when something breaks
        for seconds in [0.0] * 36 + [slow] * 2:
            number = next(numbers)
            yield task(number, seconds), [number]
        six = [next(numbers) for _ in range(6)]
        yield group(task(number) for number in six), six
        five = [next(numbers) for _ in range(5)]
        if isinstance(app.backend, BaseKeyValueStoreBackend):
            yield chord([task(number) for number in five], add_up.s().set(task_id=uuid())), [*five, sum(five)]
        else:  # it cannot do chords
            yield group(task(number) for number in [*five, 0]), [*five, 0]


def single_results(result: Any) -> list[AsyncResult[Any]]:
    """Return the results of a task, of a group's tasks, or of a chord's tasks and its end."""
    if isinstance(result, AsyncResult):
        return [*(single_results(result.parent) if result.parent else []), result]
    return list(result.results)


class Timed:
    """A signature that notes how long apply_async() takes, whatever it ends with."""

    longest = 0.0  # seconds

    def __init__(self, signature: Any) -> None:
        self.signature = signature

    def apply_async(self) -> Any:
        """Queue the task. Raises what Celery does."""
        started = time.monotonic()
        try:
            return self.signature.apply_async()
        finally:
            Timed.longest = max(Timed.longest, time.monotonic() - started)


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

    def fetch_until(self, remaining: int) -> None:
        """Fetch until so many results remain, or none comes any more."""
        while len(self.outstanding) > remaining and time.monotonic() - self.last_news < PATIENCE:
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

    def report(self) -> None:
        """Say what became of the tasks."""
        say(
            accepted=self.accepted,
            lost=len(self.outstanding),
            wrong=self.wrong,
            longest_get=self.longest_get,
            longest_pause=self.longest_pause,
            longest_delay=Timed.longest,
            noticed=noticed,
        )


def say(**what: Any) -> None:
    """Print a line for lab/faults.py."""
    print(json.dumps(what), flush=True)


def stream(fetcher: Fetcher, tasks: int) -> None:
    """Queue tasks of every kind, and fetch their results meanwhile."""
    for signature, values in jobs(tasks // 50):
        fetcher.add(single_results(queue(Timed(signature))), values)
        fetcher.fetch_until(remaining=WINDOW)


def steady(fetcher: Fetcher, tasks: int) -> None:
    """Queue so many a second, and never read each tenth result."""
    started = time.monotonic()
    for number in range(tasks):
        time.sleep(max(0.0, started + number / RATE - time.monotonic()))
        result = queue(task(number))
        if number % 10:
            fetcher.add([result], [number])
        fetcher.fetch_until(remaining=RATE)


def main() -> None:
    """Do one of the six things."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["stream", "poison", "together", "queue", "fetch", "steady"])
    parser.add_argument("tasks", type=int)
    parser.add_argument("name", nargs="?", default=uuid(), help="with which the ids of the tasks begin")
    arguments = parser.parse_args()
    part, numbers = arguments.part, range(arguments.tasks)
    signatures = {f"{arguments.name}-{number}": task(number) for number in numbers}
    for task_id, signature in signatures.items():
        signature.set(task_id=task_id)
    fetcher = Fetcher()
    if part == "stream":
        stream(fetcher, arguments.tasks)
    elif part == "poison":
        poisoned = queue(poison.s().set(task_id=uuid()))
        stream(fetcher, arguments.tasks)
        say(poison=str(poisoned.get(timeout=60, propagate=False)))
    elif part == "steady":
        steady(fetcher, arguments.tasks)
    elif part == "queue":
        for signature in signatures.values():
            queue(signature)
        say(queued=arguments.tasks)
        time.sleep(600)
    else:
        if part == "together":
            queue_together(dict(signatures))
        fetcher.add([app.AsyncResult(task_id) for task_id in signatures], list(numbers))
    fetcher.last_news = time.monotonic()  # queueing may have taken long
    fetcher.fetch_until(remaining=0)
    fetcher.report()
    if part == "steady":
        time.sleep(600)  # its memory is looked at


if __name__ == "__main__":
    main()
