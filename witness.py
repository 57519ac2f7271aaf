"""The independent witnesses: pika and redis-py look into RabbitMQ and Redis behind Celery's back.

The producer uses them to show where a result really is and to check the servers; the tests compare what they see.
"""

import json
import socket
import ssl
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

import pika
import pika.exceptions
import redis
from pika.adapters.utils.connection_workflow import AMQPConnectorException

TIMEOUT = 5.0  # seconds that a server has to answer


class ServerError(Exception):
    """A server cannot be used; the message is one line that says why and what to do."""


class Unreachable(ServerError):
    """Nothing answers: the server is down, starting, or somewhere else."""


class Refused(ServerError):
    """The server answers, but refuses the user, the password or the virtual host."""


@dataclass(frozen=True)
class ResultKey:
    """A result in Redis: the key's name, the seconds until it expires, and what is in it."""

    name: str
    ttl: int
    content: dict[str, Any]


@dataclass(frozen=True)
class ReplyQueue:
    """A reply queue in RabbitMQ: its name, how many messages and consumers it has, and its first message."""

    name: str
    messages: int
    consumers: int
    content: dict[str, Any] | None


@contextmanager
def rabbitmq_channel(url: str) -> Iterator[Any]:
    """Open a channel with pika. Raises Unreachable or Refused."""
    nodes, where = [], []
    for one in url.split(";"):
        parts = urlsplit(one)
        port = parts.port or (5671 if parts.scheme == "amqps" else 5672)
        user = unquote(parts.username or "guest")
        vhost = unquote(parts.path[1:]) or "/"  # as Celery reads it; pika.URLParameters reads amqp://host// otherwise
        tls = pika.SSLOptions(ssl.create_default_context(), parts.hostname) if parts.scheme == "amqps" else None
        where.append(f"{parts.hostname}:{port}")
        nodes.append(
            pika.ConnectionParameters(
                host=parts.hostname,
                port=port,
                virtual_host=vhost,
                credentials=pika.PlainCredentials(user, unquote(parts.password or "guest")),
                ssl_options=tls,
                socket_timeout=TIMEOUT,
                stack_timeout=TIMEOUT,
            )
        )
    server = f"RabbitMQ at {', '.join(where)}"
    try:
        with closing(pika.BlockingConnection(nodes)) as connection:
            yield connection.channel()
    except pika.exceptions.ProbableAuthenticationError:
        raise Refused(
            f"{server} refuses the user {user!r} or its password. Check RABBITMQ_URL and RABBITMQ_PASSWORD. RabbitMQ "
            f"keeps the password of its first start: docker compose exec rabbitmq rabbitmqctl change_password {user} "
            "changes it."
        ) from None
    except pika.exceptions.ProbableAccessDeniedError:
        raise Refused(
            f"{server} has no virtual host {vhost!r}, or {user!r} has no right to use it. "
            "Check the end of RABBITMQ_URL."
        ) from None
    except (pika.exceptions.AMQPError, AMQPConnectorException, OSError) as exc:
        raise Unreachable(
            f"{server} cannot be reached ({_reason(exc)}). Is it running (docker compose up -d rabbitmq), "
            "and is RABBITMQ_URL right?"
        ) from None


def _redis(url: str) -> redis.Redis:
    options: dict[str, Any] = {"socket_connect_timeout": TIMEOUT, "socket_timeout": TIMEOUT, "retry": None}
    options["decode_responses"] = True
    first = urlsplit(url.partition(";")[0])
    if not first.scheme.startswith("sentinel"):
        return redis.Redis.from_url(url.replace("redis+socket://", "unix://").replace("virtual_host", "db"), **options)
    from hardening.environment import sentinel_options  # imports Celery, which lab/wire.py does without

    names = sentinel_options(url)
    if first.username or first.password:
        options |= {"username": unquote(first.username or "default"), "password": unquote(first.password or "")}
    sentinels = [(one.hostname, one.port or 26379) for one in map(urlsplit, url.split(";"))]
    sentinel: Any = redis.Sentinel(sentinels, sentinel_kwargs=names["sentinel_kwargs"], **options)  # type: ignore[no-untyped-call]
    client: redis.Redis = sentinel.master_for(
        names["master_name"], db=int(first.path.strip("/") or 0), ssl=first.scheme == "sentinels"
    )
    return client


@contextmanager
def redis_client(url: str) -> Iterator[redis.Redis]:
    """Open a redis-py client. Raises Unreachable or Refused."""
    where = "Redis at " + ", ".join(
        f"{parts.hostname}:{parts.port or 6379}" if parts.hostname else parts.path
        for parts in map(urlsplit, url.split(";"))
    )
    client = _redis(url)
    try:
        client.ping()
        yield client
    except redis.AuthenticationError:
        raise Refused(f"{where} refuses the user or the password. Check REDIS_URL and REDIS_PASSWORD.") from None
    except redis.exceptions.NoPermissionError as exc:
        raise Refused(f"{where} gives the user too few rights ({exc}). Check its key prefix and commands.") from None
    except (redis.ConnectionError, redis.TimeoutError) as exc:
        raise Unreachable(
            f"{where} cannot be reached ({_reason(exc)}). Is it running (docker compose up -d redis), "
            "and is REDIS_URL right?"
        ) from None
    except redis.RedisError as exc:
        raise Refused(f"{where} does not do what it was asked for ({_reason(exc)}). Is REDIS_URL right?") from None
    finally:
        client.close()


def _reason(exc: BaseException) -> str:
    """Return the system's own words for an error; both libraries wrap them in errors of their own."""
    for wrapped in (getattr(exc, "exception", None), *exc.args, exc.__cause__, exc.__context__):
        if isinstance(wrapped, BaseException):
            return _reason(wrapped)
    if isinstance(exc, socket.gaierror):
        return "unknown host name"
    return getattr(exc, "strerror", None) or str(exc) or type(exc).__name__


def find_result_key(url: str, name: str) -> ResultKey | None:
    """Return a key in Redis with the result in it, or None. Raises ServerError."""
    with redis_client(url) as client:
        content = client.get(name)
        return None if content is None else ResultKey(name, int(client.ttl(name)), json.loads(content))


def find_reply_queue(url: str, name: str) -> ReplyQueue | None:
    """Return a reply queue in RabbitMQ with its first message (which stays there), or None. Raises ServerError."""
    with rabbitmq_channel(url) as channel:
        try:
            declared = channel.queue_declare(name, passive=True).method
        except pika.exceptions.ChannelClosedByBroker:
            return None
        delivery, _, body = channel.basic_get(name)
        if delivery is not None:
            channel.basic_nack(delivery.delivery_tag, requeue=True)
        content = None if body is None else json.loads(body)
        return ReplyQueue(name, declared.message_count, declared.consumer_count, content)


def count_consumers(url: str, queue: str) -> int:
    """Return how many workers consume from a queue, 0 if there is no such queue. Raises ServerError."""
    with rabbitmq_channel(url) as channel:
        try:
            return int(channel.queue_declare(queue, passive=True).method.consumer_count)
        except pika.exceptions.ChannelClosedByBroker:
            return 0
