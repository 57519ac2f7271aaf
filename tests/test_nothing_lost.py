"""Workers, connections and pool processes are broken while tasks run; every accepted result arrives."""

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import celery
import pytest
from amqp.channel import Channel
from celery.exceptions import TimeoutError as ResultTimeout

import witness
from lab.servers import ROOT, Worker, wait_until
from tests.conftest import Stack
from tests.proxy import Proxy


def _fetch(results: list[Any], timeout: float = 90.0) -> list[object]:
    """Fetch all results as a client does that carries on after an error."""
    deadline = time.monotonic() + timeout
    fetched = []
    for result in results:
        while True:
            try:
                fetched.append(result.get(timeout=5))
                break
            except Exception:
                if time.monotonic() > deadline:
                    raise
    return fetched


def _close_connections(stack: Stack) -> int:
    """Close every AMQP connection to the virtual host, as a failing network would, and count them."""
    closed = 0
    for connection in stack.rabbitmq.request("GET", f"vhosts/{stack.vhost}/connections"):
        with suppress(HTTPError):  # it is gone already
            stack.rabbitmq.request("DELETE", f"connections/{quote(connection['name'])}")
            closed += 1
    return closed


@pytest.fixture
def loaded(stack: Stack) -> ModuleType:
    return stack.load("tasks")


@pytest.mark.parametrize("down", [0.0, 4.0])
def test_a_client_waits_on_while_its_server_is_away(
    stack: Stack, down: float, caplog: pytest.LogCaptureFixture
) -> None:
    """The client, but not the worker, loses the server that its results come from, for so many seconds."""
    with (
        Proxy(stack.broker_url) as mq,
        Proxy(stack.redis_url) as redis,
        Worker(stack.logs / "w.log", env=stack.env),
        ThreadPoolExecutor(1) as client,
    ):
        tasks = replace(stack, broker_url=mq.url(), redis_url=redis.url()).load("tasks")

        queued = threading.Event()

        def queue_and_fetch() -> list[object]:
            tasks.add.delay(1, 1).get(timeout=30)  # it has a consumer from here on
            results = [tasks.nap.delay(1 + down) for _ in range(4)] + [tasks.add.delay(1, n) for n in range(20)]
            queued.set()
            return _fetch(results)

        waiting = client.submit(queue_and_fetch)
        assert queued.wait(30)
        server = redis if stack.store == "redis" else mq
        server.cut()
        time.sleep(down)  # this is how long it is down
        server.restore()
        assert waiting.result(90) == [1 + down] * 4 + list(range(1, 21))
    if stack.store == "rabbitmq":
        assert "RabbitMQ is away" in caplog.text


def test_get_ends_when_rabbitmq_does_not_answer(rabbitmq_stack: Stack) -> None:
    """So a cluster does while the node with the reply queue is away."""
    with Proxy(rabbitmq_stack.broker_url) as mq, Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env):
        tasks = replace(rabbitmq_stack, broker_url=mq.url()).load("tasks")
        result = tasks.add.delay(1, 1)
        mq.lose_once(tasks.app.thread_oid.encode())  # the declaration of the reply queue
        started = time.monotonic()
        with pytest.raises(ResultTimeout):
            result.get(timeout=1)
        assert time.monotonic() - started < 20
        assert mq.cut_at is None
        assert result.get(timeout=30) == 2


def test_a_worker_goes_on_when_redis_was_away(redis_stack: Stack) -> None:
    """Results that are ready while Redis is down are written when it is back."""
    with Proxy(redis_stack.redis_url) as redis:
        away = replace(redis_stack, redis_url=redis.url())
        with Worker(redis_stack.logs / "w.log", env=away.env) as worker:
            tasks = redis_stack.load("tasks")
            results = [tasks.nap.delay(1) for _ in range(6)]
            wait_until(lambda: worker.says(" succeeded in "), "a first result")
            redis.cut()
            wait_until(lambda: worker.says("Redis is away"), "the worker noticed")
            time.sleep(8)  # longer than redis-py itself tries
            redis.restore()
            assert _fetch(results) == [1] * 6


