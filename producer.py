"""The tour: queue tasks, fetch their results, and look where the results really are.

Every step announces what will come back. The exit code is 0 only if all of them ended as announced.

Environment:
  RESULT_STORE   redis (default) or rabbitmq: where the results go; the workers need the same value
  RABBITMQ_URL   the broker, default amqp://guest:guest@localhost:5672//
  REDIS_URL      the Redis result backend, default redis://localhost:6379/0

Examples:
  python producer.py                  the whole tour, a few seconds
  python producer.py chord where      two steps of it
  RESULT_STORE=rabbitmq python producer.py
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from celery import chain as celery_chain
from celery import chord as celery_chord
from celery import group as celery_group
from celery import states
from celery.backends.base import BaseKeyValueStoreBackend
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

import witness
from hardening.environment import service_url
from tasks import add, app, count_words, divide, fetch_price, import_rows, log_visit, nap, total

TIMEOUT = 30.0  # seconds that any single result may take
WORKER_TIMEOUT = 20.0  # seconds that a worker may take to start
LINES = ["the quick brown fox", "jumps over", "the lazy dog"]

console = Console(highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Step:
    """One step of the tour: what is called, what is announced to come back, and the function that does it."""

    name: str
    call: str
    announced: Callable[[], str]
    run: Callable[[], object]


STEPS: dict[str, Step] = {}


def step(call: str, announced: str | Callable[[], str]) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Make a function a step. Its docstring is printed; an exception that it raises counts as what came back."""

    def register(run: Callable[[], object]) -> Callable[[], object]:
        expected = (lambda: announced) if isinstance(announced, str) else announced
        STEPS[run.__name__] = Step(run.__name__, call, expected, run)
        return run

    return register


@step("add.delay(2, 3).get()", "5")
def value() -> object:
    """A worker computes, the result backend carries the value back."""
    return add.delay(2, 3).get(timeout=TIMEOUT)


@step("divide.delay(1, 0).get()", "ZeroDivisionError: division by zero")
def failure() -> object:
    """The task raises, and get() raises the same exception here."""
    return divide.delay(1, 0).get(timeout=TIMEOUT)


@step('fetch_price.delay("tea").get()', "28.5 after 2 retries")
def retry() -> object:
    """The task fails twice; Celery queues it again, first after 1 second, then after 2."""
    result = fetch_price.delay("tea")
    return f"{result.get(timeout=TIMEOUT)} after {result.retries} retries"


@step("import_rows.delay(10).get(on_message=show)", "10")
def progress() -> object:
    """The task reports how far it is, and each report reaches the caller while it waits."""
    bar = Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console, transient=True)
    rows = bar.add_task("     importing", total=10)

    def show(meta: dict[str, Any]) -> None:
        if meta["status"] == "PROGRESS":
            done, total_rows = meta["result"]["done"], meta["result"]["total"]
            bar.update(rows, completed=done)
            if done % 5 == 0:
                console.print(f"     {done} of {total_rows} rows are done")

    with bar if console.is_terminal else nullcontext():
        return import_rows.delay(10).get(timeout=TIMEOUT, on_message=show)


@step("group(count_words.s(line) for line in LINES)().join()", "[4, 2, 3]")
def group() -> object:
    """Three tasks run side by side; their results come back in the order in which they were asked for."""
    return celery_group(count_words.s(line) for line in LINES)().join(timeout=TIMEOUT)


@step("chain(add.s(2, 3), add.s(10))().get()", "15, and its parent is 5")
def chain() -> object:
    """The result of the first task becomes an argument of the second; both can be fetched."""
    result = celery_chain(add.s(2, 3), add.s(10))()
    return f"{result.get(timeout=TIMEOUT)}, and its parent is {result.parent.get(timeout=TIMEOUT)}"


def _chord_outcome() -> str:
    """Ask the result backend itself whether it can do chords."""
    try:
        app.backend.ensure_chords_allowed()
    except NotImplementedError as exc:
        return _outcome(exc)
    return "9"


