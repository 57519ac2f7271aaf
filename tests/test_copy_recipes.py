"""The short recipes in docs/copy-it.md: tests, several projects and workers, beat, routing, priorities, tracing."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lab.servers import Worker, as_admin, run, wait_until
from tests.conftest import Stack, copy_settings
from tests.pages import program, write


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The plain project of README.md."""
    folder = tmp_path / "plain"
    folder.mkdir()
    copy_settings(folder)
    write(folder, "jobs.py")
    return folder


def _append(file: Path, text: str) -> None:
    file.write_text(file.read_text() + "\n" + text)


def _client(project: Path, env: dict[str, str], code: str) -> list[str]:
    done = run(sys.executable, "-c", code, cwd=project, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


DOUBLE = "from jobs import double; print(double.delay(21).get(timeout=30))"


def test_tests_need_no_server(project: Path) -> None:
    write(project, "conftest.py", "test_jobs.py")
    nowhere = {"RABBITMQ_URL": "amqp://127.0.0.1:1//", "REDIS_URL": "redis://127.0.0.1:1/0"}
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=project, env=nowhere)
    assert "2 passed" in done.stdout, done.stdout


IN_MEMORY = """
from celery.contrib.testing.worker import start_worker
from jobs import app, double

app.conf.update(broker_url="memory://", result_backend="cache+memory://")
with start_worker(app, perform_ping_check=False):
    print(double.delay(21).get(timeout=10), double.apply_async((4,), countdown=0.2).get(timeout=10))
"""


def test_tests_may_update_the_settings_instead(project: Path) -> None:
    """The variables are not set: the worker has this folder's consumer, on a broker that has no address."""
    assert _client(project, {}, IN_MEMORY) == ["42 8"]


@pytest.mark.slow
def test_the_same_worker_with_real_servers(stack: Stack, project: Path) -> None:
    write(project, "conftest.py", "test_jobs.py")
    conftest = project / "conftest.py"
    conftest.write_text("".join(line for line in conftest.open() if not line.startswith("os.environ")))
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "worker")
    done = run(sys.executable, *command, cwd=project, env=stack.env)
    assert "1 passed" in done.stdout, done.stdout


def _of(project: Path, name: str) -> None:
    """Give the project the two names that are its own, and its own remote control."""
    settings = project / "celeryconfig.py"
    text = settings.read_text().replace('task_default_queue = "tasks"', f'task_default_queue = "{name}"')
    settings.write_text(text.replace('"celery-demo:"', f'"{name}:"'))
    _append(settings, program("celeryconfig.py, for a shared virtual host").replace("shop", name))


@pytest.mark.slow
def test_several_projects_share_the_servers(stack: Stack, project: Path, tmp_path: Path) -> None:
    stack = replace(stack, redis_url=as_admin(stack.redis_url))  # their keys have other prefixes than the demo's
    other = tmp_path / "other"
    other.mkdir()
    copy_settings(other)
    write(other, "jobs.py")
    jobs = other / "jobs.py"
    jobs.write_text(jobs.read_text().replace("2 * x", "x / 2"))
    _of(project, "shop")
    _of(other, "bank")
    inspect = "from jobs import app; print(sorted(app.control.inspect(timeout=3).ping() or ()))"
    with (
        Worker(stack.logs / "shop.log", cwd=project, app="jobs", env=stack.env),
        Worker(stack.logs / "bank.log", cwd=other, app="jobs", env=stack.env),
    ):
        twenty = "from jobs import double\nrs = [double.delay(40) for _ in range(20)]\n"
        twenty += "print({r.get(timeout=30) for r in rs})"
        assert _client(project, stack.env, twenty) == ["{80}"]
        assert _client(other, stack.env, twenty) == ["{20.0}"]
        assert [_client(side, stack.env, inspect)[0].count("@") for side in (project, other)] == [1, 1]
    if stack.store == "redis":
        with stack.redis_admin() as client:
            prefixes = {key.partition("celery-task-meta-")[0] for key in client.keys("*celery-task-meta-*")}
        assert prefixes == {"shop:", "bank:"}


def test_three_workers_on_one_host(redis_stack: Stack, project: Path) -> None:
    many = "from jobs import double\nrs = [double.delay(x) for x in range(60)]\n"
    many += "print(sum(r.get(timeout=30) for r in rs))"
    with (
        Worker(redis_stack.logs / "w1.log", cwd=project, app="jobs", env=redis_stack.env) as one,
        Worker(redis_stack.logs / "w2.log", cwd=project, app="jobs", env=redis_stack.env) as two,
        Worker(redis_stack.logs / "w3.log", cwd=project, app="jobs", env=redis_stack.env) as three,
    ):
        assert _client(project, redis_stack.env, many) == [str(2 * sum(range(60)))]
        assert all(worker.says("succeeded in") for worker in (one, two, three))


def test_beat(redis_stack: Stack, project: Path) -> None:
    recipe = program("jobs.py, at the end")
    _append(project / "jobs.py", recipe.replace("60.0", "0.5"))
    with Worker(redis_stack.logs / "beaten.log", cwd=project, app="jobs", env=redis_stack.env) as worker:
        beat = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "jobs", "beat", "--schedule", str(project / "beat"), "--pidfile="],
            cwd=project,
            env={**os.environ, **redis_stack.env},
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            wait_until(lambda: worker.log.read_text().count(": 42") >= 2, "two runs", timeout=60)
        finally:
            beat.terminate()
            beat.wait(30)


MAIL = """
@app.task
def mail():
    return "sent"
"""


