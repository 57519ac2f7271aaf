"""The tasks of the fault run. Every execution leaves a line in the worker's log, so that they can be counted."""

import os
import signal
import time
from collections.abc import Sequence

from celery import Task
from celery.utils.log import get_task_logger

from tasks import app as app

logger = get_task_logger(__name__)

if expires := os.environ.get("RESULT_EXPIRES"):
    app.conf.result_expires = int(expires)


@app.task(bind=True)
def work(self: "Task[..., int]", number: int, seconds: float = 0.0) -> int:
    """Take that many seconds, and return the number."""
    logger.info("executed %s", self.request.id)
    time.sleep(seconds)
    return number


@app.task(bind=True)
def add_up(self: "Task[..., int]", numbers: Sequence[int]) -> int:
    """Return the sum: the end of a chord."""
    logger.info("executed %s", self.request.id)
    return sum(numbers)


@app.task(max_retries=1)
def poison() -> None:
    """Kill the worker's process each time."""
    os.kill(os.getpid(), signal.SIGKILL)
