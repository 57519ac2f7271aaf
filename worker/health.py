"""The worker's health: refuse to start with a wrong password, and say whether it consumes.

tasks.py includes this module, so every worker loads it.
"""

import os
from pathlib import Path
from typing import Any

from celery import Celery, bootsteps, current_app, signals
from celery.backends.base import BaseKeyValueStoreBackend

import witness
from celeryconfig import service_url

# Compose sets it and looks at the file's age; nothing is written without it.
READY_FILE = os.environ.get("WORKER_READY_FILE")
TOUCH_INTERVAL = 0.5  # seconds


@signals.worker_init.connect
def refuse_wrong_passwords(sender: Any, **_: Any) -> None:
    """End the worker with one line when a server refuses it. A server that is down is waited for, as Celery does."""
    app: Celery = sender.app
    try:
        with witness.rabbitmq_channel(app.conf.broker_url):
            pass
        if isinstance(app.backend, BaseKeyValueStoreBackend):
            with witness.redis_client(service_url("REDIS")):
                pass
    except witness.Unreachable:
        pass
    except witness.Refused as exc:
        raise SystemExit(f"worker: {exc}") from None


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


current_app.steps["consumer"].add(Readiness)
