"""The worker's start says which broker and store are in force, and which settings are not as in celeryconfig.py."""

import sys
from pathlib import Path

import pytest

from lab.servers import Worker, run
from tests.conftest import Stack, copy_settings

JOBS = """
import celeryconfig
from celery import Celery

app = Celery("jobs")
{how}


@app.task
def double(x):
    return 2 * x
"""
FILE = 'app.config_from_object("celeryconfig")'
UPDATED = FILE + '\napp.conf.update(result_expires=60, result_backend="redis://user:s3cret@other/0")'
SETTINGS_OBJECT = """app.config_from_object({"CELERY_BROKER_URL": "redis://:s3cret@old/0", "CELERY_TASK_TIME_LIMIT": 30,
    "CELERY_RESULT_BACKEND": "django-db", "CELERY_TASK_ACKS_LATE": True}, namespace="CELERY")
app.add_defaults(celeryconfig)"""
TLS_BEFORE = """import ssl
app.config_from_object({"CELERY_BROKER_URL": "rediss://old/0",
    "CELERY_BROKER_USE_SSL": {"ssl_cert_reqs": ssl.CERT_NONE},
    "CELERY_REDIS_BACKEND_USE_SSL": {"ssl_cert_reqs": ssl.CERT_NONE}}, namespace="CELERY")
app.add_defaults(celeryconfig)"""
OLD_NAMES = """app.config_from_object({"BROKER_URL": "redis://:s3cret@old/0", "CELERY_RESULT_BACKEND": "django-db",
    "CELERY_ALWAYS_EAGER": True})
app.add_defaults(celeryconfig)
assert app.conf.task_always_eager"""
ARGUMENTS = 'app = Celery("jobs", broker="amqp://a:s3cret@old//", backend="rpc://", result_expires=60)\n' + FILE
SEVERAL = FILE + '\napp.conf.broker_url = ["amqp://a:s3cret@one//", "amqp://a:s3cret@two//"]'
QUEUES = """from kombu import Queue
app.config_from_object({"task_queues": (Queue(name) for name in ("default", "mail")), "task_default_queue": "default"})
app.add_defaults(celeryconfig)"""
OTHER_FILE = (
    'app.config_from_object({"worker_consumer": "hardening.consumer:Consumer"})\nimport hardening.environment\n'
)
OTHER_FILE += "hardening.environment.file = {}"


def _line(folder: Path, how: str, **env: str) -> str:
    copy_settings(folder)
    (folder / "jobs.py").write_text(JOBS.format(how=how))
    done = run(
        sys.executable,
        "-c",
        "from hardening import in_force; from jobs import app; print(in_force.line(app))",
        cwd=folder,
        env={"RABBITMQ_URL": "amqp://demo:s3cret@mq/demo", "REDIS_URL": "redis://demo:s3cret@cache/0", **env},
    )
    assert done.returncode == 0, done.stderr
    assert "s3cret" not in done.stdout
    return done.stdout.strip()


def test_as_in_the_file(tmp_path: Path) -> None:
    expected = "In force: broker amqp://demo:**@mq/demo, results in redis://demo:**@cache/0, queues tasks."
    assert _line(tmp_path, FILE, RESULT_STORE="redis") == expected


def test_results_in_rabbitmq(tmp_path: Path) -> None:
    expected = "In force: broker amqp://demo:**@mq/demo, results in rpc://, queues tasks."
    assert _line(tmp_path, FILE, RESULT_STORE="rabbitmq") == expected


def test_a_later_update_is_named(tmp_path: Path) -> None:
    line = _line(tmp_path, UPDATED, RESULT_STORE="redis")
    assert "results in redis://user:**@other/0" in line
    assert line.endswith("; not as in celeryconfig.py: result_backend, result_expires.")


@pytest.mark.parametrize("how", [ARGUMENTS, ARGUMENTS.replace(FILE, "app.add_defaults(celeryconfig)")])
def test_arguments_of_the_app_win_and_are_named(tmp_path: Path, how: str) -> None:
    line = _line(tmp_path, how, RESULT_STORE="redis")
    assert "broker amqp://a:**@old//, results in rpc://" in line
    assert line.endswith("; not as in celeryconfig.py: broker_url, result_backend, result_expires.")


