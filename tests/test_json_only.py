"""JSON only: whatever else is put on the task queue or where a result belongs is refused, and the next task runs."""

import datetime
import gzip
import json
import logging
import pickle
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pika
import pytest
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.exceptions import TimeoutError as ResultTimeout

import witness
from lab.servers import Worker, wait_until
from tests.conftest import Stack, copy_settings

REFUSED = "Refused a message that is no task of this app"


class Exploit:
    """Code that runs where it is unpickled: it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.trace), "w")


def publish(channel: Any, queue: str, body: bytes, headers: dict[str, Any] | None, **properties: Any) -> None:
    channel.basic_publish("", queue, body, pika.BasicProperties(headers=headers, **properties))


def task_message(task_id: str, task: str = "tasks.add") -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """Return the body, headers and properties of a message that Celery itself could have sent."""
    body = [[1, 2], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    headers: dict[str, Any] = {
        "lang": "py",
        "task": task,
        "id": task_id,
        "root_id": task_id,
        "parent_id": None,
        "group": None,
    }
    headers |= {"shadow": None, "eta": None, "expires": None, "retries": 0, "timelimit": [None, None], "stamps": {}}
    headers |= {"argsrepr": "(1, 2)", "kwargsrepr": "{}", "origin": "client", "ignore_result": False}
    properties = {"content_type": "application/json", "content_encoding": "utf-8", "correlation_id": task_id}
    return body, headers, {**properties, "reply_to": "nobody", "delivery_mode": 2}


# --- On the task queue ------------------------------------------------------------------------------------

BAD_TASKS: dict[str, tuple[bytes, dict[str, Any], dict[str, Any]]] = {
    "no JSON": (b"\xff\xfe\x00", {}, {}),
    "JSON that is no task": (b'{"x": 1}', {}, {}),
    "no headers": (b"[[1, 2], {}, {}]", {"task": None, "id": None}, {}),
    "no content type": (b"[[1, 2], {}, {}]", {}, {"content_type": None}),
    "a content type with another name": (b"[[1, 2], {}, {}]", {}, {"content_type": "application/x-yaml"}),
    "arguments that are no list": (b'["12", {}, {}]', {}, {}),
    "a callback that is none": (b'[[1, 2], {}, {"callbacks": ["x"]}]', {}, {}),
    "a nest of lists": (b"[" * 20_000, {}, {}),
    "a task name that is a list": (b"[[1, 2], {}, {}]", {"task": ["tasks.add"]}, {}),
    "an id that is a number": (b"[[1, 2], {}, {}]", {"id": 7}, {}),
    "an id with a line of its own": (b"[[1, 2], {}, {}]", {"id": "x\n[2026-01-01: CRITICAL] forged"}, {}),
    "a name with a line of its own": (b"[[1, 2], {}, {}]", {"shadow": "x\n[2026-01-01: CRITICAL] forged"}, {}),
    "a task with a line of its own": (b"[[1, 2], {}, {}]", {"task": "x\n[2026-01-01: CRITICAL] forged"}, {}),
    "half a time limit": (b"[[1, 2], {}, {}]", {"timelimit": [1]}, {}),
    "stamps that have no names": (b"[[1, 2], {}, {}]", {"stamped_headers": [["x"]]}, {}),
    "a date that is none": (b"[[1, 2], {}, {}]", {"eta": "tomorrow"}, {}),
    "unknown compression": (b"[[1, 2], {}, {}]", {"compression": "x"}, {}),
}


def new_lines(worker: Worker, before: int) -> list[str]:
    """Return the lines of the worker's log from a position on."""
    return [line for line in worker.log.read_text()[before:].splitlines() if line]


def test_it_is_refused_with_one_line_and_the_next_task_runs(stack: Stack) -> None:
    tasks = stack.load("tasks")
    _, good_headers, good_properties = task_message("some-id")
    with (
        Worker(stack.logs / "w.log", env=stack.env) as worker,
        witness.rabbitmq_channel(stack.broker_url) as channel,
    ):
        for kind, (body, headers, properties) in BAD_TASKS.items():
            before = len(worker.log.read_text())
            publish(channel, "tasks", body, {**good_headers, **headers}, **{**good_properties, **properties})
            wait_until(partial(new_lines, worker, before), f"{kind} is refused")
            result = tasks.add.delay(1, 2)
            assert result.get(timeout=20) == 3, kind
            wait_until(partial(worker.says, f"{result.id}] succeeded in "), kind)
            refused, *lines = new_lines(worker, before)
            assert REFUSED in refused
            assert len(refused) < 500
            assert [result.id in line for line in lines] == [True, True], lines
        assert worker.process.poll() is None


