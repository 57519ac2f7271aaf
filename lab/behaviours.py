"""The behaviours that are compared: what is done with a result, how it looks, and why the stores differ.

Each is one short function. It runs in a new process, with a worker of the same store beside it.
"""

import os
import sys
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from celery import chain, chord, group, states
from celery.result import GroupResult

import witness
from hardening.environment import service_url
from lab.client import PATIENCE, TIMEOUT, read, seen
from lab.compare_tasks import EXPIRES, add_by_another, add_short_lived, document, order
from lab.servers import as_admin, run, wait_until
from tasks import add, app, count_words, fetch_price, import_rows, log_visit, nap, total

MANY = 2_000
MANY_TIMEOUT = 300.0  # seconds that so many may take
LATER = 1  # seconds after which a task starts whose every state the client wants to hear
LINES = ["the quick brown fox", "jumps over", "the lazy dog"]


@dataclass(frozen=True)
class Behaviour:
    """A row of the table: what is done, how it is observed, and why the stores differ and what to do then."""

    sentence: str
    observe: Callable[[], str]
    why: str


BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(why: str = "") -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Make a function a behaviour. Its docstring is the row's first cell, what it returns is the store's cell."""

    def register(observe: Callable[[], str]) -> Callable[[], str]:
        BEHAVIOURS[observe.__name__] = Behaviour((observe.__doc__ or "").rstrip("."), observe, why)
        return observe

    return register


# --- Reading a result -------------------------------------------------------------------------------------


@behaviour()
def read_twice() -> str:
    """Read a result twice."""
    result = add.delay(2, 3)
    return f"{result.get(timeout=TIMEOUT)}, then {read(result)}"


@behaviour(
    "A message is delivered once. The object that read it remembers the value, a new object waits for a second "
    "message. Keep the object or the value, or take Redis."
)
def new_result_object() -> str:
    """Read it through a new `AsyncResult`, twice."""
    result = wait_until_stored(lambda: add.delay(2, 3))
    return f"{read(app.AsyncResult(result.id))}, then {read(app.AsyncResult(result.id))}"


@behaviour()
def another_thread() -> str:
    """Read it from another thread."""
    result = wait_until_stored(lambda: add.delay(2, 3))
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: read(app.AsyncResult(result.id))).result()


@behaviour(
    "The result waits in the reply queue of the process that queued the task. Take Redis: "
    "the next request to a web server may be in another process."
)
def another_process() -> str:
    """Read it from another process."""
    result = wait_until_stored(lambda: add.delay(2, 3))
    return in_process("ask", result.id, str(PATIENCE))


@behaviour("The result waits in the reply queue of a process that has ended, until it expires. Take Redis.")
def producer_exits() -> str:
    """The producer exits before the result is ready, then another process asks."""
    task_id = in_process("queue", "tasks.nap", "[5]")
    if app.AsyncResult(task_id).state == states.SUCCESS:
        raise RuntimeError("the result was ready before the producer had exited")
    return in_process("ask", task_id, "15")


@behaviour()
def poll_state() -> str:
    """Poll `.state`, before and after a `get()`."""
    before = poll(add.delay(2, 3))
    add.delay(2, 3).get(timeout=TIMEOUT)
    return f"{before} before, {poll(add.delay(2, 3))} after"


@behaviour()
def unknown_id() -> str:
    """Ask for an id that does not exist."""
    return read(app.AsyncResult(str(uuid.uuid4())))


# --- What a task can end with -----------------------------------------------------------------------------


@behaviour()
def progress() -> str:
    """Follow progress with `get(on_message=...)`."""
    reports: list[dict[str, Any]] = []
    value = import_rows.apply_async((3,), countdown=LATER).get(timeout=TIMEOUT, on_message=reports.append)
    done = [report["result"]["done"] for report in reports if report["status"] == "PROGRESS"]
    return f"{done} of {value}"


@behaviour()
def retry_states() -> str:
    """Follow the states of a task that fails twice and is retried."""
    reports: list[dict[str, Any]] = []
    fetch_price.apply_async(("tea",), countdown=LATER).get(timeout=TIMEOUT, on_message=reports.append)
    return ", ".join(report["status"] for report in reports)


@behaviour()
def revoke() -> str:
    """Revoke a running task with `terminate=True`."""
    result = nap.delay(30)

    def revoke_when_started(meta: dict[str, Any]) -> None:
        if meta["status"] == states.STARTED:
            result.revoke(terminate=True)

    return seen(lambda: result.get(timeout=TIMEOUT, on_message=revoke_when_started))


@behaviour()
def custom_exception() -> str:
    """A task fails with a custom exception, and the client knows its class."""
    return seen(lambda: order.delay("tea", 3).get(timeout=TIMEOUT))


@behaviour()
def unknown_exception() -> str:
    """The same, and the client does not know the class."""
    return in_process("call", order.name, '["tea", 3]')


@behaviour()
def ignore_result() -> str:
    """Ask for the result of a task with `ignore_result=True`."""
    result = log_visit.delay("/home")
    return f"{result.get(timeout=TIMEOUT)} at once, {result.state}"


@behaviour(
    "The worker queues the other task, so the result is sent to the worker's reply queue, where nobody waits for it. "
    "Pass on the client's: self.replace(other.s(...).set(reply_to=self.request.reply_to)). Or take Redis."
)
def replace() -> str:
    """A task replaces itself with another one, `self.replace(...)`."""
    return read(add_by_another.delay(2, 3), patience=5)


@behaviour()
def megabyte() -> str:
    """Fetch a result of 1 MB."""
    return f"{len(document.delay(1_000_000).get(timeout=TIMEOUT)):,} characters"


# --- Workflows --------------------------------------------------------------------------------------------

NO_CHORDS = (
    "Somebody has to count the finished parts, and a queue of messages cannot. "
    "Take Redis, or fetch the group's results in the client and queue the last task there: "
    "total.delay(group(...)().get(timeout=30))."
)


def parts() -> Any:
    """Return a group of three tasks, which count words."""
    return group(count_words.s(line) for line in LINES)


@behaviour()
def run_group() -> str:
    """Run a `group`."""
    return seen(lambda: parts()().join(timeout=TIMEOUT))


@behaviour()
def run_chain() -> str:
    """Run a `chain`, and read its parents."""
    result = chain(add.s(2, 3), add.s(10), add.s(100))()
    value = result.get(timeout=TIMEOUT)
    parent = result.parent
    return f"{value}, parents {parent.get(timeout=TIMEOUT)} and {parent.parent.get(timeout=TIMEOUT)}"


@behaviour(NO_CHORDS)
def run_chord() -> str:
    """Run a `chord`."""
    return seen(lambda: chord(parts())(total.s()).get(timeout=TIMEOUT))


@behaviour(NO_CHORDS)
def group_then_task() -> str:
    """Run `group | task`."""
    return seen(lambda: (parts() | total.s())().get(timeout=TIMEOUT))


@behaviour(NO_CHORDS)
def nested_chords() -> str:
    """Run a `chord` of two chords."""
    return seen(lambda: chord([chord(parts(), total.s()), chord(parts(), total.s())])(total.s()).get(timeout=TIMEOUT))


@behaviour(
    "The ids of a group's tasks are stored like a result, and there is no store to put them in. "
    "Keep the group's result object in the process that queued it, or take Redis."
)
def save_group() -> str:
    """`GroupResult.save()`, then `restore()` and `join()`."""

    def save_and_restore() -> object:
        result = parts()()
        result.save()
        return GroupResult.restore(result.id, app=app).join(timeout=TIMEOUT)

    return seen(save_and_restore)


# --- What becomes of a result that nobody reads -----------------------------------------------------------


@behaviour(
    "Redis deletes the key. A message cannot be picked out of a queue: it stays until it is read or expires. "
    "Queue what you will not read with ignore_result=True."
)
def forget() -> str:
    """`forget()` a result that nobody has read; the witness counts."""
    before = stored_results()
    result = wait_until_stored(lambda: add.delay(2, 3))
    result.forget()
    return f"1 in the store, then {stored_results() - before}"


@behaviour()
def expiry() -> str:
    """A result expires after 5 seconds; the witness counts."""
    app.backend.expires = EXPIRES  # of this process's reply queue; a key in Redis expires as its worker says
    before = stored_results()
    wait_until_stored(lambda: add_short_lived.delay(2, 3))
    wait_until(lambda: stored_results() == before, "result expired", TIMEOUT)
    return "1 in the store, then 0"


@behaviour()
def many_unread() -> str:
    """2,000 results wait unread; poll the state of the last, then fetch all."""
    results = wait_until_stored(lambda: [add.delay(number, 1) for number in range(MANY)], MANY)
    state = seen(lambda: results[-1].state)
    fetched = [result.get(timeout=TIMEOUT) for result in results]
    return f"{state}, then {sum(value == number + 1 for number, value in enumerate(fetched)):,} right values"


# --- Threads ----------------------------------------------------------------------------------------------


@behaviour()
def eight_threads() -> str:
    """Eight threads queue and read at the same time."""

    def client(number: int) -> str:
        return str([add.delay(number, other).get(timeout=TIMEOUT) for other in range(5)])

    with ThreadPoolExecutor(8) as threads:
        values = list(threads.map(client, range(8)))
    right = [value == str(list(range(number, number + 5))) for number, value in enumerate(values)]
    return f"{sum(right)} of 8 read what they queued"


@behaviour()
def thread_after_thread() -> str:
    """A thread queues, reads and ends; then a new thread queues and reads."""

    def client() -> str:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: read(add.delay(2, 3))).result()

    return f"{client()}, then {client()}"


# --- How to look ------------------------------------------------------------------------------------------


def poll(result: Any) -> str:
    """Return the state that polling ends with: a ready one, or the one that stays for ever."""
    deadline = time.monotonic() + PATIENCE
    while not result.ready():
        if time.monotonic() > deadline:
            return f"{result.state} for ever"
        time.sleep(0.05)
    return str(result.state)


def stored_results() -> int:
    """Return how many results the witness sees: keys in Redis, or messages on this process's reply queue."""
    if os.environ["RESULT_STORE"] == "redis":
        with witness.redis_client(as_admin(service_url("REDIS"))) as client:
            return sum(1 for _ in client.scan_iter("*celery-task-meta-*", count=1000))
    queue = witness.find_reply_queue(app.conf.broker_url, app.thread_oid)
    return queue.messages if queue else 0


def wait_until_stored(queue_tasks: Callable[[], Any], count: int = 1) -> Any:
    """Queue tasks, and return their results when the witness sees them all in the store, unread."""
    before = stored_results()
    results = queue_tasks()
    # Many take their time, and each look is a connection.
    interval = 0.05 if count == 1 else 0.5
    wait_until(lambda: stored_results() >= before + count, f"{count} results stored", MANY_TIMEOUT, interval)
    return results


def in_process(*arguments: str) -> str:
    """Return what lab/client.py prints in a new process."""
    done = run(sys.executable, "-m", "lab.client", *arguments, env={}, timeout=TIMEOUT)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()
