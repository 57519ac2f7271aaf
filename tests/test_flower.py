"""Flower, with the settings of docker-compose.yml: it shows the run, keeps it, and asks for a login."""

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import pytest

import witness
from lab.servers import ROOT, Worker, run, wait_until
from tests.conftest import Stack
from tests.proxy import listen

PASSWORD = "p@ss:w,o%r#d x'\"$"
LOGIN = f"demo:{PASSWORD}"


def _compose_settings() -> dict[str, str]:
    """Return the FLOWER_ variables of the service flower."""
    service = re.search(
        r"^  flower:\n(.*?)^  \w+:", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE | re.DOTALL
    )
    assert service
    settings = dict(re.findall(r'^ {6}(FLOWER_\w+): "?(.*?)"?(?: #.*)?$', service[1], re.MULTILINE))
    assert {"FLOWER_READ_ONLY", "FLOWER_PERSISTENT", "FLOWER_BROKER_API"} <= set(settings)
    return settings


class Flower:
    """A real Flower process with a history file of the test's own."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        with listen() as free:
            self.port = free.getsockname()[1]
        self.log = folder / "flower.log"
        settings = _compose_settings()
        self.env = {
            **os.environ,
            **stack.env,
            **settings,
            "FLOWER_ADDRESS": "127.0.0.1",
            "FLOWER_PORT": str(self.port),
            "FLOWER_PASSWORD": PASSWORD,
            "PYTHONPATH": str(ROOT),
            "FLOWER_BROKER_API": stack.rabbitmq.api + urlsplit(settings["FLOWER_BROKER_API"]).path,
            "FLOWER_DB": str(folder / "flower.db"),
        }
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "celery", "-A", "tasks", "-q", "flower", "--conf=worker/flowerconfig.py"],
                cwd=ROOT,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_until(lambda: self.process.poll() is not None or self.is_healthy(), "Flower healthy", 60)
        assert self.process.poll() is None, self.log.read_text()

    def stop(self) -> int:
        """Stop it as Compose does, with SIGTERM, and return its exit code."""
        self.process.terminate()
        return self.process.wait(30)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def request(self, path: str, login: str | None = LOGIN, method: str = "GET") -> tuple[int, str]:
        """Return the status code and the text of a page."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", method=method)
        if login:
            request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            return exc.code, exc.read().decode()

    def is_healthy(self) -> bool:
        try:
            return self.request("/healthcheck", login=None) == (200, "OK")
        except OSError:
            return False

    def tasks(self) -> dict[str, dict[str, Any]]:
        status, text = self.request("/api/tasks")
        assert status == 200, text
        tasks: dict[str, dict[str, Any]] = json.loads(text)
        return tasks

    def sees(self, task_id: str, state: str) -> dict[str, Any]:
        """Wait until it lists the task in that state, and return the task."""

        def seen() -> dict[str, Any] | None:
            task = self.tasks().get(task_id, {})
            return task if task.get("state") == state else None

        task: dict[str, Any] = wait_until(seen, f"{state} in Flower")
        return task

    def wait_subscribed(self, tasks: ModuleType) -> None:
        """Wait until it receives the workers' events: a moment after it is healthy."""
        sent: set[str] = set()

        def sees_one() -> bool:
            sent.add(tasks.add.delay(0, 0).id)
            return not sent.isdisjoint(self.tasks())

        wait_until(sees_one, "a first task in Flower")


@pytest.fixture
def flower(shared_stack: Stack, tasks: ModuleType, tmp_path: Path) -> Iterator[Flower]:
    """Flower on the stack whose worker runs, seeing what happens."""
    flower = Flower(shared_stack, tmp_path)
    try:
        flower.wait_subscribed(tasks)
        yield flower
    finally:
        flower.close()


def test_it_shows_tasks_with_state_arguments_and_result(flower: Flower, tasks: ModuleType) -> None:
    added, divided, napping = tasks.add.delay(20, 22), tasks.divide.delay(1, 0), tasks.nap.delay(30)
    ignored = tasks.divide.apply_async((2, 0), ignore_result=True)
    shown = flower.sees(added.id, "SUCCESS")
    assert (shown["name"], shown["args"], shown["kwargs"], shown["result"]) == ("tasks.add", "(20, 22)", "{}", "42")
    assert shown["worker"].startswith("shared@")
    assert flower.sees(divided.id, "FAILURE")["exception"] == "ZeroDivisionError('division by zero')"
    assert flower.sees(ignored.id, "FAILURE")["exception"] == "ZeroDivisionError('division by zero')"
    assert flower.sees(napping.id, "STARTED")["args"] == "(30,)"
    napping.revoke(terminate=True)
    flower.sees(napping.id, "REVOKED")
    page = flower.request("/tasks")[1]
    for column in ("Name", "UUID", "State", "args", "Result"):
        assert re.search(rf"<th[^>]*>\s*{column}\s*</th>", page), column


