"""A result backend for the Redis that Sentinels choose.

What Celery lacks: its sentinel:// waits without end for a Sentinel that hangs, loses what the master had not yet copied
when it dies, and listens for ever to a master that is silent because it is gone.
What this does: as RedisBackend, but a result counts as stored only when a replica has it, too. A Redis that is no
longer master, or has lost its replicas, is treated like one that is away.
To go back: result_backend = _redis_url. For Celery 5.7.
"""

import time
from typing import Any

from celery.backends import redis as celerys
from redis import exceptions

from . import redis

COPIED_WITHIN = 1000  # milliseconds; less than redis_socket_timeout
WRITES = {"EVALSHA", "SET", "SETEX", "INCRBY"}
# What a Redis answers that was the master, or is it without replicas: the worker tries again until there is a new one.
NO_MASTER = ("READONLY", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED")
NAMED = (exceptions.ReadOnlyError, exceptions.MasterDownError)  # redis-py strips their first word
SILENCE = 5.0  # seconds after which a master that announces nothing is asked whether it is there


class Client(redis.Client):
    """A client that waits after each write until a replica has it."""

    def _send_command_parse_response(self, conn: Any, command_name: str, *args: Any, **options: Any) -> Any:
        send: Any = super()._send_command_parse_response
        try:
            answer = send(conn, command_name, *args, **options)
            if command_name in WRITES and not send(conn, "WAIT", "WAIT", 1, COPIED_WITHIN):
                raise exceptions.ConnectionError("no replica has copied it")
        except exceptions.ResponseError as exc:
            if isinstance(exc, NAMED) or str(exc).startswith(NO_MASTER):
                conn.disconnect()
                raise exceptions.ConnectionError(str(exc)) from exc
            raise
        return answer


class _AsksSentinels:
    """A connection that asks for the master at each attempt; redis-py's own asks for each command, and then no more."""

    def connect_check_health(self, *args: Any, **kwargs: Any) -> None:
        """Connect, if it is not connected. Raises redis.ConnectionError."""
        connection: Any = self
        if not connection._sock:
            connection.host, connection.port = connection.connection_pool.get_master_address()
        super().connect_check_health(*args, **kwargs)  # type: ignore[misc]


class Connection(_AsksSentinels, celerys.redis.sentinel.SentinelManagedConnection):
    """A connection to the master."""


class TLSConnection(_AsksSentinels, celerys.redis.sentinel.SentinelManagedSSLConnection):
    """The same with TLS."""


class KeyConsumer(redis.KeyConsumer):
    """Notices a master that is silent because it hangs, or because the network is cut."""

    _heard = 0.0  # when

    def _catch_up(self, keys: Any = ()) -> None:
        known = self._pubsub
        super()._catch_up(keys)
        if self._pubsub is not known:
            self._heard = time.monotonic()
        elif self._pubsub and time.monotonic() > self._heard + SILENCE:
            announced: list[tuple[Any, Any]] = []
            self._pubsub.ping("still there")
            self._hear(announced, lambda message: message["type"] not in ("subscribe", "unsubscribe", "message"))
            self._heard = time.monotonic()
            for key, payload in announced:
                self._hand_out(key, payload)


class SentinelBackend(redis.RedisBackend, celerys.SentinelBackend):
    """RedisBackend, for the master that Sentinels name."""

    ResultConsumer = KeyConsumer
    connection_class, connection_class_ssl = Connection, TLSConnection

    def _get_client(self) -> type[Client]:
        return Client
