"""Tasks with a countdown or an eta: each runs in its queue, never early, and at most about a second late."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery, group
from celery.app import base as celery_base
from celery.utils.quorum_queues import detect_quorum_queues
from celery.worker.consumer import Consumer as CelerysConsumer
from kombu import Exchange

import witness
from hardening.consumer import Consumer
from hardening.delays import milliseconds
from hardening.publishing import together
from lab.servers import ROOT, Worker, wait_until
from tests.conftest import Stack
from tests.test_json_only import publish, task_message

JOBS = """
import os, signal, time
from tasks import app

@app.task(bind=True)
def where(self, *_):
    return [self.request.delivery_info["routing_key"], time.time()]

@app.task(bind=True)
def headers(self):
    return sorted(self.request.headers)

@app.task(bind=True)
def again(self, countdown):
    if not self.request.retries:
        raise self.retry(countdown=countdown)
    return where.run()

@app.task(bind=True, autoretry_for=(OSError,), default_retry_delay=.4)
def fails_once(self):
    if not self.request.retries:
        raise OSError("not yet")
    return where.run()

@app.task(bind=True)
def dies_once(self):
    if not self.request.retries:
        os.kill(os.getpid(), signal.SIGKILL)
    return where.run()
""".replace("where.run()", '[self.request.delivery_info["routing_key"], time.time()]')

BASE: Any = celery_base
LATE = 5.0  # seconds, for a slow machine; the delays themselves are powers of two of a tenth of a second


@pytest.fixture
def env(stack: Stack, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "jobs.py").write_text(JOBS)
    return {**stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


@pytest.fixture
def app(stack: Stack) -> Any:
    return stack.load("tasks").app


def test_a_retry_stays_in_its_queue(stack: Stack, env: dict[str, str], app: Any) -> None:
    """There is a worker on the default queue, too, and it does not know these tasks."""
    names = ("again", "fails_once", "dies_once")
    with (
        Worker(stack.logs / "default.log", env=stack.env) as default,
        Worker(stack.logs / "special.log", "-Q", "special", "--include", "jobs", env=env),
    ):
        results = [
            app.send_task(f"jobs.{name}", args, queue="special")
            for name, args in zip(names, [(0.4,), (), ()], strict=True)
        ]
        assert [result.get(timeout=60)[0] for result in results] == ["special"] * 3
        assert not default.says("received")


@pytest.mark.parametrize("seconds", [0.05, 0.3, 1, 2.5])
def test_it_runs_when_it_is_due(shared_stack: Stack, tasks: ModuleType, seconds: float) -> None:
    results, due = [], time.time() + seconds
    eta = datetime.fromtimestamp(due, UTC)
    results.append(tasks.nap.apply_async((0,), countdown=seconds))
    results.append(tasks.nap.apply_async((0,), eta=eta))
    results.append(tasks.nap.apply_async((0,), eta=eta.replace(tzinfo=None)))  # a naive one is UTC, as in Celery
    results.append(tasks.nap.apply_async((0,), eta=eta.astimezone(timezone(timedelta(hours=5))).isoformat()))
    started: list[float] = []
    for result in results:
        result.get(timeout=30 + seconds, on_message=lambda meta: started.append(time.time()))
    assert due <= min(started)
    assert max(started) < due + LATE
    skewed: Any = group(tasks.add.s(number, 1) for number in range(3)).skew(step=0.3)
    assert skewed.apply_async().join(timeout=30) == [1, 2, 3]


def test_one_that_is_past_runs_at_once(shared_stack: Stack, tasks: ModuleType) -> None:
    for eta in ("2001-01-01T00:00:00", "0001-01-01T00:00:00+00:00", datetime.now(UTC)):
        assert tasks.add.apply_async((1, 2), eta=eta).get(timeout=30) == 3


def test_names_that_end_alike_are_different_queues(stack: Stack, env: dict[str, str], app: Any) -> None:
    with Worker(stack.logs / "w.log", "-Q", "mail,high.mail", "--include", "jobs", env=env) as worker:
        results = {name: app.send_task("jobs.where", queue=name, countdown=0.5) for name in ("mail", "high.mail")}
        for name, result in results.items():
            assert result.get(timeout=30)[0] == name
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") >= 2, "both are logged")
        assert worker.log.read_text().count(" succeeded in ") == 2


def test_a_queue_without_a_worker_stops_nobody_else_and_keeps_its_tasks(
    stack: Stack, env: dict[str, str], app: Celery
) -> None:
    """Sixty of them stopped all others, with Celery's own delayed delivery."""
    with Worker(stack.logs / "w.log", "--include", "jobs", env=env):
        mistyped = [app.send_task("jobs.where", queue="speciall", countdown=0.5) for _ in range(60)]
        time.sleep(1)  # they become due
        assert app.send_task("jobs.where", countdown=0.5).get(timeout=30)[0] == "tasks"
        assert app.send_task("jobs.again", (0.5,)).get(timeout=30)[0] == "tasks"
    with Worker(stack.logs / "later.log", "-Q", "speciall", "--include", "jobs", env=env):
        assert {result.get(timeout=30)[0] for result in mistyped} == {"speciall"}


