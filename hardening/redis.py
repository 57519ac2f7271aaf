"""A redis:// result backend for a Redis that may be away for a while.

What Celery lacks: it queues no task while Redis is away, hears nothing more after five seconds without Redis, never
ends a chord if one of its parts could not be counted, and shows states twice, backwards, or those of other tasks.
What this does: the client subscribes in get() and reconnects; the worker stores in one round trip and tries again.
A client's calls end with kombu.exceptions.OperationalError when Redis is away, as delay() does without RabbitMQ.
To go back: result_backend = _redis_url. For Celery 5.7.
"""

import logging
import math
import sys
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from celery.backends import redis
from celery.states import READY_STATES
from kombu.exceptions import OperationalError
from redis import StrictRedis, exceptions
from redis.backoff import NoBackoff
from redis.retry import Retry

from .results import NotStored, OneBackend, OneReader, Wait, present_task, time_left, wait_for

_logger = logging.getLogger(__name__)

AWAY = (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError)


class KeyConsumer(OneReader, redis.ResultConsumer):
    """Waits for announcements of results, and goes on waiting after Redis was away.

    Celery's own subscribes to each task when it is queued, so that delay() needs Redis, and announcements pile up in a
    client that fetches results later. This one subscribes in get(), if the result is not there yet, and tells
    on_message where the task is, and then each later state, once and in order.
    """

    backend: Any
    _connection_errors: Any
    _lock_depth: Any
    _pubsub: Any  # the connection that hears announcements; None when it is lost

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._connection_errors = (OperationalError, *self._connection_errors)
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

    def look(self, wait: Wait) -> None:
        """Look whether the results are there already; if not, subscribe, and look once more."""
        try:
            if not wait.on_message:
                keys = [self._get_key_for_task(task_id) for task_id in wait.missing]
                for key, payload in zip(keys, self.backend.listener.mget(keys) if keys else (), strict=True):
                    self._hand_out(key, payload, final=True)
            with self._turn:
                keys = [] if wait.ready() else [self._get_key_for_task(task_id) for task_id in wait.missing]
            if keys:
                with self._locked():
                    self._catch_up(keys if wait.on_message else [])
        except exceptions.AuthenticationError:
            raise
        except self._connection_errors as exc:
            self._lost(exc)

    def _catch_up(self, keys: Any = ()) -> None:
        """Subscribe to what is noted, after a lost connection to everything, and hand out what is stored there.

        What is stored may be one of the states that are announced meanwhile: those up to an answer to PING are heard
        first. If it is none of them, it is older than they.
        """
        noted, self._noted = self._noted, set()
        self.subscribed_to |= noted
        if self._pubsub is None:
            noted = set(self.subscribed_to)
            self._pubsub = self.backend.listener.pubsub()
        if not (looked_at := list(noted | set(keys))):
            return
        announced: list[tuple[Any, Any]] = []
        try:
            if noted:
                self._pubsub.subscribe(*noted)
                self._hear(announced, lambda message: message["type"] == "subscribe", len(noted))
            stored = self.backend.listener.mget(looked_at)
            told = any(wait.on_message for wait in self._waits)
            if told:
                self._pubsub.ping("until here")
                self._hear(announced, lambda message: message["type"] not in ("subscribe", "unsubscribe", "message"))
        except BaseException:
            self._pubsub = None
            raise
        known = set(announced)
        for key, payload in zip(looked_at, stored, strict=True):
            if (key, payload) not in known:
                self._hand_out(key, payload, snapshot=True, final=not told)
        for key, payload in announced:
            self._hand_out(key, payload)

    def _hear(self, announced: list[tuple[Any, Any]], is_answer: Callable[[Any], bool], answers: int = 1) -> None:
        """Collect announcements until Redis has answered: what is read over another connection is later than that."""
        while answers:
            message = self._pubsub.get_message(timeout=self.app.conf.redis_socket_timeout)
            if message is None:
                raise exceptions.TimeoutError("no answer to SUBSCRIBE or PING")
            if message["type"] == "message":
                announced.append((self.backend.key_t(message["channel"]), message["data"]))
            else:
                answers -= is_answer(message)

    def _hand_out(self, key: Any, payload: Any, snapshot: bool = False, final: bool = False) -> None:
        """Hand out a stored or announced state, if somebody still waits for it; final: not those on the way there."""
        task_id = self.backend._strip_prefix(key)
        if not payload or (key not in self.subscribed_to and not any(task_id in wait.missing for wait in self._waits)):
            return
        try:
            meta = self._decode_result(payload)
            if meta["status"] in READY_STATES or not final:
                self.on_state_change({**meta, "task_id": task_id}, payload, snapshot)
        except Exception as exc:  # not what a worker has stored
            self.fail(task_id, exc)
        else:
            self._maybe_cancel_ready_task({**meta, "task_id": task_id})

    def _lost(self, error: Exception) -> None:
        self._pubsub = None
        _logger.warning("Redis is away (%s); results are waited for once it is back.", error)

    def _reconnect(self) -> None:
        """Leave it to read()."""
        self._pubsub = None

    def _is_read(self) -> bool:
        """Tell whether another thread reads. One that holds the lock, which a then() may do, keeps it from that."""
        return not self._lock_depth.value and super()._is_read()

    def read(self, timeout: float) -> None:
        """Hand out one announcement, or return after timeout, in seconds."""
        try:
            with self._locked():
                self._catch_up()
                if (pubsub := self._pubsub) and self._read_one(pubsub):
                    return
            # Without the lock, as in Celery's own: another thread may subscribe meanwhile.
            if self._wait_for_pubsub(pubsub, timeout):
                with self._locked():
                    if self._pubsub is pubsub:
                        self._read_one(pubsub)
        except exceptions.AuthenticationError:
            raise
        except self._connection_errors as exc:
            self._lost(exc)
            time.sleep(min(timeout, 1.0))

    def _read_one(self, pubsub: Any) -> bool:
        if not (pubsub.subscribed and pubsub.connection and pubsub.connection.can_read(timeout=0)):
            return False
        message = pubsub.get_message(timeout=self.app.conf.redis_socket_timeout)
        if message and message["type"] == "message":
            self._hand_out(self.backend.key_t(message["channel"]), message["data"])
        return True


