"""docs/upgrade.md: an installation with stock settings, or of an older version, is moved with nothing lost."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lab.servers import Worker, as_admin, run, wait_until
from tests.conftest import Stack, copy_settings
from tests.pages import UPGRADE, write

TASKS = """

@app.task(name="jobs.double")
def double(x):
    return 2 * x


@app.task(name="jobs.mail")
def mail(x):
    return f"mail {x}"
"""
STOCK = """
import os
from celery import Celery

app = Celery("jobs", broker=os.environ["OLD_BROKER"], backend=os.environ["OLD_RESULTS"])
app.conf.task_routes = {"jobs.mail": {"queue": "mail"}}
"""
NEW = """
from celery import Celery

app = Celery("jobs")
app.config_from_object("celeryconfig")
app.conf.task_routes = {"jobs.mail": {"queue": "MAILS"}}
"""
OLDER = """
# The settings of version 1, as far as they concern queues
app.conf.update(
    broker_transport_options={"confirm_publish": True},
    task_default_queue="tasks",
    task_default_queue_type="quorum",
    task_default_exchange_type="topic",
    task_create_missing_queue_type="quorum",
    task_create_missing_queue_exchange_type="topic",
    task_acks_late=True,
    result_backend_transport_options={"global_keyprefix": "older:"},
)
"""


@pytest.fixture
def redis_stack(redis_stack: Stack) -> Stack:
    """What is moved has other keys than the demo's user may touch."""
    return replace(redis_stack, redis_url=as_admin(redis_stack.redis_url))


class Side:
    """One of the two installations: a folder with jobs.py, and its environment."""

    def __init__(self, stack: Stack, folder: Path, code: str, **env: str) -> None:
        folder.mkdir()
        (folder / "jobs.py").write_text(code + TASKS)
        self.stack, self.folder, self.env = stack, folder, {**stack.env, **env}

    def worker(self, queues: str) -> Worker:
        log = self.stack.logs / f"{self.folder.name}-{queues.replace(',', '-')}.log"
        return Worker(log, "-Q", queues, cwd=self.folder, app="jobs", env=self.env)

    def client(self, code: str) -> list[str]:
        done = run(sys.executable, "-c", f"from jobs import *\n{code}", cwd=self.folder, env=self.env)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    def queue(self, number: int, **options: object) -> list[str]:
        """Queue tasks of both kinds, and return their ids."""
        return self.client(
            f"for x in range({number}):\n"
            f"    print(double.apply_async((x,), **{options}).id, mail.apply_async((x,), **{options}).id, sep='\\n')"
        )

    def waiting_client(self) -> subprocess.Popen[str]:
        """A client that queues 20 tasks, and fetches each result."""
        code = "from jobs import *\nrs = [t.delay(x) for x in range(10) for t in (double, mail)]\n"
        code += "print(sorted(str(r.get(timeout=60)) for r in rs))"
        command = [sys.executable, "-c", code]
        return subprocess.Popen(
            command, cwd=self.folder, env={**os.environ, **self.env}, stdout=subprocess.PIPE, text=True
        )

    def check(self, *options: str) -> tuple[int, list[str]]:
        done = run(sys.executable, "-m", "hardening.check", "-A", "jobs", *options, cwd=self.folder, env=self.env)
        assert not done.stderr, done.stderr
        return done.returncode, done.stdout.splitlines()

    def drained(self, *options: str) -> bool:
        """Tell whether nothing waits any more."""
        return not any(line.startswith("WAITS") for line in self.check(*options)[1])


EXPECTED = str(sorted([str(2 * x) for x in range(10)] + [f"mail {x}" for x in range(10)]))


def _new(stack: Stack, tmp_path: Path, queue: str = "tasks", mails: str = "mails") -> Side:
    side = Side(stack, tmp_path / "new", NEW.replace("MAILS", mails))
    copy_settings(side.folder)
    settings = side.folder / "celeryconfig.py"
    settings.write_text(settings.read_text().replace('task_default_queue = "tasks"', f'task_default_queue = "{queue}"'))
    write(side.folder, "results.py", page=UPGRADE)
    return side


