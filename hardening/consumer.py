"""The worker's consumer of tasks: it refuses a message that is no task, logs one line, and goes on with the next one.

What Celery lacks: it logs some of these messages in full. Others end the worker, and RabbitMQ gives the message to the
next worker, which ends, too: a missing content type is enough, or a time limit that is no pair.
What this does: it checks each message before Celery sees it. A message that is no task goes into the dead-letter queue,
and so does one that RabbitMQ delivers again and again (dead_letters.py). A task that is not due is parked (delays.py),
and the loop never waits for the result store (request.py). Whoever waits for a refused task gets a failure. Control
queues of later connections have names of their own, add_consumer creates the same queues as -Q, and with greenlets the
loop does not wait a tenth of a second for a heartbeat after each message.
To go back: leave out worker_consumer, as delays.py says. For Celery 5.7.
"""

import select
from collections.abc import Callable, Iterator
from functools import partial
from inspect import isgenerator
from typing import Any, ClassVar
from uuid import uuid4

from billiard.einfo import ExceptionInfo
from celery import Celery, bootsteps, signals
from celery.app.task import Context
from celery.app.trace import TraceInfo, trace_ok_t
from celery.concurrency import prefork
from celery.exceptions import InvalidTaskError, NotRegistered, Reject, WorkerLostError
from celery.states import REJECTED
from celery.utils.log import get_logger
from celery.worker import consumer, loops
from celery.worker.state import revoked
from kombu.exceptions import ContentDisallowed, DecodeError

from . import in_force
from .dead_letters import DELIVERIES, dead_letter_queue, why_dead
from .delays import delay_queue, seconds_left
from .events import EventsTogether
from .moves import Moves, lasting_queue_of, queue_of, without_delay
from .readiness import Readiness, refuse_wrong_passwords
from .request import Request, store_errors, storing

logger = get_logger(__name__)

# What Celery and Python raise at a value of the wrong kind. Lost connections are none of these.
MALFORMED = (
    InvalidTaskError,
    ContentDisallowed,
    DecodeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    OverflowError,
)

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
    "x-delivery-count": int | None,
}
NUMBER = (int, float, type(None))
ADDRESS = ("reply_to", "correlation_id")
END_TIMEOUT = 5.0  # seconds


# The limits that work in each pool; in any other one, none does.
LIMITS = {"prefork": ("time_limit", "soft_time_limit"), "gevent": ("time_limit",)}


def without_effect(worker: Any) -> Iterator[str]:
    """Yield a line for what a worker consumes or is set to that does not work as these settings promise."""
    classic = [
        queue.name
        for queue in worker.task_consumer.queues
        if (queue.queue_arguments or {}).get("x-queue-type", "classic") == "classic" and not queue.auto_delete
    ]
    if classic:
        yield (
            f"These queues are classic: {', '.join(classic)}. They are on one machine of a cluster alone, and a task "
            "that ends its worker comes back without end. See task_default_queue in celeryconfig.py."
        )
    pool = type(worker.pool).__module__.rpartition(".")[2]
    vain = {
        f"{limit} of {task.name}"
        for task in worker.app.tasks.values()
        for limit in ("time_limit", "soft_time_limit")
        if limit not in LIMITS.get(pool, ()) and getattr(task, limit)
    }
    if vain:
        yield f"These limits have no effect in this pool ({pool}): {', '.join(sorted(vain))}."


def check(message: Any) -> None:
    """Raise one of MALFORMED for what would end a worker, or lose one of its pool processes.

    The form is Celery's protocol 2: https://docs.celeryq.dev/en/stable/internals/protocol.html
    """
    headers = message.headers or {}
    for name, kind in HEADERS.items():
        if not isinstance(headers.get(name), kind):
            raise InvalidTaskError(f"the header {name} is {headers.get(name)!r:.50}")
    for name in ("task", "id", "shadow"):  # Celery writes these into the log as they are
        if not (headers.get(name) or "").isprintable():
            raise InvalidTaskError(f"the header {name} is {headers[name]!r:.50}")
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