@pytest.mark.slow
def test_a_worker_goes_on_when_rabbitmq_was_away(rabbitmq_stack: Stack) -> None:
    """A result that is ready while RabbitMQ is down is sent when it is back; Celery's rpc:// tries for 20 seconds."""
    with (
        Proxy(rabbitmq_stack.broker_url) as mq,
        Worker(rabbitmq_stack.logs / "w.log", env=replace(rabbitmq_stack, broker_url=mq.url()).env) as worker,
    ):
        tasks = rabbitmq_stack.load("tasks")
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
        result = tasks.nap.delay(2)
        wait_until(lambda: worker.says(result.id), "task received")
        mq.cut()
        time.sleep(26)
        mq.restore()
        assert result.get(timeout=60) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_chord_ends_although_redis_went_away_while_its_last_part_was_counted(redis_stack: Stack, when: str) -> None:
    """Before Redis counts it, or after it did and before the worker knows: Celery does not try again."""
    with (
        Proxy(redis_stack.redis_url) as redis,
        Worker(redis_stack.logs / "w.log", env=replace(redis_stack, redis_url=redis.url()).env) as worker,
    ):
        tasks = redis_stack.load("tasks")
        assert celery.chord([tasks.add.s(1, 1), tasks.add.s(2, 2)])(tasks.total.s()).get(timeout=30) == 6
        parts = [tasks.add.s(1, 1), tasks.nap.s(2)]
        result: Any = celery.chord(parts)(tasks.total.s())
        first, last = result.parent.results
        wait_until(lambda: (first.state, last.state) == ("SUCCESS", "STARTED"), "the last part runs")
        redis.cut_once(b".j\r\n", when)  # the key in which parts are counted
        wait_until(lambda: worker.says("Redis is away"), "the worker noticed")
        redis.restore()
        assert result.get(timeout=60) == 4


@pytest.mark.parametrize("seconds", [0.0, 8.0])
def test_one_get_waits_through_an_absence_of_redis(redis_stack: Stack, seconds: float) -> None:
    """The client, but not the worker, loses Redis; meanwhile the result comes. Celery's own consumer stays deaf."""
    with (
        Proxy(redis_stack.redis_url) as redis,
        Worker(redis_stack.logs / "w.log", env=redis_stack.env),
        ThreadPoolExecutor(1) as client,
    ):
        tasks = replace(redis_stack, redis_url=redis.url()).load("tasks")
        in_one_call = client.submit(lambda: tasks.nap.delay(2).get(timeout=60))
        wait_until(lambda: redis.open, "connected")
        wait_until(lambda: tasks.app.backend.client.ping(), "and subscribed")
        redis.cut()
        time.sleep(seconds)
        redis.restore()
        assert in_one_call.result(60) == 2


def test_a_task_is_queued_while_redis_is_away(redis_stack: Stack) -> None:
    """It needs RabbitMQ alone, and its result is fetched once Redis is back. With Celery's own, delay() fails."""
    with Proxy(redis_stack.redis_url) as redis:
        away = replace(redis_stack, redis_url=redis.url())
        with Worker(redis_stack.logs / "w.log", env=away.env):
            redis.cut()
            tasks = away.load("tasks")
            results = [tasks.add.delay(number, 1) for number in range(4)]
            with pytest.raises(ResultTimeout):
                results[0].get(timeout=1)
            redis.restore()
            assert _fetch(results) == [1, 2, 3, 4]


def test_on_message_hears_where_a_task_is_that_runs_already(redis_stack: Stack) -> None:
    """What was announced before get() is past: the state of that moment comes first, then each later one."""
    tasks = redis_stack.load("tasks")
    reports: list[dict[str, Any]] = []
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env):
        result = tasks.nap.delay(1)
        wait_until(lambda: result.state == "STARTED", "it runs")
        assert result.get(timeout=30, on_message=reports.append) == 1
    assert [report["status"] for report in reports] == ["STARTED", "SUCCESS"]


