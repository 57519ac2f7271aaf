"""List the messages that no worker could handle, and send them back to their queues.

What Celery lacks: RabbitMQ silently drops a task after 20 deliveries, when its worker ended each time or the task
rejects itself; and a refused message is gone.
What this does: the worker puts both into one quorum queue, the default queue's name plus ".dead", and stores a failure
for whoever waits. This command reads celeryconfig.py, as a worker does.
To go back: leave out worker_consumer, as delays.py says. For Celery 5.7.

  python -m hardening.dead_letters                   lists what is in it
  python -m hardening.dead_letters send-back         sends all of it back; or, with IDs, only these tasks
"""

import argparse
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import amqp
from celery import Celery
from kombu import Queue
from kombu.exceptions import OperationalError

from .moves import copy

# RabbitMQ's own limit for a quorum queue is 20: what it drops then is lost.
DELIVERIES = 15
LENGTH = 100_000  # messages; the oldest ones are dropped

QUEUE, REASON, TIME = "dead-letter-queue", "dead-letter-reason", "dead-letter-time"  # headers


def dead_letter_queue(app: Celery) -> Queue:
    """Return the queue for what no worker of an app can handle."""
    arguments = {"x-queue-type": "quorum", "x-max-length": LENGTH, "x-delivery-limit": -1}
    return Queue(f"{app.conf.task_default_queue}.dead", durable=True, queue_arguments=arguments)


def why_dead(queue: str, reason: str) -> dict[str, str]:
    """Return the headers that say where a message was, why it is here, and since when."""
    return {QUEUE: queue, REASON: reason, TIME: datetime.now(UTC).isoformat(timespec="seconds")}


def messages(channel: Any, queue: Queue) -> Iterator[Any]:
    """Yield the messages that are there now. They stay, unless they are acknowledged, when the channel is closed."""
    bound: Any = queue(channel)
    for _ in range(bound.queue_declare().message_count):
        if (message := bound.get()) is None:
            return
        yield message


def line(message: Any) -> str:
    """Describe a message: no arguments, which may be secret."""
    headers = message.headers
    when, queue, task, task_id, reason = (headers.get(name) for name in (TIME, QUEUE, "task", "id", REASON))
    return f"{when}  {queue}  {task!s:.100}  {task_id!s:.100}  {reason}".replace("\n", "\\n").replace("\r", "\\r")


def send_back(channel: Any, message: Any) -> None:
    """Put a message into the queue that it came from, as a new one. Raises amqp.AMQPError or OSError."""
    content = copy(message, {})
    headers = content.properties["application_headers"]
    queue = headers.pop(QUEUE)
    for name in (REASON, TIME):
        headers.pop(name)
    channel.basic_publish(content, routing_key=queue, mandatory=True, timeout=10)
    message.ack()


def main(arguments: list[str] | None = None) -> int:
    """Return the exit code: 0 when everything asked for was done."""
    parser = argparse.ArgumentParser(
        prog="python -m hardening.dead_letters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", nargs="?", choices=["list", "send-back"], default="list")
    parser.add_argument("id", nargs="*", help="the tasks to send back; all by default")
    parser.add_argument("--config", default="celeryconfig", help="the module with the settings (celeryconfig)")
    given = parser.parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    app = Celery(set_as_current=False)
    app.config_from_object(given.config)
    queue, wanted, done = dead_letter_queue(app), set(given.id), 0
    try:
        with app.connection_for_write(transport_options={"confirm_publish": True}) as connection:
            connection.ensure_connection(max_retries=1, timeout=10)
            for message in messages(connection.default_channel, queue):
                if given.action == "list":
                    print(line(message))
                elif not wanted or message.headers.get("id") in wanted:
                    send_back(connection.default_channel, message)
                    print(f"sent back: {line(message)}")
                else:
                    continue
                done += 1
    except (amqp.AMQPError, OSError, OperationalError, KeyError) as exc:
        print(f"dead_letters: {str(exc) or repr(exc)}".partition("\n")[0], file=sys.stderr)
        return 1
    if done == 0 and not wanted:
        print(f"The queue {queue.name} is empty.")
    if wanted and done < len(wanted):
        print(f"dead_letters: {len(wanted) - done} of these tasks are not in the queue {queue.name}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
