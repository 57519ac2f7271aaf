"""The tasks that tasks.py has no use for: the worker of an experiment loads them with ``--include lab.more_tasks``."""

import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from celery import Task
from celery.utils.log import get_task_logger

from tasks import add
from tasks import app as app

logger = get_task_logger(__name__)

if expires := os.environ.get("RESULT_EXPIRES"):
    app.conf.result_expires = int(expires)


# --- For the fault run, which counts the lines that each execution leaves in the worker's log --------------


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


# --- For the comparison -----------------------------------------------------------------------------------


class OutOfStock(Exception):
    """A custom exception that survives JSON: super().__init__ gets exactly the constructor's arguments."""

    def __init__(self, product: str, left: int) -> None:
        super().__init__(product, left)
        self.product, self.left = product, left

    def __str__(self) -> str:
        """Say how many are left."""
        return f"only {self.left} of {self.product} left"


@app.task(throws=(OutOfStock,))
def order(product: str, count: int) -> int:
    """Order more than there is: the result is an exception of the project's own."""
    if count > 2:
        raise OutOfStock(product, 2)
    return count


@app.task(bind=True)
def add_by_another(self: "Task[..., Any]", x: float, y: float) -> Any:
    """Hand over to another task, whose result becomes the result of this one."""
    return self.replace(add.s(x, y))
