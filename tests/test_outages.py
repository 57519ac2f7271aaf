"""The store is away at the wrong moment, for longer than a task may take, or when a client asks for more than get()."""

import hashlib
import json
import logging
import pickle
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import celery
import pika
import pytest
from celery.backends import redis as celery_redis
from celery.exceptions import ChordError
from kombu import compression
from kombu.exceptions import OperationalError

import witness
from hardening.redis import _CLAIM
from hardening.replies import Inbox
from hardening.results import NotStored
from lab.servers import ROOT, Worker, wait_until
from tests.conftest import Stack
from tests.proxy import Proxy

MORE_TASKS = """
import time
from tasks import app

@app.task(time_limit=5, max_retries=0)
def limited(seconds):
    time.sleep(seconds)
    return seconds

@app.task(time_limit=20, soft_time_limit=5, max_retries=0)
def soft_limited(seconds):
    time.sleep(seconds)
    return seconds

@app.task
def fail_late(seconds, more=0):
    time.sleep(seconds)
    raise ZeroDivisionError("the task's own error" + more * ".")
"""


def _worker(stack: Stack, folder: Path, *options: str) -> Worker:
    (folder / "more_tasks.py").write_text(MORE_TASKS)
    env = {**stack.env, "PYTHONPATH": f"{folder}:{ROOT}"}
    return Worker(stack.logs / "w.log", "--include", "more_tasks", *options, env=env)


def _through(stack: Stack, proxy: Proxy) -> Stack:
    """Return the stack with its store behind the proxy."""
    if stack.store == "redis":
        return replace(stack, redis_url=proxy.url())
    return replace(stack, broker_url=proxy.url())


def _store(stack: Stack) -> str:
    return stack.redis_url if stack.store == "redis" else stack.broker_url


@pytest.mark.parametrize("task", ["limited", "soft_limited"])
def test_an_outage_longer_than_the_time_limit_costs_no_value(stack: Stack, tmp_path: Path, task: str) -> None:
    """The limit ended a task that had done its work, as a failure; now its message returns, and it runs again."""
    with Proxy(_store(stack)) as proxy, _worker(_through(stack, proxy), tmp_path) as worker:
        tasks = stack.load("tasks")
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
        result = tasks.app.send_task(f"more_tasks.{task}", (1,))
        wait_until(lambda: worker.says(result.id), "task received")
        proxy.cut()
        time.sleep(14)  # longer than the limit
        proxy.restore()
        assert result.get(timeout=100) == 1
        assert tasks.add.delay(2, 2).get(timeout=30) == 4
        assert not worker.says("TimeLimitExceeded")


def test_a_time_limit_counts_no_wait_for_rabbitmq(redis_stack: Stack, tmp_path: Path) -> None:
    """It counted the next task of a chain that could not be sent, and the time without a connection if a failure was
    too long for the pipe to the main process.
    """
    with (
        Proxy(redis_stack.broker_url) as mq,
        _worker(replace(redis_stack, broker_url=mq.url()), tmp_path, "-c", "1") as worker,
    ):
        tasks = redis_stack.load("tasks")
        signature = partial(tasks.app.signature, time_limit=2)
        chain = signature("more_tasks.limited", (0.5,)) | tasks.add.s(1)
        assert chain().get(timeout=30) == 1.5  # its process is connected from here on
        sent = chain()
        wait_until(lambda: worker.says(sent.parent.id), "task received")
        mq.freeze()
        time.sleep(3)
        mq.thaw()
        assert sent.get(timeout=60) == 1.5
        fails = signature("more_tasks.fail_late", (0.5, 200_000)).delay()
        wait_until(lambda: worker.says(fails.id), "task received", timeout=30)
        mq.cut()
        time.sleep(3)
        mq.restore()
        wait_until(lambda: worker.log.read_text().count(f"{fails.id}] raised") == 2, "it ran again")
        with pytest.raises(ZeroDivisionError):
            fails.get(timeout=30)
        assert not worker.says("TimeLimitExceeded")


