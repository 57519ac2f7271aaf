"""docs/when-something-is-wrong.md: each situation is brought about, and gives precisely the text of its heading."""

import json
import re
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pika
import pika.exceptions
import pytest
import redis
from celery import chord
from celery.exceptions import InvalidTaskError, NotRegistered
from celery.exceptions import TimeoutError as ResultTimeout
from kombu.exceptions import OperationalError

import witness
from hardening import publishing
from hardening.environment import service_url
from lab.servers import ROOT, TAKEN, Worker, as_admin, run, wait_until
from tests.conftest import Stack
from tests.proxy import Proxy

PAGE = (ROOT / "docs" / "when-something-is-wrong.md").read_text()
# The headings. A text with backticks in it stands between two of them on each side.
TEXTS: list[str] = [
    text.strip()
    for heading in re.findall(r"^##+ (.*`.*)$", PAGE, re.MULTILINE)
    for _, text in re.findall(r"(?<!`)(`{1,2})(?!`)(.+?)(?<!`)\1(?!`)", heading)
]
# Parts of texts that another file's test brings about.
ELSEWHERE = ("exited prematurely", "given up after")

# A project with no more than the settings that a test is about; it does not know celeryconfig.py.
JOBS = """
from celery import Celery
app = Celery("jobs")
app.conf.update({settings})
@app.task(name="double")
def double(x):
    return 2 * x
"""
CLIENT = (sys.executable, "-c", "import jobs; jobs.double.delay(21).get(timeout=2)")
WORKER = ("celery", "-A", "jobs", "worker", "-c", "1")


def quoted(part: str) -> str:
    """Return the one text of a heading that contains this part."""
    found = [text for text in TEXTS if part in text]
    assert len(found) == 1, f"{part!r} should be in one of {TEXTS}"
    return found[0]


def _write_jobs(folder: Path, **settings: object) -> None:
    (folder / "jobs.py").write_text(JOBS.format(settings=settings))


def _output(command: tuple[str, ...], folder: Path, **env: str) -> str:
    """Run a command that fails in the project's folder, and return what it prints."""
    done = run(*command, cwd=folder, env={"PYTHONPATH": "", **env})
    assert done.returncode != 0, done.stdout
    return done.stdout + done.stderr


def _redis_says(url: str, *commands: str, login: bool = True) -> list[str]:
    """Send commands to Redis, all in one packet, and return its answers, one line each."""
    parts = urlsplit(url)
    if login and parts.password:
        commands = (f'AUTH "{unquote(parts.username or "default")}" "{unquote(parts.password)}"', *commands)
    with socket.create_connection((parts.hostname or "", parts.port or 6379), timeout=10) as connection:
        connection.sendall("".join(f"{command}\r\n" for command in commands).encode())
        with connection.makefile() as answers:
            return [answers.readline().rstrip() for _ in commands]


def test_every_quoted_text_has_a_test() -> None:
    parts = re.findall(r"""quoted\(["'](.+?)["']\)""", Path(__file__).read_text())
    assert len(TEXTS) > 25
    assert {quoted(part) for part in (*parts, *ELSEWHERE)} == set(TEXTS)
    others = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    assert [part for part in ELSEWHERE if part not in others] == []


# --- Settings ---------------------------------------------------------------------------------------------


def test_rpc_does_not_support_chords(rabbitmq_stack: Stack) -> None:
    tasks = rabbitmq_stack.load("tasks")
    with pytest.raises(NotImplementedError) as caught:
        chord([tasks.add.s(1, 2)])(tasks.total.s())
    assert f"NotImplementedError: {caught.value}".startswith(quoted("chords"))


def test_unknown_result_backend(redis_stack: Stack, tmp_path: Path) -> None:
    _write_jobs(tmp_path, broker_url=redis_stack.broker_url, result_backend="amqp://")
    assert quoted("Unknown result backend") in _output(CLIENT, tmp_path)


def test_old_and_new_setting_names(redis_stack: Stack, tmp_path: Path) -> None:
    _write_jobs(tmp_path, BROKER_URL=redis_stack.broker_url, result_backend=redis_stack.redis_url)
    for command in (CLIENT, WORKER):
        assert quoted("Cannot mix") in _output(command, tmp_path)


