"""What both result backends share: one client per process, whatever runs in it.

What Celery lacks: each thread has a backend and a reply queue of its own, a forked process keeps using its parent's,
and the states that one thread waits for reach the on_message of another. In the worker, waiting for the store can
exceed the task's time limit.
What this does: a process has one backend. One thread reads for all waiting callers, and each hears only its own tasks.
A forked process drops all of kombu's connections and starts afresh. Whoever stores a result tries again until shortly
before the task's time limit.
To go back: see redis.py and replies.py. For Celery 5.7.
"""

import logging
import math
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import kombu.pools
from celery import _state, current_app
from celery.backends.asynchronous import BaseResultConsumer, _waiting_on
from celery.exceptions import Reject, TimeoutError
from celery.result import ResultSet
from celery.signals import task_prerun, worker_process_init
from celery.states import READY_STATES

_logger = logging.getLogger(__name__)
celery_state: Any = _state  # these parts of Celery have no type hints
pools: Any = kombu.pools


# --- The worker's patience ------------------------------------------------------------------------------------------


# The thread of a worker's main process that stores outcomes (request.py): it tries once, and gives the message back.
OUTCOMES = "outcomes"


class NotStored(Reject):
    """The result could not be stored within the task's time limit: its message goes back, and the task runs again."""

    def __init__(self, reason: Exception | str | None = None, requeue: bool = True) -> None:
        super().__init__(reason, requeue)


@task_prerun.connect(weak=False)
def _note_start(task: Any, **kwargs: Any) -> None:
    task.request.began = time.monotonic()


_in_pool = False  # this process runs a worker's tasks
_by_a_task = False  # a task has started this process, which is a client then


@worker_process_init.connect(weak=False)
def _note_pool(**kwargs: Any) -> None:
    global _in_pool
    _in_pool = True


def present_task(app: Any) -> Any:
    """Return the task that this thread of a worker runs, or None."""
    task = None if _by_a_task else app.current_worker_task
    return None if task is None or task.request.is_eager else task


def time_left(app: Any) -> float:
    """Return the seconds for which a store may be tried again: none in a client, endless in a worker without limits.

    Raises NotStored when the present task's result was given up already: what follows must not be stored either.
    """
    task = present_task(app)
    if task is None:
        if threading.current_thread().name == OUTCOMES:
            return 0.0
        in_worker = not _by_a_task and (app.loader.worker_initialized or celery_state.task_join_will_block())
        return math.inf if in_worker else 0.0
    request = task.request
    if getattr(request, "not_stored", False):
        raise NotStored("the result was given up")
    hard, soft = request.timelimit or (None, None)
    ran = time.monotonic() - getattr(request, "began", time.monotonic())
    limits = [limit for limit in (hard or task.time_limit, soft or task.soft_time_limit) if limit and limit > ran]
    return max(min((limit - min(5.0, limit / 5) - ran for limit in limits), default=math.inf), 0.0)


def wait_for(store: str, app: Any, error: BaseException) -> None:
    """After a failed attempt, wait for the next one: a second, in the worker.

    Raises NotStored when the task's time is over, and the error in a client, which decides for itself.
    """
    task, left = present_task(app), time_left(app)
    if left > 0:
        _logger.warning("%s is away (%s: %s); trying again.", store, type(error).__name__, error)
        time.sleep(min(1.0, left))
    elif task is None:
        raise error
    else:
        task.request.not_stored = True
        raise NotStored(f"{store} is away ({error})") from error


# --- One backend for a process --------------------------------------------------------------------------------------


class _Shared:
    """In the place of app._local: what Celery keeps for each thread is kept once. The first value stays."""

    strays: set[str]

    def __init__(self, oid: str, threads: Any, backend: Any = None) -> None:
        # The oid is what replies are addressed to. A thread may have had one of its own before there was a backend.
        self.__dict__.update(oid=oid, threads=threads, strays=set())
        if backend is not None:
            self.backend = backend

    def __setattr__(self, name: str, value: Any) -> None:
        if value is None:  # celery.contrib.testing ends an app
            self.__dict__.pop(name, None)
        elif self.__dict__.setdefault(name, value) is not value and name == "oid":
            self.strays.add(value)


_lock = threading.Lock()
_backends: "weakref.WeakSet[OneBackend]" = weakref.WeakSet()


