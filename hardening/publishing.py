"""Publishing with a deadline, and publishing many tasks with one wait.

What Celery lacks: delay() waits without end when RabbitMQ is frozen or blocks publishers, and confirms take a round
trip for each task. RabbitMQ silently drops an expired task, so it stays PENDING.
What this does: each call ends after LIMIT with OperationalError, also where RabbitMQ has no such queue:
Celery.send_task is wrapped, and each connection uses our own channel class. Tasks that are sent in a block of
together() are confirmed together. An expired task still reaches a worker, which stores REVOKED. librabbitmq is not
looked for.
To go back: leave out on_open in broker_transport_options, and errback in _attempts. For Celery 5.7.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from itertools import takewhile
from types import MethodType
from typing import Any

from amqp import spec
from amqp.abstract_channel import AbstractChannel
from amqp.exceptions import ChannelError, MessageNacked, NotFound, RecoverableConnectionError
from celery import Celery, current_app
from celery.app import amqp as _celerys_amqp
from kombu import Connection, Queue
from kombu.exceptions import OperationalError
from kombu.transport import pyamqp
from vine import ensure_promise

from .delays import Declared, delay_queue, seconds_left
from .results import present_task, time_left, wait_for

# kombu looks for this package whenever it makes a connection, under a lock of the import: a process that is forked
# meanwhile by another thread would wait for it for ever. So look once.
try:
    import_module("librabbitmq")
except ImportError:
    sys.modules["librabbitmq"] = None  # type: ignore[assignment]

LIMIT = 20.0  # seconds that a call may take while RabbitMQ does not do its part
CLOSE_LIMIT = 2.0  # seconds; nobody needs this answer
SLICE = 1.0  # seconds after which to look whether another greenlet has read the answer
REFUSED_PAUSE = 0.5  # seconds until a refused message is sent again
DECLARE_PAUSE = 0.1  # seconds until a queue that another connection is making is declared again
NO_ROUTE = 312  # AMQP's code for a message that is in no queue

# A worker sends what follows a task that has ended: its links, the rest of its chain.
_at_its_end: ContextVar[bool] = vars(_celerys_amqp)["_callback_publish_retry"]
_until: ContextVar[float] = ContextVar("_until", default=0.0)  # when the call that publishes a task must end


# --- One bound for each call ------------------------------------------------------------------------------


def within_limit(exc: Exception, interval: float) -> None:
    """Be the retry policy's errback, which kombu calls before each new attempt. Raises OperationalError or NotStored.

    The connections of a pool share it, and keep it: so it belongs to no call, and looks up its own call's limit.
    """
    if 0 < _until.get() <= time.monotonic():
        if _at_its_end.get():
            wait_for("RabbitMQ", current_app, exc)
        raise OperationalError(f"RabbitMQ has not taken the task within {LIMIT:.0f} s: {exc or repr(exc)}") from exc
    if isinstance(exc, MessageNacked):
        time.sleep(REFUSED_PAUSE)


_celerys_send_task = Celery.send_task


@wraps(_celerys_send_task)
def _send_task(app: Any, *args: Any, **kwargs: Any) -> Any:
    """Begin the limit of a call, and end it with the call. Other apps in the process have policies of their own.

    What follows a task, its links and the rest of its chain, has the rest of the task's time: then the task runs again.
    """
    until = 0.0
    if app.conf.task_publish_retry_policy.get("errback") is within_limit:
        until = time.monotonic() + (time_left(app) if _at_its_end.get() and present_task(app) else LIMIT)
    token = _until.set(until)
    try:
        return _celerys_send_task(app, *args, **kwargs)
    finally:
        _until.reset(token)


setattr(Celery, "send_task", _send_task)  # noqa: B010


@contextmanager
def answers_within(seconds: float) -> Iterator[None]:
    """Wait no longer for RabbitMQ's answers, in all, in this block. Raises RecoverableConnectionError."""
    token = _until.set(time.monotonic() + seconds)
    try:
        yield
    finally:
        _until.reset(token)


