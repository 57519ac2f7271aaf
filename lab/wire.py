"""On the wire: a client without Celery queues a task, receives its result, and prints every message.

It sends and receives with pika and redis-py alone; a client in another language does the same. The task message is
version 2 of Celery's protocol: https://docs.celeryq.dev/en/stable/internals/protocol.html#version-2
It reads the same environment variables as celeryconfig.py.

Examples:
  python -m lab.wire                  add 2 3
  python -m lab.wire divide 1 0       a task that fails: the exception is a message, too
  python -m lab.wire import_rows 3    a task that reports its progress
"""

import argparse
import json
import runpy
import sys
import uuid
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import redis
from rich.console import Console

import witness

# The names that celeryconfig.py gives them.
QUEUE = "tasks"  # task_default_queue: also the routing key
KEY_PREFIX = "celery-demo:celery-task-meta-"  # global_keyprefix, then Celery's own prefix

READY = ("SUCCESS", "FAILURE", "REVOKED")  # the states after which nothing more comes
TIMEOUT = 30.0  # seconds to wait for the next message

# Not imported: the package's other modules need Celery.
environment = runpy.run_path(str(Path(__file__).parent.parent / "hardening" / "environment.py"))
console = Console(highlight=False, markup=False, soft_wrap=True)


def show(sentence: str, **parts: Any) -> None:
    """Print what happens, and below it the parts of the message: JSON with one line for each member."""
    console.print(f"\n{sentence}", style="bold")
    for name, part in parts.items():
        if isinstance(part, dict):
            members = [f'"{key}": {json.dumps(value)}' for key, value in part.items()]
            part = "{" + ",\n ".join(members).replace("\\n", "\n  ") + "}"  # a traceback keeps its line breaks
        elif isinstance(part, list):
            part = "[" + ",\n ".join(map(json.dumps, part)) + "]"
        console.print(f"     {name:10}  " + part.replace("\n", "\n" + " " * 17))