def test_pickle_is_refused(tasks: ModuleType, shared_stack: Stack, tmp_path: Path) -> None:
    _, headers, properties = task_message("some-id")
    properties |= {"content_type": "application/x-python-serialize", "content_encoding": "binary"}
    with witness.rabbitmq_channel(shared_stack.broker_url) as channel:
        publish(channel, "tasks", pickle.dumps(Exploit(tmp_path / "trace")), headers, **properties)
    refused = f"{REFUSED}, id 'some-id': Refusing to deserialize untrusted content of type pickle"
    wait_until(lambda: refused in (shared_stack.logs / "shared.log").read_text(), "refused")
    assert tasks.add.delay(1, 2).get(timeout=20) == 3
    assert not (tmp_path / "trace").exists()


def test_the_client_of_a_task_that_is_no_json_is_told(tasks: ModuleType) -> None:
    ignored = tasks.add.apply_async((1, 2), serializer="pickle", ignore_result=True)
    result = tasks.add.apply_async((1, 2), serializer="pickle")
    with pytest.raises(
        InvalidTaskError, match=r"^refused: Refusing to deserialize .* It is in the queue tasks\.dead\.$"
    ):
        result.get(timeout=20)
    assert tasks.app.AsyncResult(ignored.id).state == "PENDING"  # it came first


def test_a_command_that_is_no_json_is_refused_and_the_next_one_answered(rabbitmq_stack: Stack) -> None:
    control: Any = rabbitmq_stack.load("tasks").app.control
    with Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env) as worker:
        for serializer in ("pickle", "json"):
            control.mailbox.serializer = serializer
            replies = control.ping(timeout=20, limit=1) if serializer == "json" else control.broadcast("ping")
        assert [list(reply.values()) for reply in replies] == [[{"ok": "pong"}]]
        assert worker.says("Refused a command: Refusing to deserialize")
    assert "tasks.dead" not in [queue["name"] for queue in rabbitmq_stack.rabbitmq.queues(rabbitmq_stack.vhost)]


def test_the_client_of_an_unknown_task_is_told(tasks: ModuleType, shared_stack: Stack) -> None:
    result = tasks.app.send_task("tasks.gone", (1, 2))
    with pytest.raises(NotRegistered, match=r"tasks\.gone"):
        result.get(timeout=20)
    log = (shared_stack.logs / "shared.log").read_text()
    assert f"{REFUSED}, id '{result.id}': no task is called 'tasks.gone'\n" in log


def test_another_project_refuses_too(redis_stack: Stack, tmp_path: Path) -> None:
    copy_settings(tmp_path)
    (tmp_path / "jobs.py").write_text(
        "from celery import Celery\napp = Celery('jobs')\napp.config_from_object('celeryconfig')\n"
    )
    env = {**redis_stack.env, "PYTHONPATH": ""}
    with (
        Worker(tmp_path / "w.log", cwd=tmp_path, app="jobs", env=env) as worker,
        witness.rabbitmq_channel(redis_stack.broker_url) as channel,
    ):
        publish(channel, "tasks", b"nonsense", None)
        wait_until(lambda: worker.says(REFUSED), "refused")


# --- A thousand of them -----------------------------------------------------------------------------------

SEED = 20_201
VALUES: list[Any] = [
    None,
    0,
    -1,
    7,
    True,
    2**40,
    "",
    "x",
    "tasks.add",
    "\0",
    "é" * 300,
    "9" * 40,
    [],
    [1],
    ["x", None],
    [[[]]],
    {},
]
VALUES += [{"x": {"y": [1]}}, {"__type__": "uuid", "__value__": "x"}, "2020-01-01T00:00:00+00:00", "0001-01-01", "[1]"]
NOT_IN_JSON = [b"\xff\xfe\0", datetime.datetime(2020, 1, 1)]
EXTRA_HEADERS = ["compression", "meth", "stamped_headers", "replaced_task_nesting", "group_index", "utc", "args"]
TYPES = [None, "", "application/x-python-serialize", "application/data", "application/x-yaml", "text/plain", "x" * 200]
ENCODINGS = [None, "", "binary", "utf-16", "latin-1", "rot13", "zlib", "no-such", "x" * 200]


