"""The worker's main process never waits for the result store.

What Celery lacks: when a task is revoked, expired, timed out, or lost with its process, the main process stores that
itself, in its event loop. While the store is away, it takes no tasks, answers nobody and does not stop. And a lost task
is retried only after three minutes.
What this does: one thread beside the loop stores these outcomes, and acknowledges the message after that. If the store
is away, the message goes back to its queue for a while. The retry is the message itself, 5 seconds later unless the
task has a default_retry_delay. The command revoke is replaced.
To go back: leave out worker_consumer, as delays.py says. For Celery 5.7.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, ClassVar

from billiard.einfo import ExceptionWithTraceback
from celery import Task, signals
from celery.exceptions import BackendStoreError, Ignore, Reject, Retry, Terminated, WorkerLostError
from celery.utils.log import get_logger
from celery.worker import control, request, state
from kombu.exceptions import OperationalError

from .delays import delay_queue
from .moves import PAUSE, Beside, lasting_queue_of
from .results import OUTCOMES, NotStored

logger = get_logger(__name__)

LOST_RETRY_DELAY = 5.0  # seconds, for a task that sets no default_retry_delay
STORE_AWAY_DELAY = 5.0  # seconds until a task whose outcome could not be stored is looked at again

storing = Beside(OUTCOMES)


def retry_delay(task: Any) -> Any:
    """Return default_retry_delay in seconds if the task or a base class of it sets one, and LOST_RETRY_DELAY if not."""
    classes = type(task).__mro__
    own = any("default_retry_delay" in vars(each) for each in (task, *classes[: classes.index(Task)]))
    return task.default_retry_delay if own else LOST_RETRY_DELAY


def unwrapped(exc_info: Any) -> BaseException:
    """Return the exception that a pool process has sent."""
    exc: BaseException = exc_info.exception
    return exc.exc if isinstance(exc, ExceptionWithTraceback) else exc


def store_errors(consumer: Any) -> tuple[type[Exception], ...]:
    """Return what is raised when the result store of a worker's consumer is away."""
    own = getattr(consumer.app.backend, "connection_errors", ())
    return (BackendStoreError, OperationalError, OSError, *consumer.connection_errors, *own)


