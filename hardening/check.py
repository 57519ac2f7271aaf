"""Say what in this app would clash with what a broker already has, and what still waits in old queues.

    python -m hardening.check -A jobs [-Q queue,queue] [--old queue,queue] [--old-broker redis://HOST:PORT/0]

What Celery lacks: a queue or an exchange that exists in another form cannot be declared (PRECONDITION_FAILED). Celery
says so only when worker and client start, and does not say what to do.
What this does: it declares only what already exists, which changes nothing, and prints one line for each queue and for
each exchange that clashes. It needs only the rights of the app's own user. The exit code is 1 when something clashes,
and 2 when the broker does not answer.
To go back: nothing depends on this module. For Celery 5.7.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import amqp
from celery import Celery
from celery.app.utils import find_app
from kombu import Connection, Exchange, Queue
from kombu.exceptions import OperationalError

from . import in_force
from .dead_letters import dead_letter_queue

TIMEOUT = 10.0  # seconds that RabbitMQ has for each answer
STOCK_QUEUE = "celery"  # Celery's own task_default_queue
# Where Celery's native delayed delivery keeps tasks with a countdown.
NATIVE_DELAYS = [f"celery_delayed_{level}" for level in range(28)]
NOT_FOUND = 404  # AMQP's code for what does not exist


def queues(app: Celery, more: Iterable[str] = ()) -> list[Queue]:
    """Return the queues that the app's settings and tasks name. Those that a router function chooses are unknown."""
    app.loader.import_default_modules()
    names = {*app.amqp.queues, app.conf.task_default_queue, *more, *_routed(app.conf.task_routes)}
    of_tasks = {getattr(task, "queue", None) for task in app.tasks.values()}
    names |= {queue for queue in of_tasks if isinstance(queue, str)}
    return [*(app.amqp.queues[name] for name in sorted(names)), dead_letter_queue(app)]


def _routed(routes: Any) -> Iterator[str]:
    """Yield the queues in task_routes, which is a dictionary or a list of them."""
    for route in routes if isinstance(routes, (list, tuple)) else [routes]:
        for options in route.values() if isinstance(route, dict) else ():
            queue = options.get("queue") if isinstance(options, dict) else options
            if queue:
                yield str(getattr(queue, "name", queue))


def declare(connection: Connection, entity: Queue | Exchange, passive: bool) -> Any:
    """Declare on a channel of its own, for RabbitMQ closes it when it refuses. Raises a connection's channel_errors."""
    is_amqp = connection.transport.driver_type == "amqp"
    channel: Any = connection.channel()
    with connection.connection.transport.having_timeout(TIMEOUT) if is_amqp else nullcontext():
        bound: Any = entity(channel)
        declared = (
            bound.declare(passive=passive) if isinstance(entity, Exchange) else bound.queue_declare(passive=passive)
        )
        channel.close()
    return declared


def look(connection: Connection, entity: Queue | Exchange) -> tuple[str, str]:
    """Return ok or CLASH, and the reason, for one queue or exchange."""
    try:
        declare(connection, entity, passive=True)
        found = declare(connection, entity, passive=False)
    except connection.channel_errors as exc:
        missing = getattr(exc, "code", None) == NOT_FOUND
        return ("ok", "does not exist yet") if missing else ("CLASH", getattr(exc, "reply_text", None) or str(exc))
    if isinstance(entity, Exchange):
        return "ok", "exists, of the same type"
    return "ok", f"exists, of the same form; messages: {found.message_count}, consumers: {found.consumer_count}"


def waiting(connection: Connection, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield what may still hold tasks of an old installation, and how many."""
    for name in names:
        with suppress(*connection.channel_errors):
            yield f"queue {name}", declare(connection, Queue(name), passive=True).message_count
    if connection.transport.driver_type == "redis":
        channel: Any = connection.channel()
        with channel.conn_or_acquire() as client:
            yield "tasks that run, or wait for their countdown", client.hlen(channel.unacked_key)


def report(app: Celery, more: Iterable[str], old: Iterable[str], old_broker: str | None) -> int:
    """Print what there is, and return how many clashes. Raises what a broker does that cannot be asked."""
    print(in_force.line(app))
    ours, clashes = queues(app, more), 0
    with app.connection_for_write() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        for queue in ours:
            verdict, reason = look(connection, queue)
            print(f"{verdict:<6} queue {queue.name}: {reason}")
            clashes += verdict == "CLASH"
            if queue.exchange and queue.exchange.name:
                verdict, reason = look(connection, queue.exchange)
                if verdict == "CLASH":
                    print(f"{verdict:<6} exchange {queue.exchange.name}: {reason}")
                    clashes += 1
    names = {STOCK_QUEUE, *old, *NATIVE_DELAYS} - (set() if old_broker else {queue.name for queue in ours})
    with Connection(old_broker) if old_broker else app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0)
        for what, messages in waiting(connection, sorted(names)):
            if messages:
                print(f"WAITS  {what}: {messages}; keep an old worker until it is 0")
            elif not what.endswith(tuple(NATIVE_DELAYS)):
                print(f"ok     {what}: 0")
    if clashes:
        print(
            f"{clashes} would stop worker and client with PRECONDITION_FAILED. Take another name, or delete the old "
            "one once nothing needs it: nothing changes the type of a queue or an exchange that exists."
        )
    return clashes


def main() -> int:
    """Read the command line, print the report, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hardening.check", description=__doc__.partition("\n")[0])
    parser.add_argument("-A", "--app", required=True, help="as for celery -A")
    parser.add_argument("-Q", "--queues", default="", help="queues that your workers are started with, commas between")
    parser.add_argument("--old", default="", help=f"queues of the old installation, besides {STOCK_QUEUE}")
    parser.add_argument("--old-broker", help="its URL, if that was another broker: redis:// or amqp://")
    options = parser.parse_args()
    try:
        app = find_app(options.app)
    except (ImportError, AttributeError) as exc:
        parser.error(f"-A {options.app}: {exc}")
    more, old = (list(filter(None, names.split(","))) for names in (options.queues, options.old))
    try:
        clashes = report(app, more, old, options.old_broker)
    except (OperationalError, amqp.AMQPError, OSError) as exc:
        print(f"check: a broker cannot be asked: {exc}. Does it run, and is its URL right?", file=sys.stderr)
        return 2
    return 1 if clashes else 0


if __name__ == "__main__":
    sys.exit(main())
