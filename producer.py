"""The tour: queue tasks, fetch their results, and look where the results really are.

Each step below is a function, as you would write it in your own program; the tour prints its code and what came back.
The exit code is 0 only if all of them ended as announced in ANNOUNCED.

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
import inspect
import json
import os
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import celery
from celery import states
from celery.backends.base import BaseKeyValueStoreBackend
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url
from rich.console import Console

import witness
from hardening.environment import result_store, service_url
from tasks import add, app, count_words, divide, fetch_price, import_rows, log_visit, nap, total

LINES = ["the quick brown fox", "jumps over", "the lazy dog"]

# --- The steps ---------------------------------------------------------------------------------------------


def value() -> object:
    """A worker computes, the result backend carries the value back."""
    return add.delay(2, 3).get(timeout=30)


def failure() -> object:
    """The task raises, and get() raises the same exception here."""
    return divide.delay(1, 0).get(timeout=30)


def retry() -> object:
    """The task fails twice; Celery queues it again, first after 1 second, then after 2."""
    result = fetch_price.delay("tea")
    return result.get(timeout=30), f"after {result.retries} retries"


def progress() -> object:
    """The task reports how far it is, and each report reaches the caller while it waits."""
    return import_rows.delay(10).get(timeout=30, on_message=show_progress)


def group() -> object:
    """Three tasks run side by side; their results come back in the order in which they were asked for."""
    return celery.group(count_words.s(line) for line in LINES)().get(timeout=30)


def chain() -> object:
    """The result of the first task becomes an argument of the second; both can be fetched."""
    result = celery.chain(add.s(2, 3), add.s(10))()
    return result.get(timeout=30), result.parent.get(timeout=30)


def chord() -> object:
    """A task that runs when all tasks of a group are done, and gets their results."""
    return celery.chord([count_words.s(line) for line in LINES])(total.s()).get(timeout=30)


def revoke() -> object:
    """A task is called off while it runs."""
    result = nap.delay(30)
    wait_until(lambda: result.state == states.STARTED)
    result.revoke(terminate=True)
    return result.get(timeout=30)


def time_limit() -> object:
    """A task takes too long: after its time limit of 1 second it is interrupted."""
    return nap.apply_async((30,), soft_time_limit=1).get(timeout=30)


def ignored() -> object:
    """A task with ignore_result=True: it runs, but nothing is stored, and get() returns at once."""
    return log_visit.delay("/home").get(timeout=30)


def where() -> object:
    """Where is a result before and after get()? redis-py and pika look, behind Celery's back."""
    result = add.delay(20, 22)
    wait_until(lambda: is_stored(result))
    show_places("before get():", result)
    fetched = result.get(timeout=30)
    show_places("after get():", result)
    return fetched


# --- What each of them ends with ---------------------------------------------------------------------------

ANNOUNCED: dict[Callable[[], object], str] = {
    value: "5",
    failure: "ZeroDivisionError: division by zero",
    retry: "(28.5, 'after 2 retries')",
    progress: "10",
    group: "[4, 2, 3]",
    chain: "(15, 5)",
    chord: "9",
    revoke: "TaskRevokedError: terminated",
    time_limit: "SoftTimeLimitExceeded",
    ignored: "None",
    where: "42",
}
REFUSED = {  # steps that a result backend may refuse, and what to do instead
    chord: "Somebody has to count the finished parts, and a queue of messages cannot.\n"
    "Instead: total.delay(group(...)().get(timeout=30)), or RESULT_STORE=redis.",
}

# --- How they look and wait --------------------------------------------------------------------------------

WORKER_TIMEOUT = 20.0  # seconds that a worker may take to start
console = Console(highlight=False, markup=False, soft_wrap=True)


def say(text: str, style: str | None = None) -> None:
    """Print under the step's name."""
    console.print(textwrap.indent(text, "     "), style=style)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true. Raises TimeoutError after 30 seconds."""
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not happen within 30 s")
        time.sleep(0.05)


def show_progress(meta: dict[str, Any]) -> None:
    """Show one report of import_rows."""
    if meta["status"] == "PROGRESS" and meta["result"]["done"] % 5 == 0:
        say("{done} of {total} rows are done".format(**meta["result"]))


def find(result: Any) -> tuple[witness.ResultKey | None, witness.ReplyQueue | None]:
    """Return the result's key in Redis, and this process's reply queue in RabbitMQ."""
    key = None
    with suppress(witness.Unreachable):  # not needed with rabbitmq
        prefix = app.conf.result_backend_transport_options["global_keyprefix"]
        key = witness.find_result_key(service_url("REDIS"), f"{prefix}celery-task-meta-{result.id}")
    return key, witness.find_reply_queue(app.conf.broker_url, app.thread_oid)


def is_stored(result: Any) -> bool:
    """Tell whether one of the two witnesses sees the result."""
    key, queue = find(result)
    return bool(key or (queue and queue.messages))


def show_places(moment: str, result: Any) -> None:
    """Print what the two witnesses see."""

    def content(meta: dict[str, Any]) -> str:
        return json.dumps({name: meta[name] for name in ("status", "result", "name", "args")})

    key, queue = find(result)
    say(moment)
    if key:
        say(f"  Redis     {key.name}, expires in {key.ttl} s\n            {content(key.content)}")
    else:
        say("  Redis     no key with this task's id")
    if queue:
        say(f"  RabbitMQ  reply queue {queue.name}, messages: {queue.messages}, consumers: {queue.consumers}")
        if queue.content:
            say(f"            {content(queue.content)}")
    else:
        say("  RabbitMQ  no reply queue of this client")
    if moment.startswith("after"):
        if key:
            say("A key stays: until it expires, every process can read it, as often as it likes.")
        else:
            say("A message is delivered once, to the process that queued the task; no other can read it.")


# --- The tour around them ----------------------------------------------------------------------------------

STEPS = {step.__name__: step for step in ANNOUNCED}


def code(step: Callable[[], object]) -> str:
    """Return the lines of a step, without its name and its docstring."""
    lines = inspect.getsource(step).splitlines()[2:]
    return textwrap.dedent("\n".join(lines))


def outcome(came_back: object) -> str:
    """Describe what a step returned or raised, in one line."""
    if not isinstance(came_back, BaseException):
        return str(came_back)
    name, message = type(came_back).__name__, str(came_back).partition("\n")[0]
    return name if message in ("", f"{name}()") else f"{name}: {message}"


def duration(seconds: float) -> str:
    """Return a time in a readable form."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def in_a_new_process(step: Callable[[], object]) -> object:
    """Run a step in its own process, whose reply queue nobody reads yet: the witness then finds the result there."""
    with ProcessPoolExecutor(1) as process:
        return process.submit(step).result()