class Request(request.Request):
    """Celery's request for a task, whose outcome is stored beside the loop if the main process has to do it."""

    consumer: ClassVar[Any] = None  # the worker's

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settle: list[Callable[[], object]] | None = None  # in the thread: what to tell RabbitMQ in the end
        self._given_back = False
        if self.eta and self.eta <= datetime.now(UTC):
            # It is due: Celery need not hold it, which raises the prefetch for a moment.
            self._eta: datetime | None = None

    # --- What stores, and therefore goes beside the loop ---

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Store a failure when the hard limit is exceeded."""
        if soft:
            super().on_timeout(soft, timeout)
        else:
            self._beside(super().on_timeout, soft, timeout)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """Store what the pool process could not. return_ok says that it has stored the failure itself."""
        exc = unwrapped(exc_info)
        if isinstance(exc, NotStored) and self.acknowledged:  # acks_late=False: it must not run again
            self._beside(self._result_lost, exc)
        elif isinstance(exc, NotStored):  # a pool process could not store its result in time
            request.task_ready(self)
            self._give_back(STORE_AWAY_DELAY)
        elif self._stores(exc, return_ok):
            self._beside(super().on_failure, exc_info, send_failed_event, return_ok)
        else:
            super().on_failure(exc_info, send_failed_event, return_ok)

    def _result_lost(self, exc: Exception) -> None:
        lost = BackendStoreError(f"its result could not be stored within its time limit: {exc}")
        self.task.backend.mark_as_failure(self.id, lost, request=self._context, store_result=self.store_errors)

    @staticmethod
    def _stores(exc: BaseException, return_ok: bool) -> bool:
        """Tell whether Celery's on_failure stores something."""
        if isinstance(exc, Reject):
            return not getattr(exc, "requeue", False)
        if isinstance(exc, (Ignore, Retry, MemoryError, Terminated)):
            return False
        return not return_ok or isinstance(exc, (WorkerLostError, SystemExit, KeyboardInterrupt))

    def _announce_revoked(self, *args: Any) -> None:
        self._already_revoked = True
        self._beside(super()._announce_revoked, *args)

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        self._already_cancelled = True
        if emit_retry:
            self._beside(super()._announce_cancelled, emit_retry)
        else:
            super()._announce_cancelled(emit_retry)

    def _beside(self, handler: Callable[..., object], *args: Any) -> None:
        request.task_ready(self)  # in the loop, to which the lists of requests belong
        storing.do(partial(self._in_thread, partial(handler, *args)))

    def _in_thread(self, handler: Callable[[], object]) -> None:
        """Run one of Celery's handlers; what it tells RabbitMQ, tell it after that."""
        if self._given_back:
            return
        settle: list[Callable[[], object]] = []
        self._settle = settle
        try:
            handler()
        except store_errors(self.consumer) as exc:
            logger.warning("Task %s: its outcome is not stored, the store is away (%s).", self.id, exc)
            if self.acknowledged:  # nothing brings it back: it waits here
                time.sleep(PAUSE)
                storing.do(partial(self._in_thread, handler))
            else:
                self._give_back(STORE_AWAY_DELAY)
            return
        except Exception:  # in code of the task: its outcome is stored
            logger.exception("Task %s: what it does after its end has failed", self.id)
        finally:
            self._settle = None
        for tell in settle or [self.acknowledge]:
            tell()

    def acknowledge(self) -> None:
        """Acknowledge the message, in the thread in the end."""
        if self._settle is None:
            super().acknowledge()
        else:
            self._settle.append(super().acknowledge)

    def reject(self, requeue: bool = False) -> None:
        """Reject the message, in the thread in the end."""
        if self._settle is None:
            super().reject(requeue)
        else:
            self._settle.append(partial(super().reject, requeue))

    # --- Back to the queue, after a while ---

    def _give_back(self, seconds: float, retries: int | None = None) -> None:
        """Park the message for at least that long: it comes back to its queue as a new one."""
        self._given_back, due = True, datetime.now(UTC) + timedelta(seconds=seconds)
        source = lasting_queue_of(self.consumer, self.message)
        if source is None:
            super().reject(requeue=True)
            return
        headers = {"eta": due.isoformat()} | ({} if retries is None else {"retries": retries})
        queue = delay_queue(source.name, seconds, self.delivery_info["priority"])
        self.consumer.moves.move(self.message, queue, headers)
        self.acknowledged = True

    def _retry_worker_lost(self, exc: Exception, exc_info: Any) -> bool:
        """Retry a task whose process is gone, as Celery does, and by its own message: it keeps all that it had."""
        task, context, delay = self.task, self._context, retry_delay(self.task)
        if not task.acks_late:  # it must not run again
            return False
        if self.store_errors:
            task.backend.mark_as_retry(self.id, exc, exc_info.traceback, request=context)
        self._give_back(delay, context.retries + 1)
        self.send_event("task-retried", exception=repr(exc), traceback=exc_info.traceback)
        reason = Retry(exc=exc, when=delay)
        task.request_stack.push(context)
        try:
            task.on_retry(exc, self.id, self.args, self.kwargs, exc_info)
            signals.task_retry.send(sender=task, request=context, reason=reason, einfo=exc_info)
        finally:
            task.request_stack.pop()
        logger.info("Task %s[%s] retry: %s", self.task_name, self.id, reason)
        return True


# --- The command that revokes a task ---

_celerys_revoke = control._revoke


def _revoke(commands: Any, task_ids: Any, terminate: bool = False, signal: Any = None, **kwargs: Any) -> Any:
    """Revoke tasks as Celery does; the look into the store, and the mark there, beside the loop."""
    state.revoked.update(task_ids)
    found = list(control._find_requests_by_id(task_ids))
    # One that runs, or has just ended, would look to the thread like one that nobody has begun.
    if waiting := task_ids - {each.id for each in found if each in state.active_requests}:
        storing.do(partial(_celerys_revoke, commands, waiting))
    if not terminate:
        return task_ids
    for each in found:
        each.terminate(commands.consumer.pool, signal=signal)
    return control.ok(f"terminate: {', '.join(each.id for each in found) or 'tasks unknown'}")


control._revoke = _revoke
