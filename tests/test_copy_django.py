"""The recipe for Django in docs/copy-it.md, in a project that Django itself generates."""

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.servers import Worker, run, wait_until
from tests.conftest import Stack, copy_settings
from tests.pages import write

SETTINGS = """
INSTALLED_APPS += ["django_celery_beat", "django_celery_results", "orders"]
DATABASES["default"]["OPTIONS"] = {"timeout": 30}

# What a project has, and must not lose.
CELERY_BEAT_SCHEDULER = "django_celery_beat.schedulers:DatabaseScheduler"
CELERY_BEAT_SCHEDULE = {"tick": {"task": "orders.tasks.tick", "schedule": 1.0}}
CELERY_BEAT_MAX_LOOP_INTERVAL = 1
CELERY_TASK_ROUTES = {"orders.tasks.mail": {"queue": "mail"}}
# What the page says to delete.
CELERY_BROKER_URL = "redis://127.0.0.1:1/0"
CELERY_RESULT_BACKEND = "django-db"
"""
MODELS = """
from django.db import models


class Order(models.Model):
    item = models.CharField(max_length=20)
    packed = models.IntegerField(default=0)
"""
TASKS = """
from celery import shared_task
from .models import Order


@shared_task
def pack(order_id):
    Order.objects.filter(pk=order_id).update(packed=1)
    return Order.objects.get(pk=order_id).item


@shared_task
def tick():
    Order.objects.create(item="tick")


@shared_task
def mail():
    return "sent"
"""
URLS = """
from django.urls import path
from orders import views

urlpatterns = [path("orders", views.create), path("results/<task_id>", views.state)]
"""
TESTS = """
from django.test import TestCase
from orders.models import Order
from orders.tasks import mail


class Eager(TestCase):
    def test_the_view_packs(self):
        with self.captureOnCommitCallbacks(execute=True):
            self.assertEqual(self.client.get("/orders").status_code, 202)
        self.assertEqual(Order.objects.get().packed, 1)

    def test_delay(self):
        self.assertEqual(mail.delay().get(), "sent")
"""
SETTINGS_TEST = "from .settings import *\nCELERY_TASK_ALWAYS_EAGER = True\nCELERY_TASK_EAGER_PROPAGATES = True\n"


def _run(folder: Path, *command: str, env: dict[str, str], timeout: float = 60.0) -> str:
    done = run(sys.executable, *command, cwd=folder, env=env, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def _generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("django")
    _run(folder, "-m", "django", "startproject", "shop", ".", env={})
    copy_settings(folder)
    write(folder, "shop/celery.py", "shop/__init__.py", "orders/views.py")
    for name, text in {
        "orders/__init__.py": "",
        "orders/models.py": MODELS,
        "orders/tasks.py": TASKS,
        "orders/tests.py": TESTS,
        "shop/urls.py": URLS,
        "shop/settings_test.py": SETTINGS_TEST,
    }.items():
        (folder / name).write_text(text)
    with (folder / "shop/settings.py").open("a") as settings:
        settings.write(SETTINGS)
    _run(folder, "manage.py", "makemigrations", "orders", "-v", "0", env={})
    _run(folder, "manage.py", "migrate", "-v", "0", env={})
    return folder


@pytest.fixture
def project(_generated: Path) -> Path:
    """The project, with an empty table of orders."""
    with sqlite3.connect(_generated / "db.sqlite3", timeout=30) as database:
        database.execute("delete from orders_order")
    return _generated


@contextmanager
def _worker(stack: Stack, project: Path, *options: str) -> Iterator[Worker]:
    with Worker(stack.logs / "shop.log", *options, cwd=project, app="shop", env=stack.env) as worker:
        yield worker


def _client(stack: Stack, project: Path, code: str) -> str:
    setup = """
    import os, threading, time
    os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
    import django
    django.setup()
    from celery.result import AsyncResult
    from django.db import transaction
    from django.test import Client
    from orders.models import Order
    from orders.tasks import mail, pack
    client = Client(SERVER_NAME="localhost")
    """
    return _run(project, "-c", textwrap.dedent(setup) + textwrap.dedent(code), env=stack.env)


def test_eager_tests_stay_eager(project: Path) -> None:
    """No broker and no Redis are there: whoever publishes fails."""
    nowhere = {"RABBITMQ_URL": "amqp://127.0.0.1:1//", "REDIS_URL": "redis://127.0.0.1:1/0"}
    said = _run(project, "manage.py", "test", "--settings", "shop.settings_test", env=nowhere)
    assert "Ran 2 tests" in said
    assert "OK" in said


def test_a_view_queues_after_the_commit(stack: Stack, project: Path) -> None:
    with _worker(stack, project, "-Q", "tasks,mail") as worker:
        assert worker.says("without effect, for celeryconfig.py wins: CELERY_BROKER_URL, CELERY_RESULT_BACKEND.")
        said = _client(
            stack,
            project,
            """
            answer = client.get("/orders")
            print(answer.status_code, AsyncResult(answer.json()["id"]).get(timeout=30))
            if os.environ["RESULT_STORE"] == "redis":
                print(client.get("/results/" + answer.json()["id"]).json())
            try:
                with transaction.atomic():
                    pack.delay_on_commit(Order.objects.create(item="never").pk)
                    raise LookupError
            except LookupError:
                pass
            print(Order.objects.get().packed, mail.delay().get(timeout=30))
            # A web server's thread: shared_task finds the app there, too.
            thread = threading.Thread(target=lambda: print(mail.delay().get(timeout=30)))
            thread.start()
            thread.join()
            """,
        )
    seen = ["{'state': 'SUCCESS', 'result': 'tea'}"] if stack.store == "redis" else []
    assert said.splitlines() == ["202 tea", *seen, "1 sent", "sent"]


def test_beat_runs_the_projects_schedule(stack: Stack, project: Path) -> None:
    """From CELERY_BEAT_SCHEDULE, which django-celery-beat keeps in its tables."""
    log = (stack.logs / "beat.log").open("wb")
    with _worker(stack, project), log:
        beat = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "shop", "beat", "-l", "INFO", "--pidfile="],
            cwd=project,
            env={**os.environ, **stack.env},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: _ticks(project) >= 2, "two ticks", timeout=60, interval=0.3)
        finally:
            beat.send_signal(signal.SIGTERM)
            beat.wait(30)
    assert "DatabaseScheduler" in Path(log.name).read_text()


def _ticks(project: Path) -> int:
    with sqlite3.connect(project / "db.sqlite3", timeout=30) as database:
        return int(database.execute("select count(*) from orders_order where item = 'tick'").fetchone()[0])


def test_django_celery_results_stays_the_projects_own(redis_stack: Stack, project: Path) -> None:
    """With one more line, which the worker names."""
    file = project / "shop/celery.py"
    before = file.read_text()
    file.write_text(before + 'app.conf.result_backend = "django-db"\n')
    try:
        with _worker(redis_stack, project, "-Q", "mail") as worker:
            said = _client(redis_stack, project, "print(mail.delay().get(timeout=30))")
            assert worker.says("results in django-db, queues mail; not as in celeryconfig.py: result_backend")
    finally:
        file.write_text(before)
    assert said.splitlines() == ["sent"]
    with sqlite3.connect(project / "db.sqlite3") as database:
        assert database.execute("select status from django_celery_results_taskresult").fetchall() == [("SUCCESS",)]
