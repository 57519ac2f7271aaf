"""The worker says whether it consumes, and refuses to start with a wrong password.

What Celery lacks: a health check that costs nothing. celery inspect ping starts a process, and says that the worker
answers, not that it consumes. A worker with a wrong password tries again for ever, with a traceback each time.
What this does: the worker touches the file that WORKER_READY_FILE names, and ends with one line if it is refused.
To go back: leave out worker_consumer, as delays.py says. For Celery 5.7.
"""

import os
from pathlib import Path
from typing import Any, NoReturn

import amqp
from celery import Celery, bootsteps

# Compose sets it and looks at the file's age; nothing is written without it.
READY_FILE = os.environ.get("WORKER_READY_FILE")
TOUCH_INTERVAL = 0.5  # seconds


def refuse_wrong_passwords(app: Celery) -> None:
    """End the worker with one line when a server refuses it. A server that is down is waited for, as Celery does."""
    with app.connection_for_read() as connection:
        where = f"RabbitMQ at {connection.hostname}:{connection.port}"
        user, vhost = connection.userid, connection.virtual_host
        try:
            connection.connect()
        except amqp.AccessRefused:
            _refuse(
                f"{where} refuses the user {user!r} or its password. Check RABBITMQ_URL and RABBITMQ_PASSWORD. "
                "RabbitMQ keeps the password of its first start: rabbitmqctl change_password changes it."
            )
        except amqp.NotAllowed:
            _refuse(
                f"{where} has no virtual host {vhost!r}, or {user!r} has no right to use it. "
                "Check the end of RABBITMQ_URL."
            )
        except connection.connection_errors:
            pass
    if reason := app.backend.refusal() if hasattr(app.backend, "refusal") else None:
        _refuse(reason)


def _refuse(reason: str) -> NoReturn:
    raise SystemExit(f"worker: {reason}")


class Readiness(bootsteps.StartStopStep):
    """Touches READY_FILE from the worker's event loop for as long as it consumes from a task queue.

    A lost connection, a cancelled consumer and a loop that hangs all let the file grow old; once the worker
    consumes again it is touched again. No process is started and no message is sent for it.
    """

    requires = ("celery.worker.consumer.tasks:Tasks",)
    timer: Any = None

    def start(self, consumer: Any) -> None:
        """Begin with each connection to RabbitMQ."""
        if READY_FILE:
            self.timer = consumer.timer.call_repeatedly(TOUCH_INTERVAL, self.touch, (consumer, Path(READY_FILE)))

    def stop(self, consumer: Any) -> None:
        """End with the connection."""
        if self.timer:
            self.timer.cancel()

    @staticmethod
    def touch(consumer: Any, ready_file: Path) -> None:
        """Touch the file if RabbitMQ sends tasks to this worker."""
        tasks = consumer.task_consumer
        if tasks and any(tasks.consuming_from(queue) for queue in tasks.queues):
            ready_file.touch()