def test_routing(redis_stack: Stack, project: Path) -> None:
    _append(project / "celeryconfig.py", program("celeryconfig.py, one more queue"))
    _append(project / "jobs.py", MAIL)
    waits = "from jobs import mail; print(mail.delay().id)"
    task_id = _client(project, redis_stack.env, waits)[0]
    types = {queue["name"]: queue["type"] for queue in redis_stack.rabbitmq.queues(redis_stack.vhost)}
    assert types["mail"] == "quorum"
    with Worker(redis_stack.logs / "mail.log", "-Q", "mail", cwd=project, app="jobs", env=redis_stack.env):
        fetch = f"from jobs import app; print(app.AsyncResult({task_id!r}).get(timeout=30))"
        assert _client(project, redis_stack.env, fetch) == ["sent"]


def test_priorities(redis_stack: Stack, project: Path) -> None:
    """What waits runs in the order of its priority; a longer task goes first, so that all of them wait."""
    queue = "from jobs import double\nfor p in (0, 5, 31, 9): double.apply_async((p,), priority=p)"
    _client(project, redis_stack.env, queue)
    with Worker(redis_stack.logs / "first.log", "-c", "1", cwd=project, app="jobs", env=redis_stack.env) as worker:
        wait_until(lambda: worker.log.read_text().count("succeeded in") == 4, "four tasks")
    ended = [line.rpartition(": ")[2] for line in worker.log.read_text().splitlines() if "succeeded in" in line]
    assert ended == ["62", "18", "10", "0"]


def test_a_priority_of_queues_is_refused(redis_stack: Stack, project: Path) -> None:
    _append(project / "celeryconfig.py", "task_queue_max_priority = 10")
    done = run(sys.executable, "-c", "import jobs; jobs.double.delay(1)", cwd=project, env=redis_stack.env)
    assert "PRECONDITION_FAILED - invalid arg 'x-max-priority'" in done.stderr


HEARD = """
from celery.signals import task_rejected, task_unknown


@task_unknown.connect
def unknown(name, id, exc, message, **kwargs):
    print(f"heard unknown {name} {id == message.headers['id']} {exc!r}")


@task_rejected.connect
def rejected(message, exc, **kwargs):
    print(f"heard rejected {message.content_type} {type(exc).__name__}")
"""


REFUSED = """
from jobs import app
from kombu.serialization import register

register("plain", str, str, "application/x-plain", "utf-8")
failed = []
with app.connection_for_read() as connection:
    receiver = app.events.Receiver(connection, handlers={"task-failed": failed.append})
    with receiver.consumer_context() as (connected, *_):
        app.send_task("jobs.gone").get(timeout=30, propagate=False)
        app.send_task("jobs.double", (1,), serializer="plain").get(timeout=30, propagate=False)
        while not failed:
            connected.drain_events(timeout=30)
print(failed[0]["exception"])
"""


def test_signals_of_what_is_refused(redis_stack: Stack, project: Path) -> None:
    """As with Celery's own consumer, for whoever is told by them that workers have older code than clients."""
    _append(project / "jobs.py", HEARD)
    with Worker(redis_stack.logs / "refuses.log", "-E", cwd=project, app="jobs", env=redis_stack.env) as worker:
        assert "'jobs.gone' never registered" in _client(project, redis_stack.env, REFUSED)[-1]
        wait_until(lambda: worker.says("heard rejected"), "the signals")
    heard = [line.partition("heard ")[2] for line in worker.log.read_text().splitlines() if "heard " in line]
    assert heard == ["unknown jobs.gone True KeyError('jobs.gone')", "rejected application/x-plain ContentDisallowed"]


FAILS = """
@app.task
def fail():
    raise LookupError("no such order")
"""


EVENTS = """
def write(event, hint):
    with open(SEEN, "a") as file:
        file.write(event["tags"]["celery_task_id"] + " " + event["exception"]["values"][-1]["value"])


"""


@pytest.mark.slow
def test_sentry(redis_stack: Stack, project: Path) -> None:
    seen = project / "events"
    recipe = program("jobs.py, Sentry").replace("integrations=", "before_send=write, integrations=")
    jobs = project / "jobs.py"
    _append(jobs, EVENTS.replace("SEEN", repr(str(seen))) + recipe + FAILS)
    env = {**redis_stack.env, "SENTRY_DSN": "http://key@127.0.0.1:1/1"}
    with Worker(redis_stack.logs / "sentry.log", cwd=project, app="jobs", env=env):
        code = "from jobs import fail; r = fail.delay(); print(r.id, repr(r.get(timeout=30, propagate=False)))"
        task_id, _, outcome = _client(project, env, code)[0].partition(" ")
        assert outcome == "LookupError('no such order')"
        wait_until(seen.exists, "an event")
    assert seen.read_text().startswith(f"{task_id} no such order")


SPANS = """
from opentelemetry import trace as _trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

provider = TracerProvider()
_trace.set_tracer_provider(provider)


def write(span):
    with open(SEEN, "a") as file:
        file.write(f"{span.name} {span.context.trace_id}\\n")
    return ""


provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(formatter=write)))
"""


@pytest.mark.slow
def test_opentelemetry(redis_stack: Stack, project: Path) -> None:
    seen = project / "spans"
    _append(project / "jobs.py", program("jobs.py, OpenTelemetry") + SPANS.replace("SEEN", repr(str(seen))))
    with Worker(redis_stack.logs / "otel.log", cwd=project, app="jobs", env=redis_stack.env):
        code = "from jobs import *; CeleryInstrumentor().instrument(); print(double.delay(21).get(timeout=30))"
        assert _client(project, redis_stack.env, code) == ["42"]
        wait_until(lambda: seen.exists() and len(seen.read_text().splitlines()) == 2, "two spans")
    spans = dict(line.split() for line in seen.read_text().splitlines())
    assert spans.keys() == {"apply_async/jobs.double", "run/jobs.double"}
    assert len(set(spans.values())) == 1, "one trace"
