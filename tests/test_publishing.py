"""Queueing a task ends, whatever RabbitMQ does, and many tasks are queued with one wait; nothing is lost on the way."""

import json
import pickle
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import pytest
from celery import chord, group, uuid
from celery.exceptions import TaskRevokedError
from kombu import Queue
from kombu.common import maybe_declare
from kombu.exceptions import EncodeError, OperationalError

from hardening import publishing
from hardening.delays import delay_queue
from hardening.publishing import NotPlaced, together
from lab.servers import Worker, run, wait_until
from tests.conftest import Stack
from tests.proxy import Proxy

SHORT = 5.0  # seconds


@pytest.fixture
def mq(stack: Stack) -> Iterator[Proxy]:
    with Proxy(stack.broker_url) as proxy:
        yield proxy


@pytest.fixture
def tasks(stack: Stack, mq: Proxy) -> ModuleType:
    """The tasks of a process that has no connection yet, and whose way to RabbitMQ can be cut."""
    return replace(stack, broker_url=mq.url()).load("tasks")


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "LIMIT", SHORT)


def _queued(stack: Stack) -> Counter[str]:
    """Take what is in the queue, and count the ids of the tasks."""
    wanted = {"count": 10_000, "ackmode": "ack_requeue_false", "encoding": "auto"}
    messages = stack.rabbitmq.request("POST", f"queues/{stack.vhost}/tasks/get", wanted)
    return Counter(message["properties"]["headers"]["id"] for message in messages)


def _after(seconds: float, call: Any) -> None:
    threading.Timer(seconds, call).start()


# --- One bound --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["cut", "freeze"])
@pytest.mark.parametrize("connected", [False, True])
def test_a_call_ends_with_one_error(
    tasks: ModuleType, mq: Proxy, short_limit: None, connected: bool, broken: str
) -> None:
    if connected:
        tasks.add.delay(1, 1)
    getattr(mq, broken)()
    for call in (tasks.add.s(1, 1).delay, group(tasks.add.s(1, 1), tasks.add.s(2, 2))):
        started = time.monotonic()
        with pytest.raises(OperationalError, match="RabbitMQ has not taken the task within"):
            call()
        assert time.monotonic() - started > SHORT - 1


def test_a_chord_ends_too(redis_stack: Stack, short_limit: None) -> None:
    with Proxy(redis_stack.broker_url) as mq:
        tasks = replace(redis_stack, broker_url=mq.url()).load("tasks")
        tasks.add.delay(1, 1)
        mq.freeze()
        with pytest.raises(OperationalError):
            chord([tasks.add.s(1, 1)], tasks.total.s())()


@pytest.mark.slow
def test_several_connections_may_make_the_same_queue_at_once(rabbitmq_stack: Stack) -> None:
    """About one time in two thousand RabbitMQ says, of one that another connection is making, that its node is down."""
    app: Any = rabbitmq_stack.load("tasks").app
    connections, rounds = 6, 1_000
    together_now = threading.Barrier(connections, timeout=30)

    def declare(number: int) -> None:
        with app.connection_for_write() as connection:
            queues = [delay_queue(f"queue-{each}", 0.5) for each in range(rounds)]
            for queue in queues:
                together_now.wait()
                time.sleep(random.random() / 250)
                maybe_declare(queue(connection.default_channel), retry=True, **app.conf.task_publish_retry_policy)

    with ThreadPoolExecutor(connections) as threads:
        list(threads.map(declare, range(connections)))


@pytest.mark.parametrize("connected", [False, True])
def test_a_short_restart_is_survived(stack: Stack, tasks: ModuleType, mq: Proxy, connected: bool) -> None:
    """Celery's own gives a fresh process 4 seconds."""
    ids = [tasks.add.delay(1, 1).id] if connected else []
    mq.cut()
    _after(7, mq.restore)
    ids.append(tasks.add.delay(1, 1).id)
    assert _queued(stack) == Counter(ids)