@step("chord([count_words.s(line) for line in LINES])(total.s()).get()", _chord_outcome)
def chord() -> object:
    """A task that runs when all tasks of a group are done, and gets their results."""
    try:
        return celery_chord([count_words.s(line) for line in LINES])(total.s()).get(timeout=TIMEOUT)
    except NotImplementedError:
        console.print("     Somebody has to count the finished parts, and a queue of messages cannot count.")
        console.print("     Instead: total.delay(group(...)().join()), or RESULT_STORE=redis.")
        raise


@step("nap.delay(30).revoke(terminate=True), then get()", "TaskRevokedError: terminated")
def revoke() -> object:
    """A task is called off while it runs."""
    result = nap.delay(30)

    def revoke_when_started(meta: dict[str, Any]) -> None:
        if meta["status"] == states.STARTED:
            result.revoke(terminate=True)

    return result.get(timeout=TIMEOUT, on_message=revoke_when_started)


@step("nap.apply_async((30,), soft_time_limit=1).get()", "SoftTimeLimitExceeded")
def time_limit() -> object:
    """A task takes too long: after its time limit of 1 second it is interrupted."""
    return nap.apply_async((30,), soft_time_limit=1).get(timeout=TIMEOUT)


@step('log_visit.delay("/home").get()', "None")
def ignored() -> object:
    """A task with ignore_result=True: it runs, but nothing is stored, and get() returns at once."""
    return log_visit.delay("/home").get(timeout=TIMEOUT)


@step("result = add.delay(20, 22), then result.get()", "42")
def where() -> object:
    """Where is a result before and after get()? redis-py and pika look, behind Celery's back."""

    def look_fetch_look() -> object:
        result = add.delay(20, 22)
        _await_result(result.id)
        console.print("     before get():")
        _show_places(result.id)
        fetched = result.get(timeout=TIMEOUT)
        console.print("     after get():")
        if _show_places(result.id):
            console.print("     A key stays: until it expires, every process can read it, as often as it likes.")
        else:
            console.print(
                "     A message is delivered once, to the process that queued the task; nobody else can read it."
            )
        return fetched

    # A thread of its own has a reply queue of its own: the one that holds this result and no other.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(look_fetch_look).result()


def _places(task_id: str) -> tuple[witness.ResultKey | None, witness.ReplyQueue | None, str]:
    """Return the task's key in Redis, this thread's reply queue in RabbitMQ, and a word on Redis if it is down."""
    queue = witness.find_reply_queue(app.conf.broker_url, app.thread_oid)
    name = f"{app.conf.result_backend_transport_options['global_keyprefix']}celery-task-meta-{task_id}"
    try:
        return witness.find_result_key(service_url("REDIS"), name), queue, "no key with this task's id"
    except witness.ServerError:
        return None, queue, "not running, and not needed"