def run_step(number: int, step: Callable[[], object]) -> str:
    """Run one step and print it. Return "ended" or "refused" if it ended as announced, otherwise "failed"."""
    console.print(f"\n{number:2}. {step.__name__}: {step.__doc__}", style="bold")
    say(code(step), style="cyan")
    started = time.perf_counter()
    came_back: object
    try:
        came_back = in_a_new_process(step) if step is where else step()
    except (OperationalError, witness.ServerError):
        raise
    except Exception as exc:  # whatever the task raised is what the step shows
        came_back = exc
    took = duration(time.perf_counter() - started)
    if step in REFUSED and isinstance(came_back, NotImplementedError):
        say(REFUSED[step])
        say(f"-> REFUSED, {outcome(came_back)}   ({took})", style="yellow")
        return "refused"
    if outcome(came_back) == ANNOUNCED[step]:
        say(f"-> {outcome(came_back)}   ({took})", style="green")
        return "ended"
    say(f"-> {outcome(came_back)}   ({took})\nNOT AS ANNOUNCED: it should end with {ANNOUNCED[step]}", style="bold red")
    return "failed"


def check_servers() -> None:
    """Raise ServerError unless the broker, the result backend and a worker that uses it are there."""
    with witness.rabbitmq_channel(service_url("RABBITMQ")):
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
        theirs, ours = (str(url).partition("://")[0] for url in (settings["result_backend"], app.conf.result_backend))
        if theirs != ours:  # the worker hides the rest, because it contains a password
            raise witness.Refused(
                f"{name} puts its results elsewhere: it was started with another RESULT_STORE than this producer. "
                "Set the same one for both."
            )


def print_next_commands() -> None:
    """Say what to open and try after the tour."""
    console.print("\nWhat next?", style="bold")
    store = result_store()
    other = "redis" if store == "rabbitmq" else "rabbitmq"
    same = "" if store == "redis" else f"RESULT_STORE={store} "
    if flower := os.environ.get("FLOWER_PAGE"):  # set in docker-compose.yml
        overlays = [os.environ[name] for name in sorted(os.environ) if name.startswith("OVERLAY_")]
        compose = " -f ".join(["docker compose", *(["docker-compose.yml", *overlays] if overlays else [])])
        once_more = f"{same}{compose} run --rm --no-deps producer python producer.py where"
        console.print(f"  see the tasks in Flower         {flower}  (user demo)")
        console.print(f"  see the queues in RabbitMQ      {os.environ['RABBITMQ_PAGE']}  (user demo)")
        console.print("                                  (the passwords, too, are demo, unless you set others)")
        console.print(f"  put the results into {other:8}   RESULT_STORE={other} {compose} up")
        console.print(f"  run a step once more            {once_more}")
        console.print(f"  stop it                         {compose} stop")
        console.print(f'  remove everything               {compose} --profile "*" down --volumes')
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
        console.print(f"  broker          {';'.join(map(maybe_sanitize_url, app.conf.broker_url.split(';')))}")
        console.print(
            f"  result backend  {app.backend.as_uri(include_password=False)}   (RESULT_STORE={result_store()})"
        )
        started = time.perf_counter()
        ends = [run_step(number, STEPS[name]) for number, name in enumerate(chosen, 1)]
    except (OperationalError, witness.ServerError) as exc:
        print(f"producer: {outcome(exc) if isinstance(exc, OperationalError) else exc}", file=sys.stderr)
        return 1
    took = duration(time.perf_counter() - started)
    refused = ends.count("refused")
    but = f", {refused} was refused by this result backend" if refused else ""
    console.print(f"\n{ends.count('ended')} of {len(ends)} steps ended as announced{but}, in {took}.", style="bold")
    print_next_commands()
    return 1 if "failed" in ends else 0


if __name__ == "__main__":
    sys.exit(main())
