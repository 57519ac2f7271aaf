"""A client of the benchmark: each line of standard input says what to do, and a line of JSON comes back.

python -m lab.benchmark_client celery            tasks of lab/benchmark_tasks.py, queued and fetched
python -m lab.benchmark_client redis-py          the floor: the same without Celery, with redis-py alone
python -m lab.benchmark_client pika-quorum       the floor with pika alone, through a quorum queue
python -m lab.benchmark_client pika-classic      and through a classic one
python -m lab.benchmark_client redis-py answer   the other side of the floor, and likewise for pika
python -m lab.benchmark_client first             queue one task, and end with its result
"""

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import pika
import redis
from celery import chord, group

from hardening.publishing import together

TIMEOUT = 60.0  # seconds for a result
LARGE = 100_000  # characters
CHUNK = 10  # calls in one task
Figures = dict[str, float]


def clocked(call: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


class Client:
    """What is measured, in terms of sending a request and receiving its reply."""

    def send(self, number: int) -> Any:
        """Send a request for number + 1, and return what receive() needs."""
        raise NotImplementedError

    def receive(self, sent: Any) -> Any:
        """Return the reply to it."""
        raise NotImplementedError

    def answer(self) -> None:
        """Be the worker, for ever."""
        raise NotImplementedError

    def one_at_a_time(self, count: int) -> Figures:
        """Send the next request when the reply has come."""
        seconds = sorted(clocked(lambda: self.receive(self.send(1))) for _ in range(count))
        return {"p50_ms": seconds[count // 2] * 1e3, "p99_ms": seconds[count * 99 // 100] * 1e3}

    def all_at_once(self, count: int) -> Figures:
        """Send all requests, then fetch all replies."""
        started = time.perf_counter()
        sent = [self.send(number) for number in range(count)]
        queued = time.perf_counter()
        replies = sorted(self.receive(each) for each in sent)
        done = time.perf_counter()
        if replies != list(range(1, count + 1)):
            raise RuntimeError("wrong replies")
        return {"queued_per_s": count / (queued - started), "trips_per_s": count / (done - started)}


class CeleryClient(Client):
    """Celery, with the settings that BENCHMARK_SETTINGS names."""

    def __init__(self) -> None:
        from lab import benchmark_tasks

        self.tasks = benchmark_tasks
        self.unread: list[Any] = []

    def send(self, number: int) -> Any:
        """Queue a task."""
        return self.tasks.add.delay(number, 1)

    def receive(self, sent: Any) -> Any:
        """Fetch its result."""
        return sent.get(timeout=TIMEOUT)

    def together(self, count: int) -> Figures:
        """Queue tasks with one wait for RabbitMQ's confirms; Celery's defaults have none, and wait for none."""
        started = time.perf_counter()
        with together():
            sent = [self.send(number) for number in range(count)]
        seconds = time.perf_counter() - started
        if sorted(map(self.receive, sent)) != list(range(1, count + 1)):
            raise RuntimeError("wrong replies")
        return {"together_per_s": count / seconds}

    def chunks(self, count: int) -> Figures:
        """Send ten calls in each task, and fetch the lists of their results."""
        calls = self.tasks.add.chunks([(number, 1) for number in range(count)], CHUNK).group()
        results: list[list[int]] = []
        seconds = clocked(lambda: results.extend(calls().get(timeout=TIMEOUT, interval=0)))
        if sorted(chain.from_iterable(results)) != list(range(1, count + 1)):
            raise RuntimeError("wrong replies")
        return {"chunks_per_s": count / seconds}

    def group(self, count: int) -> Figures:
        """Fetch a group's results in three ways."""
        signature = group(self.tasks.add.s(number, 1) for number in range(count))

        def members() -> None:
            for each in signature():
                each.get(timeout=TIMEOUT)

        def at_once() -> None:
            signature().get(timeout=TIMEOUT, interval=0)

        figures = {"one_by_one_ms": clocked(members) * 1e3}
        figures["group_get_ms"] = clocked(lambda: signature().get(timeout=TIMEOUT)) * 1e3
        figures["group_get_0_ms"] = clocked(at_once) * 1e3
        return figures

    def chord(self, count: int) -> Figures:
        """Sum the results of a group in another task."""
        signature = chord([self.tasks.add.s(number, 1) for number in range(count)], self.tasks.total.s())
        return {"chord_ms": clocked(lambda: signature().get(timeout=TIMEOUT)) * 1e3}

    def large(self, count: int) -> Figures:
        """Fetch a large result."""
        seconds = [clocked(lambda: self.tasks.document.delay(LARGE).get(timeout=TIMEOUT)) for _ in range(count)]
        return {"large_ms": sorted(seconds)[count // 2] * 1e3}

    def queue(self, count: int) -> Figures:
        """Queue tasks, and leave their results where they are."""
        seconds = clocked(lambda: self.unread.extend(self.send(number) for number in range(count)))
        return {"queue_ms": seconds / count * 1e3}

    def fetch(self, count: int) -> Figures:
        """Fetch those results, which are all there, and let go of them."""
        seconds = clocked(lambda: [self.receive(each) for each in self.unread])
        peak = self.memory()["memory_mb"]
        self.unread.clear()
        return {"fetch_ms": seconds / count * 1e3, "client_mb": peak}

    def memory(self, count: int = 0) -> Figures:
        """Return this process's memory, and how many objects Python holds in it."""
        gc.collect()
        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[1])
        return {"memory_mb": pages * os.sysconf("SC_PAGE_SIZE") / 1e6, "blocks": float(sys.getallocatedblocks())}

    def waiting(self, count: int) -> Figures:
        """Run tasks that wait."""
        return self._rate([self.tasks.wait.s(0.01)] * count)

    def computing(self, count: int) -> Figures:
        """Run tasks that compute."""
        return self._rate([self.tasks.compute.s(0.01)] * count)

    def _rate(self, signatures: list[Any]) -> Figures:
        def run() -> None:
            for result in [signature.clone().delay() for signature in signatures]:
                result.get(timeout=TIMEOUT)

        return {"per_s": len(signatures) / clocked(run)}


# --- The floor: the same without Celery --------------------------------------------------------------------


class RedisFloor(Client):
    """LPUSH and BRPOP carry the request; the answer is stored with SET and announced with PUBLISH."""

    def __init__(self) -> None:
        self.client: Any = redis.Redis.from_url(os.environ["REDIS_URL"], socket_timeout=None)
        self.announcements: Any = self.client.pubsub()  # type: ignore[no-untyped-call]
        self.announcements.subscribe("floor-replies")
        self.announcements.get_message(timeout=TIMEOUT)

    def send(self, number: int) -> Any:
        """Queue a request."""
        self.client.lpush("floor-requests", number)

    def receive(self, sent: Any) -> Any:
        """Take the next announcement."""
        message = self.announcements.get_message(timeout=TIMEOUT)
        assert message
        return int(message["data"])

    def answer(self) -> None:
        """Be the worker, for ever."""
        while True:
            number = int(self.client.brpop(["floor-requests"])[1])
            with self.client.pipeline() as commands:
                commands.set(f"floor-reply-{number}", number + 1, ex=3600)
                commands.publish("floor-replies", number + 1)
                commands.execute()


class PikaFloor(Client):
    """A persistent message each way: to a shared queue of the given kind, and back to a classic one."""

    def __init__(self, kind: str) -> None:
        self.channel = pika.BlockingConnection(
            pika.URLParameters(f"{os.environ['RABBITMQ_URL']}?heartbeat=0")
        ).channel()
        self.requests, self.replies = f"floor-{kind}", f"floor-{kind}-replies"
        self.channel.queue_declare(self.requests, durable=True, arguments={"x-queue-type": kind})
        self.channel.queue_declare(self.replies, durable=True)
        self.answers: Any = None

    def publish(self, queue: str, number: int) -> None:
        """Publish a persistent message."""
        self.channel.basic_publish("", queue, str(number).encode(), pika.BasicProperties(delivery_mode=2))

    def send(self, number: int) -> Any:
        """Queue a request."""
        self.answers = self.answers or self.channel.consume(self.replies, auto_ack=True)
        self.publish(self.requests, number)

    def receive(self, sent: Any) -> Any:
        """Take the next reply."""
        return int(next(self.answers)[2])

    def answer(self) -> None:
        """Be the worker, for ever."""
        self.channel.basic_qos(prefetch_count=2)
        for method, _, body in self.channel.consume(self.requests):
            self.publish(self.replies, int(body) + 1)
            self.channel.basic_ack(method.delivery_tag)


CLIENTS: dict[str, Callable[[], Client]] = {
    "celery": CeleryClient,
    "redis-py": RedisFloor,
    "pika-quorum": lambda: PikaFloor("quorum"),
    "pika-classic": lambda: PikaFloor("classic"),
}


def main(kind: str, role: str = "") -> None:
    """Be the client of that kind, until standard input ends."""
    if kind == "first":
        first = CeleryClient()
        print(first.receive(first.send(1)), flush=True)
        return
    client = CLIENTS[kind]()
    if role:
        client.answer()
    for line in sys.stdin:
        what, count = line.split()
        print(json.dumps(getattr(client, what)(int(count))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