class OneBackend:
    """A backend that all threads and greenlets of a process use, and that a forked process makes its own."""

    app: Any
    result_consumer: Any

    def __init__(self, *args: Any, app: Any, **kwargs: Any) -> None:
        self._made_with = (args, {**kwargs, "app": app})
        with _lock:
            if not isinstance(app._local, _Shared):
                app._local = _Shared(getattr(app._local, "oid", None) or str(uuid.uuid4()), app._local)
        super().__init__(*args, app=app, **kwargs)  # type: ignore[call-arg]
        self.thread_safe = False  # Celery then keeps it in app._local, where the first one stays
        _backends.add(self)

    def __reduce__(self, *args: Any, **kwargs: Any) -> Any:
        """A pickled result finds the backend of the process that it gets to, and carries no password."""
        return _backend_of, (self.app.main,)

    def _after_fork(self) -> None:
        """Do nothing, where billiard calls it: _start_afresh has been here."""

    def mark_as_retry(self, *args: Any, **kwargs: Any) -> Any:
        """Go on when the state RETRY cannot be stored: the retry is on its way already."""
        with suppress(NotStored):
            return super().mark_as_retry(*args, **kwargs)  # type: ignore[misc]

    def iter_native(self, result: Any, no_ack: bool = True, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """Yield a group's results as they arrive, and its groups when they are complete."""
        self._ensure_not_eager()  # type: ignore[attr-defined]
        single = {id(node): node for node in result.results if not isinstance(node, ResultSet)}
        for node in [node for node in single.values() if node._cache]:
            yield node.id, single.pop(id(node))._cache
        for arrived in self.result_consumer._wait_for_pending(result, **kwargs):
            while arrived:
                if node := single.pop(id(arrived.popleft()), None):
                    yield node.id, node._cache
        for group in result.results:
            if isinstance(group, ResultSet):
                yield group.id, group.children  # type: ignore[attr-defined]


def _backend_of(name: str | None) -> Any:
    apps = [current_app, *celery_state._get_active_apps()]
    return next((app for app in apps if app.main == name), current_app).backend


def abandon(connection: Any) -> None:
    """Close a connection's socket in a forked process. The parent's goes on: nothing is said to RabbitMQ."""
    transport: Any = getattr(getattr(connection, "_connection", None), "_transport", None)
    if sock := getattr(transport, "sock", None):
        sock.close()
        transport.sock = None


def _start_afresh() -> None:
    """Give a forked process connections, locks and a reply queue of its own, however it was forked."""
    global _lock, _by_a_task
    _lock = threading.Lock()
    backends = list(_backends)
    if _in_pool or any(backend.app.current_worker_task for backend in backends):
        _by_a_task = True
        celery_state._set_task_join_will_block(False)
    for pool in pools.connections.values():
        for connection in (*pool._dirty, *pool._resource.queue):
            abandon(connection)
    for group in pools._groups:
        group.clear()
    for app in {backend.app for backend in backends}:
        app._pool = None
        if "amqp" in app.__dict__:
            app.amqp._producer_pool = None
        app.__dict__.pop("control", None)
        app._local = _Shared(str(uuid.uuid4()), threading.local(), app._local.__dict__.get("backend"))
    for backend in backends:
        args, kwargs = backend._made_with
        abandon(getattr(backend.result_consumer, "_connection", None))
        backend.__dict__.clear()
        backend.__init__(*args, **kwargs)  # type: ignore[misc]


os.register_at_fork(after_in_child=_start_afresh)


# --- One reader for all that wait -----------------------------------------------------------------------------------


def _members(result: Any) -> Iterator[Any]:
    if isinstance(result, ResultSet):
        for member in result.results or ():
            yield from _members(member)
    else:
        yield result


class Wait:
    """One get(): the results that it waits for, and what its on_message has not been told yet."""

    def __init__(self, result: Any, on_message: Callable[[Any], None] | None) -> None:
        self.result = result
        self.on_message = on_message
        self.missing: dict[str, list[Any]] = {}
        for member in _members(result):
            if not member._cache:
                self.missing.setdefault(member.id, []).append(member)
        self.arrived: deque[Any] = deque()
        self.untold: deque[dict[str, Any]] = deque()
        self.last_told: dict[str, object] = {}
        self.error: Exception | None = None
        if not isinstance(result, ResultSet) and result._cache:  # it was there already
            self.untold.append(dict(result._cache))

    def ready(self) -> bool:
        """Tell whether nothing is missing any more."""
        done = self.result.on_ready.ready  # a chord says so, for members without a result
        for task_id in list(self.missing) if done else self._first_missing():
            if all(member._cache for member in self.missing[task_id]):
                self.arrived.extend(self.missing.pop(task_id))
            elif not done:
                return False
        return True

    def _first_missing(self) -> Iterator[str]:
        while self.missing:
            yield next(iter(self.missing))

    def has_news(self) -> bool:
        """Tell whether get() has something to do."""
        return bool(self.untold or self.error or self.ready())

    def tell(self) -> None:
        """Tell on_message what is new, in the thread of its get(). Raises what the result cannot be read for."""
        if self.error:
            raise self.error
        while self.untold:
            meta = self.untold.popleft()
            if self.on_message:
                self.on_message(meta)


class OneReader(BaseResultConsumer):
    """Waits for results in any number of threads or greenlets, of which one at a time reads for all."""

    interval = 1.0  # seconds after which get() looks around, for on_interval and its timeout

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._waits: list[Wait] = []
        self._turn = threading.Condition()
        self._reader: int | None = None  # the thread that reads

    def begin(self, wait: Wait) -> None:
        """Note what is known when a get() begins; no state is handed out meanwhile."""

    def look(self, wait: Wait) -> None:
        """Look once whether the results of a new get() are there, without waiting for them."""
        raise NotImplementedError

    def read(self, timeout: float) -> None:
        """Hand out what arrives within timeout, in seconds. Raises no error of a lost connection."""
        raise NotImplementedError

    def _wait_for_pending(
        self,
        result: Any,
        timeout: float | None = None,
        on_interval: Callable[[], None] | None = None,
        on_message: Callable[[Any], None] | None = None,
        **kwargs: Any,
    ) -> Iterator["deque[Any]"]:
        """Yield what has arrived, whenever something happened. Raises Celery's TimeoutError."""
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        wait = Wait(result, on_message)
        with self._turn:
            self._waits.append(wait)
            self.begin(wait)
        try:
            self.look(wait)
            while not self._told(wait):
                if (left := deadline - time.monotonic()) <= 0:
                    raise TimeoutError("The operation timed out.")
                self.drain_events(min(left, self.interval), wait)
                yield wait.arrived
                if on_interval:
                    on_interval()
            yield wait.arrived
        finally:
            with self._turn:
                self._waits.remove(wait)

    def _told(self, wait: Wait) -> bool:
        with self._turn:
            ready = wait.ready()
        wait.tell()
        return ready

    def drain_events(self, timeout: float | None = None, wait: Wait | None = None) -> None:
        """Read for all that wait, or wait as long as another thread does, at most timeout seconds."""
        end = time.monotonic() + (self.interval if timeout is None else timeout)
        with self._turn:
            self._turn.wait_for(lambda: not self._is_read() or (wait and wait.has_news()), end - time.monotonic())
            if self._is_read() or (wait and wait.has_news()):
                return
            outer, self._reader = self._reader, threading.get_ident()
        try:
            self.read(max(end - time.monotonic(), 0.0))
        except Exception:
            if wait:
                raise
            _logger.exception("Results cannot be read.")  # the greenlet that reads for others must not end
            time.sleep(self.interval)
        finally:
            self._end_reading(outer)

    def _is_read(self) -> bool:
        """Tell whether another thread reads. A get() inside a then() is in the thread that reads already."""
        return self._reader not in (None, threading.get_ident())

    def _end_reading(self, outer: int | None) -> None:
        me = threading.get_ident()
        with self._turn:
            if self._reader == me:
                self._reader = outer if outer == me else None
            self._turn.notify_all()

    def on_state_change(self, meta: dict[str, Any], message: Any = None, snapshot: bool = False) -> None:
        """Hand a state to all that wait for it, and to the others that have asked for it.

        A snapshot of what is stored is not told to an on_message that heard the same just now.
        """
        task_id, ready = meta["task_id"], meta["status"] in READY_STATES
        with self._turn:
            waits = [wait for wait in self._waits if task_id in wait.missing]
            for wait in waits:
                if wait.on_message and not (snapshot and wait.last_told.get(task_id) == message):
                    wait.untold.append(dict(meta))
                    wait.last_told[task_id] = message
            waiting = [*_waiting_on(self._pending_results, task_id), *(r for w in waits for r in w.missing[task_id])]
            self.keep(meta, message, taken=ready and bool(waiting))
        if ready:
            for result in {id(result): result for result in waiting}.values():
                self._fulfil(result, meta)
        with self._turn:
            for wait in waits if ready else ():
                wait.arrived.extend(wait.missing.pop(task_id, ()))
            self._turn.notify_all()

    def keep(self, meta: dict[str, Any], message: Any, taken: bool) -> None:
        """Keep a state for those who ask later, unless it is final and somebody has taken it."""

    def _fulfil(self, result: Any, meta: dict[str, Any]) -> None:
        """Give a result its value. What goes wrong concerns its own get() alone, and not that of the reader."""
        if not result._cache:
            try:
                result._maybe_set_cache(dict(meta))
            except Exception as exc:
                if result._cache:
                    _logger.exception("What waited for the result of task %s raised an error.", result.id)
                else:
                    self.fail(result.id, exc)

    def fail(self, task_id: str, error: Exception) -> None:
        """Raise an error in the get() of those that wait for a task."""
        with self._turn:
            for wait in self._waits:
                if task_id in wait.missing:
                    wait.error = error
            self._turn.notify_all()
