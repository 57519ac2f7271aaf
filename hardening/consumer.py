"""The worker's consumer of tasks: it refuses a message that is no task with one line, and goes on with the next one.

What Celery lacks: some of these messages it puts into the log as a whole. At others it ends, and RabbitMQ gives the
message to the next worker, which ends, too: a missing content type is enough, or a time limit that is no pair.
What this does: each message is checked before Celery sees it. The worker also sends its events together and says
whether it consumes (events.py, readiness.py).
To go back: leave out worker_consumer. For Celery 5.7.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from celery import Celery
from celery.app.task import Context
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.utils.log import get_logger
from celery.worker import consumer
from kombu.exceptions import ContentDisallowed, DecodeError

from .events import EventsTogether
from .readiness import Readiness, refuse_wrong_passwords

logger = get_logger(__name__)

# What Celery and Python raise at a value of the wrong kind. Lost connections are none of these.
MALFORMED = (InvalidTaskError, ContentDisallowed, DecodeError, TypeError, ValueError, LookupError, AttributeError)

# The headers that Celery uses without a look at their type.
HEADERS = {
    "task": str,
    "id": str,
    "root_id": str | None,
    "parent_id": str | None,
    "group": str | None,
    "group_index": int | None,
    "shadow": str | None,
    "retries": int | None,
    "replaced_task_nesting": int | None,
    "timelimit": list | None,
    "stamps": dict | None,
    "stamped_headers": list | None,
}
NUMBER = (int, float, type(None))


def check(message: Any) -> None:
    """Raise one of MALFORMED for what would end a worker, or lose one of its pool processes.

    The form is Celery's protocol 2: https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    headers = message.headers or {}
    for name, kind in HEADERS.items():
        if not isinstance(headers.get(name), kind):
            raise InvalidTaskError(f"the header {name} is {headers.get(name)!r:.50}")
    if not headers["id"]:
        raise InvalidTaskError("the header id is empty")
    limits = headers.get("timelimit") or (None, None)
    if len(limits) != 2 or not all(isinstance(limit, NUMBER) for limit in limits):
        raise InvalidTaskError("the header timelimit is not a pair of numbers")
    if not all(isinstance(stamp, str) for stamp in headers.get("stamped_headers") or ()):
        raise InvalidTaskError("the header stamped_headers is not a list of names")
    body = message.payload
    if not isinstance(body, list) or [type(part) for part in body] != [list, dict, dict]:
        raise InvalidTaskError("the body is not [arguments, keyword arguments, options] in JSON")
    for name in ("callbacks", "errbacks", "chain", "chord"):
        signatures = body[2].get(name) or []
        for signature in signatures if isinstance(signatures, list) else [signatures]:
            if not isinstance(signature, dict) or not isinstance(signature.get("task"), str):
                raise InvalidTaskError(f"the option {name} is {signatures!r:.50}")


class Consumer(consumer.Consumer):
    """Celery's consumer of tasks, which survives what is no task."""

    connection_errors: tuple[type[Exception], ...]

    class Blueprint(consumer.Consumer.Blueprint):
        """Celery's steps, and ours."""

        default_steps: ClassVar = [*consumer.Consumer.Blueprint.default_steps, EventsTogether, Readiness]

    def __init__(self, *args: Any, app: Celery, **kwargs: Any) -> None:
        refuse_wrong_passwords(app)
        super().__init__(*args, app=app, **kwargs)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Return what handles a message."""
        handle = super().create_task_handler(*args, **kwargs)

        def handle_or_refuse(message: Any) -> None:
            try:
                check(message)
                handle(message)
            except MALFORMED as exc:
                self.refuse(message, exc)

        return handle_or_refuse

    def refuse(self, message: Any, reason: object) -> None:
        """Log one line and reject the message: RabbitMQ drops it, or dead-letters it where a policy says so."""
        task_id, reason = (message.headers or {}).get("id"), str(reason).strip().partition("\n")[0]
        logger.error("Refused a message that is no task of this app, id %.100r: %.300s", task_id, reason)
        if not message.acknowledged:
            message.reject_log_error(logger, self.connection_errors)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Refuse what cannot be decompressed."""
        self.refuse(message, exc)

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:
        """Refuse what Celery finds, such as a date that is none."""
        self.refuse(message, exc)

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:
        """Refuse a task that this worker does not know, and tell the client, which waits for the result."""
        self.refuse(message, f"no task is called {exc}")
        headers, properties = message.headers, message.properties
        request = Context(headers, reply_to=properties.get("reply_to"), correlation_id=properties.get("correlation_id"))
        self.app.backend.mark_as_failure(headers["id"], NotRegistered(headers["task"]), request=request)