def _await_result(task_id: str) -> None:
    """Wait until one of the two witnesses sees the result. Raises TimeoutError."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        key, queue, _ = _places(task_id)
        if key or (queue and queue.messages):
            return
        time.sleep(0.05)
    raise TimeoutError(f"no result in Redis or RabbitMQ after {TIMEOUT:.0f} s")


def _show_places(task_id: str) -> bool:
    """Print what the two witnesses see, and tell whether the result is a key in Redis."""

    def content(meta: dict[str, Any]) -> str:
        return json.dumps({name: meta[name] for name in ("status", "result", "name", "args")})

    key, queue, redis_says = _places(task_id)
    if key:
        console.print(f"       Redis     {key.name}, expires in {key.ttl} s")
        console.print(f"                 {content(key.content)}")
    else:
        console.print(f"       Redis     {redis_says}")
    if queue:
        console.print(
            f"       RabbitMQ  reply queue {queue.name}, messages: {queue.messages}, consumers: {queue.consumers}"
        )
        if queue.content:
            console.print(f"                 {content(queue.content)}")
    else:
        console.print("       RabbitMQ  no reply queue of this client")
    return key is not None


def _outcome(came_back: object) -> str:
    """Describe what a step returned or raised, in one line."""
    if not isinstance(came_back, BaseException):
        return str(came_back)
    name, message = type(came_back).__name__, str(came_back).partition("\n")[0]
    return name if message in ("", f"{name}()") else f"{name}: {message}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def run_step(number: int, tour_step: Step) -> bool:
    """Run one step, print it, and tell whether it ended as announced."""
    console.print(f"\n{number:2}. {tour_step.name}: {tour_step.run.__doc__}", style="bold")
    console.print(f"     {tour_step.call}")
    started = time.perf_counter()
    try:
        outcome = _outcome(tour_step.run())
    except (OperationalError, witness.ServerError):
        raise
    except Exception as exc:  # whatever the task raised is what the step shows
        outcome = _outcome(exc)
    took = _duration(time.perf_counter() - started)
    announced = tour_step.announced()
    as_announced = outcome == announced
    console.print(f"     -> {outcome}   ({took})", style="green" if as_announced else "red")
    if not as_announced:
        console.print(f"     NOT AS ANNOUNCED: this step should end with {announced}", style="bold red")
    return as_announced


def check_servers() -> None:
    """Raise ServerError unless the broker, the result backend and a worker that uses it are there."""
    with witness.rabbitmq_channel(app.conf.broker_url):
        pass
    if isinstance(app.backend, BaseKeyValueStoreBackend):
        with witness.redis_client(service_url("REDIS")):
            pass
    queue, deadline = app.conf.task_default_queue, time.monotonic() + WORKER_TIMEOUT
    while not witness.count_consumers(app.conf.broker_url, queue):
        if time.monotonic() > deadline:
            raise witness.Unreachable(
                f"no worker consumes from the queue {queue!r}, so no task would ever run. "
                "Start one: docker compose up -d worker, or without Docker: celery -A tasks worker"
            )
        time.sleep(0.1)
    for name, settings in (app.control.inspect(timeout=2.0, limit=1).conf() or {}).items():
        if settings["result_backend"] != app.conf.result_backend:
            raise witness.Refused(
                f"{name} puts its results elsewhere: it was started with another RESULT_STORE than this producer. "
                "Set the same one for both."
            )


def print_next_commands() -> None:
    """Say what to open and to try after the tour."""
    console.print("\nWhat next?", style="bold")
    store = os.environ.get("RESULT_STORE") or "redis"
    other = "redis" if store == "rabbitmq" else "rabbitmq"
    same = "" if store == "redis" else f"RESULT_STORE={store} "
    if flower := os.environ.get("FLOWER_PAGE"):  # set in docker-compose.yml
        once_more = f"{same}docker compose run --rm --no-deps producer python producer.py where"
        console.print(f"  see the tasks in Flower         {flower}  (user demo)")
        console.print(f"  see the queues in RabbitMQ      {os.environ['RABBITMQ_PAGE']}  (user demo)")
        console.print("                                  (the passwords, too, are demo, unless you set others)")
        console.print(f"  put the results into {other:8}   Ctrl-C, then: RESULT_STORE={other} docker compose up")
        console.print(f"  run a step once more            {once_more}")
        console.print('  remove everything               docker compose --profile "*" down --volumes')
    else:
        console.print(f"  run a step once more            {same}python producer.py where")
        console.print("  see the tasks in Flower         FLOWER_BASIC_AUTH=demo:demo celery -A tasks flower")


def main() -> int:
    """Run the tour and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="*", help="run these steps only: " + ", ".join(STEPS))
    chosen = parser.parse_args().step or list(STEPS)
    if unknown := set(chosen) - set(STEPS):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; the steps are {', '.join(STEPS)}")
    try:
        check_servers()
        console.print("Celery result backends: the tour", style="bold")
        console.print(f"  broker          {maybe_sanitize_url(app.conf.broker_url)}")
        store = os.environ.get("RESULT_STORE") or "redis"
        console.print(f"  result backend  {app.backend.as_uri(include_password=False)}   (RESULT_STORE={store})")
        started = time.perf_counter()
        good = sum([run_step(number, STEPS[name]) for number, name in enumerate(chosen, 1)])
    except (OperationalError, witness.ServerError) as exc:
        print(f"producer: {_outcome(exc) if isinstance(exc, OperationalError) else exc}", file=sys.stderr)
        return 1
    took = _duration(time.perf_counter() - started)
    console.print(f"\n{good} of {len(chosen)} steps ended as announced, in {took}.", style="bold")
    print_next_commands()
    return 0 if good == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
