"""The app of the benchmark: our settings, Celery's own, or ours with one of them taken back.

BENCHMARK_SETTINGS names which: "ours", "default" or a key of PRICES. lab/benchmark.py sets it.
"""

import os
from collections.abc import Sequence
from typing import Any

from celery import Celery

OURS, DEFAULT = "ours", "default"  # celeryconfig.py, and an app in which only the two URLs are set
STOCK = os.environ.get("REDIS_URL") if os.environ.get("RESULT_STORE") == "redis" else "rpc://"

NOT_CONFIRMED: dict[str, Any] = {"broker_transport_options": {"confirm_publish": False}}
CLASSIC = {"task_default_queue_type": "classic", "task_create_missing_queue_type": "classic"}
PRICES: dict[str, dict[str, Any]] = {  # what is put back to Celery's default, while all other settings stay
    "publishing is not confirmed": NOT_CONFIRMED,
    "classic queue, not quorum": CLASSIC,
    "neither confirmed nor quorum": {**NOT_CONFIRMED, **CLASSIC},
    "acknowledged before it runs": {
        "task_acks_late": False,
        "task_reject_on_worker_lost": None,
        "task_retry_on_worker_lost": False,
    },
    "prefetch 4, not 1": {"worker_prefetch_multiplier": 4},
    "result without name and arguments": {"result_extended": False},
    "no time-outs for Redis": {
        "redis_socket_timeout": 120.0,
        "redis_socket_connect_timeout": None,
        "redis_socket_keepalive": False,
    },
    "results in memory only": {"result_persistent": False},
    "Celery's own redis:// or rpc://": {"result_backend": STOCK},
    "with events, for Flower": {"worker_send_task_events": True},
}
ONLY = {"no time-outs for Redis": "redis", "results in memory only": "rabbitmq"}


def kinds(store: str) -> list[str]:
    """Return the kinds of settings that are measured with a store."""
    return [OURS, DEFAULT, *(name for name in PRICES if ONLY.get(name, store) == store)]


def change(app: Celery, settings: dict[str, Any]) -> None:
    """Change settings of celeryconfig.py; of those that are dictionaries, only the members that are named."""
    for name, value in settings.items():
        app.conf[name] = {**app.conf[name], **value} if isinstance(value, dict) else value


kind = os.environ.get("BENCHMARK_SETTINGS", OURS)
if kind == DEFAULT:
    app = Celery("benchmark", broker=os.environ["RABBITMQ_URL"], backend=STOCK)
else:
    app = Celery("benchmark")
    app.config_from_object("celeryconfig")
    change(app, PRICES.get(kind, {}))


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