def test_processes_that_sent_no_result_yet_wait_for_rabbitmq(rabbitmq_stack: Stack, tmp_path: Path) -> None:
    """A process connects with its first result; when it could not, the task failed with OperationalError."""
    with Proxy(rabbitmq_stack.broker_url) as mq, _worker(_through(rabbitmq_stack, mq), tmp_path) as worker:
        tasks = rabbitmq_stack.load("tasks")
        results = [tasks.app.send_task("more_tasks.limited", (2,), time_limit=60) for _ in range(2)]
        wait_until(lambda: all(worker.says(result.id) for result in results), "tasks received")
        mq.cut()
        time.sleep(5)
        mq.restore()
        assert [result.get(timeout=60) for result in results] == [2, 2]


def test_a_client_s_calls_end_with_one_error_while_the_store_is_away(stack: Stack) -> None:
    """It is the error of delay() without RabbitMQ. They hung, or raised what redis-py raises."""
    with Proxy(_store(stack)) as proxy:
        away = _through(stack, proxy)
        tasks = away.load("tasks")
        proxy.cut()
        result = tasks.app.AsyncResult("an-id")
        calls: dict[str, Any] = {"state": lambda: result.state, "ready": result.ready}
        if stack.store == "redis":
            saved = tasks.app.GroupResult("a-group", [result])
            calls |= {
                "forget": tasks.app.AsyncResult("another").forget,
                "save": saved.save,
                "restore": lambda: tasks.app.GroupResult.restore("a-group"),
                "delete": saved.delete,
                "exists": result.exists,
                "chord": lambda: celery.chord([tasks.add.s(1, 1)] * 2)(tasks.total.s()),
            }
        started = time.monotonic()
        for name, call in calls.items():
            with pytest.raises(OperationalError):
                pytest.fail(f"{name} returned {call()!r}")
        assert time.monotonic() - started < 10 * len(calls)
        proxy.restore()
        assert result.state == "PENDING"


def test_a_chord_ends_whatever_moment_redis_goes_away_at(redis_stack: Stack, tmp_path: Path) -> None:
    """Before Redis does what the last part asks for, or after it did and before the worker knows."""
    with Proxy(redis_stack.redis_url) as redis, _worker(_through(redis_stack, redis), tmp_path) as worker:
        tasks = redis_stack.load("tasks")

        def run(command: bytes, when: str) -> int:
            result: Any = celery.chord([tasks.add.s(1, 1), tasks.nap.s(1)])(tasks.total.s())
            first, last = result.parent.results
            wait_until(lambda: (first.state, last.state) == ("SUCCESS", "STARTED"), "the last part runs")
            if command:
                noticed = worker.log.read_text().count("Redis is away")
                redis.cut_once(command, when)
                wait_until(lambda: worker.log.read_text().count("Redis is away") > noticed, "the worker noticed")
                redis.restore()
            value: int = result.get(timeout=60)
            return value

        assert run(b"", "") == 3  # Redis has the scripts from here on
        scripts = {
            "part": tasks.app.backend._chord_part_return_script.script,
            "extend": celery_redis.CHORD_CLAIM_EXTEND_LUA,
            "clean up": celery_redis.CHORD_CLEANUP_LUA,
        }
        commands = {name: hashlib.sha1(text.encode()).hexdigest().encode() for name, text in scripts.items()}
        for name, command in {**commands, "read the parts": b"ZRANGE"}.items():
            for when in ("before", "after"):
                assert run(command, when) == 3, (name, when)
        assert not worker.says("ChordError")


def test_a_chord_ends_with_the_task_s_own_error_although_redis_was_away(redis_stack: Stack, tmp_path: Path) -> None:
    """The state of the rest of a failed chain was asked for once only, and the chord ended with ConnectionError."""
    with Proxy(redis_stack.redis_url) as redis, _worker(_through(redis_stack, redis), tmp_path) as worker:
        tasks = redis_stack.load("tasks")
        fails = tasks.app.signature("more_tasks.fail_late", (3,))
        result: Any = celery.chord([celery.chain(fails, tasks.add.s(1)), tasks.add.s(1, 1)])(tasks.total.s())
        wait_until(lambda: worker.says("fail_late"), "task received")
        redis.cut()
        wait_until(lambda: worker.says("Redis is away"), "the worker noticed")
        time.sleep(3)
        redis.restore()
        with pytest.raises((ChordError, ZeroDivisionError), match="the task's own error"):
            result.get(timeout=60)