def test_a_queue_that_lost_its_worker_keeps_its_tasks(stack: Stack, env: dict[str, str], app: Any) -> None:
    """They are parked, and their queue is deleted. When it comes back, RabbitMQ tries again within three minutes."""
    with (
        Worker(stack.logs / "w.log", "--include", "jobs", env=env),
        witness.rabbitmq_channel(stack.broker_url) as channel,
    ):
        with Worker(stack.logs / "gone.log", "-Q", "gone", "--include", "jobs", env=env):
            for _ in range(60):
                app.send_task("jobs.where", queue="gone", countdown=8)
            wait_until(lambda: parked(stack, "gone") == 60, "parked")
        channel.queue_delete("gone")
        time.sleep(9)  # they become due
        assert app.send_task("jobs.where", countdown=0.5).get(timeout=30)[0] == "tasks"
        kept = [queue["messages"] for queue in stack.rabbitmq.queues(stack.vhost) if "gone.delay" in queue["name"]]
        assert sum(kept) == 60


def parked(stack: Stack, queue: str) -> int:
    """Count the tasks in the delay queues of a queue. The management API would tell some seconds later."""
    names = [found["name"] for found in stack.rabbitmq.queues(stack.vhost)]
    with witness.rabbitmq_channel(stack.broker_url) as channel:
        found = [channel.queue_declare(name, passive=True) for name in names if name.startswith(f"{queue}.delay.")]
    return sum(each.method.message_count for each in found)


def test_a_countdown_waits_for_the_first_worker(stack: Stack, env: dict[str, str], app: Any) -> None:
    results = [app.send_task("jobs.where", countdown=seconds, queue=queue) for seconds in (0.2, 2) for queue in "ab"]
    with Worker(stack.logs / "w.log", "-Q", "a,b", "--include", "jobs", env=env):
        assert [result.get(timeout=30)[0] for result in results] == ["a", "b", "a", "b"]


def test_a_topic_exchange_of_ones_own(stack: Stack, env: dict[str, str], tmp_path: Path, app: Any) -> None:
    """Both queues get the task, and the delay and the retry of each stay in it."""
    (tmp_path / "own.py").write_text(
        "from kombu import Exchange, Queue\n"
        "from jobs import app\n"
        "news = Exchange('news', 'topic')\n"
        "app.conf.task_queues = [\n"
        "    Queue('all', news, '#', queue_arguments={'x-queue-type': 'quorum'}),\n"
        "    Queue('uk', news, 'uk.#'),\n"  # a classic one
        "]\n"
    )
    news: Any = Exchange("news", "topic")
    with Worker(stack.logs / "w.log", app="own", env=env) as worker:
        app.send_task("jobs.again", (0.3,), exchange=news, routing_key="uk.london", countdown=0.3)
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") == 2, "both")
        log = worker.log.read_text()
        assert log.count("['all', ") == log.count("['uk', ") == 1
        assert log.count(" received") == 4


