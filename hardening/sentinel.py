"""A result backend for the Redis that Sentinels choose.

What Celery lacks: its sentinel:// waits without end for a Sentinel that hangs, and loses what the master has not yet
copied when it dies.
What this does: RedisBackend, and a result counts as stored when a replica has it, too. A Redis that is no master any
more, or has lost its replicas, is like one that is away.
To go back: result_backend = _environment.service_url("REDIS"). For Celery 5.7.
"""

from typing import Any

from celery.backends import redis

from . import redis as plain

COPIED_WITHIN = 1000  # milliseconds; less than redis_socket_timeout
WRITES = {"EVALSHA", "SET", "SETEX", "INCRBY"}
# What a Redis answers that was the master, or is it without replicas: the worker tries again until there is a new one.
NO_MASTER = ("READONLY", "NOREPLICAS", "MASTERDOWN", "UNBLOCKED")
NAMED = (redis.redis.ReadOnlyError, redis.redis.exceptions.MasterDownError)  # redis-py strips their first word


class Client(plain.Client):
    """RedisBackend's client, which waits after each write until a replica has it."""

    def _send_command_parse_response(self, conn: Any, command_name: str, *args: Any, **options: Any) -> Any:
        try:
            answer = super()._send_command_parse_response(conn, command_name, *args, **options)
            if command_name in WRITES and not super()._send_command_parse_response(
                conn, "WAIT", "WAIT", 1, COPIED_WITHIN
            ):
                raise redis.redis.ConnectionError("no replica has copied it")
        except redis.redis.ResponseError as exc:
            if isinstance(exc, NAMED) or str(exc).startswith(NO_MASTER):
                conn.disconnect()
                raise redis.redis.ConnectionError(str(exc)) from exc
            raise
        return answer


class SentinelBackend(plain.RedisBackend, redis.SentinelBackend):
    """RedisBackend, for the master that Sentinels name."""

    connection_class = redis.redis.sentinel.SentinelManagedConnection

    def _get_client(self) -> type[Client]:
        return Client