@pytest.mark.alone
def test_a_full_redis_loses_no_result(redis_stack: Stack) -> None:
    """Redis refuses to write (maxmemory) until there is room: the worker waits for it."""
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env) as worker, redis_stack.redis_admin() as redis:
        tasks = redis_stack.load("tasks")
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
        limit = redis.config_get("maxmemory")["maxmemory"]
        redis.config_set("maxmemory", 1)
        try:
            results = [tasks.add.delay(number, 1) for number in range(4)]
            wait_until(lambda: worker.says("OutOfMemoryError"), "the worker noticed")
        finally:
            redis.config_set("maxmemory", limit)
        assert _fetch(results) == [1, 2, 3, 4]


def test_get_times_out_while_its_server_is_away(stack: Stack) -> None:
    """It raises the one error that a client expects, and the next get() fetches the result."""
    with (
        Proxy(stack.broker_url) as mq,
        Proxy(stack.redis_url) as redis,
        Worker(stack.logs / "w.log", env=stack.env),
    ):
        tasks = replace(stack, broker_url=mq.url(), redis_url=redis.url()).load("tasks")
        result = tasks.add.delay(1, 2)
        server = redis if stack.store == "redis" else mq
        server.cut()
        with pytest.raises(ResultTimeout, match=r"The operation timed out\."):
            result.get(timeout=1)
        server.restore()
        assert result.get(timeout=30) == 3


def test_results_that_were_read_leave_the_client(stack: Stack, loaded: ModuleType) -> None:
    with Worker(stack.logs / "w.log", env=stack.env) as worker:
        results = [loaded.add.delay(number, 1) for number in range(50)]
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") == 50, "all done")
        assert _fetch(results) == list(range(1, 51))
        assert loaded.nap.delay(1).get(timeout=30) == 1  # it waits, and takes in what has arrived
        assert len(loaded.app.backend._pending_messages) <= 1


def test_results_that_nobody_reads_leave_the_client_when_they_expire(rabbitmq_stack: Stack) -> None:
    tasks = rabbitmq_stack.load("tasks")
    unread = tasks.app.backend._pending_messages
    with Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env) as worker:
        for number in range(20):
            tasks.add.delay(number, 1)
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") == 20, "all done")
        assert tasks.nap.delay(1).get(timeout=30) == 1  # it waits, and takes in what has arrived
        assert len(unread) == 20
        unread.expires = 1.0
        time.sleep(1)  # they expire
        tasks.add.delay(1, 1)
        assert tasks.nap.delay(1).get(timeout=30) == 1
        assert len(unread) == 1


def test_an_error_in_on_message_leaves_the_result_to_the_next_get(stack: Stack, loaded: ModuleType) -> None:
    def fail(meta: dict[str, object]) -> None:
        raise RuntimeError("in the caller's own code")

    def queue_and_fetch() -> object:
        result = loaded.add.delay(1, 2)
        with pytest.raises(RuntimeError, match="in the caller's own code"):
            result.get(timeout=60, on_message=fail)
        return result.get(timeout=60)

    def listens() -> bool:
        """Tell whether the client waits for its result: what has arrived before needs no message."""
        if stack.store == "rabbitmq":
            names = [queue["name"] for queue in stack.rabbitmq.queues(stack.vhost)]
            return any(witness.count_consumers(stack.broker_url, name) for name in names)
        with stack.redis_admin() as redis:
            return bool(redis.pubsub_channels("celery-demo:celery-task-meta-*"))

    with ThreadPoolExecutor(1) as client:
        fetched = client.submit(queue_and_fetch)
        wait_until(listens, "the client listens")
        with Worker(stack.logs / "w.log", env=stack.env):
            assert fetched.result(90) == 3