def test_a_chord_ends_although_the_worker_of_its_last_part_was_lost(redis_stack: Stack) -> None:
    """The claim to start the chord's end outlives it; the part that runs again must get it."""
    tasks = redis_stack.load("tasks")
    backend = tasks.app.backend
    keys = [backend.get_key_for_group("a-group", suffix) for suffix in (".j", ".t", ".s", ".d", "", ".c")]
    backend.set_chord_size("a-group", 1)

    def count(part: str, token: str) -> int:
        args = [part, "{}", 1, 0, 60, 60, 30, token]
        claimed: int = backend._chord_part_return_script(keys=keys, args=args, client=backend.client)[3]
        return claimed

    assert [count("a", "first"), count("a", "again")] == [1, 1]
    with redis_stack.redis_admin() as redis:
        assert redis.get(keys[-1].decode()) == "again"
    assert _CLAIM in celery_redis.CHORD_PART_RETURN_LUA  # what is replaced, in the installed version


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ("\ud800", {}),
        (None, {}),  # nested deeply, below
        ("a value", {"result_compression": "gzip"}),
    ],
)
def test_a_success_of_any_kind_is_not_overwritten(redis_stack: Stack, value: object, change: dict[str, Any]) -> None:
    """As when a task runs twice, and fails the second time."""
    tasks = redis_stack.load("tasks")
    tasks.app.conf.update(change)
    if value is None:
        for _ in range(900):
            value = [value]
    backend = tasks.app.backend
    backend.store_result("an-id", value, "SUCCESS")
    backend.store_result("an-id", ValueError("too late"), "FAILURE")
    assert tasks.app.AsyncResult("an-id").get(timeout=30) == value


def _reply(channel: Any, queue: str, task_id: str, result: object) -> None:
    properties = pika.BasicProperties(content_type="application/json", content_encoding="utf-8", correlation_id=task_id)
    channel.basic_publish(
        "", queue, json.dumps({"task_id": task_id, "status": "SUCCESS", "result": result}), properties
    )


def test_unread_replies_are_bounded_in_bytes(
    rabbitmq_stack: Stack, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They filled the client's memory without end. Now the oldest give way, and one line says so."""
    monkeypatch.setattr(Inbox, "limit", 1 << 20)
    tasks = rabbitmq_stack.load("tasks")
    oid, last = tasks.app.thread_oid, tasks.app.AsyncResult("reply-1999")
    assert last.state == "PENDING"  # the queue is there
    with witness.rabbitmq_channel(rabbitmq_stack.broker_url) as channel, caplog.at_level(logging.WARNING):
        for number in range(2_000):
            _reply(channel, oid, f"reply-{number}", "x" * 2_000)
        wait_until(last.ready, "the last one")
    inbox = tasks.app.backend.result_consumer.inbox
    assert inbox.size <= 1 << 20
    assert len(inbox) > 400
    assert tasks.app.AsyncResult("reply-0").state == "PENDING"
    assert len([line for line in caplog.messages if "the oldest are dropped" in line]) in (1, 2, 3)
    assert last.get(timeout=1) == "x" * 2_000


def test_one_task_is_polled_among_many_unread_replies(tasks: ModuleType, shared_stack: Stack) -> None:
    """Celery's rpc:// raises BacklogLimitExceeded above 1,000."""
    if shared_stack.store == "redis":
        pytest.skip("Redis keeps results on the server")
    result = tasks.add.delay(1, 1)
    with witness.rabbitmq_channel(shared_stack.broker_url) as channel:
        for number in range(2_000):
            _reply(channel, tasks.app.thread_oid, f"unread-{number}", number)
    wait_until(result.ready, "the state")
    assert result.get(timeout=1) == 2
    assert tasks.app.AsyncResult("unread-7").state == "SUCCESS"
    assert tasks.app.AsyncResult("unread-7").get(timeout=5) == 7


def test_what_arrives_while_rabbitmq_is_asked_is_handed_out_at_once(rabbitmq_stack: Stack) -> None:
    """The first get() after a silence asks RabbitMQ whether it is there, and reads the result before the answer."""
    tasks = rabbitmq_stack.load("tasks")
    with Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env) as worker:
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
        consumer = tasks.app.backend.result_consumer
        consumer.silence, consumer.interval = 0.0, 20.0  # seconds
        result = tasks.add.delay(2, 2)
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") == 2, "the result is sent")
        started = time.monotonic()
        assert result.get(timeout=60) == 4
        assert time.monotonic() - started < consumer.interval


