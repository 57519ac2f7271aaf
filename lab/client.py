"""Another process: it queues a task and exits, or asks for a result by its id, or both.

It knows tasks.py, as every client does, and nothing of lab/compare_tasks.py.

  python -m lab.client queue tasks.nap '[1]'    prints the task's id
  python -m lab.client ask ID 5                 prints the result, if it comes within 5 seconds
  python -m lab.client call tasks.add '[2, 3]'  queues the task and prints its result
"""

import json
import re
import sys
from collections.abc import Callable
from typing import Any

from celery.exceptions import TimeoutError as ResultTimeout

from tasks import app

TIMEOUT = 120.0  # seconds; what takes longer could not be observed
PATIENCE = 2.0  # seconds; a result that is stored already, and does not come by then, never comes


def describe(exc: BaseException) -> str:
    """Return an exception with the module to import it from, without the ids that differ from run to run."""
    module = type(exc).__module__
    name = type(exc).__name__ if module == "builtins" else f"{module}.{type(exc).__name__}"
    message = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", str(exc)).partition("\n")[0]
    return f"`{name}: {message}`"


def seen(call: Callable[[], object]) -> str:
    """Return what a call returns or raises. A result that is not there in time is no observation: that is raised."""
    try:
        return str(call())
    except ResultTimeout:
        raise
    except Exception as exc:  # whatever it is, it is what was seen
        return describe(exc)


def read(result: Any, patience: float = PATIENCE) -> str:
    """Return what get() returns or raises, or that nothing comes."""
    try:
        return seen(lambda: result.get(timeout=patience))
    except ResultTimeout as exc:
        return f"{result.state} for ever, {describe(exc)}"


def main(action: str, target: str, detail: str) -> None:
    """Do one of the three actions."""
    if action == "ask":
        print(read(app.AsyncResult(target), float(detail)))
        return
    result = app.send_task(target, json.loads(detail))
    print(result.id if action == "queue" else seen(lambda: result.get(timeout=TIMEOUT)))


if __name__ == "__main__":
    main(*sys.argv[1:])
