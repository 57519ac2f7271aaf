"""The worker's main process never waits for the result store: it takes tasks, answers and ends while that is away."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from celery import chord

from lab.servers import ROOT, Worker, wait_until
from tests.conftest import Stack
from tests.proxy import Proxy

JOBS = """
import os, signal, time
from tasks import app

@app.task
def sleeps(seconds):
    time.sleep(seconds)
    return "done"

@app.task(max_retries=0)
def dies():
    os.kill(os.getpid(), signal.SIGKILL)

def note(path):
    with open(path, "a") as file:
        file.write("ran\\n")
    return "done"

@app.task(time_limit=3)
def limited(path):
    return note(path)

@app.task(acks_late=False, time_limit=3)
def once(path):
    return note(path)

@app.task(acks_late=False)
def dies_early_acknowledged(path):
    note(path)
    os.kill(os.getpid(), signal.SIGKILL)

@app.task(ignore_result=True)
def touch(path):
    open(path, "w").close()
"""


@pytest.fixture
def env(redis_stack: Stack, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "jobs.py").write_text(JOBS)
    return {**redis_stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def send(app: Any, kind: str) -> Any:
    """Queue a task whose outcome the main process has to store."""
    match kind:
        case "revoked":
            result = app.send_task("jobs.sleeps", (60,), countdown=1)
            result.revoke()
        case "expired":
            result = app.send_task(
                "jobs.sleeps", (60,), countdown=1, headers={"expires": datetime.now(UTC).isoformat()}
            )
        case "timed out":
            result = app.send_task("jobs.sleeps", (60,), time_limit=1)
        case "unknown":
            result = app.send_task("jobs.nosuch")
        case "lost":
            result = app.send_task("jobs.dies")
    return result


def others_run(app: Any, folder: Path) -> None:
    """Wait until six tasks whose results nobody wants have run."""
    for number in range(6):
        app.send_task("jobs.touch", (str(folder / f"touched{number}"),), ignore_result=True)
    wait_until(lambda: len(list(folder.glob("touched*"))) == 6, "the others ran")


@contextmanager
def without_redis(stack: Stack, env: dict[str, str], *options: str) -> Iterator[tuple[Proxy, Worker]]:
    """Run a worker for which Redis is away, until the proxy restores it."""
    with Proxy(stack.redis_url) as redis:
        away = {**env, "REDIS_URL": redis.url()}
        with Worker(stack.logs / "w.log", *options, "--include", "jobs", env=away) as worker:
            redis.cut()
            yield redis, worker


OUTCOMES = {"revoked": "REVOKED", "expired": "REVOKED", "timed out": "FAILURE", "unknown": "FAILURE", "lost": "FAILURE"}


@pytest.mark.parametrize(
    "kinds",
    [list(OUTCOMES), *(pytest.param([kind], marks=pytest.mark.slow) for kind in OUTCOMES)],
    ids=lambda kinds: " and ".join(kinds),
)
def test_other_tasks_go_on_and_the_outcome_is_stored_later(
    redis_stack: Stack, env: dict[str, str], tmp_path: Path, kinds: list[str]
) -> None:
    app: Any = redis_stack.load("tasks").app
    with without_redis(redis_stack, env) as (redis, worker):
        results = {kind: send(app, kind) for kind in kinds}
        time.sleep(3)  # the limit is exceeded, the countdown is over
        others_run(app, tmp_path)
        assert app.control.ping(timeout=10)
        redis.restore()
        expected = {kind: OUTCOMES[kind] for kind in kinds}
        wait_until(lambda: {kind: result.state for kind, result in results.items()} == expected, "stored", 60)
        assert worker.process.poll() is None


def test_it_ends_and_the_message_returns(redis_stack: Stack, env: dict[str, str]) -> None:
    app: Any = redis_stack.load("tasks").app
    with without_redis(redis_stack, env) as (redis, worker):
        result = send(app, "timed out")
        wait_until(lambda: worker.says("signal 9 (SIGKILL)"), "timed out")
        os.kill(worker.process.pid, signal.SIGTERM)
        try:
            wait_until(lambda: worker.process.poll() is not None, "it ends")
        finally:
            redis.restore()
    with Worker(redis_stack.logs / "next.log", "--include", "jobs", env=env):
        wait_until(lambda: result.state == "FAILURE", "stored by the next one")


@pytest.mark.parametrize("pool", ["gevent", "threads"])
def test_other_pools_go_on_too(redis_stack: Stack, env: dict[str, str], tmp_path: Path, pool: str) -> None:
    app: Any = redis_stack.load("tasks").app
    with without_redis(redis_stack, env, "-P", pool) as (redis, _):
        results = [send(app, kind) for kind in ("expired", "unknown")]
        time.sleep(2)  # the countdown is over
        others_run(app, tmp_path)
        redis.restore()
        wait_until(lambda: [result.state for result in results] == ["REVOKED", "FAILURE"], "stored", timeout=60)


@pytest.mark.parametrize("pool", ["prefork", "solo", "threads", "gevent"])
def test_a_result_that_is_late_for_its_limit_arrives_and_the_worker_goes_on(
    redis_stack: Stack, env: dict[str, str], tmp_path: Path, pool: str
) -> None:
    """Its message goes back, and the task runs again. Other pools than prefork lose it by themselves."""
    app: Any = redis_stack.load("tasks").app
    ran = tmp_path / "ran"
    with without_redis(redis_stack, env, "-P", pool) as (redis, _):
        results = [app.send_task("jobs.limited", (str(ran),)) for _ in range(3)]
        wait_until(lambda: ran.exists() and ran.read_text().count("ran") > 3, "one ran again", timeout=90)
        redis.restore()
        assert [result.get(timeout=90) for result in results] == ["done"] * 3
        assert app.send_task("jobs.limited", (str(ran),)).get(timeout=30) == "done"


def test_a_task_that_is_acknowledged_early_never_runs_twice(
    redis_stack: Stack, env: dict[str, str], tmp_path: Path
) -> None:
    """Neither when its result cannot be stored within its limit, nor when its process is killed: that is a failure."""
    app: Any = redis_stack.load("tasks").app
    with without_redis(redis_stack, env) as (redis, worker):
        once = app.send_task("jobs.once", (str(tmp_path / "once"),))
        wait_until(lambda: worker.says("its outcome is not stored"), "given up", timeout=60)
        redis.restore()
        killed = app.send_task("jobs.dies_early_acknowledged", (str(tmp_path / "killed"),))
        with pytest.raises(Exception, match="could not be stored within its time limit"):
            once.get(timeout=60)
        with pytest.raises(Exception, match="signal 9"):
            killed.get(timeout=60)
    assert (tmp_path / "once").read_text() == (tmp_path / "killed").read_text() == "ran\n"


def test_a_chord_whose_part_no_worker_knows_fails(redis_stack: Stack, env: dict[str, str]) -> None:
    app: Any = redis_stack.load("tasks").app
    with Worker(redis_stack.logs / "w.log", "--include", "jobs", env=env):
        header = [app.signature("jobs.nosuch"), app.signature("tasks.add", (1, 1))]
        with pytest.raises(Exception, match="nosuch"):
            chord(header, app=app)(app.signature("tasks.total")).get(timeout=60)


def test_a_running_task_that_is_revoked_is_terminated_and_not_taken_for_one_that_waits(
    redis_stack: Stack, env: dict[str, str]
) -> None:
    app: Any = redis_stack.load("tasks").app
    with Worker(redis_stack.logs / "w.log", "--include", "jobs", env=env):
        for _ in range(3):
            result = app.send_task("jobs.sleeps", (60,))
            wait_until(lambda: any((app.control.inspect().active() or {}).values()), "it runs")
            result.revoke(terminate=True)
            with pytest.raises(Exception, match="terminated"):
                result.get(timeout=60)
            wait_until(lambda: not any((app.control.inspect().active() or {"": [1]}).values()), "it has ended")


def test_a_soft_limit_above_any_hard_one(redis_stack: Stack, env: dict[str, str]) -> None:
    """There is no hard limit in the settings that a task with a longer soft one would collide with."""
    app: Any = redis_stack.load("tasks").app
    with Worker(redis_stack.logs / "w.log", "--include", "jobs", env=env):
        assert app.send_task("jobs.sleeps", (0,), soft_time_limit=600).get(timeout=30) == "done"
    assert replace(redis_stack).load("celeryconfig").__dict__.get("task_time_limit") is None
