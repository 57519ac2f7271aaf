"""Tasks with a countdown or an eta wait in RabbitMQ, not in a worker, and come back to the queue they were sent to.

What Celery lacks: either a worker holds them, and a few of them block it, or 28 RabbitMQ queues do. Then a retry leaves
its queue, a delay below a second fails, a queue gets the tasks of another whose name ends alike, and one misspelt queue
stops all of them.
What this does: such a task goes into a delay queue, one for each task queue and delay, from which RabbitMQ returns it
when it is due. The client does that (publishing.py); a worker does it with a task that it gets too early, from another
client, or because its delay is longer than a minute and takes more than one delay queue. For apps with this
worker_consumer, detect_quorum_queues and Task.signature_from_request are replaced.
To go back: leave out worker_consumer and task_default_exchange, and set task_default_exchange_type and
task_create_missing_queue_exchange_type to "topic", on queues with new names. For Celery 5.7.
"""

import math
import time
from datetime import UTC, datetime
from typing import Any

from celery import Celery, Task
from celery.app import base as _base
from celery.utils.quorum_queues import detect_quorum_queues
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Queue

CONSUMER = "hardening.consumer:Consumer"  # worker_consumer

EXACT = 60  # seconds; shorter delays take one queue
LONGEST = 2**20  # seconds, twelve days; then the rest of the delay follows
UNUSED = 86_400  # seconds after which a delay queue that is not used any more is deleted
DECLARE_AGAIN = 600  # seconds


def _detect_quorum_queues(app: Celery, driver_type: str) -> tuple[bool, str]:
    """Say that there are none, to an app whose workers park tasks: Celery would send them to its own 28 queues."""
    if app.conf.worker_consumer == CONSUMER:
        return False, ""
    return detect_quorum_queues(app, driver_type)


vars(_base)["detect_quorum_queues"] = _detect_quorum_queues


_celerys_signature = Task.signature_from_request


def _signature_from_request(
    task: Any, request: Any = None, args: Any = None, kwargs: Any = None, queue: Any = None, **options: Any
) -> Any:
    """Send a retry to the queue that its task came from, and not to an exchange, which may have more queues."""
    source = (task.request if request is None else request).delivery_info or {}
    if not queue and source.get("exchange") == "" and task.app.conf.worker_consumer == CONSUMER:
        queue = Queue(source["routing_key"], no_declare=True)
    return _celerys_signature(task, request, args, kwargs, queue=queue, **options)


setattr(Task, "signature_from_request", _signature_from_request)  # noqa: B010


def seconds_left(eta: Any, app: Celery | None = None) -> float:
    """Return the seconds until eta, the header of a task message. Raises what Celery does at one that is no date.

    One without a time zone is in the app's. Without an app, it is left to the worker: 0.
    """
    due: Any = maybe_iso8601(eta)
    if app is None and due.tzinfo is None:
        return 0.0
    due = maybe_make_aware(due, app.conf.timezone if app else UTC)
    seconds: float = (due - datetime.now(UTC)).total_seconds()
    return seconds


def milliseconds(seconds: float) -> int:
    """Return how long the next delay queue holds a task that is due in so many seconds.

    Up to a minute it is rounded up, to half a second, or below a second to a tenth: no task is early, or late by more.
    Above, it is the three leading bits, so that few queues serve all delays; the rest follows.
    """
    if seconds > EXACT:
        whole = min(int(seconds), LONGEST)
        bits = whole.bit_length() - 3
        return (whole >> bits << bits) * 1000
    step = 100 if seconds < 1 else 500
    return max(math.ceil(seconds * 1000 / step), 1) * step


def delay_queue(queue: str, seconds: float, priority: int | None = None) -> Queue:
    """Return the queue from which RabbitMQ returns a task to its own queue when its delay, or most of it, is over.

    Whoever uses it declares it again each DECLARE_AGAIN seconds, so that it is never deleted with a task in it, unless
    the task's own queue is missing for UNUSED seconds. Priorities have queues of their own, or a task with a higher
    one would stand before those that are due.
    """
    delay = milliseconds(seconds)
    return Queue(
        f"{queue}.delay.{delay}ms" + (f".priority{priority}" if priority else ""),
        durable=True,
        queue_arguments={
            "x-queue-type": "quorum",
            "x-message-ttl": delay,
            "x-expires": delay + UNUSED * 1000,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
            # A task stays until RabbitMQ has it in its own queue again.
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )


class Declared:
    """The delay queues that were declared on one channel, and when."""

    def __init__(self) -> None:
        self._at: dict[str, float] = {}

    def declare(self, queue: Queue, channel: Any) -> None:
        """Declare a queue, unless that was done a short while ago. Raises what the channel does."""
        if time.monotonic() - self._at.get(queue.name, -DECLARE_AGAIN) >= DECLARE_AGAIN:
            queue(channel).queue_declare()
            self._at[queue.name] = time.monotonic()