def malformed_body(rng: random.Random, body: list[Any]) -> bytes:
    """Return a body with a random fault."""
    text = json.dumps(body)
    deep = b"[" * rng.choice([10, 500, 900, 20_000])
    part = rng.randrange(3)
    embedded = {**body[2], rng.choice(list(body[2])): rng.choice(VALUES)}
    old = {name: rng.choice(VALUES) for name in ("task", "id", "args", "kwargs")}
    return rng.choice(
        [
            rng.randbytes(rng.randrange(200)),
            text[: rng.randrange(len(text))].encode(),
            text.encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"])),
            gzip.compress(text.encode()),
            pickle.dumps(body),
            deep,
            deep + b"]" * len(deep),
            json.dumps([["x" * rng.choice([100_000, 300_000])], {}, {}]).encode(),
            json.dumps(rng.choice(VALUES)).encode(),
            json.dumps(body[: rng.randrange(3)]).encode(),
            json.dumps([*body, 1]).encode(),
            json.dumps([*body[:part], rng.choice(VALUES), *body[part + 1 :]]).encode(),
            json.dumps([*body[:2], embedded]).encode(),
            json.dumps({"task": "tasks.add", "id": "x", "args": [1, 2], "kwargs": {}}).encode(),
            json.dumps(old | {"task": "tasks.add"}).encode(),
            json.dumps(old).encode(),
        ]
    )


def malformed(rng: random.Random) -> tuple[bytes, dict[str, Any] | None, dict[str, Any]]:
    """Return a task message with one to three random faults."""
    task_id = str(uuid.UUID(int=rng.getrandbits(128)))
    parts, headers, properties = task_message(task_id, rng.choice(["tasks.add", "tasks.add", "tasks.gone"]))
    body = json.dumps(parts).encode()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        match rng.randrange(6):
            case 0 | 1:
                body = malformed_body(rng, parts)
            case 2:
                properties["content_type"] = rng.choice(TYPES)
            case 3:
                properties[rng.choice(["content_encoding", "correlation_id", "reply_to"])] = rng.choice(ENCODINGS)
            case 4:
                headers.pop(rng.choice(list(headers)))
            case 5:
                headers[rng.choice([*headers, *EXTRA_HEADERS])] = rng.choice([*VALUES, *NOT_IN_JSON])
    return body, rng.choice([None, *[headers] * 30]), properties


@pytest.mark.slow
def test_a_thousand_malformed_messages_leave_the_worker_alive_and_nothing_else_lost(stack: Stack) -> None:
    tasks, rng = stack.load("tasks"), random.Random(SEED)
    results = []
    with (
        Worker(stack.logs / "w.log", env=stack.env) as worker,
        witness.rabbitmq_channel(stack.broker_url) as channel,
    ):
        for number in range(1_000):
            body, headers, properties = malformed(rng)
            publish(channel, "tasks", body, headers, **properties)
            if number % 20 == 0:
                results.append(tasks.add.delay(number, 1))
        assert [result.get(timeout=60) for result in results] == list(range(1, 1_001, 20))
        assert [tasks.add.delay(number, 2).get(timeout=20) for number in range(20)] == list(range(2, 22))

        def messages() -> list[int]:
            queues = {queue["name"]: queue for queue in stack.rabbitmq.queues(stack.vhost)}
            return [queues["tasks"]["messages"], queues["tasks"]["messages_unacknowledged"]]

        wait_until(lambda: messages() == [0, 0], "the queue is empty")
        assert worker.process.poll() is None
        assert witness.count_consumers(stack.broker_url, "tasks") == 1
        log = worker.log.read_text()
        # Each was refused with one line, or was a task after all, for add() has its own opinion on its arguments.
        refused, received = log.count(REFUSED), log.count("] received\n")
        assert refused + received == 1_000 + 50 + 20
        assert refused > 500


