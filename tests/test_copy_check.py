"""python -m hardening.check: what would clash with a broker in another state, and what waits there."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from celery import Celery
from kombu import Exchange, Queue

from hardening import check
from lab.servers import RabbitMQ, as_admin, run
from tests.conftest import Stack, copy_settings
from tests.pages import UPGRADE

JOBS = """
from celery import Celery

app = Celery("jobs")
app.config_from_object("celeryconfig")
app.conf.task_routes = {"jobs.mail": {"queue": "mail"}, "reports.*": "reports"}


@app.task(queue="special")
def double(x):
    return 2 * x
"""


@pytest.fixture
def redis_stack(redis_stack: Stack) -> Stack:
    """What is moved has other keys than the demo's user may touch."""
    return replace(redis_stack, redis_url=as_admin(redis_stack.redis_url))


def _check(stack: Stack, folder: Path, *options: str, **env: str) -> tuple[int, list[str]]:
    if not (folder / "jobs.py").exists():
        copy_settings(folder)
        (folder / "jobs.py").write_text(JOBS)
    command = (sys.executable, "-m", "hardening.check", "-A", "jobs", *options)
    done = run(*command, cwd=folder, env={**stack.env, **env})
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines() + done.stderr.splitlines()


def _queue_names(stack: Stack) -> set[str]:
    return {queue["name"] for queue in stack.rabbitmq.queues(stack.vhost)}


def test_an_empty_broker_stays_empty(redis_stack: Stack, tmp_path: Path) -> None:
    code, lines = _check(redis_stack, tmp_path, "-Q", "urgent")
    assert code == 0
    assert lines[0].startswith("In force: broker amqp://")
    assert lines[1:] == [
        f"ok     queue {name}: does not exist yet"
        for name in ("mail", "reports", "special", "tasks", "urgent", "tasks.dead")
    ]
    assert _queue_names(redis_stack) == set()


def test_queues_of_a_stock_installation_clash_and_wait(redis_stack: Stack, tmp_path: Path) -> None:
    with Celery("old", broker=redis_stack.broker_url) as stock:
        for queue in (None, "mail", "old-mail"):
            stock.send_task("jobs.mail", queue=queue)
    code, lines = _check(redis_stack, tmp_path, "--old", "old-mail")
    assert code == 1
    clash = "CLASH  queue mail: PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'mail' in vhost"
    assert [line for line in lines if line.startswith(clash)], lines
    assert "WAITS  queue celery: 1; keep an old worker until it is 0" in lines
    assert "WAITS  queue old-mail: 1; keep an old worker until it is 0" in lines
    assert "would stop worker and client with PRECONDITION_FAILED" in lines[-1]
    assert _queue_names(redis_stack) == {"celery", "mail", "old-mail"}


def test_an_exchange_that_outlived_its_queue_clashes(redis_stack: Stack, tmp_path: Path) -> None:
    with Celery(broker=redis_stack.broker_url).connection_for_write() as connection:
        Exchange("mail", "fanout", durable=True)(connection.default_channel).declare()
    code, lines = _check(redis_stack, tmp_path)
    assert code == 1
    assert [line for line in lines if line.startswith("CLASH  exchange mail: PRECONDITION_FAILED - inequ")], lines
    assert "ok     queue mail: does not exist yet" in lines


def test_what_this_app_made_is_no_clash(redis_stack: Stack, tmp_path: Path) -> None:
    _check(redis_stack, tmp_path)
    sent = run(sys.executable, "-c", "import jobs; jobs.double.delay(1)", cwd=tmp_path, env=redis_stack.env)
    assert sent.returncode == 0, sent.stderr
    code, lines = _check(redis_stack, tmp_path)
    assert code == 0
    assert "ok     queue special: exists, of the same form; messages: 1, consumers: 0" in lines


def test_a_queue_that_somebody_has_for_himself_clashes(redis_stack: Stack, tmp_path: Path) -> None:
    with Celery(broker=redis_stack.broker_url).connection_for_write() as connection:
        Queue("tasks", exclusive=True, durable=False)(connection.default_channel).queue_declare()
        code, lines = _check(redis_stack, tmp_path)
    assert code == 1
    assert [line for line in lines if line.startswith("CLASH  queue tasks: RESOURCE_LOCKED")], lines


def test_redis_as_the_old_broker(redis_stack: Stack, tmp_path: Path) -> None:
    with Celery("old", broker=redis_stack.redis_url) as stock:
        for priority in (0, 9):
            stock.send_task("jobs.mail", priority=priority)
    code, lines = _check(redis_stack, tmp_path, "--old-broker", redis_stack.redis_url)
    assert code == 0
    assert "WAITS  queue celery: 2; keep an old worker until it is 0" in lines
    assert "ok     tasks that run, or wait for their countdown: 0" in lines


def test_no_answer_is_one_line(redis_stack: Stack, tmp_path: Path) -> None:
    nobody = "amqp://nobody:s3cret@" + redis_stack.broker_url.rpartition("@")[2]
    for url in ("amqp://guest:s3cret@127.0.0.1:1//", nobody):
        code, lines = _check(redis_stack, tmp_path, RABBITMQ_URL=url)
        assert (code, len(lines)) == (2, 2)
        assert lines[1].startswith("check: a broker cannot be asked: ")
        assert "s3cret" not in "".join(lines)


def test_no_administrator_is_needed(redis_stack: Stack, tmp_path: Path) -> None:
    """A user with the rights that the demo's own has: everything in its virtual host, and no tag."""
    server: RabbitMQ = redis_stack.rabbitmq
    user = redis_stack.vhost
    server.request("PUT", f"users/{user}", {"password": "own", "tags": ""})
    try:
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        server.request("PUT", f"permissions/{redis_stack.vhost}/{user}", everything)
        url = f"amqp://{user}:own@{redis_stack.broker_url.rpartition('@')[2]}"
        assert _check(redis_stack, tmp_path, RABBITMQ_URL=url)[0] == 0
    finally:
        server.request("DELETE", f"users/{user}")


def test_it_says_what_the_page_shows(redis_stack: Stack, tmp_path: Path) -> None:
    """For the state of the page: a queue that clashes, tasks that wait, and an empty old queue."""
    command, *shown = UPGRADE.partition("$ python -m hardening.check ")[2].partition("```")[0].splitlines()
    copy_settings(tmp_path)
    (tmp_path / "jobs.py").write_text(PLAIN)
    with Celery("old", broker=redis_stack.broker_url) as stock:
        for queue in [*["celery"] * 12, "mail", "reports"]:
            stock.send_task("jobs.double", queue=queue)
        with stock.connection_for_write() as connection:
            for queue in ("mail", "reports"):
                Queue(queue)(connection.default_channel).purge()
    code, lines = _check(redis_stack, tmp_path, *command.split()[2:])
    assert code == 1
    assert lines[1:] == [line.replace("vhost 'demo'", f"vhost '{redis_stack.vhost}'") for line in shown[1:]]


PLAIN = """
from celery import Celery

app = Celery("jobs")
app.config_from_object("celeryconfig")
"""


def test_the_default_queue_is_looked_at_where_task_queues_lacks_it() -> None:
    app = Celery(set_as_current=False)
    app.conf.update(task_queues=[Queue("mail")], task_default_queue="tasks")
    assert [queue.name for queue in check.queues(app)] == ["mail", "tasks", "tasks.dead"]