def publish(channel: Any, task_id: str, task: str, args: list[Any], **reply_to: str) -> None:
    """Send the task message, and return when RabbitMQ has taken it. Raises ServerError."""
    properties = {
        "correlation_id": task_id,
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "delivery_mode": 2,  # persistent
        **reply_to,  # the reply queue's name, for results that come back through RabbitMQ
    }
    headers = {
        "lang": "py",  # the task's language, not the client's
        "task": task,
        "id": task_id,
        "root_id": task_id,  # its own: no other task queued it
        "parent_id": None,
        "group": None,
        "argsrepr": json.dumps(args),  # optional, like the next: for people, in Flower and in logs
        "kwargsrepr": "{}",
    }
    body = [args, {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    show(
        "Send the task. The headers name it; the body holds its arguments, its keyword arguments and what runs next.",
        exchange=f"the default one, with the queue's name as routing key: {QUEUE}",
        properties=properties,
        headers=headers,
        body=body,
    )
    channel.confirm_delivery()
    # mandatory: without a queue of that name the message is refused, not dropped in silence.
    message = pika.BasicProperties(headers=headers, **properties)
    try:
        channel.basic_publish("", QUEUE, json.dumps(body), message, mandatory=True)
    except (pika.exceptions.AMQPChannelError, pika.exceptions.UnroutableError, pika.exceptions.NackError) as exc:
        raise witness.ServerError(f"RabbitMQ does not take the message ({exc}). Restart the worker.") from None
    console.print("     -> RabbitMQ confirms that it has the message", style="green")


def call_through_rabbitmq(channel: Any, task_id: str, task: str, args: list[Any]) -> dict[str, Any]:
    """Queue a task, and return the last reply that arrives on a reply queue."""
    reply: dict[str, Any] = {"status": "PENDING"}
    reply_queue = channel.queue_declare("", exclusive=True).method.queue
    show(
        "Declare a reply queue first. It belongs to this connection, and is removed with it.",
        queue=f"{reply_queue}, exclusive",
    )
    publish(channel, task_id, task, args, reply_to=reply_queue)
    for delivery, properties, body in channel.consume(reply_queue, auto_ack=True, inactivity_timeout=TIMEOUT):
        if delivery is None:
            break
        reply = json.loads(body)
        show(
            "Receive a reply. The worker published it to the queue that reply_to names; nobody else gets it.",
            properties={"correlation_id": properties.correlation_id, "content_type": properties.content_type},
            body=reply,
        )
        if reply["status"] in READY:
            break
    return reply


def call_through_redis(channel: Any, client: redis.Redis, task_id: str, task: str, args: list[Any]) -> dict[str, Any]:
    """Queue a task, wait until its result is announced, and return what is in the key."""
    key = f"{KEY_PREFIX}{task_id}"
    with client.pubsub() as subscription:  # type: ignore[no-untyped-call]
        subscription.subscribe(key)
        subscription.get_message(timeout=TIMEOUT)  # Redis confirms the subscription
        show("Subscribe first, so that no announcement is missed. The channel has the name of the key.", channel=key)
        publish(channel, task_id, task, args)
        while announcement := subscription.get_message(timeout=TIMEOUT):
            status = json.loads(announcement["data"])["status"]
            show("Hear an announcement. The worker wrote the key, and published it to the channel.", status=status)
            if status in READY:
                break
    # Read the key in any case: an announcement reaches only who is connected at that moment, the key stays.
    result: dict[str, Any] = json.loads(client.get(key) or '{"status": "PENDING"}')
    if result["status"] in READY:
        show(
            "Read the key. It stays until it expires, and every other process can read it, too.",
            key=f"{key}, expires in {client.ttl(key)} s",
            value=result,
        )
    return result


def call(task: str, args: list[Any]) -> dict[str, Any]:
    """Queue a task, and return its result from the store that RESULT_STORE names. Raises ServerError."""
    store, broker = environment["result_store"](), environment["service_url"]("RABBITMQ")
    if store == "memory" or broker == "memory://":
        raise witness.ServerError("no worker sees what is in the memory of this process: take RabbitMQ and Redis.")
    if not witness.count_consumers(broker, QUEUE):
        raise witness.ServerError(
            f"no worker consumes from the queue {QUEUE!r}, so the task would never run. "
            "Start one: docker compose up -d worker"
        )
    console.print(f"On the wire: {task}, without Celery, its result in {store}", style="bold")
    task_id = str(uuid.uuid4())
    with witness.rabbitmq_channel(broker) as channel:
        if store == "rabbitmq":
            result = call_through_rabbitmq(channel, task_id, task, args)
        else:
            with witness.redis_client(environment["service_url"]("REDIS")) as client:
                result = call_through_redis(channel, client, task_id, task, args)
    if result["status"] not in READY:
        raise witness.ServerError(
            f"no result in {store} after {TIMEOUT:.0f} s. Do the workers have RESULT_STORE={store}, too, "
            "and does the task store its result?"
        )
    return result


def json_or_text(argument: str) -> Any:
    """Return 2 as a number and [2, 3] as a list; what is not JSON is a text."""
    try:
        return json.loads(argument)
    except ValueError:
        return argument


def main() -> int:
    """Queue the task and return the exit code: 0 if a result came back, even an exception."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="*", default=["add", "2", "3"], help="a task of tasks.py and its arguments")
    name, *args = parser.parse_args().task
    try:
        result = call(f"tasks.{name}", [json_or_text(argument) for argument in args])
    except witness.ServerError as exc:
        print(f"wire: {exc}", file=sys.stderr)
        return 1
    error = result["result"]
    succeeded = result["status"] == "SUCCESS"
    came_back = result["result"] if succeeded else f"{error['exc_type']}: {', '.join(map(str, error['exc_message']))}"
    console.print(f"     -> {came_back}", style="green")
    return 0


if __name__ == "__main__":
    sys.exit(main())
