"""Programs of other kinds than the demo: threads, greenlets and forked processes queue and fetch side by side."""

import copy
import gc
import json
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery, group
from celery.contrib.testing.app import setup_default_app
from celery.exceptions import TimeoutError as ResultTimeout
from celery.result import AsyncResult

from lab.servers import ROOT, Worker, run, wait_until
from tests.conftest import Stack

# Tasks that the demo has no use for.
MORE_TASKS = """
import multiprocessing
from celery import shared_task
from celery.result import allow_join_result
from tasks import add, app

@app.task
def waits(number):
    with allow_join_result():
        return add.delay(number, 1).get(timeout=30)

@app.task(bind=True)
def steps(self, number):
    for step in range(number):
        self.update_state(state="PROGRESS", meta={"step": step})
    return number

def _child(results):
    try:
        results.put([add.delay(n, n).get(timeout=30) for n in range(12)])
    except BaseException as exc:
        results.put(repr(exc))

@app.task
def start_processes():
    multiprocessing.current_process()._config["daemon"] = False  # Python starts none from a pool process otherwise
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=_child, args=(results,)) for _ in range(3)]
    for child in children:
        child.start()
    return [results.get() for _ in children]
"""


@pytest.fixture
def more(stack: Stack, tmp_path: Path) -> Iterator[ModuleType]:
    """The tasks of the demo and those above, with a worker of three processes."""
    (tmp_path / "more_tasks.py").write_text(MORE_TASKS)
    env = {**stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Worker(stack.logs / "w.log", "--include", "more_tasks", "-c", "3", env=env):
        yield stack.load("tasks")


def _in_threads(number: int, action: Any, items: Any) -> list[Any]:
    with ThreadPoolExecutor(number) as threads:
        return [future.result(90) for future in [threads.submit(action, item) for item in items]]


def test_threads_fetch_what_the_main_thread_queued(tasks: ModuleType) -> None:
    """With a reader in each thread, most of the results got to the wrong one, and the main thread heard no more."""
    results = [tasks.add.delay(number, 1) for number in range(60)]
    assert _in_threads(12, lambda result: result.get(timeout=60), results) == list(range(1, 61))
    assert tasks.add.delay(1, 1).get(timeout=30) == 2


def test_threads_queue_and_fetch_at_once(tasks: ModuleType) -> None:
    def one_after_another(start: int) -> list[int]:
        return [tasks.add.delay(start, number).get(timeout=60) for number in range(5)]

    expected = [[start + number for number in range(5)] for start in range(16)]
    assert _in_threads(16, one_after_another, range(16)) == expected


def test_threads_fetch_groups_and_poll(tasks: ModuleType) -> None:
    def fetch_group(start: int) -> list[int]:
        values: list[int] = group(tasks.add.s(start, number) for number in range(10))().get(timeout=60)
        return values

    def poll(start: int) -> list[int]:
        result = tasks.add.delay(start, 0)
        wait_until(result.ready, "the state", timeout=60)
        return [result.get(timeout=1)]

    def both(start: int) -> list[int]:
        return fetch_group(start) + poll(start)

    expected = [[start + number for number in range(10)] + [start] for start in range(8)]
    assert _in_threads(8, both, range(8)) == expected


def test_a_result_is_read_from_another_thread(tasks: ModuleType) -> None:
    result = tasks.add.delay(1, 2)
    assert _in_threads(1, lambda task_id: AsyncResult(task_id, app=tasks.app).get(timeout=30), [result.id]) == [3]


def test_what_waits_for_a_result_queues_and_fetches(tasks: ModuleType) -> None:
    """It is called by the thread that reads, which waited for itself."""
    fetched: list[int] = []
    first = tasks.add.delay(1, 1)
    first.then(lambda result: fetched.append(tasks.add.delay(result.result, 1).get(timeout=10)))
    assert first.get(timeout=30) == 2
    assert fetched == [3]


def test_what_waits_for_a_result_fetches_while_another_thread_reads(tasks: ModuleType) -> None:
    """With Redis it is called by the thread that has just subscribed, and that keeps the one that reads out."""
    fetched: list[int] = []
    first = tasks.add.delay(1, 1)
    wait_until(AsyncResult(first.id, app=tasks.app).ready, "the result is there")
    slow = tasks.add.apply_async((3, 3), countdown=4)
    with ThreadPoolExecutor(1) as threads:
        reading = threads.submit(slow.get, timeout=60)
        wait_until(lambda: tasks.app.backend.result_consumer._reader, "the thread reads")
        first.then(lambda result: fetched.append(tasks.add.delay(result.result, 1).get(timeout=10)))
        assert tasks.add.apply_async((2, 2), countdown=1).get(timeout=60) == 4
        assert reading.result(60) == 6
    assert fetched == [3]


def test_time_outs_hold_in_every_thread(stack: Stack) -> None:
    tasks = stack.load("tasks")  # and no worker
    results = [tasks.add.delay(1, number) for number in range(12)]

    def give_up(result: Any) -> bool:
        with pytest.raises(ResultTimeout):
            result.get(timeout=0.5)
        return True

    assert _in_threads(12, give_up, results) == [True] * 12
    with Worker(stack.logs / "w.log", env=stack.env):
        assert [result.get(timeout=60) for result in results] == list(range(1, 13))


def test_threads_that_end_leave_no_connection_and_no_queue(stack: Stack) -> None:
    with Worker(stack.logs / "w.log", env=stack.env):
        tasks = stack.load("tasks")

        def fetch(number: int) -> None:
            assert tasks.add.delay(number, 1).get(timeout=60) == number + 1

        def count() -> tuple[int, int]:
            if stack.store == "redis":
                with stack.redis_admin() as redis:
                    database = str(redis.client_info()["db"])
                    return sum(client["db"] == database for client in redis.client_list()), 0
            ours = {"tasks", "w@"}
            names = [queue["name"] for queue in stack.rabbitmq.queues(stack.vhost)]
            replies = [name for name in names if name not in ours and len(name) == 36]
            return len(stack.rabbitmq.request("GET", f"vhosts/{stack.vhost}/connections")), len(replies)

        def many() -> None:
            for number in range(40):
                thread = threading.Thread(target=fetch, args=(number,))
                thread.start()
                thread.join(90)

        fetch(0)
        connections, queues = wait_until(lambda: (counted := count())[0] > 2 and counted, "connections listed")
        many()
        wait_until(lambda: count()[0] <= connections + 2 and count()[1] == queues, "as many as before")


def test_a_pickled_or_copied_result_is_fetched_and_has_no_password(tasks: ModuleType, shared_stack: Stack) -> None:
    """Unpickling made a second client with the same reply queue, and closed the first one's connection."""
    result = tasks.add.delay(1, 2)
    waiting = tasks.nap.delay(1)
    assert tasks.add.delay(1, 1).get(timeout=30) == 2
    pickled = pickle.dumps(result)
    for url in (shared_stack.broker_url, shared_stack.redis_url):
        assert url.encode() not in pickled
    for another in (pickle.loads(pickled), copy.copy(waiting), copy.deepcopy(waiting)):
        assert another.backend is tasks.app.backend
    assert pickle.loads(pickled).get(timeout=30) == 3
    assert waiting.get(timeout=30) == 1


# A parent and three children queue and fetch 12 each; the last line tells how many of the 48 arrived.
FORKS = """
import json, multiprocessing, os, sys, threading
import tasks

def fetch(name):
    results = [tasks.add.delay(name, n) for n in range(12)]
    return sum(result.get(timeout=60) == name + n for n, result in enumerate(results))

def fork(number):
    read, write = os.pipe()
    if os.fork() == 0:
        arrived = 0
        try:
            arrived = fetch(number)
        finally:
            os.write(write, bytes([arrived]))
            os._exit(0)
    return lambda: os.read(read, 1)[0]

def multiprocess(number):
    queue = multiprocessing.SimpleQueue()
    multiprocessing.Process(target=lambda: queue.put(fetch(number))).start()
    return queue.get

def main(how, when):
    multiprocessing.set_start_method("fork")
    start = fork if how == "fork" else multiprocess
    held = []
    if when == "after":
        held = [tasks.add.delay(1, 1), tasks.add.delay(2, 2)]
        assert held[0].get(timeout=60) == 2
    if when == "meanwhile":  # threads of the parent wait for results, and hold locks
        for seconds in (3, 3, 3):
            result = tasks.nap.delay(seconds)
            held.append(result)
            threading.Thread(target=result.get, kwargs={"timeout": 60}).start()
    children = [start(100 * number) for number in (1, 2, 3)]
    arrived = [fetch(0)] + [child() for child in children]
    for result in held:
        result.get(timeout=60)
    arrived.append(fetch(0))
    print(json.dumps(arrived))

main(*sys.argv[1:])
"""


@pytest.mark.parametrize("how", ["fork", "multiprocessing"])
@pytest.mark.parametrize("when", ["before", "after", "meanwhile"])
def test_forked_processes_fetch_their_own(
    tasks: ModuleType, shared_stack: Stack, tmp_path: Path, how: str, when: str
) -> None:
    """Before the app was used (gunicorn, uWSGI), after (--preload), and while threads of the parent wait."""
    (tmp_path / "forks.py").write_text(FORKS)
    env = {**shared_stack.env, "PYTHONPATH": str(ROOT)}
    done = run(sys.executable, str(tmp_path / "forks.py"), how, when, env=env, timeout=110)
    assert json.loads(done.stdout.splitlines()[-1]) == [12] * 5, done.stderr


def test_a_task_starts_processes_that_queue_and_fetch(more: ModuleType) -> None:
    result = more.app.send_task("more_tasks.start_processes")
    assert result.get(timeout=100) == [[2 * number for number in range(12)]] * 3


def test_a_task_waits_for_one_that_it_queues(more: ModuleType) -> None:
    """From the first one in each pool process on: the reply queue is there before the task is sent."""
    assert [more.app.send_task("more_tasks.waits", (n,)).get(timeout=60) for n in range(9)] == [*range(1, 10)]


@pytest.mark.parametrize("first", ["", "import celeryconfig\n"], ids=["patched first", "settings first"])
def test_greenlets_share_one_client(tasks: ModuleType, shared_stack: Stack, tmp_path: Path, first: str) -> None:
    """Also where the settings are imported before gevent patches, as with gunicorn --preload."""
    pytest.importorskip("gevent")
    (tmp_path / "greenlets.py").write_text(
        f"{first}from gevent import monkey; monkey.patch_all()\n"
        "import gevent, json, tasks\n"
        "def fetch(n):\n"
        "    return tasks.add.delay(n, 1).get(timeout=60)\n"
        "jobs = [gevent.spawn(fetch, n) for n in range(60)]\n"
        "gevent.joinall(jobs, timeout=90)\n"
        "print(json.dumps([job.value for job in jobs]))\n"
    )
    env = {**shared_stack.env, "PYTHONPATH": str(ROOT)}
    done = run(sys.executable, str(tmp_path / "greenlets.py"), env=env, timeout=110)
    assert json.loads(done.stdout.splitlines()[-1]) == list(range(1, 61)), done.stderr
    assert "used by another greenlet" not in done.stderr


def test_on_message_hears_each_state_of_its_own_task_once_and_in_order(more: ModuleType) -> None:
    def listen(number: int) -> tuple[str, list[dict[str, Any]]]:
        heard: list[dict[str, Any]] = []
        result = more.app.send_task("more_tasks.steps", (30,))
        assert result.get(timeout=60, on_message=heard.append) == 30
        return result.id, heard

    for task_id, heard in [*map(listen, range(10)), *_in_threads(4, listen, range(20))]:
        assert {meta["task_id"] for meta in heard} == {task_id}
        steps = [meta["result"]["step"] for meta in heard if meta["status"] == "PROGRESS"]
        assert steps == sorted(set(steps))
        if steps:  # it may have been over before get() looked
            assert steps == list(range(steps[0], 30))
        assert [meta["status"] for meta in heard].count("SUCCESS") == 1
        assert heard[-1]["status"] == "SUCCESS"


def test_the_name_of_a_reply_queue_that_a_thread_had_before_the_backend_is_read_too(rabbitmq_stack: Stack) -> None:
    """Celery names it when a task is queued, shortly before it makes the backend: two first threads may be as fast."""
    tasks = rabbitmq_stack.load("tasks")
    both, made = threading.Barrier(2), threading.Event()

    def queue(first: bool) -> int:
        oid = tasks.app.thread_oid
        both.wait(30)
        if first:
            assert tasks.app.backend
            made.set()
        assert made.wait(30)
        value: int = tasks.app.send_task("tasks.add", (1, 1), reply_to=oid).get(timeout=60)
        return value

    with Worker(rabbitmq_stack.logs / "w.log", env=rabbitmq_stack.env):
        assert _in_threads(2, queue, [True, False]) == [2, 2]
        assert tasks.add.delay(1, 1).get(timeout=30) == 2


def test_a_test_app_lets_go_of_its_backend(shared_stack: Stack) -> None:
    """The fixtures of Celery's pytest plugin end each app with this, or each test would leave a connection."""
    app: Any = Celery("brief", set_as_current=False)
    app.config_from_object(shared_stack.load("celeryconfig"))
    with setup_default_app(app):
        backend = weakref.ref(app.backend)
    gc.collect()
    assert backend() is None
    assert app.backend


def test_redis_is_not_imported_for_rabbitmq(rabbitmq_stack: Stack) -> None:
    code = "import sys, tasks; assert tasks.app.backend; print('redis' in sys.modules)"
    done = run(sys.executable, "-c", code, env=rabbitmq_stack.env)
    assert done.stdout.strip() == "False", done.stderr
