"""The worker puts a message into another queue, and its loop never waits for that.

What Celery lacks: a worker can acknowledge or reject a message, but not put it elsewhere without the risk of losing it.
What this does: one thread beside the loop publishes the message over a connection of its own, and acknowledges the
original once RabbitMQ has confirmed the copy. It needs its own connection because RabbitMQ blocks one that publishes
while memory is short, and the worker could then acknowledge nothing. A fork waits up to a second for that thread.
To go back: leave out worker_consumer, as delays.py says. For Celery 5.7.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Any

import amqp
from celery.utils.log import get_logger
from kombu import Queue
from kombu.compression import compress
from kombu.exceptions import OperationalError

from .delays import Declared

logger = get_logger(__name__)

ANSWER_TIMEOUT = 60.0  # seconds; then the connection is made anew
FORK_PATIENCE = 1.0  # seconds that a fork waits for a job
PAUSE = 1.0  # seconds between attempts

# What RabbitMQ writes into a message that comes from a delay queue, and what more into one that it delivers again.
DELAYED = ("x-death", "x-first-death-", "x-last-death-")
DELIVERED_AGAIN = ("x-delivery-count", "x-acquired-count", "x-opt-")


class Beside:
    """Does jobs in their order, in one daemon thread (a greenlet with gevent) that starts with the first of them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.at_work = threading.RLock()
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._started = threading.Lock()
        self.waited = False
        _all.add(self)

    def do(self, job: Callable[[], object]) -> None:
        """Do it later. An exception is logged."""
        self._jobs.put(job)
        if self._started.acquire(blocking=False):
            threading.Thread(target=self._run, name=self.name, daemon=True).start()

    def do_until_done(self, job: Callable[[], object], away: tuple[type[Exception], ...]) -> None:
        """Do it later, and again after what else there is when it raises one of these. Another exception is logged."""

        def attempt() -> None:
            try:
                job()
            except away as exc:
                logger.warning("%s: %s; trying again.", self.name, exc)
                time.sleep(PAUSE)
                self.do(attempt)

        self.do(attempt)

    def wait(self, timeout: float) -> bool:
        """Wait until the jobs of this moment are done, and tell whether they are. timeout in seconds."""
        if not self._started.locked():
            return True
        done = threading.Event()
        self._jobs.put(done.set)
        return done.wait(timeout)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            with self.at_work:
                try:
                    job()
                except Exception:
                    logger.exception("%s: a job failed", self.name)


def _before_fork() -> None:
    for each in _all:
        each.waited = each.at_work.acquire(timeout=FORK_PATIENCE)


def _after_fork() -> None:
    for each in _all:
        if each.waited:
            each.at_work.release()


def _after_fork_in_child() -> None:
    for each in _all:
        each.at_work = threading.RLock()


# A pool process that is forked while a thread holds a lock, of an import for one, would wait for it for ever. So the
# fork waits for the end of the job, but not long: one that takes longer waits for a server, and holds no such lock.
_all: "weakref.WeakSet[Beside]" = weakref.WeakSet()
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def queue_of(consumer: Any, message: Any) -> Queue | None:
    """Return the queue that a message was consumed from: a routing key or an exchange does not tell."""
    tasks = consumer.task_consumer
    for name, tag in tasks._active_tags.items() if tasks else ():
        if tag == message.delivery_info.get("consumer_tag"):
            queue: Queue = tasks._queues[name]
            return queue
    return None


def lasting_queue_of(consumer: Any, message: Any) -> Queue | None:
    """Return the queue that a message was consumed from, unless it ends with this worker."""
    queue = queue_of(consumer, message)
    return None if queue is None or queue.auto_delete or queue.exclusive else queue


def without_delay(headers: dict[str, Any], *more: str) -> dict[str, Any]:
    """Return what the client has put into the headers: a task hands them on to its retry, and x-death holds a date."""
    others = (*DELAYED, *more)
    return {name: value for name, value in headers.items() if not name.startswith(others)}


def copy(message: Any, headers: dict[str, Any]) -> amqp.Message:
    """Return a message as it was published, with these headers added. It expires no more: it was delivered in time."""
    body = message.body
    if (compression := message.headers.get("compression")) and not message.errors:
        body, _ = compress(body, compression)
    own = without_delay(message.headers, *DELIVERED_AGAIN)  # a copy starts afresh
    kept = {name: value for name, value in message.properties.items() if name != "expiration"}
    return amqp.Message(body, **{**kept, "delivery_mode": 2, "application_headers": {**own, **headers}})


class Moves:
    """Moves messages to other queues, one after the other, each confirmed."""

    def __init__(self, consumer: Any) -> None:
        self.consumer, self.beside = consumer, Beside("moves")
        self._connection: Any = None
        self._declared = Declared()

    def move(self, message: Any, to: Queue, headers: dict[str, Any] | None = None) -> None:
        """Put a message into the queue to, then acknowledge it.

        If its connection is lost before that, RabbitMQ delivers it again, and it is moved then.
        """
        channel = message.channel
        self.beside.do(partial(self._move, message, channel, to, copy(message, headers or {})))

    def _move(self, message: Any, channel: Any, to: Queue, content: amqp.Message) -> None:
        while True:
            if channel.connection is None and not message.acknowledged:
                return  # RabbitMQ gives it out again
            if self._publish(to, content):
                break
            time.sleep(PAUSE)
        if not message.acknowledged:
            self.consumer.call_soon_ack(message.ack_log_error, logger, self.consumer.connection_errors)

    def _publish(self, to: Queue, content: amqp.Message) -> bool:
        try:
            if self._connection is None:
                connection = self.consumer.app.connection_for_write()
                connection.transport_options = {**connection.transport_options, "confirm_publish": True}
                self._declared = Declared()
                self._connection = connection.ensure_connection(max_retries=1, timeout=ANSWER_TIMEOUT)
            channel = self._connection.default_channel
            self._declared.declare(to, channel)
            channel.basic_publish(content, routing_key=to.name, mandatory=True, timeout=ANSWER_TIMEOUT)
        except (amqp.AMQPError, OSError, OperationalError) as exc:
            logger.warning("A message could not be put into the queue %s (%s); trying again.", to.name, exc)
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.collect()
            return False
        return True