def _headers(message: Any) -> dict[str, Any]:
    return message.properties.get("application_headers") or {}


def _task_id(message: Any) -> str | None:
    """Return the id of the task in a message, or nothing if it holds none."""
    headers = _headers(message)
    return headers.get("id") if "task" in headers else None


# --- The connection ---------------------------------------------------------------------------------------


def on_open(connection: Any) -> None:
    """Prepare a connection to RabbitMQ: py-amqp calls this with each one that it has opened."""
    connection.Channel = Channel
    connection.wait = MethodType(_wait, connection)
    connection.blocked = None
    connection.on_blocked = partial(setattr, connection, "blocked")
    connection.on_unblocked = partial(setattr, connection, "blocked", None)


for each in (on_open, within_limit):  # both stand in settings, which a worker sends to celery inspect, as JSON
    vars(each)["__json__"] = partial(str, f"{each.__module__}.{each.__name__}")


def _patience(connection: Any) -> float:
    """Return the seconds to wait for an answer: what is left of the call, and of a cluster's each server its share.

    It is one at least, or the last attempt would end without the answer that says why.
    """
    until = _until.get()
    left = max(until - time.monotonic(), SLICE) if until else LIMIT
    return min(LIMIT / max(len(connection.client.alt), 1), left)


def _give_up(connection: Any, seconds: float) -> None:
    """Leave a connection whose server does not answer. Raises RecoverableConnectionError: kombu connects anew."""
    reason = f" ({connection.blocked})" if connection.blocked else ""
    connection.collect()
    error = RecoverableConnectionError(f"RabbitMQ has not answered for {seconds:.0f} s{reason}")
    if _at_its_end.get():  # Celery tries again, and there may be no time to connect
        within_limit(error, 0)
    raise error


def _wait(
    channel: Any, method: Any, callback: Any = None, timeout: float | None = None, returns_tuple: bool = False
) -> Any:
    """Wait for an answer as py-amqp does, but not for ever. Raises RecoverableConnectionError."""
    answer, connection = ensure_promise(callback), channel.connection
    if connection is None:
        raise RecoverableConnectionError("the connection is closed")
    closing = method in (spec.Channel.CloseOk, spec.Connection.CloseOk)
    seconds = timeout or (CLOSE_LIMIT if closing else _patience(connection))
    end = time.monotonic() + seconds
    while True:
        try:
            return AbstractChannel.wait(channel, method, answer, min(SLICE, seconds), returns_tuple)
        except TimeoutError:
            if time.monotonic() >= end:
                _give_up(connection, seconds)