def test_result_backend_in_the_environment(redis_stack: Stack, tmp_path: Path) -> None:
    _write_jobs(tmp_path, broker_url=redis_stack.broker_url)
    assert quoted("No module named") in _output(WORKER, tmp_path, RESULT_BACKEND="rabbitmq")


def test_rediss_without_a_parameter(redis_stack: Stack, tmp_path: Path) -> None:
    _write_jobs(tmp_path, broker_url=redis_stack.broker_url, result_backend="rediss://127.0.0.1:1/0")
    assert quoted("rediss") in _output(CLIENT, tmp_path)


def test_a_result_without_an_app(tmp_path: Path) -> None:
    code = "from celery.result import AsyncResult; AsyncResult('some-id').state"
    assert quoted("DisabledBackend") in _output((sys.executable, "-c", code), tmp_path)


# --- RabbitMQ ---------------------------------------------------------------------------------------------


def test_the_queues_of_older_celery(redis_stack: Stack, tmp_path: Path) -> None:
    """Celery before 5.7 declares its control and event queues in the way that these two settings bring back."""
    connection = pika.BlockingConnection(pika.URLParameters(redis_stack.broker_url))
    try:
        connection.channel().queue_declare("transient")
    except pika.exceptions.ConnectionClosedByBroker as exc:
        refused: str = exc.reply_text
    else:
        connection.close()
        pytest.skip("this RabbitMQ still permits transient non-exclusive queues; 4.3 does not")
    assert quoted("transient_nonexcl_queues") in refused
    _write_jobs(tmp_path, broker_url=redis_stack.broker_url, control_queue_exclusive=False, event_queue_exclusive=False)
    worker = Worker(tmp_path / "w.log", cwd=tmp_path, app="jobs", env={"PYTHONPATH": ""})
    try:
        wait_until(lambda: worker.says(quoted("transient_nonexcl_queues")), "refused")
        assert not worker.says(" ready.")
    finally:
        worker.kill()
    with Worker(tmp_path / "w.log", cwd=ROOT, env=redis_stack.env):
        pass  # these settings are fit for it


def test_a_queue_of_another_type(redis_stack: Stack, tmp_path: Path) -> None:
    with witness.rabbitmq_channel(redis_stack.broker_url) as channel:
        channel.queue_declare("jobs", durable=True)
    _write_jobs(
        tmp_path, broker_url=redis_stack.broker_url, task_default_queue="jobs", task_default_queue_type="quorum"
    )
    for command in (CLIENT, WORKER):
        assert quoted("x-queue-type") in _output(command, tmp_path)


def test_an_exchange_of_another_type(redis_stack: Stack, tmp_path: Path) -> None:
    with witness.rabbitmq_channel(redis_stack.broker_url) as channel:
        channel.exchange_declare("jobs", "topic", durable=True)
    _write_jobs(tmp_path, broker_url=redis_stack.broker_url, task_default_queue="jobs")
    for command in (CLIENT, WORKER):
        assert quoted("'type' for exchange") in _output(command, tmp_path)


def test_two_workers_of_one_node_name(redis_stack: Stack, tmp_path: Path) -> None:
    with Worker(tmp_path / "same.log", env=redis_stack.env):
        (tmp_path / "second").mkdir()
        second = Worker(tmp_path / "second" / "same.log", env=redis_stack.env)
        try:
            assert second.process.wait(30) != 0
        finally:
            second.kill()
        assert second.says(quoted("RESOURCE_LOCKED"))
        with Worker(tmp_path / "other.log", env=redis_stack.env):
            pass  # a node name of its own


def test_a_wrong_rabbitmq_password(redis_stack: Stack, tmp_path: Path) -> None:
    broker = urlsplit(redis_stack.broker_url)
    wrong = broker._replace(netloc=f"{broker.username}:wrong@{broker.netloc.rpartition('@')[2]}").geturl()
    _write_jobs(tmp_path, broker_url=wrong)
    for command in (CLIENT, WORKER):
        assert quoted("ACCESS_REFUSED") in _output(command, tmp_path)


def test_nothing_listens_where_rabbitmq_should_be(tmp_path: Path) -> None:
    _write_jobs(tmp_path, broker_url="amqp://127.0.0.1:1//", task_publish_retry=False)
    assert quoted("Connection refused") in _output(CLIENT, tmp_path)


