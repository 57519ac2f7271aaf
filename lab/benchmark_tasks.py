"""The app of the benchmark: our settings, Celery's own, or ours with one of them taken back.

BENCHMARK_SETTINGS names which: "ours", "default", "bulk" or a key of PRICES. lab/benchmark.py sets it.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import Celery

OURS, DEFAULT = "ours", "default"  # celeryconfig.py, and an app in which only the two URLs are set
BULK = "bulk"  # ours for the results, but what is quick for the tasks, so that 40,000 of them fit into the time
BOTH = ("redis", "rabbitmq")
STOCK = os.environ.get("REDIS_URL") if os.environ.get("RESULT_STORE") == "redis" else "rpc://"


@dataclass(frozen=True)
class Price:
    """A setting whose price is measured: it is put back to Celery's default, and all others stay."""

    settings: dict[str, Any]
    stores: tuple[str, ...] = BOTH
    worker_options: tuple[str, ...] = field(default=())


NOT_CONFIRMED: dict[str, Any] = {"broker_transport_options": {"confirm_publish": False}}
CLASSIC = {"task_default_queue_type": "classic", "task_create_missing_queue_type": "classic"}
PRICES = {
    "publishing is not confirmed": Price(NOT_CONFIRMED),
    "classic queue, not quorum": Price(CLASSIC),
    "neither confirmed nor quorum": Price({**NOT_CONFIRMED, **CLASSIC}),
    "acknowledged before it runs": Price(
        {"task_acks_late": False, "task_reject_on_worker_lost": None, "task_retry_on_worker_lost": False}
    ),
    "prefetch 4, not 1": Price({"worker_prefetch_multiplier": 4}),
    "result without name and arguments": Price({"result_extended": False}),
    "no retries, no time-outs for Redis": Price(
        {
            "redis_socket_timeout": 120.0,
            "redis_socket_connect_timeout": None,
            "redis_socket_keepalive": False,
        },
        ("redis",),
    ),
    "results in memory only": Price({"result_persistent": False}, ("rabbitmq",)),
    "Celery's own redis:// or rpc://": Price({"result_backend": STOCK}),
    "with events, for Flower": Price({}, worker_options=("--task-events",)),
}


def change(app: Celery, settings: str) -> None:
    """Take back settings of celeryconfig.py; of those that are dictionaries, only the members that are named."""
    fast = {**NOT_CONFIRMED, **CLASSIC, "worker_prefetch_multiplier": 32}
    for name, value in (fast if settings == BULK else PRICES[settings].settings).items():
        app.conf[name] = {**app.conf[name], **value} if isinstance(value, dict) else value
    app.conf.task_default_queue = f"tasks, but {settings}"  # one queue cannot be of two types


settings = os.environ.get("BENCHMARK_SETTINGS", OURS)
if settings == DEFAULT:
    app = Celery("benchmark", broker=os.environ["RABBITMQ_URL"], backend=STOCK)
else:
    app = Celery("benchmark")
    app.config_from_object("celeryconfig")
    if settings != OURS:
        change(app, settings)


@app.task
def add(x: float, y: float) -> float:
    """Return x + y: next to no work, so that the rest is what costs."""
    return x + y


@app.task
def total(numbers: Sequence[float]) -> float:
    """Return the sum: the body of a chord."""
    return sum(numbers)


@app.task
def document(size: int) -> str:
    """Return a text of that many characters."""
    return "x" * size


@app.task
def wait(seconds: float) -> None:
    """Wait that long, as for a database or another service."""
    time.sleep(seconds)


@app.task
def compute(seconds: float) -> None:
    """Use so much time of a processor."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