class Channel(pyamqp.Channel):
    """A channel whose every wait ends, and which counts by itself what RabbitMQ has confirmed."""

    wait = _wait
    _published = 0  # so many messages; the number of the last one

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unconfirmed: dict[int, Callable[[bool], None]] = {}
        self._declared = Declared()

    def open(self) -> None:
        """Open the channel, or open it again when RabbitMQ has closed it: the numbers begin again, too."""
        self._published = 0
        self._unconfirmed.clear()
        super().open()

    def queue_declare(self, queue: str = "", passive: bool = False, *args: Any, **kwargs: Any) -> Any:
        """Declare a queue. Raises RecoverableConnectionError, after which kombu tries again, and what py-amqp does.

        While another connection is just making the same queue, RabbitMQ says that the queue's node is down.
        """
        try:
            return super().queue_declare(queue, passive, *args, **kwargs)
        except NotFound as exc:
            if passive:
                raise
            time.sleep(DECLARE_PAUSE)
            raise RecoverableConnectionError(exc.reply_text) from exc

    def prepare_message(self, *args: Any, **kwargs: Any) -> Any:
        """Leave out the expiration of a task: RabbitMQ would drop it, and the worker looks at its header anyway."""
        message = super().prepare_message(*args, **kwargs)
        if _task_id(message):
            message.properties.pop("expiration", None)
        return message

    def publish(
        self,
        message: Any,
        exchange: str,
        routing_key: str,
        on_confirm: Callable[[bool], None],
        mandatory: bool = False,
    ) -> int:
        """Publish without a wait, and return the message's number. Raises RecoverableConnectionError.

        on_confirm is called by whoever reads from the connection: with True when RabbitMQ has taken the message, with
        False when it has refused it. If the channel or the connection is lost before, it is not called.
        """
        if self.connection is None:
            raise RecoverableConnectionError("the connection is closed")
        if not self._published:
            self.confirm_select(nowait=True)
        self._published += 1
        self._unconfirmed[self._published] = on_confirm
        number, connection, seconds = self._published, self.connection, _patience(self.connection)
        try:
            with connection.transport.having_timeout(seconds):
                self.send_method(spec.Basic.Publish, "Bssbb", (0, exchange, routing_key, mandatory, False), message)
        except TimeoutError:  # what it has sent is part of a message
            _give_up(connection, seconds)
        return number

    def basic_publish_confirm(
        self,
        msg: Any,
        exchange: str = "",
        routing_key: str = "",
        mandatory: bool = False,
        immediate: bool = False,
        timeout: float | None = None,
        confirm_timeout: float | None = None,
    ) -> None:
        """Publish, and wait until RabbitMQ has taken the message; in a block of together(), the block waits.

        Raises MessageNacked or RecoverableConnectionError, after which kombu tries again, and NotPlaced in a block.
        py-amqp puts this in the place of basic_publish when confirm_publish is set.
        """
        if not exchange and routing_key and (delay := self._delay_queue(msg, routing_key)):
            self._declared.declare(delay, self)
            routing_key = delay.name
        if "ticket" in _headers(msg):
            # A worker's answer to a command, sent from its loop: nobody has to wait until it is confirmed.
            self.publish(msg, exchange, routing_key, lambda taken: None, mandatory)
            return
        block = _block.get()
        if block and block.mine() and not mandatory and (task_id := _task_id(msg)):
            block.send(self.connection.client, _Task(task_id, (msg, exchange, routing_key)))
            return
        to_queue = not exchange and _task_id(msg) is not None
        try:
            self.publish_and_wait(msg, exchange, routing_key, mandatory or to_queue, confirm_timeout or timeout)
        except ChannelError as exc:
            if mandatory or exc.reply_code != NO_ROUTE:
                raise
            self.connection.client.declared_entities.clear()  # it was deleted: the next attempt declares it again
            self._declared = Declared()
            raise MessageNacked(f"RabbitMQ has no queue {routing_key!r}") from exc

    @staticmethod
    def _delay_queue(message: Any, queue: str) -> Queue | None:
        """Return where a task waits until it is due; nothing if it is, or if that is left to the worker."""
        headers = _headers(message)
        if "task" in headers and headers.get("eta") and ".delay." not in queue:
            with suppress(ValueError, TypeError, OverflowError):  # no date: the worker refuses it
                if (left := seconds_left(headers["eta"])) > 0:
                    return delay_queue(queue, left, message.properties.get("priority"))
        return None

    def publish_and_wait(
        self, message: Any, exchange: str, routing_key: str, mandatory: bool = False, timeout: float | None = None
    ) -> None:
        """Publish, and wait until RabbitMQ has taken it. Raises MessageNacked or RecoverableConnectionError."""
        taken: list[bool] = []
        number = self.publish(message, exchange, routing_key, taken.append, mandatory)
        seconds = timeout or _patience(self.connection)
        end = time.monotonic() + seconds
        while number in self._unconfirmed:
            self.read(seconds, end)
        if taken != [True]:
            raise MessageNacked("RabbitMQ has refused the message")

    def read(self, seconds: float, end: float) -> None:
        """Handle what RabbitMQ sends next. Raises RecoverableConnectionError when nothing came in all the seconds."""
        connection = self.connection
        if connection is None or not connection.connected:
            raise RecoverableConnectionError("the connection is closed")
        try:
            connection.drain_events(timeout=min(SLICE, max(end - time.monotonic(), 0.001)))
        except TimeoutError:
            if time.monotonic() >= end:
                _give_up(connection, seconds)

    def _on_basic_ack(self, delivery_tag: int, multiple: bool) -> None:
        self._settle(delivery_tag, multiple, True)

    def _on_basic_nack(self, delivery_tag: int, multiple: bool) -> None:
        self._settle(delivery_tag, multiple, False)

    def _settle(self, number: int, multiple: bool, taken: bool) -> None:
        for each in list(takewhile(number.__ge__, self._unconfirmed)) if multiple else [number]:
            if on_confirm := self._unconfirmed.pop(each, None):
                on_confirm(taken)