def test_a_project_may_have_a_celeryconfig_of_its_own(tmp_path: Path) -> None:
    """Then the copied one has another name."""
    copy_settings(tmp_path)
    (tmp_path / "celeryconfig.py").rename(tmp_path / "celerybase.py")
    (tmp_path / "celeryconfig.py").write_text('task_default_queue, timezone = "old", "Europe/Paris"')
    (tmp_path / "jobs.py").write_text(
        "import celerybase\nfrom celery import Celery\nfrom hardening import in_force\n"
        'app = Celery("jobs")\napp.config_from_object("celeryconfig")\napp.add_defaults(celerybase)\n'
        "print(app.conf.timezone, in_force.line(app))"
    )
    done = run(sys.executable, "jobs.py", cwd=tmp_path, env={})
    assert done.stdout.startswith("Europe/Paris In force: "), done.stderr
    assert done.stdout.endswith("queues tasks; without effect, for celerybase.py wins: task_default_queue.\n")


def test_a_settings_object_that_loses_is_named(tmp_path: Path) -> None:
    """Its other settings, and those that say the same, are not."""
    line = _line(tmp_path, SETTINGS_OBJECT, RESULT_STORE="redis")
    assert "broker amqp://demo:**@mq/demo, results in redis://demo:**@cache/0" in line
    assert line.endswith("; without effect, for celeryconfig.py wins: CELERY_BROKER_URL, CELERY_RESULT_BACKEND.")


def test_a_settings_object_with_old_names_loses_like_one_with_new_names(tmp_path: Path) -> None:
    """And what else it sets stays."""
    line = _line(tmp_path, OLD_NAMES, RESULT_STORE="redis")
    assert "broker amqp://demo:**@mq/demo, results in redis://demo:**@cache/0" in line
    assert line.endswith("; without effect, for celeryconfig.py wins: BROKER_URL, CELERY_RESULT_BACKEND.")


def test_a_default_queue_that_no_worker_consumes_is_named(tmp_path: Path) -> None:
    """The project's own queues stay, and the name of the default queue changes."""
    line = _line(tmp_path, QUEUES)
    assert "queues default, mail; without effect, for celeryconfig.py wins: task_default_queue; " in line
    assert line.endswith("; not in task_queues, so that no worker runs its tasks: tasks.")


def test_no_tls_of_before_is_left_over(tmp_path: Path) -> None:
    """It would be spoken to servers that do not speak it, and in another library's words."""
    names = "CELERY_BROKER_URL, CELERY_BROKER_USE_SSL, CELERY_REDIS_BACKEND_USE_SSL."
    assert _line(tmp_path, TLS_BEFORE, RESULT_STORE="redis").endswith(f"celeryconfig.py wins: {names}")


def test_no_password_of_several_brokers_is_shown(tmp_path: Path) -> None:
    line = _line(tmp_path, SEVERAL, RESULT_STORE="redis")
    assert "broker amqp://a:**@one//;amqp://a:**@two//," in line
    assert line.endswith("; not as in celeryconfig.py: broker_url.")


def test_no_password_of_a_sentinel_is_shown(tmp_path: Path) -> None:
    line = _line(tmp_path, FILE, RESULT_STORE="redis", REDIS_URL="sentinel://demo:s3cret@one;two;three/0")
    assert "results in sentinel://" in line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("task_serializer='pickle'", "task_serializer"),
        ("task_serializer='unknown'", "task_serializer"),
        ("result_accept_content=['yaml'], task_serializer='application/json'", "result_serializer"),
    ],
)
def test_a_serializer_that_nobody_accepts_is_named(tmp_path: Path, change: str, named: str) -> None:
    line = _line(tmp_path, f"{FILE}\napp.conf.update({change})")
    assert line.endswith(f"; not in accept_content, so that messages are refused: {named}.")


def test_settings_of_another_file_are_named(tmp_path: Path) -> None:
    assert _line(tmp_path, OTHER_FILE).endswith("; without: celeryconfig.py.")


@pytest.mark.parametrize(("how", "level"), [(FILE, "INFO"), (FILE + "\napp.conf.result_expires = 60", "WARNING")])
def test_the_worker_says_it_once(redis_stack: Stack, tmp_path: Path, how: str, level: str) -> None:
    copy_settings(tmp_path)
    (tmp_path / "jobs.py").write_text(JOBS.format(how=how))
    with Worker(redis_stack.logs / "jobs.log", cwd=tmp_path, app="jobs", env=redis_stack.env) as worker:
        lines = [line for line in worker.log.read_text().splitlines() if "In force: " in line]
    assert len(lines) == 1
    assert f": {level}/MainProcess] In force: broker amqp://" in lines[0]
