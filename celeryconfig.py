"""Celery settings: RabbitMQ is the broker, RESULT_STORE says where the results go.

Copy this file next to any Celery app and call ``app.config_from_object("celeryconfig")``;
no other file of this project is needed. It reads these environment variables:

RESULT_STORE   redis (default) or rabbitmq
RABBITMQ_URL   amqp:// or amqps://, default amqp://guest:guest@localhost:5672//
REDIS_URL      redis:// or rediss://, default redis://localhost:6379/0; only used by RESULT_STORE=redis
RABBITMQ_PASSWORD, REDIS_PASSWORD              a password in plain text, to be put into the URL
RABBITMQ_PASSWORD_FILE, REDIS_PASSWORD_FILE    the same, read from a file (/run/secrets/...)

Above each setting stands the reason for its value, then the result backend that it concerns
(redis, rabbitmq or both) and its documentation. A value that cannot work stops the process with one line.
"""

import logging
import os
import re
import ssl
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NoReturn
from urllib.parse import quote, urlsplit

from celery import Task
from celery.backends import redis, rpc
from celery.backends.asynchronous import greenletDrainer
from celery.result import result_from_tuple
from celery.utils.collections import BufferMap
from kombu.exceptions import OperationalError

_LOGIN_HOST_PORT = r"://([^:/?#;@]*(:[^:/?#;@]*)?@)?([^:/?#;@\[\]]+|\[[\da-fA-F:.]+\])(:\d+)?"
_SERVICES = {  # what a URL must match, what it looks like, its default
    "RABBITMQ": (
        rf"amqps?{_LOGIN_HOST_PORT}(/[^?#;@]*)?",
        "amqp://USER:PASSWORD@HOST:PORT/VHOST (amqps:// for TLS)",
        "amqp://guest:guest@localhost:5672//",
    ),
    "REDIS": (
        rf"rediss?{_LOGIN_HOST_PORT}(/\d*)?(\?[^#@]*)?",
        "redis://USER:PASSWORD@HOST:PORT/0 (rediss:// for TLS)",
        "redis://localhost:6379/0",
    ),
}


def _stop(problem: str) -> NoReturn:
    """End the process with one line: around any other exception the celery command prints a traceback."""
    raise SystemExit(f"celeryconfig: {problem}")


def password(service: str) -> str | None:
    """Return the password in SERVICE_PASSWORD, or in the file that SERVICE_PASSWORD_FILE names, or None."""
    given, path = os.environ.get(f"{service}_PASSWORD"), os.environ.get(f"{service}_PASSWORD_FILE")
    if not path:
        return given
    if given:
        _stop(f"{service}_PASSWORD and {service}_PASSWORD_FILE are both set: unset one of them.")
    try:
        secret = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as exc:
        _stop(f"{service}_PASSWORD_FILE names {path}, which cannot be read: {getattr(exc, 'strerror', 'no UTF-8')}.")
    return secret or _stop(f"{service}_PASSWORD_FILE names {path}, which is empty.")


def service_url(service: str) -> str:
    """Return RABBITMQ_URL or REDIS_URL, checked, with the service's password in it.

    A malformed one ends the process; the message does not show it, for the password's sake.
    """
    pattern, form, default = _SERVICES[service]
    url = os.environ.get(f"{service}_URL") or default
    try:
        parts = urlsplit(url)
        well_formed = re.fullmatch(pattern, url, re.ASCII) and parts.port != 0
    except ValueError:  # a port above 65535
        well_formed = False
    if not well_formed:
        _stop(
            f"{service}_URL is malformed. It must look like {form}. Write @ : / % # ? ; in the password "
            f"as %40 %3A %2F %25 %23 %3F %3B, or give the password in {service}_PASSWORD."
        )
    secret = password(service)
    if secret:
        user, _, host = parts.netloc.rpartition("@")
        parts = parts._replace(netloc=f"{user.partition(':')[0]}:{quote(secret, safe='')}@{host}")
    return parts.geturl()


