"""On the wire: a client that does not import Celery queues a task and receives its result, on both stores."""

import json
import re
import sys
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import celeryconfig
import witness
from lab import wire
from lab.servers import run
from tests.conftest import Stack

WIRE = (sys.executable, "-m", "lab.wire")


def test_a_result_comes_back(shared_stack: Stack) -> None:
    done = run(*WIRE, "add", "2", "3", env=shared_stack.env)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert f"On the wire: tasks.add, without Celery, its result in {shared_stack.store}" in done.stdout
    assert "-> RabbitMQ confirms that it has the message" in done.stdout
    assert done.stdout.endswith("     -> 5\n")


def _parts(printed: str, name: str) -> list[Any]:
    """Return the parts of the messages that are printed under this name; they are JSON."""
    found = re.findall(rf"^ {{5}}{name} +(.*(?:\n {{17}}.*)*)", printed, re.MULTILINE)
    return [json.loads(part) for part in found]


def test_what_is_printed_is_what_was_sent(shared_stack: Stack) -> None:
    """One task id runs through all messages."""
    printed = run(*WIRE, env=shared_stack.env).stdout
    properties, headers, body = (_parts(printed, name)[0] for name in ("properties", "headers", "body"))
    task_id = headers["id"]
    assert body[:2] == [[2, 3], {}]
    assert (headers["lang"], headers["task"], headers["root_id"]) == ("py", "tasks.add", task_id)
    assert (properties["correlation_id"], properties["content_type"]) == (task_id, "application/json")
    if shared_stack.store == "redis":
        result = _parts(printed, "value")[0]
        assert "reply_to" not in properties
        assert printed.count(f"celery-demo:celery-task-meta-{task_id}") == 2  # the channel, the key
    else:
        result = _parts(printed, "body")[1]
        assert f"queue       {properties['reply_to']}, exclusive" in printed
        assert _parts(printed, "properties")[1]["correlation_id"] == task_id
    assert (result["task_id"], result["status"], result["result"]) == (task_id, "SUCCESS", 5)


def test_celery_is_not_imported(shared_stack: Stack) -> None:
    code = (
        "import sys; from lab import wire; exit_code = wire.main(); "
        "unwanted = {'celery', 'kombu', 'amqp', 'celeryconfig', 'tasks'} & set(sys.modules); "
        "print(sorted(unwanted)); sys.exit(exit_code)"
    )
    done = run(sys.executable, "-c", code, env=shared_stack.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("     -> 5\n[]\n")


def test_an_exception_comes_back_as_a_message(shared_stack: Stack) -> None:
    done = run(*WIRE, "divide", "1", "0", env=shared_stack.env)
    assert (done.returncode, done.stderr) == (0, "")
    assert '"status": "FAILURE"' in done.stdout
    assert '"exc_type": "ZeroDivisionError", "exc_message": ["division by zero"]' in done.stdout
    assert re.search(r"^ +return x / y$", done.stdout, re.MULTILINE), "the traceback is not readable"
    assert done.stdout.endswith("     -> ZeroDivisionError: division by zero\n")


def test_progress_comes_before_the_result(shared_stack: Stack) -> None:
    done = run(*WIRE, "import_rows", "2", env=shared_stack.env)
    states = re.findall(r"\"?status\"?:? +\"?([A-Z]+)", done.stdout)
    assert states[:4] == ["STARTED", "PROGRESS", "PROGRESS", "SUCCESS"]
    assert done.stdout.endswith("     -> 2\n")


def test_a_text_need_not_be_json(shared_stack: Stack) -> None:
    done = run(*WIRE, "count_words", "the lazy dog", env=shared_stack.env)
    assert done.stdout.endswith("     -> 3\n")


def test_an_unknown_task_fails_like_any_other(shared_stack: Stack) -> None:
    done = run(*WIRE, "nosuch", env=shared_stack.env)
    assert done.stdout.endswith("     -> NotRegistered: tasks.nosuch\n")


def test_nothing_is_left_on_the_broker(shared_stack: Stack) -> None:
    run(*WIRE, env=shared_stack.env)
    queues = shared_stack.rabbitmq.queues(shared_stack.vhost)
    assert not [queue["name"] for queue in queues if queue["name"].startswith("amq.gen")]


@pytest.mark.parametrize("password", ["wrong", "p@:/%# ;?&word"])
def test_a_password_beside_the_url(password: str, shared_stack: Stack) -> None:
    """It replaces the one in the URL, whatever characters it has: RabbitMQ checks it and refuses it."""
    right = urlsplit(shared_stack.broker_url)
    done = run(*WIRE, env={**shared_stack.env, "RABBITMQ_PASSWORD": password})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"wire: RabbitMQ at {right.hostname}:{right.port} refuses the user")
    without = right._replace(netloc=right.netloc.replace(f":{right.password}@", "@")).geturl()
    done = run(
        *WIRE, env={**shared_stack.env, "RABBITMQ_URL": without, "RABBITMQ_PASSWORD": unquote(right.password or "")}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"RESULT_STORE": "memcached"}, "celeryconfig: RESULT_STORE is 'memcached', but it must be redis or rabbitmq."),
        ({"RESULT_STORE": "memory"}, "wire: no worker sees what is in the memory of this process"),
        ({"RABBITMQ_URL": "memory://"}, "wire: no worker sees what is in the memory of this process"),
        (
            {"RABBITMQ_URL": "amqp://demo:secret/word@rabbitmq:5672/demo"},
            "celeryconfig: RABBITMQ_URL is malformed. It must look like",
        ),
        ({"REDIS_URL": "http://redis"}, "celeryconfig: REDIS_URL is malformed. It must look like"),
        ({"RABBITMQ_URL": "amqp://demo:demo@127.0.0.1:1/demo"}, "wire: RabbitMQ at 127.0.0.1:1 cannot be reached"),
        ({"REDIS_URL": "redis://127.0.0.1:1/0"}, "wire: Redis at 127.0.0.1:1 cannot be reached"),
        ({"REDIS_PASSWORD_FILE": "/missing"}, "celeryconfig: REDIS_PASSWORD_FILE names /missing, which cannot be read"),
    ],
)
def test_bad_input_gets_one_line(env: dict[str, str], line: str, shared_stack: Stack) -> None:
    done = run(*WIRE, env={**shared_stack.env, "RESULT_STORE": "redis", **env})
    assert done.returncode == 1
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1
    assert "secret" not in done.stderr


def test_no_worker_gets_one_line(redis_stack: Stack) -> None:
    done = run(*WIRE, env=redis_stack.env)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("wire: no worker consumes from the queue 'tasks'")
    assert done.stderr.count("\n") == 1


def test_a_message_that_no_queue_gets_is_noticed(shared_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "QUEUE", "gone")
    with (
        witness.rabbitmq_channel(shared_stack.broker_url) as channel,
        pytest.raises(witness.ServerError, match=r"RabbitMQ does not take the message \(1 unroutable message"),
    ):
        wire.publish(channel, "some-id", "tasks.add", [1, 2])


def test_it_knows_the_names_in_the_settings() -> None:
    """The client repeats two names; they must be those of celeryconfig.py."""
    assert celeryconfig.task_default_queue == wire.QUEUE
    prefix = celeryconfig.result_backend_transport_options["global_keyprefix"]
    assert f"{prefix}celery-task-meta-" == wire.KEY_PREFIX