def test_rabbitmq_goes_away(redis_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "LIMIT", 2.0)
    with Proxy(redis_stack.broker_url) as proxy:
        tasks = replace(redis_stack, broker_url=proxy.url()).load("tasks")
        tasks.add.delay(1, 2)

        def queue_and_cut() -> None:
            with publishing.together():
                tasks.add.delay(1, 2)
                proxy.cut()
                tasks.add.apply_async((1, 2), task_id="too-late")

        with pytest.raises(publishing.NotPlaced) as not_placed:
            queue_and_cut()
        with pytest.raises(OperationalError) as not_taken:
            tasks.add.delay(1, 2)
        proxy.restore()
    assert "too-late" in not_placed.value.ids
    for raised, part in ((not_placed, quoted("NotPlaced")), (not_taken, quoted("has not taken the task"))):
        assert f"{raised.type.__module__}.{raised.type.__name__}: {raised.value}".startswith(part)


def test_a_task_that_takes_longer_than_the_consumer_timeout(redis_stack: Stack, tmp_path: Path) -> None:
    """RabbitMQ's is 30 minutes; a queue may have a shorter one."""
    arguments = {"x-queue-type": "quorum", "x-consumer-timeout": 1_000}
    with witness.rabbitmq_channel(redis_stack.broker_url) as channel:
        channel.queue_declare("jobs", durable=True, arguments=arguments)
    (tmp_path / "jobs.py").write_text(
        "import time\n"
        "from celery import Celery\n"
        "from kombu import Queue\n"
        "app = Celery('jobs')\n"
        f"app.conf.update(broker_url={redis_stack.broker_url!r}, task_default_queue='jobs', task_acks_late=True)\n"
        f"app.conf.task_queues = [Queue('jobs', queue_arguments={arguments})]\n"
        "@app.task(name='nap')\n"
        "def nap(): time.sleep(60)\n"
    )
    with Worker(tmp_path / "w.log", cwd=tmp_path, app="jobs", env={"PYTHONPATH": ""}) as worker:
        done = run(sys.executable, "-c", "import jobs; jobs.nap.delay()", cwd=tmp_path, env={"PYTHONPATH": ""})
        assert done.returncode == 0, done.stderr
        wait_until(lambda: worker.says(quoted("ConsumerCancelled")), "taken back", 60)
        worker.kill()


def test_polling_while_many_results_wait(rabbitmq_stack: Stack) -> None:
    """With Celery's own rpc://."""
    tasks = rabbitmq_stack.load("tasks")
    tasks.app.conf.result_backend = "rpc://"
    result = tasks.add.delay(1, 2)
    with witness.rabbitmq_channel(rabbitmq_stack.broker_url) as channel:
        for number in range(1_001):
            reply = {"task_id": f"other-{number}", "status": "SUCCESS", "result": number, "children": []}
            properties = pika.BasicProperties(
                content_type="application/json", content_encoding="utf-8", correlation_id=f"other-{number}"
            )
            channel.basic_publish("", tasks.app.thread_oid, json.dumps(reply), properties)
    with pytest.raises(Exception, match=result.id) as caught:
        _ = result.state
    assert f"{caught.type.__module__}.{caught.type.__name__}" == quoted("BacklogLimitExceeded")


def test_a_worker_that_is_up_but_runs_nothing(redis_stack: Stack, tmp_path: Path) -> None:
    """Two tasks with a countdown on a classic queue fill a worker of two processes that reserves none."""
    settings = {"broker_url": redis_stack.broker_url, "result_backend": as_admin(redis_stack.redis_url)}
    _write_jobs(tmp_path, **settings, worker_prefetch_multiplier=1, task_acks_late=True)
    code = "from jobs import double; [double.apply_async((1,), countdown=300) for _ in range(2)]; "
    client = (sys.executable, "-c", code + "double.delay(2).get(timeout=3)")
    with Worker(tmp_path / "w.log", cwd=tmp_path, app="jobs", env={"PYTHONPATH": ""}) as worker:
        assert "celery.exceptions.TimeoutError" in _output(client, tmp_path)
        assert worker.log.read_text().count(quoted("received")) == 2
        assert not worker.says(quoted("succeeded in"))
        worker.kill()


