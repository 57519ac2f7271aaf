"""The recipes for Flask and FastAPI in docs/copy-it.md, under gunicorn and uvicorn."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lab.servers import Worker, wait_until
from tests.conftest import Stack, copy_settings
from tests.pages import write
from tests.proxy import Proxy

FLASK, FASTAPI = "make_celery", "jobs"  # what the worker's -A says
FRAMEWORKS = pytest.mark.parametrize("framework", [FLASK, FASTAPI])
ONE_OF_THEM_SLOW = pytest.mark.parametrize("framework", [FASTAPI, pytest.param(FLASK, marks=pytest.mark.slow)])


def _ask(method: str, url: str) -> tuple[int, dict[str, Any], dict[str, str]]:
    """Return the status, the JSON and the headers of an answer; each time over a connection of its own."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60) as answer:
            return answer.status, json.load(answer), _lower(answer.headers)
    except urllib.error.HTTPError as exc:
        return exc.code, json.load(exc), _lower(exc.headers)


def _lower(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


@contextmanager
def _server(folder: Path, framework: str, processes: int, env: dict[str, str]) -> Iterator[str]:
    """Run the web server, and yield its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = {
        FLASK: ["gunicorn", "shop:create_app()", "--threads", "4", "--bind", f"127.0.0.1:{port}"],
        FASTAPI: ["uvicorn", "api:api", "--port", port],
    }[framework]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *command, "--workers", str(processes)],
            cwd=folder,
            env={**os.environ, **env},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: _answers(url) or server.poll() is not None, f"{url} answers", timeout=60)
            assert server.poll() is None, (folder / "server.log").read_text()
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                raise


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@pytest.fixture
def project(tmp_path: Path) -> Path:
    copy_settings(tmp_path)
    write(tmp_path, "jobs.py", "shop.py", "make_celery.py", "api.py")
    return tmp_path


def _state_after_all(url: str, task_id: str) -> dict[str, Any]:
    return wait_until(  # type: ignore[no-any-return]
        lambda: (
            (answer := _ask("GET", f"{url}/results/{task_id}")[1])["state"] not in ("PENDING", "STARTED") and answer
        ),
        f"the state of {task_id} is final",
    )


@FRAMEWORKS
def test_each_request_gets_what_it_queued(stack: Stack, project: Path, framework: str) -> None:
    """Redis: two processes; rabbitmq: one, and its threads."""
    processes = 2 if stack.store == "redis" else 1
    with (
        Worker(stack.logs / "web.log", cwd=project, app=framework, env=stack.env),
        _server(project, framework, processes, stack.env) as url,
        ThreadPoolExecutor(8) as browsers,
    ):

        def browse(x: int) -> dict[str, Any]:
            status, answer, _ = _ask("POST", f"{url}/double/{x}")
            assert status == 202
            return _state_after_all(url, answer["id"])

        answers = list(browsers.map(browse, range(24), timeout=100))
        assert answers == [{"state": "SUCCESS", "result": 2 * x} for x in range(24)]


def test_fastapi_waits_in_a_thread(stack: Stack, project: Path) -> None:
    """While 8 requests wait, others are answered."""
    with _server(project, FASTAPI, 1, stack.env) as url, ThreadPoolExecutor(8) as browsers:
        ids = [_ask("POST", f"{url}/double/{x}")[1]["id"] for x in range(4)]
        waits = [browsers.submit(_ask, "GET", f"{url}/results/{task_id}/wait") for task_id in ids]
        assert _ask("GET", f"{url}/results/{ids[0]}")[1] == {"state": "PENDING", "result": None}
        assert not any(wait.done() for wait in waits)
        with Worker(stack.logs / "late.log", cwd=project, app=FASTAPI, env=stack.env):
            assert [wait.result(60)[1] for wait in waits] == [{"state": "SUCCESS", "result": 2 * x} for x in range(4)]


def test_with_rabbitmq_a_second_process_says_why_it_has_no_result(rabbitmq_stack: Stack, project: Path) -> None:
    framework = FLASK
    with (
        Worker(rabbitmq_stack.logs / "web.log", cwd=project, app=framework, env=rabbitmq_stack.env),
        _server(project, framework, 2, rabbitmq_stack.env) as url,
        ThreadPoolExecutor(8) as browsers,
    ):
        task_id = _ask("POST", f"{url}/double/4")[1]["id"]
        seen: dict[int, dict[str, Any]] = {}

        def both_processes() -> bool:
            answers = browsers.map(lambda _: _ask("GET", f"{url}/results/{task_id}"), range(8))
            seen.update({status: answer for status, answer, _ in answers if answer.get("state") != "PENDING"})
            return {200, 404} <= seen.keys()

        wait_until(both_processes, "both processes have answered")
        assert "queued by another process; RESULT_STORE=redis" in str(seen[404])


@ONE_OF_THEM_SLOW
def test_while_redis_is_away_tasks_are_queued_and_states_are_503(
    redis_stack: Stack, project: Path, framework: str
) -> None:
    with Proxy(redis_stack.redis_url) as proxy:
        env = {**redis_stack.env, "REDIS_URL": proxy.url()}
        with _server(project, framework, 1, env) as url:
            first = _ask("POST", f"{url}/double/1")[1]["id"]
            assert _ask("GET", f"{url}/results/{first}")[1]["state"] == "PENDING"
            proxy.cut()
            status, answer, _ = _ask("POST", f"{url}/double/2")
            assert status == 202
            status, _, headers = _ask("GET", f"{url}/results/{answer['id']}")
            assert (status, headers["retry-after"]) == (503, "5")
            proxy.restore()
            with Worker(redis_stack.logs / "back.log", cwd=project, app=framework, env=redis_stack.env):
                assert [_state_after_all(url, task_id)["result"] for task_id in (first, answer["id"])] == [2, 4]


@ONE_OF_THEM_SLOW
def test_while_rabbitmq_is_away_queueing_is_503(redis_stack: Stack, project: Path, framework: str) -> None:
    env = {**redis_stack.env, "RABBITMQ_URL": "amqp://guest:guest@127.0.0.1:1//"}
    with _server(project, framework, 1, env) as url:
        status, answer, headers = _ask("POST", f"{url}/double/1")
        assert (status, answer, headers["retry-after"]) == (
            503,
            {"error": "try again"},
            "5",
        )


def test_flasks_other_settings_stay(redis_stack: Stack, project: Path) -> None:
    """Those in CELERY, and those from the environment; the file wins over both."""
    code = "from make_celery import app; print(app.conf.timezone, app.conf.task_ignore_result, app.conf.broker_url)"
    env = {**redis_stack.env, "FLASK_CELERY__task_ignore_result": "true", "FLASK_CELERY__broker_url": '"redis://x"'}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, env={**os.environ, **env}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"Europe/Paris True {redis_stack.broker_url}\n", done.stderr