class _RetryDelay:
    """An annotation for all tasks: a default_retry_delay, in seconds, for those that do not set one."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def annotate_any(self) -> dict[str, int]:
        """Celery asks for the settings of any task first."""
        return {}

    def annotate(self, task: "Task[..., Any]") -> dict[str, int]:
        """Return what to set on this task."""
        return {"default_retry_delay": self.seconds} if task.default_retry_delay == Task.default_retry_delay else {}


_store = os.environ.get("RESULT_STORE") or "redis"
if _store not in ("redis", "rabbitmq"):
    _stop(f"RESULT_STORE is {_store!r}, but it must be redis or rabbitmq.")

# --- Broker -----------------------------------------------------------------------------------------------

# Tasks always travel through RabbitMQ, whichever store the results take.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-url
broker_url = service_url("RABBITMQ")

# With amqps://, check the certificate's host name, too: by itself Celery checks only that it is signed by somebody
# trusted. The certificate authority of your own servers goes into the standard variable SSL_CERT_FILE.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-use-ssl
if broker_url.startswith("amqps://"):
    broker_use_ssl = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": urlsplit(broker_url).hostname}

# A worker that starts before RabbitMQ waits for it.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-connection-retry-on-startup
broker_connection_retry_on_startup = True

# delay() returns when RabbitMQ has taken the message. Without it, a message lost on the way is lost in silence.
# Price, tasks a second: redis 16 %, rabbitmq 22 %. Calls that are sent together with task.chunks() pay it once.
# Drop it if lost tasks do no harm.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#broker-transport-options
broker_transport_options = {"confirm_publish": True}

# A quorum queue has a message on disk before it confirms it, in a cluster on two of three nodes. The topic exchange
# lets RabbitMQ itself hold tasks with a countdown, so that retries never block a worker. The name is not
# Celery's default "celery": a queue of that name may exist already with another type, and RabbitMQ refuses to
# change it (PRECONDITION_FAILED). Queues named with -Q are of the same kind.
# Price, tasks a second: redis 25 %, rabbitmq 7 %. Classic queues do if you have one RabbitMQ, and no retries.
# both - https://docs.celeryq.dev/en/stable/getting-started/backends-and-brokers/rabbitmq.html#using-quorum-queues
task_default_queue = "tasks"
task_default_queue_type = "quorum"
task_default_exchange_type = "topic"
task_create_missing_queue_type = "quorum"
task_create_missing_queue_exchange_type = "topic"

# --- Tasks ------------------------------------------------------------------------------------------------

# Acknowledge a task after it ran, not before: when its worker dies, another worker gets it. A task may
# therefore run twice; write it so that this does no harm.
# Price, tasks a second: within the noise. Drop it for tasks that must not run twice.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-acks-late
task_acks_late = True

# When a pool process is killed in mid-task (out of memory, kill -9), run the task again as a retry: it counts
# against max_retries, so a task that kills its process each time ends as a WorkerLostError instead of circling
# for ever. Should the retry not be sent, the message goes back to the queue.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-retry-on-worker-lost
task_retry_on_worker_lost = True
task_reject_on_worker_lost = True

# Such a retry comes after 5 seconds, not after Celery's 180, unless the task sets a default_retry_delay of its own.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-annotations
task_annotations = [_RetryDelay(5)]

# Seconds after which a task that hangs is killed. Stay below 30 minutes: then RabbitMQ gives the task to somebody
# else. A soft limit belongs to the single task; one for all would make a task's own, shorter time_limit wait for it.
# Price, tasks a second: within the noise.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-time-limit
task_time_limit = 300

# Keep trying to publish while RabbitMQ restarts (about 20 seconds), then raise OperationalError.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#task-publish-retry-policy
task_publish_retry_policy = {"max_retries": 20, "interval_start": 0, "interval_step": 0.2, "interval_max": 1}

# JSON only: whoever can write to a queue could run code in a worker that accepts pickle, and in a client.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#accept-content
accept_content = ["json"]
task_serializer = "json"
result_serializer = "json"

# --- Worker -----------------------------------------------------------------------------------------------

# Each process holds one task and reserves none, so that an idle worker finds work and a dead one keeps little.
# Price, tasks a second: within the noise.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-prefetch-multiplier
worker_prefetch_multiplier = 1

# SIGTERM waits for the running tasks. SIGQUIT, or SIGTERM with REMAP_SIGTERM=SIGQUIT, waits this many seconds,
# then puts what still runs back on the queue.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-soft-shutdown-timeout
worker_soft_shutdown_timeout = 10.0

# When the connection to RabbitMQ is lost, let running tasks finish: their results count, although RabbitMQ gives the
# tasks out once more. Stopping them (True) leaves some of them revoked for good when results go through RabbitMQ too.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#worker-cancel-long-running-tasks-on-connection-loss
worker_cancel_long_running_tasks_on_connection_loss = False

# --- Results ----------------------------------------------------------------------------------------------

# One key a task in Redis, or one message a result on the caller's own reply queue in RabbitMQ. Both classes are at the
# end of this file; service_url("REDIS") or "rpc://" in their place goes back to Celery's own, and to what these lose.
# Price, tasks a second: redis a gain of 9 %, rabbitmq a gain of 26 %.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-backend
result_backend = f"{__name__}:{'RedisBackend' if _store == 'redis' else 'ReplyQueueBackend'}"

# With rediss://, check the server's certificate and host name (SSL_CERT_FILE as above).
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-backend-use-ssl
if _store == "redis" and service_url("REDIS").startswith("rediss://"):
    redis_backend_use_ssl = {"ssl_cert_reqs": ssl.CERT_REQUIRED}

# Seconds until a result that nobody reads is removed, so that neither store fills up. Celery's default is a day.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-expires
result_expires = 3600

# Keep the task's name, arguments and retries beside the result, for whoever finds the key later.
# Price, tasks a second: within the noise. Drop it if nobody else reads your results.
# both - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-extended
result_extended = True

# Results on the reply queue survive a restart of RabbitMQ.
# Price, tasks a second: within the noise. Drop it if a lost result can be computed again.
# rabbitmq - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-persistent
result_persistent = True

# The worker tries again while Redis is away, at least once a second. Without it, results are lost.
# Price, tasks a second: within the noise.
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-backend-always-retry
result_backend_always_retry = True
result_backend_max_sleep_between_retries_ms = 1000

# Every key starts with this, so that several projects can share one Redis and one ACL rule names them all.
# The retry policy lets a client that queues a chord fail after 5 seconds when Redis cannot be reached, instead of 19.
# A full Redis (maxmemory) is like one that is away: the worker waits until there is room, and no result is lost.
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#result-backend-transport-options
result_backend_transport_options = {
    "global_keyprefix": "celery-demo:",
    "retry_policy": {"timeout": 5.0},
    "additional_connection_errors": ["redis.exceptions.OutOfMemoryError"],
}

# Seconds. Notice a Redis that is gone instead of waiting two minutes for its answer.
# redis - https://docs.celeryq.dev/en/stable/userguide/configuration.html#redis-socket-timeout
redis_socket_connect_timeout = 2.0
redis_socket_timeout = 5.0
redis_socket_keepalive = True

# --- What the environment must not override ---------------------------------------------------------------

# The celery command takes these variables for its own and lets them win over this file, in some processes only.
for _name in ("BROKER_URL", "CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"):
    if os.environ.get(_name) not in (None, "", broker_url):
        _stop(f"{_name} is set in the environment and overrides RABBITMQ_URL: unset it, and set RABBITMQ_URL.")
for _name in ("RESULT_BACKEND", "CELERY_RESULT_BACKEND"):
    if os.environ.get(_name) not in (None, "", result_backend):
        _stop(
            f"{_name} is set in the environment and overrides RESULT_STORE: "
            "unset it, and set RESULT_STORE=redis (with REDIS_URL) or RESULT_STORE=rabbitmq."
        )

# --- The result backends ----------------------------------------------------------------------------------

_logger = logging.getLogger(__name__)


class KeyConsumer(redis.ResultConsumer):
    """Waits for announcements of results, and goes on waiting after Redis was away.

    Celery's own subscribes to each task when it is queued, so that delay() needs Redis, and announcements pile up in a
    client that fetches results later. This one subscribes in get(), if the result is not there yet, so that on_message
    hears nothing of what was before. And Celery's own gives up when it cannot connect for some seconds, and hears of
    nothing from then on; this one connects anew.
    """

    _pubsub: Any  # the connection that hears announcements; None when it is lost

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._noted: set[Any] = set()  # keys to subscribe to

    def consume_from(self, task_id: str) -> None:
        """Note a task whose result somebody wants, or a member of a group; the next get() that waits subscribes."""
        key = self._get_key_for_task(task_id)
        with self._locked():
            self._pending_unsubscribe.discard(key)
            if key not in self.subscribed_to:
                self._noted.add(key)

    def cancel_for(self, task_id: str) -> None:
        """Forget a task whose result is there, or that nobody waits for any more."""
        self._noted.discard(self._get_key_for_task(task_id))
        if not sys.is_finalizing():  # Python deletes what is left of the results, too late to connect
            super().cancel_for(task_id)

    def on_wait_for_pending(self, result: Any, **kwargs: Any) -> None:
        """Look whether the result is there already."""
        with suppress(*self._connection_errors):
            super().on_wait_for_pending(result, **kwargs)

    def drain_events_until(self, *args: Any, **kwargs: Any) -> Any:
        """Wait for a result. A greenlet subscribes itself: the one that drains for all may be asleep for a second."""
        if isinstance(self.drainer, greenletDrainer):
            with suppress(*self._connection_errors):
                self._subscribe()
        return super().drain_events_until(*args, **kwargs)

    def _subscribe(self) -> bool:
        """Subscribe to what is noted, after a lost connection to everything. Tell whether a result came before that."""
        with self._locked():
            noted, self._noted = self._noted, set()
            self.subscribed_to |= noted
            if self._pubsub is None:
                noted = set(self.subscribed_to)
                self._pubsub = self.backend.client.pubsub()
            if not noted:
                return False
            try:
                self._pubsub.subscribe(*noted)
                self._wait_until_subscribed(set(noted))
                found = list(filter(None, self.backend.client.mget(noted)))
            except BaseException:
                self._pubsub = None
                raise
            for meta in found:
                self.on_state_change(self._decode_result(meta), None)
            return bool(found)

    def _wait_until_subscribed(self, keys: set[Any]) -> None:
        """Wait until Redis confirms it. The look goes over another connection, and could overtake it otherwise."""
        while keys:
            message = self._pubsub.get_message(timeout=self.app.conf.redis_socket_timeout)
            if message is None:
                raise redis.redis.TimeoutError("no answer to SUBSCRIBE")
            if message["type"] == "message":
                self.on_state_change(self._decode_result(message["data"]), message)
            elif message["type"] == "subscribe":
                keys.discard(self.backend.key_t(message["channel"]))

    def _reconnect(self) -> None:
        """Leave it to drain_events."""
        self._pubsub = None

    def drain_events(self, timeout: float | None = None) -> None:
        """Handle one announcement, or return after timeout, in seconds."""
        try:
            if not self._subscribe():
                super().drain_events(timeout)
        except redis.redis.AuthenticationError:
            raise
        except self._connection_errors as exc:
            self._pubsub = None
            _logger.warning("Redis is away (%s); results are waited for once it is back.", exc)
            time.sleep(min(timeout or 1.0, 1.0))


# A task that ran twice must not turn its success into a failure. Only JSON is protected: see result_serializer.
_STORE_SCRIPT = """
local is_json, stored = pcall(cjson.decode, redis.call("GET", KEYS[1]) or "{}")
if is_json and stored.status == "SUCCESS" then return end
redis.call("SET", KEYS[1], unpack(ARGV))
redis.call("PUBLISH", KEYS[1], ARGV[1])
"""


class RedisBackend(redis.RedisBackend):
    """Celery's redis:// backend, for a Redis that may be away for a while.

    The worker stores a result in one round trip, and counts a finished part of a chord once Redis is back: Celery tries
    again to store results only, and the chord would never end. The client queues tasks without Redis, waits about as
    long as get() says, and does not hoard announcements. And get() of a group does not sleep for half a second before
    it listens.
    """

    ResultConsumer = KeyConsumer

    def __init__(self, *args: Any, url: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, url=url or service_url("REDIS"), **kwargs)
        self._pending_messages.maxsize = 1  # announcements that nobody waits for; get() reads the key

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing: get() subscribes."""

    @cached_property
    def _store(self) -> Any:
        return self.client.register_script(_STORE_SCRIPT)

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store and announce a result in one round trip; Celery's own takes two, and looks first what is stored."""
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = task_id
        self._set_with_state(self.get_key_for_task(task_id), self.encode(meta), state)
        return result

    def _set(self, key: Any, value: Any, expires: int | None = None) -> None:
        expires = self.expires if expires is None else expires
        self._store(keys=[key], args=[value, "EX", expires] if expires else [value])

    def on_chord_part_return(self, *args: Any, **kwargs: Any) -> Any:
        """Count a part of a chord, in the worker; a part that was counted already does not count twice.

        Whoever counts the last part has a claim to start the chord's end, for twice result_chord_join_timeout. If the
        answer was lost, the claim must expire before the next attempt gets it.
        """
        while True:
            try:
                return super().on_chord_part_return(*args, **kwargs)
            except self.connection_errors as exc:
                _logger.warning("Redis is away (%s); a part of a chord is counted once it is back.", exc)
                time.sleep(2 * (self.app.conf.result_chord_join_timeout or 5.0) + 1)

    def get_task_meta(self, task_id: str, cache: bool = True) -> Any:
        """Return a task's state and result, with one attempt. Raises redis.RedisError when Redis is away."""
        return self._get_task_meta_for(task_id)

    def iter_native(self, result: Any, **kwargs: Any) -> Any:
        """Yield a group's results as they are announced. Celery sleeps for interval, once, before it listens."""
        return super().iter_native(result, **{**kwargs, "interval": 0})


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
        connection, now = producer.channel.connection, time.monotonic()
        if self.app.current_worker_task or connection is not self._declared[0] or now - self._declared[1] > 1:
            super().on_task_call(producer, task_id)
            self._declared = (producer.channel.connection, now)

    def _slurp_from_queue(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        return filter(self.result_consumer.read, super()._slurp_from_queue(*args, **kwargs))

    @property
    def binding(self) -> Any:
        """The reply queue of this client thread; results on it expire like keys in Redis."""
        return self.Queue(
            self.oid, self.exchange, self.oid, durable=True, expires=self.expires, message_ttl=self.expires
        )