# --- Where a result belongs -------------------------------------------------------------------------------

NO_RESULTS = {
    "no JSON": b"\xff\xfe\x00",
    "nothing": b"null",
    "a number": b"7",
    "no state": b'{"task_id": "ID"}',
    "half": b'{"status": "SUCC',
    "a nest": b"[" * 100_000,
    "children that are none": b'{"status": "SUCCESS", "result": 1, "children": 7, "task_id": "ID"}',
    "a failure that is none": b'{"status": "FAILURE", "result": "x", "task_id": "ID"}',
    "a failure that calls": b'{"status": "FAILURE", "task_id": "ID", "result": '
    b'{"exc_module": "os", "exc_type": "system", "exc_message": "touch TRACE"}}',
    "a failure that opens": b'{"status": "FAILURE", "task_id": "ID", "result": '
    b'{"exc_module": "builtins", "exc_type": "open", "exc_message": ["TRACE", "w"]}}',
}


@pytest.fixture
def no_result(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bytes]:
    """What is no result, for the task "some-id"; it must not run the code in it."""
    trace = tmp_path / "trace"
    pickled = pickle.dumps(Exploit(trace))
    body = NO_RESULTS.get(request.param, pickled)
    yield body.replace(b"ID", b"some-id").replace(b"TRACE", str(trace).encode())
    assert not trace.exists()


def within(seconds: float, call: Callable[[], object]) -> object:
    """Return what a call returns, or the class of what it raises, if it does so in time."""
    started = time.monotonic()
    try:
        end = call()
    except Exception as exc:
        end = type(exc)
    assert time.monotonic() - started < seconds
    return end


def raises(call: Callable[[], object]) -> bool:
    """Tell whether a call raises in time."""
    return isinstance(within(10, call), type)


@pytest.mark.parametrize("no_result", [*NO_RESULTS, "pickle"], indirect=True)
def test_what_is_no_result_is_refused_and_the_next_one_fetched(
    tasks: ModuleType, shared_stack: Stack, no_result: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    if shared_stack.store == "redis":
        put_into_redis(tasks, shared_stack, no_result)
    else:
        put_on_the_reply_queue(tasks, shared_stack, no_result, caplog)
    assert tasks.add.delay(1, 2).get(timeout=20) == 3


def put_into_redis(tasks: ModuleType, stack: Stack, no_result: bytes) -> None:
    """With Redis, it is the result of one task: whoever asks for it gets an error, in time."""
    key = "celery-demo:celery-task-meta-some-id"
    with stack.redis_admin() as client:
        client.set(key, no_result, ex=60)
        assert raises(lambda: tasks.app.AsyncResult("some-id").state)
        assert raises(lambda: tasks.app.AsyncResult("some-id").get(timeout=2))
        client.delete(key)
        announce = threading.Timer(0.5, lambda: client.publish(key, no_result))
        announce.start()
        assert raises(lambda: tasks.app.AsyncResult("some-id").get(timeout=2))
        announce.join()


def put_on_the_reply_queue(tasks: ModuleType, stack: Stack, no_result: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """With rabbitmq, it may concern anybody: it is dropped with one line, whether the queue is polled or consumed."""
    waiting = tasks.add.delay(1, 2)
    with witness.rabbitmq_channel(stack.broker_url) as channel:

        def dropped(call: Callable[[Any], object]) -> object:
            caplog.clear()
            for content_type in ("application/json", "application/x-python-serialize", None):
                properties = {"content_type": content_type, "correlation_id": "some-id"}
                publish(channel, tasks.app.thread_oid, no_result, None, **properties)
            end = within(10, lambda: call(tasks.app.AsyncResult("some-id")))
            lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
            assert [line.startswith("Dropped a reply that is no result (") for line in lines] == [True] * 3
            assert "\n" not in "".join(lines)
            return end

        assert dropped(lambda result: result.state) == "PENDING"
        assert waiting.get(timeout=20) == 3
        assert dropped(lambda result: result.get(timeout=2)) is ResultTimeout
        assert channel.queue_declare(tasks.app.thread_oid, passive=True).method.message_count == 0