@pytest.mark.parametrize("expires", [0, None])
def test_results_that_never_expire_leave_no_queue_for_ever(rabbitmq_stack: Stack, expires: int | None) -> None:
    """0 made delay() fail (PRECONDITION_FAILED), and None left a queue behind for good."""
    tasks = rabbitmq_stack.load("tasks")
    tasks.app.conf.result_expires = expires
    with Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env):
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
    queues = {queue["name"]: queue for queue in rabbitmq_stack.rabbitmq.queues(rabbitmq_stack.vhost)}
    arguments = queues[tasks.app.thread_oid]["arguments"]
    assert arguments["x-expires"] == 24 * 3_600_000
    assert "x-message-ttl" not in arguments


def test_in_a_cluster_the_reply_queue_survives_its_node(rabbitmq_stack: Stack) -> None:
    """With several hosts in the broker's URL it is a quorum queue, which expires like the other."""
    tasks = rabbitmq_stack.load("tasks")
    tasks.app.conf.broker_url = [rabbitmq_stack.broker_url] * 2
    with Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env):
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
        results = [tasks.add.delay(number, 1) for number in range(20)]
        assert [result.get(timeout=30) for result in results] == list(range(1, 21))
    queues = {queue["name"]: queue for queue in rabbitmq_stack.rabbitmq.queues(rabbitmq_stack.vhost)}
    queue = queues[tasks.app.thread_oid]
    assert queue["type"] == "quorum"
    assert (queue["arguments"]["x-expires"], queue["arguments"]["x-message-ttl"]) == (3_600_000, 3_600_000)


@pytest.mark.parametrize("method", ["gzip", "bzip2", "lzma"])
def test_what_inflates_to_gigabytes_is_refused(redis_stack: Stack, method: str) -> None:
    """kombu inflates before anything is checked: 200 kB took the worker to as much memory as they hold."""
    tasks = redis_stack.load("tasks")
    body, kind = compression.compress(b"\0" * (200 << 20), method)
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env) as worker:
        assert tasks.add.delay(1, 1).get(timeout=30) == 2
        properties = pika.BasicProperties(
            content_type="application/json",
            content_encoding="utf-8",
            headers={"compression": kind, "task": "tasks.add", "id": "a-bomb", "lang": "py"},
        )
        with witness.rabbitmq_channel(redis_stack.broker_url) as channel:
            channel.basic_publish("", "tasks", body, properties)
        wait_until(lambda: worker.says("Refused a message"), "refused")
        assert tasks.add.delay(2, 2).get(timeout=30) == 4
        peak = Path(f"/proc/{worker.process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
        assert int(peak) < 300 << 10  # kB: it had 200 MB to inflate
        assert len([line for line in worker.log.read_text().splitlines() if "a-bomb" in line]) == 1


def test_what_the_pool_gives_back_can_be_pickled() -> None:
    again: Any = pickle.loads(pickle.dumps(NotStored("Redis is away")))
    assert isinstance(again, NotStored)
    assert again.requeue  # type: ignore[attr-defined]