# --- Many tasks, one wait ---------------------------------------------------------------------------------

WINDOW = 1_000  # tasks that may be unconfirmed at a time: they are kept in memory, to be sent again


class NotPlaced(OperationalError):
    """RabbitMQ did not confirm these tasks. Those that were sent when the connection was lost may have arrived."""

    def __init__(self, ids: list[str], reason: str) -> None:
        super().__init__(ids, reason)
        self.ids = ids

    def __str__(self) -> str:
        """Say how many, and why."""
        return f"RabbitMQ has not taken {len(self.ids)} of the tasks: {self.args[1]}"


@dataclass(eq=False, slots=True)
class _Task:
    """A task that is sent."""

    id: str
    message: tuple[Any, str, str]  # with its exchange and routing key

    @property
    def to_queue(self) -> bool:
        """Tell whether it is sent to one queue; those that are bound to an exchange are the project's own."""
        return not self.message[1]


@contextmanager
def together() -> Iterator[None]:
    """Send the tasks that this thread or greenlet queues in the block without a wait for each.

    with together():
        for page in pages:
            fetch.delay(page)

    All ways to queue a task count: delay(), apply_async(), groups, chords, chunks. Leaving the block waits until
    RabbitMQ has confirmed all of them. If the connection is lost, it sends again what is not confirmed, so that a task
    may run twice. Raises NotPlaced with the ids of what RabbitMQ has not taken for LIMIT seconds, at the end or in the
    call that finds out. If the block raises, what it has sent is still waited for. A block in a block belongs to it.
    Fetch results after the block: only its end makes sure that the tasks are there.
    """
    outer = _block.get()
    if outer and outer.mine():
        yield
        return
    block = _Block()
    token = _block.set(block)
    try:
        yield
    except BaseException as exc:
        if not_placed := block.end():
            exc.add_note(str(not_placed))
        raise
    else:
        if not_placed := block.end():
            raise not_placed
    finally:
        _block.reset(token)


class _Block:
    """What one block of together() has sent."""

    def __init__(self) -> None:
        self.owner: tuple[int, int] | None = (os.getpid(), threading.get_ident())
        self.lines: dict[tuple[Any, ...], _Line] = {}
        self.not_placed: dict[str, str] = {}  # ids of tasks, and why

    def mine(self) -> bool:
        """Tell whether the caller is in the block: a thread, a fork or a later asyncio task may have a copy only."""
        return self.owner == (os.getpid(), threading.get_ident())

    def send(self, client: Any, task: _Task) -> None:
        """Send a task to where a connection goes, but not through it: other threads read from it. Raises NotPlaced."""
        place = (client.virtual_host, client.userid, *(client.alt or [client.host]))
        if place not in self.lines:
            self.lines[place] = _Line(client, self.not_placed)
        self.not_placed.pop(task.id, None)
        self.lines[place].send(task)

    def end(self) -> NotPlaced | None:
        """Wait until everything is confirmed, and return what is not."""
        self.owner = None
        for line in self.lines.values():
            with suppress(NotPlaced):
                line.settle(0)
            line.connection.release()
        return NotPlaced(list(self.not_placed), next(iter(self.not_placed.values()))) if self.not_placed else None


_block: ContextVar[_Block | None] = ContextVar("_block", default=None)


