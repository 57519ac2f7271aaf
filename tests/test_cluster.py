"""What a cluster needs of a client and a worker; the cluster itself is run by lab/faults.py."""

import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
import redis
from kombu.exceptions import OperationalError
from pika.exceptions import ChannelClosedByBroker

import witness
from hardening.sentinel import NO_MASTER, WRITES, Client
from lab.faults import CLUSTER_FAULTS, table
from lab.scale import HEAD, QUEUES
from lab.servers import ROOT, STORES, Worker, as_admin, run, wait_until
from lab.stack import NODES
from tests.conftest import Stack
from tests.proxy import Proxy


@pytest.fixture
def client(redis_stack: Stack) -> Client:
    """redis-py's client as the backend makes it, for a Redis without replicas; these keys have no prefix."""
    made: Any = Client.from_url(as_admin(redis_stack.redis_url), socket_timeout=10)
    return cast(Client, made)


def test_a_write_that_no_replica_has_is_none(client: Client) -> None:
    store: Any = client.register_script('redis.call("SET", KEYS[1], ARGV[1])')
    for write in (
        lambda: client.set("key", "value"),
        lambda: client.execute_command("SETEX", "key", 10, "value"),
        lambda: client.incrby("number"),
        lambda: store(keys=["key"], args=["value"]),
    ):
        with pytest.raises(OperationalError, match="no replica has copied it"):
            write()
    assert client.get("key") == b"value"
    assert {"EVALSHA", "SET", "SETEX", "INCRBY"} == WRITES


@pytest.mark.parametrize("answer", NO_MASTER)
def test_a_redis_that_is_no_master_any_more_is_away(client: Client, answer: str) -> None:
    fails: Any = client.register_script(f'return redis.error_reply("{answer} and some reason")')
    with pytest.raises(OperationalError):
        fails()
    client.get("key")


def test_another_error_stays_one(client: Client) -> None:
    with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
        client.register_script('redis.call("RPUSH", "list", 1); return redis.call("GET", "list")')()


def test_results_through_a_unix_socket(redis_stack: Stack, tmp_path: Path) -> None:
    path, server = tmp_path / "redis.sock", urlsplit(redis_stack.redis_url)

    def serve() -> None:
        while True:
            try:
                accepted, _ = listener.accept()
            except OSError:  # closed
                return
            onward = socket.create_connection((server.hostname, server.port or 6379))
            for source, target in ((accepted, onward), (onward, accepted)):
                threading.Thread(target=pipe, args=(source, target), daemon=True).start()

    def pipe(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=serve, daemon=True).start()
        login = server.netloc.rpartition("@")[0]
        url = f"redis+socket://{login + '@' if login else ''}{path}?virtual_host={server.path.strip('/')}"
        env = {**redis_stack.env, "REDIS_URL": url}
        with Worker(redis_stack.logs / "socket.log", env=env):
            tour = run(sys.executable, "producer.py", "value", "where", env=env)
        assert tour.returncode == 0, tour.stdout + tour.stderr


def test_a_worker_comes_back_while_another_connection_holds_its_control_queue(
    redis_stack: Stack, tmp_path: Path
) -> None:
    """So does RabbitMQ's node that is cut off, for its own end of the old connection."""
    with Proxy(redis_stack.broker_url) as proxy:
        log = tmp_path / "held.log"
        with Worker(log, env={**redis_stack.env, "RABBITMQ_URL": proxy.url()}) as worker:
            proxy.cut()
            with witness.rabbitmq_channel(redis_stack.broker_url) as channel:
                name = f"held@{socket.gethostname()}.celery.pidbox"

                def hold() -> bool:
                    nonlocal channel
                    try:
                        channel.queue_declare(name, exclusive=True)
                    except ChannelClosedByBroker:  # RabbitMQ has not noticed yet
                        channel = channel.connection.channel()
                        return False
                    return True

                wait_until(hold, "the worker's queue is free")
                proxy.restore()
                wait_until(lambda: log.read_text().count("Connected to") == 2, f"worker connected again, {log}")
                assert redis_stack.load("tasks").add.delay(2, 3).get(timeout=30) == 5
            assert worker.process.poll() is None


PAGE = (ROOT / "docs" / "beyond-one-machine.md").read_text()


def test_the_page_shows_one_two_and_three_nodes_with_both_stores() -> None:
    header, _, *rows = PAGE.split("<!-- scale -->\n")[1].split("\n\n")[0].splitlines()
    assert header == f"| {' | '.join(HEAD)} |"
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [
        [store, str(count + 1), str(queues)]
        for store in STORES
        for count in range(len(NODES))
        for queues in (1, len(QUEUES))
    ]
    for *_, node, worker, client in cells:  # what is missing first
        assert float(node.strip(" %")) > 80 > 40 > float(worker.strip(" %")) > float(client.strip(" %")) * 0.5


def test_the_page_shows_every_fault_and_nothing_is_lost() -> None:
    header, _, *rows = PAGE.split("<!-- cluster faults -->\n")[1].split("\n\n")[0].splitlines()
    assert header == table([], CLUSTER_FAULTS).splitlines()[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    shown = {(what, store) for what, store, *_ in cells}
    assert shown == {(fault.text, store) for fault in CLUSTER_FAULTS for store in STORES}
    assert {lost for _, _, _, _, lost, *_ in cells} == {"0"}
    longest_get, longest_delay = (max(int(row[column].removesuffix(" s")) for row in cells) for column in (7, 8))
    said = f"No `get(timeout=5)` took longer than {longest_get} seconds, and no `delay()` longer than {longest_delay}:"
    assert said in PAGE