def test_the_broker_page_counts_the_messages_of_the_task_queue(flower: Flower) -> None:
    def numbers() -> list[str]:
        status, page = flower.request("/broker")
        assert status == 200
        row = re.search(r'<tr id="tasks">(.*?)</tr>', page, re.DOTALL)
        return re.findall(r"<td[^>]*>(\d+)</td>", row[1]) if row else []

    # RabbitMQ counts every few seconds: messages, unacknowledged, ready, consumers.
    assert wait_until(lambda: numbers() if len(numbers()) == 4 else None, "numbers of the queue")[3] == "1"


@pytest.mark.parametrize("login", [None, "demo:wrong", "demo:", "other:p@ss:word"])
def test_without_the_login_it_shows_nothing(flower: Flower, login: str | None) -> None:
    for path in ("/", "/workers", "/tasks", "/broker", "/api/tasks", "/api/workers"):
        assert flower.request(path)[0] == 200, path
        assert flower.request(path, login) in ((401, "Access denied"), (401, "")), path


def test_the_history_survives_a_restart(flower: Flower, tasks: ModuleType) -> None:
    result = tasks.add.delay(20, 22)
    before = flower.sees(result.id, "SUCCESS")
    assert flower.stop() == 0
    flower.start()
    after = flower.tasks()[result.id]
    assert (after["state"], after["args"], after["result"]) == ("SUCCESS", "(20, 22)", "42")
    assert after["received"] == before["received"]


def test_the_history_survives_a_kill(flower: Flower, tasks: ModuleType) -> None:
    """It is saved every FLOWER_STATE_SAVE_INTERVAL milliseconds, not only at the end."""
    db = Path(flower.env["FLOWER_DB"])

    def saved() -> int:
        return max(path.stat().st_mtime_ns for path in db.parent.glob(f"{db.name}*"))  # Python 3.11 adds an ending

    flower.stop()
    flower.env["FLOWER_STATE_SAVE_INTERVAL"] = "200"
    flower.start()
    flower.wait_subscribed(tasks)
    result = tasks.add.delay(20, 22)
    flower.sees(result.id, "SUCCESS")
    seen = saved()
    wait_until(lambda: saved() > seen, "history saved")
    flower.close()
    flower.start()
    assert flower.tasks()[result.id]["state"] == "SUCCESS"


def test_it_only_reads(flower: Flower, tasks: ModuleType) -> None:
    worker = json.loads(flower.request("/api/workers")[1])
    name = next(iter(worker), "shared@host")
    for path in (f"/api/worker/shutdown/{name}", f"/api/worker/pool/grow/{name}", "/api/task/async-apply/tasks.add"):
        assert flower.request(path, method="POST") == (403, "Read only mode is enabled"), path
    assert tasks.add.delay(1, 1).get(timeout=30) == 2


def test_the_worker_sends_its_events_together(redis_stack: Stack) -> None:
    """By itself Celery sends three messages a task, and waits until RabbitMQ has confirmed each of them."""
    tasks = redis_stack.load("tasks")
    count, messages, events = 40, 0, Counter[str]()
    with (
        Worker(redis_stack.logs / "w.log", "--task-events", env=redis_stack.env) as worker,
        witness.rabbitmq_channel(redis_stack.broker_url) as channel,
    ):
        channel.queue_declare("seen", exclusive=True)
        channel.queue_bind("seen", "celeryev", "task.#")
        results = [tasks.add.delay(number, 1) for number in range(count - 1)]
        assert [result.get(timeout=30) for result in results] == list(range(1, count))
        last = tasks.nap.delay(1)
        wait_until(lambda: last.state == "STARTED", "the last task runs")
        worker.stop()  # it waits for the task, and then sends the last events
        while message := channel.basic_get("seen", auto_ack=True)[2]:
            messages += 1
            events.update(event["type"] for event in json.loads(message))
    assert events == {"task-received": count, "task-started": count, "task-succeeded": count}
    assert messages < count / 2


@pytest.mark.parametrize("password", ["", "pässword"])
def test_a_password_that_flower_cannot_use_gets_one_line(password: str) -> None:
    command = ("celery", "-A", "tasks", "-q", "flower", "--conf=worker/flowerconfig.py")
    done = run(*command, env={"FLOWER_PASSWORD": password, "FLOWER_PASSWORD_FILE": "", "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1
    assert done.stderr.startswith("flowerconfig: FLOWER_PASSWORD is missing, or has a character that is not ASCII")
    assert done.stderr.count("\n") == 1
