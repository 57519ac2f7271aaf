"""An rpc:// result backend whose reply queue survives a restart of RabbitMQ and of its reader.

What Celery lacks: the reply queue is deleted, results and all, when RabbitMQ stops, its reader reconnects once, and
each thread has a queue of its own.
What this does: a durable queue for each process, and a reader that reconnects whenever somebody waits.
To go back: result_backend = "rpc://". For Celery 5.7.
"""

import logging
import math
import threading
import time
from functools import cached_property
from queue import Empty
from typing import Any

from celery.backends import rpc
from celery.exceptions import BackendGetMetaError
from celery.result import result_from_tuple
from celery.states import PENDING, READY_STATES, SUCCESS
from kombu.common import maybe_declare
from kombu.exceptions import LimitExceeded, OperationalError
from kombu.serialization import loads

from .publishing import answers_within
from .results import OneBackend, OneReader, Wait, celery_state, present_task, time_left, wait_for

_logger = logging.getLogger(__name__)

DAY = 24 * 3600.0


class Inbox:
    """The replies that nobody has fetched yet, by task: the final one, or else the latest.

    They are kept as they came, which takes the least room, for result_expires; the oldest give way above the limit.
    """

    limit = 64 * 2**20  # bytes

    def __init__(self, expires: float | None) -> None:
        self.expires = expires or float("inf")
        self.size = 0
        self._replies: dict[str, tuple[float, str, Any]] = {}
        self._lock = threading.Lock()
        self._last_warning = float("-inf")

    def __len__(self) -> int:
        """Return the number of tasks with a reply."""
        return len(self._replies)

    def put(self, task_id: str, state: str, message: Any) -> None:
        """Keep a reply. A success stays, and a final state is not followed by another one."""
        now = time.monotonic()
        with self._lock:
            _, present, _ = self._replies.get(task_id, (None, None, None))
            if present == SUCCESS or (present in READY_STATES and state not in READY_STATES):
                return
            self._remove(task_id)
            self._replies[task_id] = now, state, message
            self.size += len(message.body)
            dropped = 0
            while self._replies:
                oldest = next(iter(self._replies))
                if (expired := self._replies[oldest][0] < now - self.expires) or self.size > self.limit:
                    self._remove(oldest)
                    dropped += not expired
                else:
                    break
        if dropped and now > self._last_warning + 10:
            self._last_warning = now
            _logger.warning(
                "Unread results take more than %d MB: the oldest are dropped, now that of task %s. Fetch or forget() "
                "results, or ignore_result.",
                self.limit >> 20,
                oldest,
            )

    def _remove(self, task_id: str) -> Any:
        _, _, message = self._replies.pop(task_id, (None, None, None))
        if message:
            self.size -= len(message.body)
        return message

    def get(self, task_id: str) -> dict[str, Any] | None:
        """Return a task's reply, and keep it."""
        with self._lock:
            _, _, message = self._replies.get(task_id, (None, None, None))
        return message.decode() if message else None

    def take(self, task_id: str, *, final: bool = False) -> dict[str, Any] | None:
        """Return a task's reply and keep it no longer; final: no other one."""
        with self._lock:
            _, state, _ = self._replies.get(task_id, (None, None, None))
            message = None if final and state not in READY_STATES else self._remove(task_id)
        return message.decode() if message else None


class _Reply:
    """What is kept of a message: without its channel and connection."""

    __slots__ = ("accept", "body", "encoding", "kind")

    def __init__(self, message: Any) -> None:
        self.body, self.kind, self.encoding = message.body, message.content_type, message.content_encoding
        self.accept = message.accept

    def decode(self) -> dict[str, Any]:
        meta: dict[str, Any] = loads(self.body, self.kind, self.encoding, accept=self.accept)
        return meta


class ReplyConsumer(OneReader, rpc.ResultConsumer):
    """Waits for results, and goes on waiting after RabbitMQ restarted.

    Celery's own tries to reconnect once and then never again. This one connects anew whenever somebody waits for
    a result, and acknowledges a result when it has arrived, so that one that was on its way is sent once more.
    """

    backend: Any
    answer_timeout = 5.0  # seconds
    silence = 10.0  # seconds after which RabbitMQ is asked whether it is there: a node that is cut off says nothing
    _heard = 0.0  # when
    _awaited = 0  # replies that were on the queue when the consumer was made, and are still to come

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inbox = Inbox(self.backend.expires)

    def start(self, initial_task_id: str = "", **kwargs: Any) -> None:
        """Connect, with one attempt for each URL, and consume from the reply queue. Raises what the connection does."""
        connection = self.app.connection_for_read()
        self._connection_errors = (*connection.connection_errors, *connection.channel_errors, OperationalError)
        queues = self.backend.queues()
        try:
            connection.ensure_connection(max_retries=max(len(connection.alt) - 1, 0))
            # In a cluster, RabbitMQ does not answer while the node with the queue is away.
            with answers_within(self.answer_timeout):
                channel = connection.default_channel
                for queue in queues:
                    queue(channel).declare()
                self._awaited = sum(channel.queue_declare(queue.name, passive=True).message_count for queue in queues)
                consumer = self.Consumer(
                    channel, queues, accept=self.accept, on_message=self._on_reply, on_decode_error=self._drop
                )
                consumer.consume()
        except BaseException:
            connection.collect()
            raise
        self._connection, self._consumer, self._heard = connection, consumer, time.monotonic()

    def read(self, timeout: float) -> None:
        """Hand out one result, or return after timeout, in seconds."""
        try:
            self._read(timeout)
        except self._connection_errors as exc:
            _logger.warning("RabbitMQ is away (%s); results are waited for once it is back.", exc)
            time.sleep(min(timeout, 1.0))

    def _read(self, timeout: float) -> bool:
        """Hand out one result, and tell whether there was one. Raises what the connection does."""
        try:
            self._connect()
            if time.monotonic() > self._heard + self.silence:
                self._ask()
                return True  # results that came before the answer are handed out
            self._connection.drain_events(timeout=timeout)
            self._heard = time.monotonic()
        except TimeoutError:
            return False
        except self._connection_errors:
            self._give_up()
            raise
        return True

    def _ask(self) -> None:
        self._heard = time.monotonic()
        try:
            with self._connection.connection.transport.having_timeout(self.answer_timeout):
                self._connection.default_channel.queue_declare(self.backend.oid, passive=True)
        except TimeoutError as exc:
            raise OperationalError("no answer") from exc

    def _connect(self) -> None:
        if self._consumer is not None and len(self._consumer.queues) != len(self.backend.oids()):
            self._give_up()
        if self._consumer is None:
            self.start()

    def _give_up(self) -> None:
        if self._connection is not None:
            self._connection.collect()
        self._connection = self._consumer = None
        self._awaited = 0

    def poll(self, wait: float = 0.0) -> None:
        """Take in what is there. wait: for so many seconds for what was on the queue when the consumer was made.

        Raises OperationalError when RabbitMQ is away.
        """
        end = time.monotonic() + wait
        with self._turn:
            if self._is_read():  # another thread takes it in
                self._turn.wait_for(lambda: not self._awaited, wait)
                return
            outer, self._reader = self._reader, threading.get_ident()
        try:
            self._connect()
            while self._read(max(end - time.monotonic(), 0.0) if self._awaited else 0.0):
                pass
        except self._connection_errors as exc:
            raise OperationalError(f"RabbitMQ is away: {exc}") from exc
        finally:
            self._end_reading(outer)

    def begin(self, wait: Wait) -> None:
        """Tell on_message first where its task is."""
        for task_id in wait.missing if wait.on_message else ():
            if meta := self.inbox.get(task_id):
                wait.untold.append(meta)

    def look(self, wait: Wait) -> None:
        """Nothing: a result that had arrived was found when the result was registered."""

    def keep(self, meta: dict[str, Any], message: Any, taken: bool) -> None:
        """Keep a reply, unless it is final and taken."""
        if taken:
            self.inbox.take(meta["task_id"])
        elif message is not None:
            self.inbox.put(meta["task_id"], meta["status"], _Reply(message))

    def validated(self, message: Any) -> dict[str, Any] | None:
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
        self._awaited = max(self._awaited - 1, 0)
        if meta := self.validated(message):
            self.on_state_change(meta, message)
            message.ack()

    def consume_from(self, task_id: str) -> None:
        """Do nothing: whoever reads first connects."""