def _results(stack: Stack, ids: list[str], prefix: str = "") -> list[str]:
    """Return the results in Redis, under a prefix."""
    with stack.redis_admin() as client:
        return [key for key in ids if client.exists(f"{prefix}celery-task-meta-{key}")]


@pytest.mark.slow
@pytest.mark.parametrize("old_results", ["redis", "rpc://"])
def test_from_stock_settings(redis_stack: Stack, tmp_path: Path, old_results: str) -> None:
    """Waiting tasks, named queues, unread results, clients and workers of both kinds side by side."""
    old_url = redis_stack.redis_url if old_results == "redis" else old_results
    old = Side(redis_stack, tmp_path / "old", STOCK, OLD_BROKER=redis_stack.broker_url, OLD_RESULTS=old_url)
    waiting = old.queue(5) + old.queue(2, countdown=3)

    new = _new(redis_stack, tmp_path, mails="mail")
    code, lines = new.check()
    assert code == 1, lines
    assert any(line.startswith("CLASH  queue mail: ") for line in lines)
    jobs = new.folder / "jobs.py"
    jobs.write_text(jobs.read_text().replace('"mail"}', '"mails"}'))
    code, lines = new.check("--old", "mail")
    assert code == 0, lines
    assert "WAITS  queue celery: 7; keep an old worker until it is 0" in lines
    assert "WAITS  queue mail: 7; keep an old worker until it is 0" in lines

    with new.worker("tasks,mails"):
        assert new.client("print(double.delay(4).get(timeout=30), mail.delay(1).get(timeout=30))") == ["8 mail 1"]
        with old.worker("celery,mail") as old_worker:
            clients = [side.waiting_client() for side in (old, new, old)]
            assert [client.communicate(timeout=90)[0].strip() for client in clients] == [EXPECTED] * 3
            wait_until(lambda: new.drained("--old", "mail"), "the old queues are empty", timeout=60, interval=0.5)
            wait_until(lambda: old_worker.log.read_text().count("succeeded in") >= 54, "the old tasks ran")
        if old_results == "redis":
            assert _results(redis_stack, waiting) == waiting
            code_new = (
                (new.folder / "results.py").read_text().replace("redis://localhost:6379/0", redis_stack.redis_url)
            )
            (new.folder / "results.py").write_text(code_new)
            found = new.client(f"from results import find\nfor i in {waiting}: print(find(i).get(timeout=10))")
            assert sorted(found) == sorted(f"{2 * x}" for x in [*range(5), 0, 1]) + sorted(
                f"mail {x}" for x in [*range(5), 0, 1]
            )
            own = new.client("from results import find\nprint(find(double.delay(6).id).get(timeout=30))")
            assert own == ["12"]

    # What the page says to delete, with its commands.
    for command in (["queue.delete", "celery"], ["exchange.delete", "celery", "false"]):
        assert f"celery -A jobs amqp {' '.join(command)}\n" in UPGRADE
        for name in ("celery", "mail"):
            typed = [name if word == "celery" else word for word in command]
            done = run(sys.executable, "-m", "celery", "-A", "jobs", "amqp", *typed, cwd=new.folder, env=new.env)
            assert done.returncode == 0, done.stdout + done.stderr
    assert not {"celery", "mail"} & {queue["name"] for queue in redis_stack.rabbitmq.queues(redis_stack.vhost)}
    exchanges = {found["name"] for found in redis_stack.rabbitmq.request("GET", f"exchanges/{redis_stack.vhost}")}
    assert not {"celery", "mail"} & exchanges

    # The way back.
    left = new.queue(3)
    with old.worker("celery,mail"):
        client = old.waiting_client()
        assert client.communicate(timeout=90)[0].strip() == EXPECTED
        assert any("queue tasks: exists, of the same form; messages: 3" in line for line in new.check()[1])
        with new.worker("tasks,mails"):
            wait_until(lambda: len(_results(redis_stack, left, "celery-demo:")) == 6, "the new tasks ran")