def test_docker_stop_kills_the_worker_and_the_task_comes_back(stack: Stack) -> None:
    """SIGTERM, and SIGKILL when stop_grace_period is over: what docker stop and docker compose stop do."""
    tasks = stack.load("tasks")
    with Worker(stack.logs / "first.log", env=stack.env) as first:
        result = tasks.nap.delay(5)
        wait_until(lambda: first.says(result.id), "task received")
        first.process.terminate()
        wait_until(lambda: first.says(quoted("Warm shutdown")), "SIGTERM arrived")
        first.kill()
        assert f"exited with code {128 + signal.SIGKILL}" == quoted("exited with code")
        assert first.process.returncode == -signal.SIGKILL  # Docker adds 128 to the signal's number
    with Worker(stack.logs / "second.log", env=stack.env):
        assert result.get(timeout=60) == 5


# --- Redis ------------------------------------------------------------------------------------------------


def test_a_full_redis(redis_stack: Stack) -> None:
    """Redis is full between two commands of one packet: it takes no other client's command between them."""
    url = as_admin(service_url("REDIS"))
    with redis.Redis.from_url(url, socket_timeout=10) as client:
        settings = client.config_get("maxmemory*")
    if settings["maxmemory-policy"] != "noeviction":
        pytest.skip("this Redis would throw keys away")
    answers = _redis_says(
        url, "CONFIG SET maxmemory 1", f"SET {TAKEN} 1", f"CONFIG SET maxmemory {settings['maxmemory']}"
    )
    assert answers[-3:] == ["+OK", f"-{quoted('OOM')}", "+OK"]


def test_a_key_prefix_that_the_user_has_no_right_to(redis_stack: Stack, tmp_path: Path) -> None:
    if as_admin(redis_stack.redis_url) == redis_stack.redis_url:
        pytest.skip("this Redis has no user with few rights")
    _write_jobs(tmp_path, broker_url=redis_stack.broker_url, result_backend=redis_stack.redis_url)
    assert quoted("No permissions") in _output(CLIENT, tmp_path)


def test_redis_without_a_password(redis_stack: Stack, tmp_path: Path) -> None:
    parts = urlsplit(redis_stack.redis_url)
    if not parts.password:
        pytest.skip("this Redis asks for no password")
    assert _redis_says(redis_stack.redis_url, "PING", login=False) == [f"-{quoted('NOAUTH')}"]
    without = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    once = {"retry_policy": {"max_retries": 0}}
    _write_jobs(
        tmp_path,
        broker_url=redis_stack.broker_url,
        result_backend=without,
        result_backend_transport_options=once,
    )
    assert quoted("HELLO") in _output(CLIENT, tmp_path)
    wrong = parts._replace(netloc=f"{parts.username}:wrong@{parts.netloc.rpartition('@')[2]}").geturl()
    _write_jobs(
        tmp_path, broker_url=redis_stack.broker_url, result_backend=wrong, result_backend_transport_options=once
    )
    assert quoted("invalid username-password pair") in _output(CLIENT, tmp_path)


def test_the_store_is_away(stack: Stack) -> None:
    code = "import tasks; tasks.app.AsyncResult('some-id').state"
    away = {"RABBITMQ_URL": "amqp://127.0.0.1:1//", "REDIS_URL": "redis://127.0.0.1:1/0"}
    done = run(sys.executable, "-c", code, env={**stack.env, **away})
    text = quoted("OperationalError: Redis is away:") if stack.store == "redis" else quoted("RabbitMQ is away:")
    assert text in done.stderr


def test_a_worker_whose_redis_is_away(redis_stack: Stack) -> None:
    away = replace(redis_stack, redis_url="redis://127.0.0.1:1/0")
    with Worker(redis_stack.logs / "w.log", env=away.env) as worker:
        away.load("tasks").add.delay(1, 2)
        texts = (quoted("Redis is away ("), quoted("; trying again."))
        wait_until(lambda: all(map(worker.says, texts)), "it says so")
        worker.kill()


def test_a_task_that_the_worker_does_not_know(redis_stack: Stack) -> None:
    app = redis_stack.load("tasks").app
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env) as worker:
        with pytest.raises(NotRegistered) as caught:
            app.send_task("nosuch").get(timeout=60)
        assert f"{caught.type.__module__}.{caught.type.__name__}: {caught.value}".startswith(quoted("NotRegistered"))
        assert worker.says(quoted("Refused a message"))
        with pytest.raises(InvalidTaskError) as refused:
            app.send_task("tasks.add", (1, 2), serializer="pickle").get(timeout=60)
        text = f"{refused.type.__module__}.{refused.type.__name__}: {refused.value}"
        assert text.startswith(quoted("InvalidTaskError"))