class Patience(Retry):
    """Tries each command again, in the worker, until shortly before the task's time limit."""

    def __init__(self, app: Any, errors: tuple[type[Exception], ...]) -> None:
        super().__init__(NoBackoff(), -1, errors)
        self.app = app

    def __deepcopy__(self, memo: Any) -> "Patience":
        """Return itself: redis-py makes a copy for each connection."""
        return self

    def call_with_retry(
        self, do: Any, fail: Any, is_retryable: Any = None, with_failure_count: bool = False, **kwargs: Any
    ) -> Any:
        """Call do() until it succeeds. Raises NotStored in the worker, and what Redis raised in a client."""
        failures = 0
        time_left(self.app)  # raises NotStored once a result was given up
        while True:
            try:
                return do()
            except self._supported_errors as error:
                failures += 1
                fail(error, failures) if with_failure_count else fail(error)
                wait_for("Redis", self.app, error)


class _InTime:
    """A connection that does not wait for a silent Redis past the end of the task's time."""

    patience: Any
    socket_timeout: Any
    socket_connect_timeout: Any

    def _within(self, timeout: float | None) -> float | None:
        if not present_task(self.patience.app) or (left := time_left(self.patience.app)) == math.inf:
            return timeout
        return min(timeout or left, max(left, 0.2))

    def _connect(self) -> Any:
        timeout = self.socket_connect_timeout
        self.socket_connect_timeout = self._within(timeout)
        try:
            return super()._connect()  # type: ignore[misc]
        finally:
            self.socket_connect_timeout = timeout

    def read_response(self, *args: Any, **kwargs: Any) -> Any:
        """Read an answer. Raises redis.TimeoutError."""
        if (timeout := self._within(self.socket_timeout)) != self.socket_timeout:
            kwargs.setdefault("timeout", timeout)
        return super().read_response(*args, **kwargs)  # type: ignore[misc]


class Client(StrictRedis):
    """A client whose calls end with the same error as delay() when the server is away."""

    def execute_command(self, *args: Any, **options: Any) -> Any:
        """Send a command. Raises OperationalError when Redis is away."""
        try:
            return super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        except exceptions.AuthenticationError:
            raise
        except AWAY as exc:
            raise OperationalError(f"Redis is away: {exc}") from exc