def test_each_call_has_a_limit_of_its_own(tasks: ModuleType, mq: Proxy, short_limit: None) -> None:
    """They share the pool's connections. The first one ends before RabbitMQ is back, the others after that."""
    mq.cut()
    ended = threading.Event()

    def first() -> None:
        with pytest.raises(OperationalError):
            tasks.add.delay(1, 1)
        ended.set()

    def second() -> None:
        ended.wait(60)  # with the first one's limit left over where it was
        _after(2, mq.restore)
        tasks.add.delay(1, 1)

    with ThreadPoolExecutor(2) as threads:
        for running in [threads.submit(first), threads.submit(second)]:
            running.result(60)


def test_a_call_in_the_same_thread_begins_anew(tasks: ModuleType, mq: Proxy, short_limit: None) -> None:
    mq.cut()
    with pytest.raises(OperationalError):
        tasks.add.delay(1, 1)
    _after(2, mq.restore)
    tasks.add.delay(1, 1)


def test_a_limit_ends_with_its_call(tasks: ModuleType, short_limit: None) -> None:
    with tasks.app.connection_for_write() as connection:
        connection.connect()
        with pytest.raises(EncodeError):
            tasks.add.delay(object(), 1)
        assert publishing._patience(connection.connection) == SHORT  # what is waited for next has its whole time


def test_a_message_that_rabbitmq_refuses_is_an_error(stack: Stack, tasks: ModuleType, short_limit: None) -> None:
    _fill_up_after(stack, 3)
    sent = []
    with pytest.raises(OperationalError, match="refused"):  # noqa: PT012
        for number in range(20):
            sent.append(tasks.add.delay(number, 1))
    assert len(sent) >= 3


def test_a_task_is_in_a_queue_or_the_call_raises(stack: Stack, tasks: ModuleType) -> None:
    """A queue that was deleted took no task, and RabbitMQ confirms what is nowhere."""
    for options in ({}, {"countdown": 0.1}):
        tasks.add.apply_async((1, 1), **options)
        for queue in stack.rabbitmq.queues(stack.vhost):
            stack.rabbitmq.request("DELETE", f"queues/{stack.vhost}/{queue['name']}")
        ids = Counter([tasks.add.apply_async((1, 1), **options).id])
        assert wait_until(partial(_queued, stack), "in the queue") == ids
    stack.rabbitmq.request("DELETE", f"queues/{stack.vhost}/tasks")
    lost: list[str] = []
    with pytest.raises(NotPlaced, match="RabbitMQ has no queue 'tasks'") as caught, together():
        lost.extend(tasks.add.delay(1, number).id for number in range(3))
    assert caught.value.ids == lost
    tasks.add.delay(1, 1)
    with pytest.raises(OperationalError, match="RabbitMQ has no queue 'nowhere'"):
        tasks.add.apply_async((1, 1), queue=Queue("nowhere", no_declare=True), retry=False)


def _fill_up_after(stack: Stack, messages: int) -> None:
    full = {"max-length": messages, "overflow": "reject-publish"}
    policy = {"pattern": "^tasks$", "definition": full, "apply-to": "queues"}
    stack.rabbitmq.request("PUT", f"policies/{stack.vhost}/full", policy)


def test_the_next_server_is_tried_when_one_is_frozen(stack: Stack, mq: Proxy) -> None:
    mq.freeze()
    tasks = replace(stack, broker_url=mq.url()).load("tasks")
    tasks.app.conf.broker_url = f"{mq.url()};{stack.broker_url}"
    ids = [tasks.add.delay(1, 1).id]
    with together():
        ids += [tasks.add.delay(1, 1).id for _ in range(10)]
    assert set(_queued(stack)) == set(ids)


def test_settings_can_be_shown_pickled_and_sent(shared_stack: Stack) -> None:
    tasks = shared_stack.load("tasks")
    inspect = tasks.app.control.inspect(timeout=30, limit=1)
    for conf in inspect.conf().values():
        assert "within_limit" in str(conf["task_publish_retry_policy"])
    for stats in inspect.stats().values():
        assert "on_open" in str(stats["broker"]["transport_options"])
    with pickle.loads(pickle.dumps(tasks.app.connection_for_write())) as connection:
        assert type(connection.default_channel) is publishing.Channel
    assert pickle.loads(pickle.dumps(tasks.app)).conf.broker_transport_options["on_open"] is publishing.on_open
    error = pickle.loads(pickle.dumps(NotPlaced(["an id"], "no reason")))
    assert (error.ids, str(error)) == (["an id"], "RabbitMQ has not taken 1 of the tasks: no reason")


