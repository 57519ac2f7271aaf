"""The witnesses: with each store, the results are in it and nothing of them is in the other one."""

import json
import threading
from collections.abc import Callable
from types import ModuleType

import pika
import pytest
from celery import chord
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult

import witness
from lab.servers import TAKEN, wait_until
from tests.conftest import Stack


def _in_new_thread(action: Callable[[], None]) -> None:
    """Run an action in a thread of its own: it is a client of its own, with its own reply queue."""
    errors: list[BaseException] = []

    def target() -> None:
        try:
            action()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=target)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def _result_keys(stack: Stack) -> list[str]:
    with stack.redis_admin() as client:
        return [key for key in client.scan_iter(count=1000) if key != TAKEN]


def test_a_result_is_in_its_store_and_nowhere_else(tasks: ModuleType, shared_stack: Stack) -> None:
    def look() -> None:
        before = set(_result_keys(shared_stack))
        result = tasks.add.delay(20, 22)
        oid = tasks.app.thread_oid
        if shared_stack.store == "redis":
            name = f"celery-demo:celery-task-meta-{result.id}"
            key = wait_until(lambda: witness.find_result_key(shared_stack.redis_url, name), "key in Redis")
            assert 0 < key.ttl <= 3600
            assert (key.content["status"], key.content["result"]) == ("SUCCESS", 42)
            assert witness.find_reply_queue(shared_stack.broker_url, oid) is None
            names = {queue["name"] for queue in shared_stack.rabbitmq.queues(shared_stack.vhost)}
            assert {name for name in names if not name.startswith(("tasks.d", "celeryev.", "shared@"))} == {"tasks"}
        else:

            def arrived() -> witness.ReplyQueue | None:
                queue = witness.find_reply_queue(shared_stack.broker_url, oid)
                return queue if queue and queue.messages else None

            queue = wait_until(arrived, "message on the reply queue")
            assert queue.messages == 1
            assert queue.content is not None
            assert (queue.content["task_id"], queue.content["result"]) == (result.id, 42)
            assert set(_result_keys(shared_stack)) == before == set()
        assert result.get(timeout=30) == 42

    _in_new_thread(look)


def test_who_can_read_a_result_again(tasks: ModuleType, shared_stack: Stack) -> None:
    result = tasks.add.delay(1, 2)
    assert result.get(timeout=30) == 3
    assert result.get(timeout=30) == 3  # the object remembers
    another: AsyncResult[int] = AsyncResult(result.id, app=tasks.app)
    if shared_stack.store == "redis":
        assert another.get(timeout=30) == 3
    else:
        with pytest.raises(ResultTimeout):
            another.get(timeout=1)


def test_the_reply_queue_is_durable_and_expires(tasks: ModuleType, shared_stack: Stack) -> None:
    if shared_stack.store == "redis":
        pytest.skip("Redis has keys, no reply queue")
    tasks.add.delay(1, 2).get(timeout=30)
    names = {queue["name"]: queue for queue in shared_stack.rabbitmq.queues(shared_stack.vhost)}
    queue = names[tasks.app.thread_oid]
    assert queue["durable"] is True
    assert queue["auto_delete"] is False
    arguments = queue["arguments"]
    assert (arguments["x-expires"], arguments["x-message-ttl"]) == (3_600_000, 3_600_000)


def test_nothing_of_an_ignored_result_is_stored(tasks: ModuleType, shared_stack: Stack) -> None:
    def look() -> None:
        result = tasks.log_visit.delay("/home")
        assert result.get(timeout=30) is None
        tasks.add.delay(1, 1).get(timeout=30)
        assert not [key for key in _result_keys(shared_stack) if result.id in key]
        queue = witness.find_reply_queue(shared_stack.broker_url, tasks.app.thread_oid)
        assert queue is None or queue.messages == 0

    _in_new_thread(look)


def test_task_messages_wait_in_a_quorum_queue(tasks: ModuleType, shared_stack: Stack) -> None:
    def types() -> dict[str, str]:
        return {queue["name"]: queue["type"] for queue in shared_stack.rabbitmq.queues(shared_stack.vhost)}

    assert types()["tasks"] == "quorum"
    tasks.app.control.add_consumer("one_more", reply=True, timeout=30, limit=1)
    assert tasks.add.apply_async((1, 2), queue="one_more").get(timeout=30) == 3
    tasks.app.control.cancel_consumer("one_more", reply=True, timeout=30, limit=1)
    assert types()["one_more"] == "quorum"


def test_no_early_result_is_dropped_however_many_there_are(tasks: ModuleType, shared_stack: Stack) -> None:
    """Celery's rpc:// keeps 8,192 results that nobody waits for yet, and drops the oldest without a word."""
    if shared_stack.store == "redis":
        pytest.skip("Redis keeps results on the server")

    def fetch_first_of_many() -> None:
        first = tasks.add.delay(1, 2)
        oid = tasks.app.thread_oid
        wait_until(
            lambda: (queue := witness.find_reply_queue(shared_stack.broker_url, oid)) and queue.messages,
            "the first result",
        )
        with witness.rabbitmq_channel(shared_stack.broker_url) as channel:
            for number in range(8_300):
                reply = {"task_id": f"other-{number}", "status": "SUCCESS", "result": number, "children": []}
                channel.basic_publish(
                    "",
                    oid,
                    json.dumps(reply),
                    pika.BasicProperties(
                        content_type="application/json", content_encoding="utf-8", correlation_id=reply["task_id"]
                    ),
                )
        last: AsyncResult[int] = AsyncResult("other-8299", app=tasks.app)
        assert last.get(timeout=60) == 8_299
        assert first.get(timeout=30) == 3

    _in_new_thread(fetch_first_of_many)


def test_a_success_in_redis_is_not_overwritten(redis_stack: Stack) -> None:
    """As when a task runs twice, and fails the second time; any other state may follow another."""
    tasks = redis_stack.load("tasks")
    backend, result = tasks.app.backend, tasks.app.AsyncResult("ran-twice")
    for state, stored in [("PROGRESS", "PROGRESS"), ("SUCCESS", "SUCCESS"), ("FAILURE", "SUCCESS")]:
        backend.store_result(result.id, ValueError(state) if state == "FAILURE" else state, state)
        assert result.state == stored
    with redis_stack.redis_admin() as client:
        client.script_flush()  # as after a restart of Redis
    backend.store_result("another", 42, "SUCCESS")
    assert tasks.app.AsyncResult("another").get(timeout=30) == 42


@pytest.mark.parametrize("expires", [60, None])
def test_a_result_in_redis_expires_when_result_expires_says(redis_stack: Stack, expires: int | None) -> None:
    tasks = redis_stack.load("tasks")
    tasks.app.conf.result_expires = expires
    tasks.app.backend.store_result("an-id", 42, "SUCCESS")
    key = witness.find_result_key(redis_stack.redis_url, "celery-demo:celery-task-meta-an-id")
    assert key
    assert 0 < key.ttl <= 60 if expires else key.ttl == -1


def test_what_counts_the_parts_of_a_chord_outlives_the_results(redis_stack: Stack) -> None:
    tasks = redis_stack.load("tasks")
    chord([tasks.add.s(1, 2), tasks.add.s(3, 4)])(tasks.total.s())
    with redis_stack.redis_admin() as client:
        (size,) = client.scan_iter("*.s", count=1000)
        assert client.ttl(size) > 10 * tasks.app.conf.result_expires