def test_a_far_off_eta_holds_no_place(stack: Stack, env: dict[str, str], app: Any) -> None:
    """Of a client that is not Celery; two of them stopped a worker. A classic queue is no exception."""
    with witness.rabbitmq_channel(stack.broker_url) as channel:
        channel.queue_declare("classic", durable=True)
        for queue in ("tasks", "classic"):
            body, headers, properties = task_message("far-off", "jobs.where")
            if queue == "tasks":
                channel.queue_declare("tasks", durable=True, arguments={"x-queue-type": "quorum"})
            for _ in range(10):
                publish(channel, queue, json.dumps(body).encode(), headers | {"eta": "2099-01-01"}, **properties)
    with Worker(stack.logs / "w.log", "--include", "jobs", env=env):
        wait_until(lambda: parked(stack, "tasks") == 10, "parked")
        assert app.send_task("jobs.where").get(timeout=30)[0] == "tasks"
        app.control.add_consumer("classic", queue_arguments={})
        wait_until(lambda: parked(stack, "classic") == 10, "parked")


def test_a_parked_task_that_is_revoked_does_not_run(stack: Stack, env: dict[str, str], app: Any) -> None:
    with Worker(stack.logs / "w.log", "--include", "jobs", env=env) as worker:
        result = app.send_task("jobs.where", countdown=3)
        wait_until(lambda: parked(stack, "tasks") == 1, "parked")
        result.revoke()
        wait_until(lambda: worker.says("Discarding revoked task"), "discarded")
        assert not worker.says("Failed to mark")
        with pytest.raises(Exception, match="revoked"):
            result.get(timeout=30)


def test_what_a_task_is_sent_with_returns_with_it(stack: Stack, env: dict[str, str], app: Any) -> None:
    """Compression, priority and headers of one's own."""
    with Worker(stack.logs / "w.log", "--include", "jobs", env=env):
        options: dict[str, Any] = {"compression": "gzip", "priority": 7, "headers": {"mine": "x" * 2000}}
        result = app.send_task("jobs.where", ["y" * 5000], countdown=20, **options)
        with witness.rabbitmq_channel(stack.broker_url) as channel:
            queue = "tasks.delay.20000ms.priority7"
            wait_until(lambda: parked(stack, "tasks"), "parked")
            _, properties, body = channel.basic_get(queue, auto_ack=True)
            assert properties
            assert properties.headers
            assert (properties.priority, properties.headers["mine"]) == (7, "x" * 2000)
            assert len(body) < 500
            del properties.headers["eta"]
            channel.basic_publish("", "tasks", body, properties)
        assert result.get(timeout=30)[0] == "tasks"


def test_a_task_sees_the_headers_of_its_client_alone(stack: Stack, env: dict[str, str], app: Any) -> None:
    """It hands them on to its retry, and RabbitMQ's x-death holds a date, which is no JSON."""
    with Worker(stack.logs / "w.log", "--include", "jobs", env=env):
        at_once, later = (app.send_task("jobs.headers", countdown=seconds, headers={"mine": 1}) for seconds in (0, 0.3))
        assert later.get(timeout=60) == at_once.get(timeout=60)


def test_many_at_once_are_parked_and_return_in_time(stack: Stack, env: dict[str, str], app: Any) -> None:
    with Worker(stack.logs / "w.log", "--include", "jobs", env=env):
        due = time.time() + 4
        results = [app.send_task("jobs.where", countdown=4) for _ in range(200)]
        ran = [result.get(timeout=60)[1] for result in results]
        assert min(ran) >= due
        wait_until(lambda: parked(stack, "tasks") == 0, "no copy is left")


@pytest.mark.parametrize(
    ("seconds", "expected"),
    {-1: 100, 0.01: 100, 0.25: 300, 0.999: 1000, 1: 1000, 2.2: 2500, 60: 60_000, 100: 96_000, 3600: 3_584_000}.items(),
)
def test_the_delays(seconds: float, expected: int) -> None:
    assert milliseconds(seconds) == expected


