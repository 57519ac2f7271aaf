"""Every pool that Celery has: with the copied settings alone it runs all tasks, and ends."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from lab.servers import Worker, run, wait_until
from tests.conftest import Stack, copy_settings

JOBS = """
import time
from celery import Celery

app = Celery("jobs")
app.config_from_object("celeryconfig")

@app.task(bind=True)
def job(self, number):
    if number % 10 == 0 and not self.request.retries:
        raise self.retry(countdown=0.3)
    time.sleep(0.05)
    return number
"""
CLIENT = """
from jobs import job
results = [job.apply_async((n,), countdown=0.3 if n % 10 == 1 else None) for n in range(100)]
print([result.get(timeout=90) for result in results] == list(range(100)))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    copy_settings(tmp_path)
    (tmp_path / "jobs.py").write_text(JOBS)
    return tmp_path


@pytest.mark.parametrize(
    "options",
    [
        ("-P", "gevent", "-c", "10", "-E"),
        pytest.param(("-P", "gevent", "-c", "10"), marks=pytest.mark.slow),
        ("-P", "threads", "-E"),
        ("-P", "solo", "-E"),
        ("-E",),
    ],
    ids=lambda options: " ".join(options),
)
def test_it_runs_a_hundred_tasks_and_ends(stack: Stack, folder: Path, options: tuple[str, ...]) -> None:
    """The heart beats every two seconds: after some of them the loop of greenlets had swallowed a confirm."""
    env = {**stack.env, "PYTHONPATH": ""}
    if "gevent" in options:
        pytest.importorskip("gevent")
    with Worker(folder / "w.log", *options, cwd=folder, app="jobs", env=env, lean=False) as worker:
        done = run(sys.executable, "-c", CLIENT, cwd=folder, env=env, timeout=110)
        assert done.stdout == "True\n", done.stderr
        if options[:2] == ("-P", "gevent"):
            time.sleep(18)  # it froze after 16 s
            done = run(sys.executable, "-c", CLIENT, cwd=folder, env=env, timeout=110)
            assert done.stdout == "True\n", done.stderr
        os.kill(worker.process.pid, signal.SIGTERM)
        wait_until(lambda: worker.process.poll() is not None, "it ends")
        assert worker.process.returncode == 0