class ReplyQueueBackend(OneBackend, rpc.RPCBackend):
    """Celery's rpc:// backend, with a reply queue that survives a restart of RabbitMQ and of its reader.

    The queue belongs to the process, is not auto-delete, and is not declared again with each call. Worker and client
    reconnect until they succeed. A result that arrives before its get() is kept for result_expires. The queue is
    removed when nobody has used it for so long: a result that takes longer needs Redis.
    """

    ResultConsumer = ReplyConsumer
    confirm_timeout = 20.0  # seconds; then a RabbitMQ that does not answer counts as away
    _declared: tuple[Any, float] = (None, 0.0)  # on which connection, and when

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending_messages = self.result_consumer.inbox

    def oids(self) -> list[str]:
        """Return the names of this process's reply queue, and of those of threads that were before the backend."""
        return [self.oid, *sorted(self.app._local.strays)]

    def queues(self) -> list[Any]:
        """Return the reply queues."""
        return [self._queue(oid) for oid in self.oids()]

    @cached_property
    def _queue_arguments(self) -> dict[str, str] | None:
        # In a cluster a classic queue is away while its node is.
        return {"x-queue-type": "quorum"} if len(self.app.connection_for_read().alt) > 1 else None

    def _queue(self, oid: str) -> Any:
        return self.Queue(
            oid,
            self.exchange,
            oid,
            durable=True,
            expires=self.expires or DAY,
            message_ttl=self.expires or None,
            queue_arguments=self._queue_arguments,
        )

    @property
    def binding(self) -> Any:
        """The reply queue of this process; results on it expire like keys in Redis."""
        return self._queue(self.oid)

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Declare the reply queue, but only once a second on the same connection.

        After a second it may be gone, with result_expires or RabbitMQ's data; declaring it also renews result_expires.
        In a task Celery declares nothing: the answers to what a task queues go to nobody, as a rule.
        """
        if celery_state.task_join_will_block():
            return
        local = self.app._local
        if (stray := getattr(local.threads, "oid", self.oid)) != self.oid and stray not in local.strays:
            local.strays.add(stray)
            self._declared = (None, 0.0)
        connection, now = producer.channel.connection, time.monotonic()
        if connection is not self._declared[0] or now - self._declared[1] > 1:
            for queue in self.queues():
                maybe_declare(queue(producer.channel), retry=True, **self.app.conf.task_publish_retry_policy)
            self._declared = (producer.channel.connection, now)

    def store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Send a result; in the worker, for as long as it takes. Raises NotStored, and OperationalError in a client."""
        reply_to, correlation_id = self.destination_for(task_id, request)
        if not reply_to:
            return None
        body = self._to_result(task_id, state, result, traceback, request)
        while True:
            left = max(time_left(self.app), 0.5) if present_task(self.app) else math.inf
            try:
                self._send(body, reply_to, correlation_id, min(left, self.confirm_timeout))
                return result
            except OperationalError as exc:
                wait_for("RabbitMQ", self.app, exc)

    def _send(self, body: Any, reply_to: str, correlation_id: str, timeout: float) -> None:
        """Send a reply, with one attempt. Raises OperationalError when RabbitMQ is away."""
        try:
            acquired = self.app.amqp.producer_pool.acquire(block=True, timeout=timeout)
        except LimitExceeded as exc:
            raise OperationalError("every connection to RabbitMQ is in use") from exc
        with acquired as producer:
            connection = producer.connection
            try:
                connection.ensure_connection(max_retries=max(len(connection.alt) - 1, 0), timeout=timeout)
                producer.publish(
                    body,
                    exchange=self.exchange,
                    routing_key=reply_to,
                    correlation_id=correlation_id,
                    serializer=self.serializer,
                    delivery_mode=self.delivery_mode,
                    confirm_timeout=timeout,
                )
            except (*connection.recoverable_connection_errors, *connection.recoverable_channel_errors) as exc:
                connection.collect()
                raise OperationalError(str(exc)) from exc

    def mark_as_revoked(self, task_id: str, reason: str = "", request: Any = None, **kwargs: Any) -> Any:
        """Tell the client. Without a request nobody knows where it is: the worker that gets the task tells it."""
        return super().mark_as_revoked(task_id, reason, request, **kwargs) if request else None

    def get_task_meta(self, task_id: str, backlog_limit: int = 0) -> Any:
        """Return a task's latest state, for .state and .ready().

        Raises OperationalError when RabbitMQ is away, and in a worker BackendGetMetaError, which Celery expects there.
        """
        try:
            self.result_consumer.poll(self.result_consumer.answer_timeout)
        except OperationalError as exc:
            if time_left(self.app):
                raise BackendGetMetaError(f"{task_id}: {exc}") from exc
            raise
        if meta := self.result_consumer.inbox.get(task_id):
            return self.meta_from_decoded(meta)
        return {"status": PENDING, "result": None}

    poll = get_task_meta

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Register a result, and give it what has arrived already."""
        super().add_pending_result(result, weak, start_drainer)
        if meta := self.result_consumer.inbox.take(result.id, final=True):
            self.result_consumer.on_state_change(meta)
        return result

    def _maybe_resolve_from_buffer(self, result: Any) -> None:
        raise Empty  # add_pending_result does it, when nothing can come in between

    def forget(self, task_id: str) -> None:
        """Forget a result."""
        self.result_consumer.inbox.take(task_id)