def test_the_reply_queue_is_declared_when_it_may_be_gone_and_not_with_each_call(
    rabbitmq_stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Celery declares it with each call, which costs a round trip. Here: once a second, and on each connection."""
    tasks = rabbitmq_stack.load("tasks")
    declared: list[str] = []
    declare = Channel.queue_declare

    def count(channel: Any, queue: str, *args: Any, **options: Any) -> Any:
        declared.append(queue)
        return declare(channel, queue, *args, **options)

    monkeypatch.setattr(Channel, "queue_declare", count)
    started = time.monotonic()
    results = [tasks.add.delay(number, 1) for number in range(200)]
    seconds = time.monotonic() - started
    reply_queue = tasks.app.thread_oid
    assert 1 <= declared.count(reply_queue) <= seconds + 2
    with Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env):
        assert _fetch(results) == list(range(1, 201))

        # Removed, as RabbitMQ does after result_expires, while this thread did nothing else than queue.
        tasks.app.backend.result_consumer.stop()
        tasks.app.backend.result_consumer.on_after_fork()
        with tasks.app.connection_for_write() as connection:
            connection.default_channel.queue_delete(reply_queue)
        time.sleep(1.1)
        assert tasks.add.delay(1, 1).get(timeout=10) == 2

        # And on a new connection at once.
        before = declared.count(reply_queue)
        with tasks.app.connection_for_write() as connection:
            assert tasks.add.apply_async((1, 1), connection=connection).get(timeout=30) == 2
        assert declared.count(reply_queue) == before + 1


def test_connections_of_worker_and_client_break(stack: Stack, loaded: ModuleType) -> None:
    with Worker(stack.logs / "w.log", env=stack.env) as worker:
        # The management API lists a connection some seconds after it was opened.
        results = [loaded.import_rows.delay(30) for _ in range(4)] + [loaded.add.delay(1, n) for n in range(50)]
        wait_until(lambda: worker.says(" received"), "task received")
        wait_until(lambda: _close_connections(stack) >= 2, "connections closed")
        wait_until(lambda: worker.says("onnection to broker lost"), "loss noticed by the worker")
        assert _fetch(results) == [30] * 4 + list(range(1, 51))


def test_connections_to_redis_are_killed(redis_stack: Stack) -> None:
    """Those of the worker, and the client's two: one that asks, and one that hears announcements."""
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env) as worker, redis_stack.redis_admin() as redis:
        tasks = redis_stack.load("tasks")
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
        results = [tasks.import_rows.delay(20) for _ in range(4)] + [tasks.add.delay(1, n) for n in range(50)]
        wait_until(lambda: worker.says(" received"), "task received")
        own = redis.client_info()
        killed = [
            redis.client_kill_filter(_id=client["id"])
            for client in redis.client_list()
            if client["db"] == str(own["db"]) and client["id"] != str(own["id"])
        ]
        assert sum(killed) >= 3
        assert _fetch(results) == [20] * 4 + list(range(1, 51))


def test_a_worker_is_killed_and_another_one_finishes(stack: Stack, loaded: ModuleType) -> None:
    with Worker(stack.logs / "first.log", env=stack.env) as first:
        results = [loaded.import_rows.delay(2) for _ in range(10)]
        wait_until(lambda: first.says(" received"), "task received")
        first.kill()
    with Worker(stack.logs / "second.log", env=stack.env):
        assert _fetch(results) == [2] * 10


def test_sigterm_lets_running_tasks_finish(stack: Stack, loaded: ModuleType) -> None:
    with Worker(stack.logs / "first.log", env=stack.env) as first:
        result = loaded.nap.delay(2)
        waiting = [loaded.nap.delay(1) for _ in range(4)]
        wait_until(lambda: result.state == "STARTED", "the task runs")  # one that does not run yet is put back
        assert first.stop() == 0
    assert result.get(timeout=5) == 2  # no worker runs any more: it was finished before the exit
    with Worker(stack.logs / "second.log", env=stack.env):
        assert _fetch(waiting) == [1] * 4


def test_a_soft_shutdown_puts_the_task_back(stack: Stack, loaded: ModuleType) -> None:
    """SIGQUIT, or SIGTERM with REMAP_SIGTERM=SIGQUIT: out after worker_soft_shutdown_timeout, the task unfinished."""
    with Worker(stack.logs / "first.log", env={**stack.env, "REMAP_SIGTERM": "SIGQUIT"}) as first:
        result = loaded.nap.delay(20)
        wait_until(lambda: result.state == "STARTED", "the task runs")
        first.stop()
        assert not first.says(" succeeded in ")
    with Worker(stack.logs / "second.log", env=stack.env):
        assert result.get(timeout=60) == 20