class _Line:
    """A connection of a block's own to one RabbitMQ, and what is not confirmed there."""

    def __init__(self, client: Any, not_placed: dict[str, str]) -> None:
        self.client = client
        self.connection = Connection(**{**client.info(), "transport_options": dict(client.transport_options)})
        self.lost: tuple[type[BaseException], ...] = (*self.connection.recoverable_connection_errors, OperationalError)
        self.refusing: tuple[type[BaseException], ...] = self.connection.channel_errors
        self.errors = (*self.connection.connection_errors, *self.refusing)
        self.patience = LIMIT / max(len(client.alt), 1)  # seconds of silence, after which to try the next server
        self.not_placed = not_placed
        self.channel: Any = None
        self.open: dict[_Task, None] = {}
        self.refused: list[_Task] = []
        self.singly = False  # send each task by itself, to find out which one RabbitMQ does not take

    def send(self, task: _Task) -> None:
        """Send a task, and wait if too many are open. Raises NotPlaced."""
        self.open[task] = None
        if self.channel:
            try:
                self._publish(task)
            except self.lost:
                self._hang_up()
        self.settle(WINDOW // 2 if len(self.open) >= WINDOW else WINDOW)

    def settle(self, most: int) -> None:
        """Wait until at most so many are open. Raises NotPlaced when there is no progress for LIMIT seconds."""
        before, reason = len(self.open), "it refuses them"
        end = quiet = time.monotonic() + LIMIT
        while self.open and (self.channel is None or len(self.open) > most):
            try:
                if self.channel is None:
                    self._connect(end)
                    quiet = time.monotonic() + self.patience
                elif self.singly:
                    self._send_singly()
                elif self.refused:
                    time.sleep(REFUSED_PAUSE)
                    again, self.refused = self.refused, []
                    for task in again:
                        self._publish(task)
                else:
                    self.channel.read(self.patience, min(end, quiet))
            except self.lost as exc:
                reason = str(exc) or repr(exc)
                self._hang_up()
            except self.errors as exc:
                if self.channel is None or not self.connection.connected:
                    self._give_up(str(exc))
                self.singly = True
            if len(self.open) < before:
                before, end = len(self.open), time.monotonic() + LIMIT
                quiet = time.monotonic() + self.patience
            elif time.monotonic() >= end:
                self._give_up(reason)

    def _publish(self, task: _Task) -> None:
        self.channel.publish(*task.message, partial(self._confirmed, task), mandatory=task.to_queue)

    def _returned(self, exc: Exception, exchange: str, queue: str, message: Any) -> None:
        """Remember what no queue has taken; RabbitMQ confirms it next."""
        self.client.declared_entities.clear()
        self.not_placed[_task_id(message) or ""] = f"RabbitMQ has no queue {queue!r}"

    def _confirmed(self, task: _Task, taken: bool) -> None:
        if taken:
            self.open.pop(task, None)
        else:
            self.refused.append(task)

    def _send_singly(self) -> None:
        for task in list(self.open):
            try:
                self.channel.publish_and_wait(*task.message, mandatory=task.to_queue)
            except self.refusing as exc:
                self.not_placed[task.id] = str(exc)
            self.open.pop(task)
        self.singly = False

    def _connect(self, end: float) -> None:
        """Connect, and send again what is open."""
        seconds: Any = max(end - time.monotonic(), 0.1)
        self.connection.ensure_connection(interval_start=0, interval_step=1, interval_max=1, timeout=seconds)
        self.channel = self.connection.channel()
        self.channel.events["basic_return"].add(self._returned)
        if not self.singly:
            for task in list(self.open):
                self._publish(task)

    def _hang_up(self) -> None:
        self.channel = None
        self.refused.clear()
        self.connection.collect()
        self.connection.maybe_switch_next()

    def _give_up(self, reason: str) -> None:
        self.not_placed.update(dict.fromkeys((task.id for task in self.open), reason))
        self.open.clear()
        self._hang_up()
        raise NotPlaced(list(self.not_placed), reason)