def test_a_delay_up_to_a_minute_needs_no_worker(stack: Stack, env: dict[str, str], app: Any) -> None:
    """The client parks it, and RabbitMQ alone puts it into its queue, from which no worker takes it yet."""
    app.send_task("jobs.where", countdown=0.7)
    with together():
        app.send_task("jobs.where", countdown=0.7)
    assert parked(stack, "tasks") == 2
    with witness.rabbitmq_channel(stack.broker_url) as channel:
        wait_until(lambda: channel.queue_declare("tasks", passive=True).method.message_count == 2, "due")
    with Worker(stack.logs / "w.log", "--include", "jobs", env=env) as worker:
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") == 2, "run")


# --- Queues of one's own ----------------------------------------------------------------------------------


def test_queues_of_ones_own(stack: Stack, env: dict[str, str], tmp_path: Path, app: Any) -> None:
    """A classic one, and a limit that the pool does not know, are named once; priorities work by themselves."""
    (tmp_path / "own.py").write_text(
        "from kombu import Queue\n"
        "from jobs import app, where\n"
        "app.conf.task_queues = [Queue('mail', queue_arguments={'x-queue-type': 'quorum'}), Queue('old')]\n"
        "where.soft_time_limit = 3\n"
    )
    for priority in (1, 9, 5):
        app.send_task("jobs.where", queue="mail", priority=priority)
    with Worker(stack.logs / "w.log", "-P", "solo", app="own", env=env) as worker:
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") == 3, "they ran")
        for queue in ("mail", "old"):
            app.amqp.queues.create_missing_queue_type = "quorum" if queue == "mail" else "classic"
            assert app.send_task("jobs.where", queue=queue, countdown=0.3).get(timeout=30)[0] == queue
        log = worker.log.read_text()
        assert log.count("These queues are classic: old. ") == 1
        assert log.count("These limits have no effect in this pool (solo): soft_time_limit of jobs.where.") == 1


def test_a_quorum_queue_refuses_a_maximum_for_its_priorities(stack: Stack) -> None:
    """And serves the highest one first without it."""
    quorum = {"x-queue-type": "quorum"}
    with witness.rabbitmq_channel(stack.broker_url) as channel:
        channel.queue_declare("mail", durable=True, arguments=quorum)
        channel.confirm_delivery()
        for priority in (1, 9, 5):
            publish(channel, "mail", str(priority).encode(), {}, priority=priority)
        assert [channel.basic_get("mail", auto_ack=True)[2] for _ in range(3)] == [b"9", b"5", b"1"]
    with (
        pytest.raises(witness.ServerError, match="PRECONDITION_FAILED"),
        witness.rabbitmq_channel(stack.broker_url) as channel,
    ):
        channel.queue_declare("other", durable=True, arguments={**quorum, "x-max-priority": 10})


# --- The parts of Celery that it changes ------------------------------------------------------------------


def test_celerys_own_delayed_delivery_is_off_for_apps_with_our_worker_alone(app: Any) -> None:
    assert BASE.detect_quorum_queues(app, "amqp") == (False, "")
    assert detect_quorum_queues(app, "amqp") == (True, "tasks")  # the worker asks for its prefetch
    other = Celery(set_as_current=False)
    other.conf.update(task_default_queue="other", task_default_queue_type="quorum")
    assert BASE.detect_quorum_queues(other, "amqp") == (True, "other")


def test_the_steps_are_celerys_without_one() -> None:
    ours, theirs = Consumer.Blueprint.default_steps, CelerysConsumer.Blueprint.default_steps
    assert [step for step in theirs if step not in ours] == ["celery.worker.consumer.delayed_delivery:DelayedDelivery"]


def queue_names(stack: Stack) -> Iterator[str]:
    """Return the names of the queues in RabbitMQ."""
    return (queue["name"] for queue in stack.rabbitmq.queues(stack.vhost))


def test_nothing_of_celerys_is_declared(shared_stack: Stack, tasks: ModuleType) -> None:
    tasks.add.apply_async((1, 2), countdown=1).get(timeout=30)
    assert not [name for name in queue_names(shared_stack) if name.startswith("celery_delayed")]
