"""Workers, connections and pool processes are broken while tasks run; every accepted result arrives."""

import os
import signal
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import Stack
from tests.servers import ROOT, Worker, consumers, wait_until

TASKS = 60


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


@pytest.fixture
def loaded(stack: Stack) -> ModuleType:
    return stack.load("tasks")


def test_connections_break_while_results_are_waited_for(stack: Stack, loaded: ModuleType) -> None:
    worker = Worker(stack.logs / "w.log", env=stack.env).wait_ready()
    try:
        loaded.add.delay(0, 0).get(timeout=30)
        results = [loaded.import_rows.delay(1) for _ in range(TASKS)]
        for _ in range(3):
            assert results[0].get(timeout=30) == 1
            # The management API lists a connection some seconds after it was opened.
            wait_until(lambda: stack.rabbitmq.close_connections(stack.vhost), "connections closed")
        assert _fetch(results) == [1] * TASKS
    finally:
        worker.close()


def test_a_worker_is_killed_and_another_one_finishes(stack: Stack, loaded: ModuleType) -> None:
    first = Worker(stack.logs / "first.log", env=stack.env).wait_ready()
    results = [loaded.import_rows.delay(2) for _ in range(10)]
    wait_until(lambda: first.says("received"), "task received")
    first.kill()
    second = Worker(stack.logs / "second.log", env=stack.env).wait_ready()
    try:
        assert _fetch(results) == [2] * 10
    finally:
        second.close()


def test_sigterm_lets_running_tasks_finish(stack: Stack, loaded: ModuleType) -> None:
    worker = Worker(stack.logs / "w.log", env=stack.env).wait_ready()
    result = loaded.nap.delay(2)
    waiting = [loaded.nap.delay(1) for _ in range(4)]
    wait_until(lambda: worker.says(result.id), "task received")
    assert worker.stop() == 0
    assert result.get(timeout=5) == 2  # no worker runs any more: it was finished before the exit
    second = Worker(stack.logs / "second.log", env=stack.env).wait_ready()
    try:
        assert _fetch(waiting) == [1] * 4
    finally:
        second.close()


def test_a_soft_shutdown_puts_the_task_back(stack: Stack, loaded: ModuleType) -> None:
    """SIGQUIT, or SIGTERM with REMAP_SIGTERM=SIGQUIT: out after worker_soft_shutdown_timeout."""
    worker = Worker(stack.logs / "w.log", env={**stack.env, "REMAP_SIGTERM": "SIGQUIT"}).wait_ready()
    result = loaded.nap.delay(12)
    wait_until(lambda: worker.says(result.id), "task received")
    started = time.monotonic()
    worker.stop()
    assert time.monotonic() - started < 11.9
    second = Worker(stack.logs / "second.log", env=stack.env).wait_ready()
    try:
        assert result.get(timeout=60) == 12
    finally:
        second.close()


def test_a_killed_pool_process_costs_one_retry(stack: Stack, loaded: ModuleType) -> None:
    worker = Worker(stack.logs / "w.log", env=stack.env).wait_ready()
    try:
        result = loaded.nap.delay(2)
        started: list[int] = []

        def kill_once(meta: dict[str, object]) -> None:
            state = meta["result"]
            if meta["status"] == "STARTED" and not started and isinstance(state, dict):
                started.append(state["pid"])
                os.kill(state["pid"], signal.SIGKILL)

        assert result.get(timeout=60, on_message=kill_once) == 2
        assert started
        assert result.retries == 1
    finally:
        worker.close()


def test_a_poison_task_ends_as_a_failure_and_the_others_run_on(stack: Stack, tmp_path: Path) -> None:
    """A task that kills its process each time is retried max_retries times, then fails for good."""
    (tmp_path / "poison.py").write_text(
        "import os, signal\n"
        "from tasks import app, add\n"
        "@app.task(max_retries=1)\n"
        "def poison():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    os.environ["PYTHONPATH"] = str(tmp_path)
    worker = Worker(
        stack.logs / "w.log", "--include", "poison", env={**stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ).wait_ready()
    try:
        tasks = stack.load("tasks")
        poison = tasks.app.send_task("poison.poison")
        others = [tasks.add.delay(number, 1) for number in range(20)]
        assert _fetch(others) == list(range(1, 21))
        with pytest.raises(Exception, match="Worker exited prematurely: signal 9") as caught:
            poison.get(timeout=60)
        assert type(caught.value).__name__ == "WorkerLostError"
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
    finally:
        worker.close()
        del os.environ["PYTHONPATH"]


def test_two_workers_share_the_tasks(stack: Stack, loaded: ModuleType) -> None:
    workers = [Worker(stack.logs / f"w{number}.log", env=stack.env).wait_ready() for number in (1, 2)]
    try:
        assert consumers(stack.broker_url) == 2
        assert _fetch([loaded.import_rows.delay(1) for _ in range(40)]) == [1] * 40
        for worker in workers:
            assert worker.log.read_text().count(" succeeded in ") >= 10
    finally:
        for worker in workers:
            worker.close()


def test_a_countdown_does_not_block_a_worker(stack: Stack, loaded: ModuleType) -> None:
    """RabbitMQ holds tasks with a countdown; on a classic queue, eight of them block a worker of two processes."""
    worker = Worker(stack.logs / "w.log", env=stack.env).wait_ready()
    try:
        for _ in range(20):
            loaded.add.apply_async((1, 1), countdown=300)
        assert loaded.add.delay(2, 2).get(timeout=20) == 4
    finally:
        worker.close()


def test_the_health_file_follows_the_worker(redis_stack: Stack, tmp_path: Path) -> None:
    """It is touched while the worker consumes, grows old when it does not, and is touched again when it does."""
    ready = tmp_path / "ready"
    tasks = redis_stack.load("tasks")
    worker = Worker(redis_stack.logs / "w.log", env={**redis_stack.env, "WORKER_READY_FILE": str(ready)}).wait_ready()

    def touched() -> bool:
        before = ready.stat().st_mtime if ready.exists() else 0
        end = time.monotonic() + 2.5  # five times its interval
        while time.monotonic() < end:
            if ready.exists() and ready.stat().st_mtime > before:
                return True
            time.sleep(0.1)
        return False

    try:
        wait_until(touched, "touched by a worker that consumes")
        tasks.app.control.cancel_consumer("tasks")
        wait_until(lambda: not touched(), "not touched by a worker that no longer consumes")
        tasks.app.control.add_consumer("tasks")
        wait_until(touched, "touched again")
        wait_until(lambda: redis_stack.rabbitmq.close_connections(redis_stack.vhost), "connections closed")
        wait_until(lambda: worker.says("onnection to broker lost"), "loss noticed")
        wait_until(touched, "touched again after the connection was lost")
        os.kill(worker.process.pid, signal.SIGSTOP)
        wait_until(lambda: not touched(), "not touched by a worker that hangs")
        os.kill(worker.process.pid, signal.SIGCONT)
        wait_until(touched, "touched again after it hung")
    finally:
        os.kill(worker.process.pid, signal.SIGCONT)
        worker.close()
