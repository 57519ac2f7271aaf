"""Tasks with a countdown or an eta wait in RabbitMQ, in no worker, and come back to the queue they were sent to.

What Celery lacks: either a worker holds them, and a few block it, or 28 queues of RabbitMQ do. Then a retry leaves its
queue, a delay below a second fails, a queue gets those of another whose name ends alike, and one misspelt queue stops
all of them.
What this does: they are sent like any task. A worker that receives one too early parks it: it puts it into a queue
that belongs to its own queue and to one delay, and from which RabbitMQ returns it after that. The delays are powers of
two, so that a task is parked a few times. A task from any other client, and a year far off, is parked like these.
To go back: leave out worker_consumer and the import of this module, and set the exchange type to topic.
For Celery 5.7.
"""

from datetime import UTC, datetime
from typing import Any

from celery import Celery
from celery.app import base as _base
from celery.utils.quorum_queues import detect_quorum_queues
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu import Queue

CONSUMER = "hardening.consumer:Consumer"  # worker_consumer

# Milliseconds. A task is late by less than the first one; the last one is 14 hours.
DELAYS = [100 * 2**n for n in range(20)]


def _detect_quorum_queues(app: Celery, driver_type: str) -> tuple[bool, str]:
    """Say that there are none, to an app whose workers park tasks: Celery would send them to its own 28 queues."""
    if app.conf.worker_consumer == CONSUMER:
        return False, ""
    return detect_quorum_queues(app, driver_type)


vars(_base)["detect_quorum_queues"] = _detect_quorum_queues


def seconds_left(eta: Any, app: Celery) -> float:
    """Return the seconds until eta, the header of a task message. Raises what Celery does at one that is no date."""
    due: datetime = maybe_make_aware(maybe_iso8601(eta), app.conf.timezone)  # type: ignore[arg-type]
    return (due - datetime.now(UTC)).total_seconds()


def delay_queue(queue: str, seconds: float, priority: int = 0) -> Queue:
    """Return the queue that holds a task for at most that long, and then returns it to its own queue.

    It never expires: its tasks would go with it. Priorities have queues of their own, or a task with a higher one would
    stand before those that are due.
    """
    delay = max([delay for delay in DELAYS if delay <= seconds * 1000], default=DELAYS[0])
    return Queue(
        f"{queue}.delay.{delay}ms" + (f".priority{priority}" if priority else ""),
        durable=True,
        queue_arguments={
            "x-queue-type": "quorum",
            "x-message-ttl": delay,
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": queue,
            # A task stays until RabbitMQ has it in its own queue again.
            "x-dead-letter-strategy": "at-least-once",
            "x-overflow": "reject-publish",
        },
    )
