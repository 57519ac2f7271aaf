"""An rpc:// result backend whose reply queue survives a restart of RabbitMQ and of its reader.

What Celery lacks: the reply queue is deleted, results and all, when RabbitMQ stops, and its reader reconnects once.
What this does: a durable queue without auto-delete, and a reader that connects anew whenever somebody waits.
To go back: result_backend = "rpc://". For Celery 5.7.
"""

import logging
import time
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

from celery.backends import rpc
from celery.result import result_from_tuple
from celery.utils.collections import BufferMap
from kombu.common import maybe_declare
from kombu.exceptions import OperationalError

from .publishing import bounded_policy

_logger = logging.getLogger(__name__)

# The connection that consumes from each reply queue: two consumers would share the results between them.
_consuming: "weakref.WeakValueDictionary[str, Any]" = weakref.WeakValueDictionary()


class ReplyConsumer(rpc.ResultConsumer):
    """Waits for results, and goes on waiting after RabbitMQ restarted.

    Celery's own tries to reconnect once and then never again. This one connects anew whenever somebody waits for
    a result, and acknowledges a result when it has arrived, so that one that was on its way is sent once more.
    """

    answer_timeout = 5.0  # seconds

    def start(self, initial_task_id: str, **kwargs: Any) -> None:
        """Connect, with one attempt for each URL, and consume from the reply queue. Raises what the connection does."""
        connection = self.app.connection_for_read()
        self._connection_errors = (*connection.connection_errors, *connection.channel_errors, OperationalError)
        queue = self.backend.binding
        self.take_over()
        try:
            connection.ensure_connection(max_retries=max(len(connection.alt) - 1, 0))
            # In a cluster, RabbitMQ does not answer while the node with the queue is away.
            with connection.connection.transport.having_timeout(self.answer_timeout):
                consumer = self.Consumer(
                    connection.default_channel,
                    [queue],
                    accept=self.accept,
                    on_message=self._on_reply,
                    on_decode_error=self._drop,
                )
                consumer.consume()
        except BaseException:
            connection.collect()
            raise
        self._connection, self._consumer = connection, consumer
        _consuming[queue.name] = connection

    def take_over(self) -> None:
        """Close the connection of an ended thread, unless this one consumes already; RabbitMQ sends us what it held.

        Python gives a new thread the identity of an ended one, and with it the name of its reply queue.
        """
        if self._consumer is None and (left_over := _consuming.pop(self.backend.oid, None)):
            left_over.collect()

    def read(self, message: Any) -> dict[str, Any] | None:
        """Return the result in a message. What is none, or not JSON, is dropped with one line in the log."""
        try:
            meta: dict[str, Any] = message.payload
            self.backend.meta_from_decoded(dict(meta))
            hash(meta["task_id"])
            for child in meta.get("children") or ():
                result_from_tuple(child, self.app)
        except Exception as exc:
            self._drop(message, exc)
            return None
        return meta

    def _drop(self, message: Any, exc: Exception) -> None:
        _logger.warning("Dropped a reply that is no result (%s: %.200s).", type(exc).__name__, exc)
        message.reject()

    def _on_reply(self, message: Any) -> None:
        if (meta := self.read(message)) is None:
            return
        try:
            self.on_state_change(meta, message)
        except BaseException:  # the caller's on_message raised: keep the result for the next get()
            message.requeue()
            raise
        message.ack()

    def consume_from(self, task_id: str) -> None:
        """Do nothing: drain_events connects, in the one thread or greenlet that waits."""

    def drain_events(self, timeout: float | None = None) -> None:
        """Handle one result. Raises TimeoutError when none arrives within timeout, in seconds."""
        try:
            if self._consumer is None:
                self.start("")
            self._connection.drain_events(timeout=timeout)
        except TimeoutError:  # nothing came; Drainer asks again until get() has waited long enough
            raise
        except self._connection_errors as exc:
            _logger.warning("RabbitMQ is away (%s); results are waited for once it is back.", exc)
            if self._connection is not None:
                self._connection.collect()
            self._connection = self._consumer = None
            time.sleep(min(timeout or 1.0, 1.0))


class _UnreadResults(BufferMap):
    """Results that arrived before their get(). The next one to arrive removes those that are older than expires."""

    def __init__(self, expires: float | None) -> None:
        super().__init__(maxsize=None)
        self.expires = expires or float("inf")

    def put(self, task_id: str, meta: dict[str, Any]) -> None:
        super().put(task_id, meta)
        self[task_id].arrived = now = time.monotonic()
        while next(iter(self.values())).arrived < now - self.expires:
            self.total -= len(self.popitem(last=False)[1])

    def take(self, task_id: str, *default: Any) -> Any:
        meta = super().take(task_id, *default)
        if not self.get(task_id, True):  # Celery's own keeps the empty buffer of each result for ever
            del self[task_id]
        return meta


class ReplyQueueBackend(rpc.RPCBackend):
    """Celery's rpc:// backend, with a reply queue that survives a restart of RabbitMQ and of its reader.

    Five things differ. The queue is not auto-delete: it was deleted, results and all, when RabbitMQ stopped. Worker
    and client reconnect until they succeed. A new thread does not share its queue with an ended one. A result that
    arrives before its get() is kept for result_expires, where rpc:// keeps the last 8,192. And the queue is not
    declared again with each call, which takes rpc:// a round trip.
    The queue is removed when nobody has used it for result_expires: a result that takes longer needs Redis.
    """

    ResultConsumer = ReplyConsumer
    # The worker tries once a second to send a result, for as long as RabbitMQ is away; rpc:// stops after 20 times.
    retry_policy: ClassVar = {**rpc.RPCBackend.retry_policy, "max_retries": None}
    _declared: tuple[Any, float] = (None, 0.0)  # on which connection, and when

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending_messages = self.result_consumer._pending_messages = _UnreadResults(self.expires)

    def get_task_meta(self, *args: Any, **kwargs: Any) -> Any:
        """Poll the reply queue, for .state and .ready()."""
        self.result_consumer.take_over()
        return super().get_task_meta(*args, **kwargs)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Declare the reply queue, but only once a second on the same connection.

        After a second it may be gone, with result_expires or RabbitMQ's data; declaring it also renews result_expires.
        In a task Celery declares nothing, and so there is nothing to note.
        """
        policy = bounded_policy(self.app)
        connection, now = producer.channel.connection, time.monotonic()
        if self.app.current_worker_task or connection is not self._declared[0] or now - self._declared[1] > 1:
            if not self.app.current_worker_task:
                maybe_declare(self.binding(producer.channel), retry=True, **policy)
            self._declared = (producer.channel.connection, now)

    def _slurp_from_queue(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return filter(self.result_consumer.read, super()._slurp_from_queue(*args, **kwargs))

    @property
    def binding(self) -> Any:
        """The reply queue of this client thread; results on it expire like keys in Redis."""
        return self.Queue(
            self.oid, self.exchange, self.oid, durable=True, expires=self.expires, message_ttl=self.expires
        )
