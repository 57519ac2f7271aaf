"""The behaviours that are compared: each public function here is a row of the table.

Its docstring is the row's first cell, and what it returns or raises is the store's cell; docs/side-by-side.md says why
the stores differ. Workers of the same store run beside it, which lab/compare.py has started.

  python -m lab.behaviours NAME    observe one with the store of RESULT_STORE

That process knows tasks.py, as every client does. What else the workers know, lab/more_tasks.py, it calls by name.
"""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery import chain, chord, group, states
from celery.exceptions import OperationalError
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import GroupResult

import witness
from hardening.environment import service_url
from lab.servers import run, wait_until
from tasks import add, app, count_words, fetch_price, import_rows, log_visit, nap, total

TIMEOUT = 300.0  # seconds; what takes longer could not be observed
PATIENCE = 2.0  # seconds; a result that is stored already, and does not come by then, never comes
MANY = 2_000
SHORT_LIVED = "short-lived"  # the queue of a worker whose results expire soon
EXPIRES = 5  # seconds; long enough to be seen before

# --- Reading a result -------------------------------------------------------------------------------------


def read_twice() -> str:
    """Read a result twice."""
    result = add.delay(2, 3)
    return f"{result.get(timeout=TIMEOUT)}, then {result.get(timeout=PATIENCE)}"


def new_result_object() -> str:
    """Read it through a new `AsyncResult`, twice."""
    task_id = _add_unread().id
    return f"{_read(task_id)}, then {_read(task_id)}"


