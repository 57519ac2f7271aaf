"""What no worker can handle is kept: the dead-letter queue, the failure for who waits, and the command."""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import witness
from hardening.dead_letters import DELIVERIES
from lab.servers import ROOT, Worker, run, wait_until
from tests.conftest import Stack
from tests.test_json_only import publish, task_message

JOBS = """
import os, signal
from celery.exceptions import Reject
from tasks import app

@app.task
def rejects():
    if not os.path.exists("{mended}"):
        raise Reject("not now", requeue=True)
    return "mended"

@app.task
def kills_its_worker(secret):
    os.killpg(os.getpgid(0), signal.SIGKILL)
"""


@pytest.fixture
def env(stack: Stack, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "jobs.py").write_text(JOBS.format(mended=tmp_path / "mended"))
    return {**stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}


def dead_letters(env: dict[str, str], *arguments: str) -> CompletedProcess[str]:
    return run(sys.executable, "-m", "hardening.dead_letters", *arguments, env=env)


def test_a_task_that_rejects_itself_is_kept_and_can_be_sent_back(
    stack: Stack, env: dict[str, str], tmp_path: Path
) -> None:
    app: Any = stack.load("tasks").app
    assert dead_letters(env).stdout == "The queue tasks.dead is empty.\n"
    with Worker(stack.logs / "w.log", "-Q", "tasks,special", "--include", "jobs", env=env):
        result = app.send_task("jobs.rejects", queue="special")
        with pytest.raises(Exception, match=f"given up after {DELIVERIES} deliveries") as caught:
            result.get(timeout=60)
        assert type(caught.value).__name__ == "WorkerLostError"
        assert "tasks.dead" in str(caught.value)
        assert app.send_task("tasks.add", (1, 2)).get(timeout=30) == 3

        listed = dead_letters(env)
        assert (listed.returncode, listed.stderr) == (0, "")
        assert f"  special  jobs.rejects  {result.id}  given up after" in listed.stdout
        assert dead_letters(env).stdout == listed.stdout  # it stays
        (tmp_path / "mended").touch()
        another = dead_letters(env, "send-back", "no-such-id")
        assert another.returncode == 1
        assert another.stderr == "dead_letters: 1 of these tasks are not in the queue tasks.dead\n"
        assert dead_letters(env, "send-back", result.id).returncode == 0
        if stack.store == "redis":
            wait_until(lambda: app.AsyncResult(result.id).state == "SUCCESS", "it has run")
        assert dead_letters(env, "list").stdout == "The queue tasks.dead is empty.\n"


@pytest.mark.slow
def test_a_task_that_kills_its_worker_ends(stack: Stack, env: dict[str, str]) -> None:
    """Each worker is gone at once, and the next one gets the task. No argument is shown."""
    app: Any = stack.load("tasks").app
    result = app.send_task("jobs.kills_its_worker", ("hunter2",))
    options = ("-Q", "tasks", "--include", "jobs", "-P", "solo")
    for number in range(DELIVERIES):
        worker = Worker(stack.logs / f"{number}.log", *options, env=env)
        worker.process.wait(60)
    with Worker(stack.logs / "last.log", *options, env=env):
        with pytest.raises(Exception, match="given up after"):
            result.get(timeout=60)
        listed = dead_letters(env).stdout
        assert "jobs.kills_its_worker" in listed
        assert "hunter2" not in listed


def test_what_is_refused_is_kept_as_it_was(stack: Stack, env: dict[str, str]) -> None:
    body, headers, properties = task_message("some-id")
    with (
        Worker(stack.logs / "w.log", env=env),
        witness.rabbitmq_channel(stack.broker_url) as channel,
    ):
        publish(channel, "tasks", b"nonsense", {"x": "\n2026 forged line", "id": "a\nforged line"})
        publish(channel, "tasks", json.dumps(body).encode(), headers | {"retries": "x"}, **properties)
        wait_until(lambda: dead_letters(env).stdout.count("\n") == 2, "both")
        listed = dead_letters(env).stdout
        assert "refused: the header retries is 'x'" in listed
        assert not [line for line in listed.splitlines() if line.startswith("forged")]
        back = dead_letters(env, "send-back")
        assert back.returncode == 0, back.stderr
        wait_until(lambda: dead_letters(env).stdout.count("\n") == 2, "refused again")
        _, found, kept = channel.basic_get("tasks.dead", auto_ack=True)
        assert found
        assert found.headers
        assert found.headers["dead-letter-queue"] == "tasks"
        assert kept in (b"nonsense", json.dumps(body).encode())


def test_the_command_says_what_is_wrong_in_one_line(stack: Stack) -> None:
    done = dead_letters({**stack.env, "RABBITMQ_URL": "amqp://guest:hunter2@127.0.0.1:1//"})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("dead_letters: ")
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr
