"""A redis:// result backend for a Redis that may be away for a while.

What Celery lacks: it queues no task while Redis is away, hears nothing more after five seconds without Redis, and never
ends a chord whose part could not be counted.
What this does: the client subscribes in get() and connects anew, the worker stores in one round trip and tries again.
To go back: result_backend = redis_url. For Celery 5.7.
"""

import logging
import sys
import time
from contextlib import suppress
from functools import cached_property
from typing import Any

from celery.backends import redis
from celery.backends.asynchronous import greenletDrainer

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

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pending_messages.maxsize = 1  # announcements that nobody waits for; get() reads the key

    def refusal(self) -> str | None:
        """Return why Redis refuses this user, in one line; None when it does not, or cannot be reached."""
        where = f"Redis at {self.connparams.get('host')}:{self.connparams.get('port')}"
        try:
            self.client.ping()
        except redis.redis.AuthenticationError:
            return f"{where} refuses the user or the password. Check REDIS_URL and REDIS_PASSWORD."
        except (redis.redis.ConnectionError, redis.redis.TimeoutError):
            return None
        except redis.redis.RedisError as exc:
            return f"{where} does not do what it was asked for ({exc}). Is REDIS_URL right?"
        return None

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