# --- Expired tasks ----------------------------------------------------------------------------------------


def test_an_expired_task_is_revoked(stack: Stack) -> None:
    """RabbitMQ would drop the message, and the caller waits for ever."""
    tasks = stack.load("tasks")
    result, other = tasks.add.apply_async((1, 1), expires=0.5), tasks.add.apply_async((1, 1), expires=600)
    time.sleep(1.5)
    with Worker(stack.logs / "w.log", env=stack.env):
        assert other.get(timeout=30) == 2
        with pytest.raises(TaskRevokedError, match="expired"):
            result.get(timeout=30)


# --- Many tasks, one wait ---------------------------------------------------------------------------------


def test_all_ways_to_queue_a_task_count(stack: Stack) -> None:
    tasks = stack.load("tasks")
    with Worker(stack.logs / "w.log", env=stack.env), together():
        results = [tasks.add.delay(1, 1), tasks.add.apply_async((1, 1)), (tasks.add.s(0, 1) | tasks.add.s(1))()]
        with together():
            results += group(tasks.add.s(1, 1) for _ in range(10))().results
        if stack.store == "redis":
            results.append(chord([tasks.add.s(1, 0), tasks.add.s(1, 0)], tasks.total.s())())
        results += tasks.app.send_task(tasks.add.name, (1, 1)), tasks.add.chunks([(1, 1)] * 4, 2)()
        assert results[0].get(timeout=30) == 2  # fetched in the block
        *single, chunks = results
        assert [result.get(timeout=30) for result in single] == [2] * len(single)
        assert chunks.get(timeout=30) == [[2, 2], [2, 2]]


def test_no_call_waits_and_the_end_does(redis_stack: Stack) -> None:
    with Proxy(redis_stack.broker_url) as mq:
        tasks = replace(redis_stack, broker_url=mq.url()).load("tasks")
        queued, thawed = threading.Event(), threading.Event()

        def thaw() -> None:
            queued.wait(60)
            time.sleep(1)
            thawed.set()
            mq.thaw()

        with ThreadPoolExecutor(1) as threads:
            threads.submit(thaw)
            with together():
                ids = [tasks.add.delay(1, 1).id]
                mq.freeze()
                ids += [tasks.add.delay(1, 1).id for _ in range(100)]
                assert not thawed.is_set()
                queued.set()
            assert thawed.is_set()
        assert _queued(redis_stack) == Counter(ids)


def test_a_window_bounds_what_is_kept(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "WINDOW", 50)
    tasks = stack.load("tasks")
    ids, most = [], 0
    with together():
        for number in range(400):
            ids.append(tasks.add.delay(number, 1).id)
            block = publishing._block.get()
            assert block
            most = max(most, *(len(line.open) for line in block.lines.values()))
    assert _queued(stack) == Counter(ids)
    assert most < 50


@pytest.mark.parametrize("down", [0.0, 4.0])
def test_nothing_is_lost_when_the_connection_is_lost(stack: Stack, tasks: ModuleType, mq: Proxy, down: float) -> None:
    ids = []
    with together():
        for number in range(600):
            ids.append(tasks.add.delay(number, 1).id)
            if number in (0, 300, 599):
                mq.cut()
                _after(down, mq.restore)
    assert set(_queued(stack)) == set(ids)