def _handing_over(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Return a tracer that hands a Reject of the result backend to the request: other pools than prefork lose it."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        try:
            return trace(*args, **kwargs)
        except Reject as exc:
            return trace_ok_t(ExceptionInfo(), TraceInfo(REJECTED, exc), 0.0, None)

    return traced


class LastMoves(bootsteps.StartStopStep):
    """Waits at the worker's end for outcomes and moves: a message that is not acknowledged comes again."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def stop(self, consumer: Any) -> None:
        """Wait for what is parked; with the connection, the acknowledgements are lost, too."""
        if consumer.connection:
            consumer.moves.beside.wait(END_TIMEOUT)

    def shutdown(self, consumer: Any) -> None:
        """Wait for the outcomes of the tasks that the stopped worker has waited for."""
        if storing.wait(END_TIMEOUT):
            consumer.moves.beside.wait(END_TIMEOUT)


class ResultsFirst(bootsteps.StartStopStep):
    """Hears, after RabbitMQ was away, what the pool has done meanwhile, before the time limits are looked at.

    While it connects, Celery's worker hears neither: then it took a task that had ended for one that took too long.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def register_with_event_loop(self, consumer: Any, hub: Any) -> None:
        """Handle all that the pool processes have sent: that it took a task, and that the task has ended, for each."""
        pool: Any = getattr(consumer.pool, "_pool", None)
        for fileno in list(getattr(pool, "_fileno_to_outq", ())):
            poll = select.poll()
            poll.register(fileno, select.POLLIN)
            while pool._cache and (reader := hub.readers.get(fileno)):
                half_read = isgenerator(reader[0])  # a long traceback, for one, which its process goes on to write
                if not poll.poll(1000 if half_read else 0):
                    break
                if half_read:
                    next(reader[0], None)
                else:
                    pool.handle_result_event(fileno)


class Consumer(consumer.Consumer):
    """Celery's consumer of tasks, which survives what is no task, and parks what is not due."""

    connection_errors: tuple[type[Exception], ...]

    class Blueprint(consumer.Consumer.Blueprint):
        """Celery's steps without its delayed delivery, and ours."""

        default_steps: ClassVar = [
            *(step for step in consumer.Consumer.Blueprint.default_steps if "delayed_delivery" not in step),
            EventsTogether,
            LastMoves,
            ResultsFirst,
            Readiness,
        ]

    def __init__(self, *args: Any, app: Celery, **kwargs: Any) -> None:
        refuse_wrong_passwords(app)
        in_force.say(app)
        self.moves, Request.consumer = Moves(self), self
        # The first connection's control queue shows that no other worker has this name. It may outlive the connection,
        # on a RabbitMQ node that is cut off, and would keep a later one out: these have queues of their own.
        control: Any = app.control
        mailbox, end_of_name = control.mailbox, iter([""])
        queue_of = type(mailbox).get_queue
        mailbox.get_queue = lambda name: queue_of(mailbox, name + next(end_of_name, f".{uuid4().hex[:8]}"))
        super().__init__(*args, app=app, **kwargs)
        if type(self.pool).__module__.endswith(".solo"):  # its loop stands still while a task runs
            self.amqheartbeat = 0
        if self.pool.is_green:  # its loop waits for a heartbeat after each message, a tenth of a second by default
            vars(loops)["_quick_drain"] = partial(vars(loops)["_quick_drain"], timeout=0.001)

    def connection_for_write(self, *args: Any, **kwargs: Any) -> Any:
        """Connect for the worker's events, which are not confirmed.

        Nobody waits for one that is lost, and in a pool of greenlets the loop would read the confirm that the heartbeat
        waits for: the worker would do nothing more.
        """
        connection = self.app.connection_for_write(*args, **kwargs)
        connection.transport_options = {**connection.transport_options, "confirm_publish": False}
        return self.ensure_connected(connection)

    def on_ready(self) -> None:
        """Say once what does not work as it should."""
        if not self.restart_count:
            for line in without_effect(self):
                logger.warning(line)
        super().on_ready()

    def add_task_queue(self, *args: Any, **options: Any) -> None:
        """Consume from one more queue, of the kind that -Q makes: Celery makes it classic, and clients are refused."""
        arguments = {"x-queue-type": self.app.conf.task_create_missing_queue_type}
        super().add_task_queue(*args, **{"queue_arguments": arguments, **options})

    def call_soon_ack(self, p: Any, *args: Any, **kwargs: Any) -> Any:
        """Acknowledge at once when the event loop, which does it otherwise, has ended."""
        if self.hub and self.blueprint.state != bootsteps.RUN:
            return p(*args, **kwargs)
        return super().call_soon_ack(p, *args, **kwargs)

    def create_task_handler(self, *args: Any, **kwargs: Any) -> Callable[[Any], None]:
        """Return what handles a message."""
        handle = super().create_task_handler(*args, **kwargs)

        def handle_or_refuse(message: Any) -> None:
            try:
                check(message)
                if not self.give_up(message) and not self.park(message):
                    message.headers = without_delay(message.headers)
                    handle(message)
            except MALFORMED as exc:
                self.on_invalid_task(None, message, exc)

        return handle_or_refuse

    def update_strategies(self) -> None:
        """Tell each task that has no request class of its own to take ours."""
        for task in self.app.tasks.values():
            if task.Request == "celery.worker.request:Request":
                task.Request = Request
        super().update_strategies()
        if not isinstance(self.pool, prefork.TaskPool):
            for task in self.app.tasks.values():
                task.__trace__ = _handing_over(task.__trace__)

    def park(self, message: Any) -> bool:
        """Put a task that is not due into a delay queue of its queue, and tell whether that was so.

        It is also made sure that its retries stay in this queue: Celery sends them to the exchange that the task came
        from, which may have more queues.
        """
        queue = lasting_queue_of(self, message)
        if queue is None:
            return False
        message.delivery_info.update(exchange="", routing_key=queue.name)
        eta, left = message.headers.get("eta"), 0.0
        if eta and message.headers["id"] not in revoked and (left := seconds_left(eta, self.app)) > 0:
            self.moves.move(message, delay_queue(queue.name, left, message.properties.get("priority")))
        return left > 0

    def give_up(self, message: Any) -> bool:
        """Put a task that was delivered too often into the dead-letter queue, and tell whether that was so.

        Its worker ended each time, or it rejects itself; RabbitMQ would drop it soon, and nobody would know.
        """
        deliveries = message.headers.get("x-delivery-count") or 0
        if deliveries < DELIVERIES:
            return False
        reason = f"given up after {deliveries} deliveries: its worker ended, or it was rejected, each time"
        logger.error("Task %r[%r]: %s", message.headers["task"], message.headers["id"], reason)
        self.bury(message, reason)
        self.fail(message, WorkerLostError(f"{reason}. It is in the queue {dead_letter_queue(self.app).name}."))
        return True

    def bury(self, message: Any, reason: str) -> None:
        """Put a message into the dead-letter queue."""
        queue = queue_of(self, message)
        self.moves.move(message, dead_letter_queue(self.app), why_dead(queue.name if queue else "", reason))

    def fail(self, message: Any, exc: Exception, is_task: bool = True) -> None:
        """Tell the client, which waits for the result, once the store is there. Of what is no task, only ids count."""
        headers, address = message.headers, {name: message.properties.get(name) for name in ADDRESS}
        store = not headers.get("ignore_result")
        if is_task:
            options = {name: message.payload[2].get(name) for name in ("chord", "chain", "errbacks")}
        else:
            headers, options = {name: headers[name] for name in ("id", "task")}, {}
        request = Context({**headers, **options}, **address)
        storing.do_until_done(
            partial(self.app.backend.mark_as_failure, headers["id"], exc, request=request, store_result=store),
            store_errors(self),
        )
        if self.event_dispatcher:
            self.event_dispatcher.send("task-failed", uuid=headers["id"], exception=repr(exc))

    def refuse(self, message: Any, reason: object, failure: Exception | None = None) -> None:
        """Log one line, put the message into the dead-letter queue, and tell the client, if it can be told from it."""
        headers = message.headers or {}
        ids, reason = [headers.get("id"), headers.get("task")], str(reason).strip().partition("\n")[0]
        logger.error("Refused a message that is no task of this app, id %.100r: %.300s", ids[0], reason)
        if not message.acknowledged:
            self.bury(message, f"refused: {reason:.300}")
        if failure:
            self.fail(message, failure)
        elif all(isinstance(word, str) and word and word.isprintable() for word in ids):
            kept = f"refused: {reason:.300}. It is in the queue {dead_letter_queue(self.app).name}."
            self.fail(message, InvalidTaskError(kept), is_task=False)

    def on_decode_error(self, message: Any, exc: Exception) -> None:
        """Refuse what cannot be decoded. A command of celery control is not acknowledged: it gets a line alone."""
        if message.delivery_info.get("exchange") == self.app.control.mailbox.exchange.name:
            logger.error("Refused a command: %.300s", exc)
        else:
            self.on_invalid_task(None, message, exc)

    def on_invalid_task(self, body: object, message: Any, exc: Exception) -> None:
        """Refuse what Celery finds, such as a date that is none."""
        self.refuse(message, exc)
        signals.task_rejected.send(sender=self, message=message, exc=exc)

    def on_unknown_task(self, body: object, message: Any, exc: Exception) -> None:
        """Refuse a task that this worker does not know."""
        task_id, name = message.headers["id"], message.headers["task"]
        self.refuse(message, f"no task is called {exc}", NotRegistered(name))
        signals.task_unknown.send(sender=self, message=message, exc=exc, name=name, id=task_id)