def another_thread() -> str:
    """Read it from another thread."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_read, _add_unread().id).result()


def eight_threads() -> str:
    """Eight threads queue and read at the same time, and end; then eight new ones."""

    def client(number: int) -> bool:
        return all(add.delay(number, other).get(timeout=TIMEOUT) == number + other for other in range(5))

    with ThreadPoolExecutor(8) as first, ThreadPoolExecutor(8) as second:
        right = sum(first.map(client, range(8)))
        first.shutdown()
        return f"{right}, then {sum(second.map(client, range(8)))} read what they queued"


def another_process() -> str:
    """Read it from another process."""
    return _elsewhere("_read", _add_unread().id)


def producer_exits() -> str:
    """The producer exits before the result is ready, then another process asks."""
    task_id = _elsewhere("_leave")
    if app.AsyncResult(task_id).ready():
        raise TimeoutError("the result was ready before the producer had exited")
    return _read(task_id, patience=15)


def poll_state() -> str:
    """Poll `.state`, before and after a `get()`."""
    polled = []
    for when in ("before", "after"):
        result = add.delay(2, 3)
        wait_until(result.ready, "result ready", TIMEOUT)
        polled.append(f"{result.state} {when}")
        add.delay(2, 3).get(timeout=TIMEOUT)
    return ", ".join(polled)


def unknown_id() -> str:
    """Ask for an id that does not exist."""
    return _read("there-is-no-such-id")


# --- What a task can end with -----------------------------------------------------------------------------


def progress() -> str:
    """Follow progress with `get(on_message=...)`."""
    *reports, last = _hear(import_rows.s(3))
    return f"{[report['result']['done'] for report in reports if report['status'] == 'PROGRESS']} of {last['result']}"


def retry_states() -> str:
    """Follow the states of a task that fails twice and is retried."""
    return ", ".join(report["status"] for report in _hear(fetch_price.s("tea")))


def revoke() -> str:
    """Revoke a running task with `terminate=True`."""
    result = nap.delay(30)
    wait_until(lambda: result.state == states.STARTED, "task started", TIMEOUT)
    result.revoke(terminate=True)
    return str(result.get(timeout=TIMEOUT))


def known_exception() -> str:
    """A task fails with a custom exception, and the client knows its class."""
    from lab.more_tasks import order

    return str(order.delay("tea", 3).get(timeout=TIMEOUT))


def unknown_exception() -> str:
    """The same, and the client does not know the class."""
    return str(app.send_task("lab.more_tasks.order", ("tea", 3)).get(timeout=TIMEOUT))


def ignore_result() -> str:
    """Ask for the result of a task with `ignore_result=True`."""
    result = log_visit.delay("/home")
    return f"{result.get(timeout=TIMEOUT)} at once, {result.state}"


def replace() -> str:
    """A task replaces itself with another one, `self.replace(...)`."""
    return _read(app.send_task("lab.more_tasks.add_by_another", (2, 3)).id, patience=5)


def megabyte() -> str:
    """Fetch a result of 1 MB."""
    text = app.send_task(add.name, ("x" * 500_000, "y" * 500_000)).get(timeout=TIMEOUT)
    return f"{len(text):,} characters"


# --- Workflows --------------------------------------------------------------------------------------------


def _parts() -> Any:
    """Return a group of three tasks, which count words."""
    return group(map(count_words.s, ("the quick brown fox", "jumps over", "the lazy dog")))


def group_and_chain() -> str:
    """Run a `group`; run a `chain`, and read its parents."""
    counts = _parts()().join(timeout=TIMEOUT)
    result = chain(add.s(2, 3), add.s(10), add.s(100))()
    value, parent, first = (each.get(timeout=TIMEOUT) for each in (result, result.parent, result.parent.parent))
    return f"{counts}; {value}, parents {parent} and {first}"


def run_chord() -> str:
    """Run a `chord`."""
    return str(chord(_parts())(total.s()).get(timeout=TIMEOUT))


def group_then_task() -> str:
    """Run `group | task`."""
    return str((_parts() | total.s())().get(timeout=TIMEOUT))


def nested_chords() -> str:
    """Run a `chord` of two chords."""
    return str(chord([chord(_parts(), total.s())] * 2)(total.s()).get(timeout=TIMEOUT))


def save_group() -> str:
    """`GroupResult.save()`, then `restore()` and `join()`."""
    result = _parts()()
    result.save()
    return str(GroupResult.restore(result.id, app=app).join(timeout=TIMEOUT))


# --- What becomes of a result that nobody reads -----------------------------------------------------------


def forget() -> str:
    """`forget()` a result that nobody has read; the witness counts."""
    result = _add_unread()
    result.forget()
    return f"1 in the store, then {_stored(result)}"


def expiry() -> str:
    """A result expires after 5 seconds; the witness counts."""
    app.conf.result_expires = EXPIRES  # of this process's reply queue; a key in Redis expires as its worker says
    result = _add_unread(queue=SHORT_LIVED)
    wait_until(lambda: not _stored(result), "result expired", TIMEOUT)
    return "1 in the store, then 0"


def many_unread() -> str:
    """2,000 results wait unread; poll the state of the last, then fetch all."""
    results = [add.delay(number, 1) for number in range(MANY)]
    wait_until(lambda: _stored(*results) == MANY, "all stored", TIMEOUT, interval=0.5)
    state = results[-1].state
    right = sum(result.get(timeout=TIMEOUT) == number + 1 for number, result in enumerate(results))
    return f"{state}, then {right:,} right values"


# --- How to look ------------------------------------------------------------------------------------------


def _add_unread(**options: Any) -> Any:
    """Queue a task, and return its result when the witness sees it in the store."""
    result = add.apply_async((2, 3), **options)
    wait_until(lambda: _stored(result), "result stored", TIMEOUT)
    return result


def _elsewhere(what: str, *arguments: str) -> str:
    """Return what a function of this module returns in a process of its own, which then exits."""
    return run(sys.executable, "-m", "lab.behaviours", what, *arguments, env={}, timeout=TIMEOUT).stdout.strip()


def _leave() -> str:
    """Queue a task that runs for a while, and return its id."""
    return str(nap.delay(5).id)


def _stored(*results: Any) -> int:
    """Return how many of this process's results the witness sees: keys in Redis, or messages on its reply queue."""
    if os.environ["RESULT_STORE"] == "redis":
        with witness.redis_client(service_url("REDIS")) as client:
            return sum(map(bool, client.mget([app.backend.get_key_for_task(result.id) for result in results])))
    queue = witness.find_reply_queue(app.conf.broker_url, app.thread_oid)
    return queue.messages if queue else 0


def _read(task_id: str, patience: float = PATIENCE) -> str:
    """Return what a new result object's get() returns, or that nothing comes."""
    result = app.AsyncResult(task_id)
    try:
        return str(result.get(timeout=patience))
    except ResultTimeout as exc:
        return f"{result.state} for ever, {_describe(exc)}"


def _hear(task: Any) -> list[dict[str, Any]]:
    """Queue a task that starts in a second, so that get() is there before, and return each state that it tells of."""
    reports: list[dict[str, Any]] = []
    task.apply_async(countdown=1).get(timeout=TIMEOUT, on_message=reports.append)
    return reports


def _describe(exc: BaseException) -> str:
    """Return an exception with the module to import it from, without the ids that differ from run to run."""
    module = type(exc).__module__
    name = type(exc).__name__ if module == "builtins" else f"{module}.{type(exc).__name__}"
    message = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", str(exc)).partition("\n")[0]
    return f"`{name}: {message}`"


if __name__ == "__main__":
    try:
        print(globals()[sys.argv[1]](*sys.argv[2:]))
    except (TimeoutError, ResultTimeout, OperationalError, witness.ServerError) as exc:  # nothing was seen
        sys.exit(f"{os.environ['RESULT_STORE']}: could not be observed: {_describe(exc)}")
    except Exception as exc:  # whatever it is, it is what was seen
        print(_describe(exc))