def test_what_was_not_placed_is_named(redis_stack: Stack, short_limit: None) -> None:
    with Proxy(redis_stack.broker_url) as mq:
        tasks = replace(redis_stack, broker_url=mq.url()).load("tasks")
        ids: list[str] = []
        with pytest.raises(NotPlaced) as raised, together():  # noqa: PT012
            ids += [tasks.add.delay(number, 1).id for number in range(10)]
            mq.freeze()
            ids += [tasks.add.delay(number, 1).id for number in range(10)]
        assert set(ids[10:]) <= set(raised.value.ids) <= set(ids)
        assert set(_queued(redis_stack)) | set(raised.value.ids) == set(ids)
        assert str(raised.value).startswith(f"RabbitMQ has not taken {len(raised.value.ids)} of the tasks: ")


def test_what_could_be_placed_later_is_not_named(stack: Stack, tasks: ModuleType, mq: Proxy, short_limit: None) -> None:
    ids = [uuid()]
    with together():
        tasks.add.apply_async((1, 1), task_id=ids[0])
        mq.cut()
        with pytest.raises(OperationalError):  # noqa: PT012 - it is not the first one
            while True:
                ids.append(uuid())
                tasks.add.apply_async((1, 1), task_id=ids[-1])
        mq.restore()
        for task_id in ids:
            tasks.add.apply_async((1, 1), task_id=task_id)
    assert set(_queued(stack)) == set(ids)


def test_what_rabbitmq_refuses_is_named(stack: Stack, tasks: ModuleType, short_limit: None) -> None:
    _fill_up_after(stack, 3)
    with pytest.raises(OperationalError):  # noqa: PT012
        while True:
            tasks.add.delay(1, 1)
    ids: list[str] = []
    with pytest.raises(NotPlaced, match="refuses") as raised, together():  # noqa: PT012
        ids.append(tasks.add.delay(1, 1).id)
        time.sleep(1)  # RabbitMQ takes the first ones of a new connection, and then says no
        ids += [tasks.add.delay(1, 1).id for _ in range(10)]
    queued = _queued(stack)
    assert set(raised.value.ids) == {task_id for task_id in ids if task_id not in queued}


def test_one_message_that_is_too_large_takes_none_with_it(stack: Stack, tasks: ModuleType) -> None:
    ids: list[str] = []
    with pytest.raises(NotPlaced, match="larger than") as raised, together():
        ids += [tasks.count_words.delay("a word" if number != 5 else "x" * 17_000_000).id for number in range(10)]
    assert raised.value.ids == [ids.pop(5)]
    assert set(_queued(stack)) == set(ids)


def test_the_blocks_own_exception_wins(stack: Stack, tasks: ModuleType) -> None:
    ids: list[str] = []
    with pytest.raises(ZeroDivisionError), together():  # noqa: PT012
        ids += [tasks.add.delay(number, 1).id for number in range(10)]
        ids.append(str(1 / 0))
    assert _queued(stack) == Counter(ids)


def test_a_block_belongs_to_one_thread(stack: Stack) -> None:
    tasks = stack.load("tasks")
    tasks.add.delay(0, 0)
    everybody = threading.Barrier(5)

    def send(in_a_block: bool) -> list[str]:
        with together() if in_a_block else nullcontext():
            everybody.wait(60)
            return [tasks.add.delay(number, 1).id for number in range(50)]

    with ThreadPoolExecutor(5) as threads:
        sent = list(threads.map(send, [True] * 4 + [False]))
    queued = _queued(stack)
    assert queued.total() == 251
    assert set(queued) > {task_id for ids in sent for task_id in ids}


GREENLETS = """
from gevent import monkey; monkey.patch_all()
import json, gevent, tasks
from hardening.publishing import together
def send(number):
    with together():
        return [(gevent.sleep(0), tasks.add.delay(number, each).id)[1] for each in range(20)]
jobs = [gevent.spawn(send, number) for number in range(10)]
gevent.joinall(jobs, raise_error=True)
print(json.dumps([task_id for job in jobs for task_id in job.value]))
"""


def test_greenlets_have_blocks_of_their_own(stack: Stack) -> None:
    pytest.importorskip("gevent")
    done = run(sys.executable, "-c", GREENLETS, env=stack.env)
    assert done.returncode == 0, done.stderr
    assert _queued(stack) == Counter(json.loads(done.stdout))