@pytest.mark.slow
def test_without_the_old_code(redis_stack: Stack, tmp_path: Path) -> None:
    """A new worker empties the old queue, with the lines of the page."""
    old = Side(
        redis_stack, tmp_path / "old", STOCK, OLD_BROKER=redis_stack.broker_url, OLD_RESULTS=redis_stack.redis_url
    )
    waiting = old.client("for x in range(5): print(double.delay(x).id)")
    new = _new(redis_stack, tmp_path)
    write(new.folder, "celeryconfig.py, at the end", page=UPGRADE)
    addition = (new.folder / "celeryconfig.py, at the end").read_text()
    with (new.folder / "celeryconfig.py").open("a") as settings:
        settings.write(addition)
    assert new.check()[0] == 0
    with new.worker("tasks,celery"):
        wait_until(lambda: len(_results(redis_stack, waiting, "celery-demo:")) == 5, "the old tasks ran")
        assert new.client("print(double.delay(4).get(timeout=30))") == ["8"]


@pytest.mark.slow
def test_from_redis_as_the_broker(redis_stack: Stack, tmp_path: Path) -> None:
    old = Side(
        redis_stack, tmp_path / "old", STOCK, OLD_BROKER=redis_stack.redis_url, OLD_RESULTS=redis_stack.redis_url
    )
    waiting = old.queue(3, priority=9) + old.queue(2) + old.queue(1, countdown=4)
    new = _new(redis_stack, tmp_path)
    options = ("--old", "mail", "--old-broker", redis_stack.redis_url)
    code, lines = new.check(*options)
    assert code == 0
    assert "WAITS  queue celery: 6; keep an old worker until it is 0" in lines
    assert "WAITS  queue mail: 6; keep an old worker until it is 0" in lines
    with new.worker("tasks,mails"), old.worker("celery,mail"):
        clients = [side.waiting_client() for side in (old, new)]
        assert [client.communicate(timeout=90)[0].strip() for client in clients] == [EXPECTED] * 2
        wait_until(lambda: new.drained(*options), "Redis is empty", timeout=60, interval=0.5)
    assert _results(redis_stack, waiting) == waiting


@pytest.mark.slow
def test_from_an_older_version(redis_stack: Stack, tmp_path: Path) -> None:
    """Its exchange is of the type topic, and its countdowns wait in celery_delayed queues; the queue keeps its name."""
    code = STOCK.replace('"mail"', '"tasks"') + OLDER
    old = Side(
        redis_stack, tmp_path / "old", code, OLD_BROKER=redis_stack.broker_url, OLD_RESULTS=redis_stack.redis_url
    )
    with old.worker("tasks"):  # it binds the delays
        old.client("print(double.delay(1).get(timeout=30))")
    new = _new(redis_stack, tmp_path, mails="tasks")
    settings = new.folder / "celeryconfig.py"
    settings.write_text(settings.read_text().replace('"celery-demo:"', '"older:"'))
    waiting = old.queue(2) + old.queue(1, countdown=10)
    exit_code, lines = new.check()
    assert exit_code == 0, lines
    held = any(line.startswith("WAITS  queue celery_delayed_") for line in lines)  # or due already
    assert f"ok     queue tasks: exists, of the same form; messages: {4 if held else 6}, consumers: 0" in lines
    with new.worker("tasks"):
        with old.worker("tasks"):
            clients = [side.waiting_client() for side in (old, new)]
            assert [client.communicate(timeout=90)[0].strip() for client in clients] == [EXPECTED] * 2
        wait_until(lambda: len(_results(redis_stack, waiting, "older:")) == 6, "the old tasks ran", timeout=60)
        assert new.drained()
