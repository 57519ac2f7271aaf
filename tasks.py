"""The tasks of the demo, one for each kind of result.

Start a worker with ``celery -A tasks worker``.
"""

import time
from collections.abc import Sequence

from celery import Celery, Task
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.log import get_task_logger

app = Celery("tasks")
app.config_from_object("celeryconfig")
logger = get_task_logger(__name__)


@app.task
def add(x: float, y: float) -> float:
    """Return x + y: the result is a value."""
    return x + y


# throws: errors that callers expect are logged in one line, without a traceback.
@app.task(throws=(ZeroDivisionError,))
def divide(x: float, y: float) -> float:
    """Return x / y: the result may be an exception, which get() raises in the caller."""
    return x / y


# autoretry_for names the errors that go away by themselves; any other error fails the task at once.
@app.task(bind=True, autoretry_for=(ConnectionError,), retry_backoff=True, retry_jitter=False, max_retries=3)
def fetch_price(self: "Task[..., float]", product: str) -> float:  # celery-audit: ignore[CEL009], for exact delays
    """Ask a shop that does not answer the first two times: the result comes after two retries, 1 and 2 s later."""
    if self.request.retries < 2:
        raise ConnectionError(f"the shop does not answer (attempt {self.request.retries + 1})")
    return 9.5 * len(product)


# track_started: writes STARTED when the task begins. That doubles the writes of a quick task, so use it for long ones.
@app.task(bind=True, track_started=True)
def import_rows(self: "Task[..., int]", total: int) -> int:
    """Import rows, a tenth of a second each, and report how many of them are done."""
    for done in range(1, total + 1):
        time.sleep(0.1)
        self.update_state(state="PROGRESS", meta={"done": done, "total": total})
    return total


@app.task
def count_words(text: str) -> int:
    """Return the number of words in text: one part of a larger job."""
    return len(text.split())


@app.task
def total(counts: Sequence[int]) -> int:
    """Return the sum of the counts: puts the parts of a group together."""
    return sum(counts)


@app.task(track_started=True, throws=(SoftTimeLimitExceeded,))
def nap(seconds: float) -> float:
    """Sleep that long: something to revoke, or to run into a time limit."""
    time.sleep(seconds)
    return seconds


@app.task(ignore_result=True)
def log_visit(page: str) -> None:
    """Note a visit to a page: nobody wants the result, so none is stored."""
    logger.info("visit to %s", page)