# --- PENDING for ever; with rabbitmq there are more causes: see lab/behaviours.py -------------------------


def _stays_pending(result: object) -> bool:
    """Tell whether get() finds nothing, and the state is the one that the page is about."""
    with pytest.raises(ResultTimeout):
        result.get(timeout=1)  # type: ignore[attr-defined]
    return bool(result.state == quoted("PENDING"))  # type: ignore[attr-defined]


@pytest.fixture
def loaded(stack: Stack) -> ModuleType:
    return stack.load("tasks")


def test_pending_no_worker_consumes_from_the_queue(stack: Stack, loaded: ModuleType) -> None:
    with Worker(stack.logs / "w.log", env=stack.env):
        result = loaded.add.apply_async((1, 2), queue="other")
        assert _stays_pending(result)
    with Worker(stack.logs / "other.log", "-Q", "other", env=stack.env):
        assert result.get(timeout=30) == 3


def test_pending_it_runs_without_track_started(stack: Stack, tmp_path: Path) -> None:
    tasks = stack.load("tasks")
    (tmp_path / "more.py").write_text(
        "import time\n"
        "from tasks import app\n"
        "@app.task(name='untracked')\n"
        "def untracked(): time.sleep(3)\n"
        "@app.task(name='tracked', track_started=True)\n"
        "def tracked(): time.sleep(3)\n"
    )
    env = {**stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    with Worker(stack.logs / "w.log", "--include", "more", env=env) as worker:
        untracked, tracked = tasks.app.send_task("untracked"), tasks.app.send_task("tracked")
        wait_until(lambda: tracked.state == "STARTED", "started")
        assert worker.says(untracked.id)
        assert untracked.state == quoted("PENDING")
        wait_until(untracked.successful, "done")


def test_pending_unknown_id_and_ignored_result(shared_stack: Stack) -> None:
    tasks = shared_stack.load("tasks")
    assert _stays_pending(tasks.app.AsyncResult("there-is-no-such-id"))
    ignored = tasks.log_visit.delay("/home")
    assert ignored.get(timeout=30) is None
    assert ignored.state == quoted("PENDING")


def test_pending_the_result_has_expired(stack: Stack, loaded: ModuleType) -> None:
    loaded.app.conf.result_expires = 5  # of the reply queue; a key expires as its worker says
    with Worker(stack.logs / "w.log", "result.expires=5", env=stack.env) as worker:
        result = loaded.add.delay(1, 2)
        wait_until(lambda: worker.says(f"{result.id}] succeeded in "), "the task ran")

        def stored() -> object:
            queue = witness.find_reply_queue(stack.broker_url, loaded.app.thread_oid)
            key = witness.find_result_key(stack.redis_url, f"celery-demo:celery-task-meta-{result.id}")
            return key or (queue and queue.messages)

        wait_until(lambda: not stored(), "expired")
        assert result.state == quoted("PENDING")


@pytest.mark.parametrize(
    "difference",
    [
        "app.conf.result_backend = 'rpc://'",
        "app.conf.result_backend = os.environ['REDIS_URL'].rpartition('/')[0] + '/0'",
        "app.conf.result_backend_transport_options = {'global_keyprefix': 'other:'}",
    ],
)
def test_pending_worker_and_reader_use_different_stores(redis_stack: Stack, difference: str) -> None:
    tasks = redis_stack.load("tasks")
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env) as worker:
        result = tasks.add.delay(1, 2)
        wait_until(lambda: worker.says(f"{result.id}] succeeded in "), "the task ran")
        code = f"import os; from tasks import app; {difference}; print(app.AsyncResult('{result.id}').state)"
        # as admin: to the demo's user, Redis refuses keys with another prefix
        done = run(sys.executable, "-c", code, env={**redis_stack.env, "REDIS_URL": as_admin(redis_stack.redis_url)})
        assert done.stdout == quoted("PENDING") + "\n", done.stderr
        assert result.get(timeout=5) == 3