def test_a_killed_pool_process_costs_one_retry(stack: Stack, loaded: ModuleType) -> None:
    with Worker(stack.logs / "w.log", env=stack.env):
        result = loaded.nap.delay(2)
        killed: list[int] = []

        def kill_once(meta: dict[str, Any]) -> None:
            if meta["status"] == "STARTED" and not killed:
                killed.append(meta["result"]["pid"])
                os.kill(killed[0], signal.SIGKILL)

        assert result.get(timeout=60, on_message=kill_once) == 2
        assert killed
        assert result.retries == 1


def test_a_poison_task_ends_as_a_failure_and_the_others_run_on(stack: Stack, tmp_path: Path) -> None:
    """A task that kills its process each time is retried max_retries times, then fails for good."""
    (tmp_path / "poison.py").write_text(
        "import os, signal\n"
        "from tasks import app\n"
        "@app.task(max_retries=1)\n"
        "def poison():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Worker(stack.logs / "w.log", "--include", "poison", env=env):
        tasks = stack.load("tasks")
        poison = tasks.app.send_task("poison.poison")
        others = [tasks.add.delay(number, 1) for number in range(20)]
        assert _fetch(others) == list(range(1, 21))
        with pytest.raises(Exception, match="Worker exited prematurely: signal 9") as caught:
            poison.get(timeout=60)
        assert type(caught.value).__name__ == "WorkerLostError"
        assert tasks.add.delay(1, 1).get(timeout=30) == 2


def test_two_workers_share_the_tasks(stack: Stack, loaded: ModuleType) -> None:
    with Worker(stack.logs / "w1.log", env=stack.env) as one, Worker(stack.logs / "w2.log", env=stack.env) as two:
        assert witness.count_consumers(stack.broker_url, "tasks") == 2
        assert _fetch([loaded.import_rows.delay(1) for _ in range(40)]) == [1] * 40
        for worker in (one, two):
            assert worker.log.read_text().count(" succeeded in ") >= 10


def test_a_countdown_does_not_block_a_worker(stack: Stack, loaded: ModuleType) -> None:
    """RabbitMQ holds tasks with a countdown; on a classic queue, eight of them block a worker of two processes."""
    with Worker(stack.logs / "w.log", env=stack.env):
        for _ in range(20):
            loaded.add.apply_async((1, 1), countdown=300)
        assert loaded.add.delay(2, 2).get(timeout=20) == 4


def test_the_health_file_follows_the_worker(redis_stack: Stack, tmp_path: Path) -> None:
    """It is touched while the worker consumes, grows old when it does not, and is touched again when it does."""
    ready = tmp_path / "ready"
    tasks = redis_stack.load("tasks")

    def touched() -> bool:
        before = ready.stat().st_mtime if ready.exists() else 0
        end = time.monotonic() + 2.5  # five times its interval
        while time.monotonic() < end:
            if ready.exists() and ready.stat().st_mtime > before:
                return True
            time.sleep(0.1)
        return False

    env = {**redis_stack.env, "WORKER_READY_FILE": str(ready)}
    with Worker(redis_stack.logs / "w.log", env=env) as worker:
        wait_until(touched, "touched by a worker that consumes")
        tasks.app.control.cancel_consumer("tasks")
        wait_until(lambda: not touched(), "not touched by a worker that no longer consumes")
        tasks.app.control.add_consumer("tasks")
        wait_until(touched, "touched again")
        wait_until(lambda: _close_connections(redis_stack), "connections closed")
        wait_until(lambda: worker.says("onnection to broker lost"), "loss noticed")
        wait_until(touched, "touched again after the connection was lost")
        os.kill(worker.process.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: not touched(), "not touched by a worker that hangs")
        finally:
            os.kill(worker.process.pid, signal.SIGCONT)
        wait_until(touched, "touched again after it hung")
