"""The tasks of the fault run. Every execution leaves a line in the worker's log, so that they can be counted."""

import os
import signal
import time
from collections.abc import Sequence

from celery import Task
from celery.utils.log import get_task_logger

from tasks import app

logger = get_task_logger(__name__)
EXECUTED = "executed"  # the line says this and the task's id


@app.task(bind=True)
def work(self: "Task[..., int]", number: int, seconds: float) -> int:
    """Take that many seconds, and return the number."""
    logger.info("%s %s", EXECUTED, self.request.id)
    time.sleep(seconds)
    return number


@app.task(bind=True)
def add_up(self: "Task[..., int]", numbers: Sequence[int]) -> int:
    """Return the sum: the end of a chord."""
    logger.info("%s %s", EXECUTED, self.request.id)
    return sum(numbers)


@app.task(max_retries=1)
def poison() -> None:
    """Kill the worker's process each time."""
    os.kill(os.getpid(), signal.SIGKILL)