# A task that ran twice must not turn its success into a failure.
_STORE_SCRIPT = """
if redis.call("GETRANGE", KEYS[1], 0, 19) == '{"status": "SUCCESS"' then return end
redis.call("SET", KEYS[1], unpack(ARGV))
redis.call("PUBLISH", KEYS[1], ARGV[1])
"""

# Whoever counts the last part of a chord claims its end. In Celery's script, a claim whose answer is lost, or whose
# worker is, keeps everybody else out. Here the same part may claim it again: what it began before is void then.
_CLAIM = """
    if redis.call('SET', ckey, claim_token, 'NX', 'EX', claim_expires) then
        claimed = 1
    end
"""
_CLAIM_AGAIN = """
    local mine = 'claim:' .. member
    if redis.call('SISMEMBER', dkey, mine) == 1 then
        redis.call('SET', ckey, claim_token, 'EX', claim_expires)
        claimed = 1
    elseif redis.call('SET', ckey, claim_token, 'NX', 'EX', claim_expires) then
        redis.call('SADD', dkey, mine)
        claimed = 1
    end
"""


class RedisBackend(OneBackend, redis.RedisBackend):
    """Celery's redis:// backend, for a Redis that may be away for a while.

    The worker stores a result in one round trip, and tries every command again: Celery does so to store results only,
    and a chord would fail or never end. The client queues tasks without Redis, waits about as long as get() says, and
    does not hoard announcements.
    """

    ResultConsumer = KeyConsumer
    connection_class: Any = redis.redis.Connection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.always_retry = False  # redis-py tries again
        self._at_once = dict(self.connparams)
        errors = (*(error for error in self.connection_errors if error is not KeyError), *AWAY)
        patience = Patience(self.app, errors)
        connection = self.connparams.get("connection_class", self.connection_class)
        self.connparams["retry"] = patience
        self.connparams["connection_class"] = type("Connection", (_InTime, connection), {"patience": patience})

    def _get_client(self) -> Any:
        return Client

    @cached_property
    def listener(self) -> Any:
        """A client that tries nothing twice: for announcements, which are lost meanwhile, and to say what is wrong."""
        return self._create_client(**self._at_once)

    def refusal(self) -> str | None:
        """Return why Redis refuses this user, in one line; None when it does not, or cannot be reached."""
        where = f"Redis at {self.connparams.get('host')}:{self.connparams.get('port')}"
        try:
            self.listener.ping()
        except exceptions.AuthenticationError:
            return f"{where} refuses the user or the password. Check REDIS_URL and REDIS_PASSWORD."
        except OperationalError:
            return None
        except exceptions.RedisError as exc:
            return f"{where} does not do what it was asked for ({exc}). Is REDIS_URL right?"
        return None

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Do nothing: get() subscribes."""

    def ensure(self, fun: Callable[..., Any], args: Any, **policy: Any) -> Any:
        """Call it once: redis-py tries again, in the worker."""
        return fun(*args)

    @cached_property
    def _store(self) -> Any:
        return self.client.register_script(_STORE_SCRIPT)

    def _store_result(
        self, task_id: str, result: Any, state: str, traceback: Any = None, request: Any = None, **kwargs: Any
    ) -> Any:
        """Store and announce a result in one round trip; Celery's own takes two, and looks first what is stored.

        A success must not be overwritten. The script sees one in plain JSON; otherwise Celery looks.
        """
        if self.compression or self.serializer != "json":
            return super()._store_result(task_id, result, state, traceback, request, **kwargs)
        meta = self._get_result_meta(result=result, state=state, traceback=traceback, request=request)
        meta["task_id"] = task_id
        self._set_with_state(self.get_key_for_task(task_id), self.encode(meta), state)
        return result

    def _set(self, key: Any, value: Any, expires: int | None = None) -> None:
        expires = self.expires if expires is None else expires
        self._store(keys=[key], args=[value, "EX", expires] if expires else [value])

    @cached_property
    def _chord_part_return_script(self) -> Any:
        return self.client.register_script(redis.CHORD_PART_RETURN_LUA.replace(_CLAIM, _CLAIM_AGAIN))

    def chord_error_from_stack(self, callback: Any, exc: Any = None) -> Any:
        """Fail the end of a chord, but not because Redis is away: then the part runs again."""
        if isinstance(sys.exc_info()[1], NotStored):
            raise
        return super().chord_error_from_stack(callback, exc)
