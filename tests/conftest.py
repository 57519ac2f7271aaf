"""Fixtures: a RabbitMQ virtual host and a Redis database of the tests' own, and a worker for each store."""

import fcntl
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from hardening.environment import service_url
from lab.servers import ROOT, OwnServers, Worker, own_servers

APP_MODULES = ("celeryconfig", "tasks", "producer")
QUIET = "on two quiet cores"


def pytest_report_header(config: pytest.Config) -> str:
    """Say at the start how long it takes."""
    if config.option.markexpr == "slow":
        return f"These are the long ones alone. They take about 8 minutes {QUIET}."
    return f"All of them take about 6 minutes {QUIET}, -n 6 at once; those marked slow are left out: -m slow runs them."


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Let a test that is marked alone run while no other does, whichever process they are in.

    Who waits for the server holds the gate, so that the others, behind it, do not come first again and again.
    """
    folder = Path(tempfile.gettempdir())
    with (folder / "celery-tests-gate").open("w") as gate, (folder / "celery-tests-servers").open("w") as servers:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(servers, fcntl.LOCK_EX if item.get_closest_marker("alone") else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        return (yield)


@dataclass(frozen=True)
class Stack(OwnServers):
    """One store, with servers of its own and a place for logs."""

    logs: Path

    def load(self, module: str) -> ModuleType:
        """Import a module of the project anew, in this process and with this stack's environment."""
        for name in APP_MODULES:
            sys.modules.pop(name, None)
        os.environ.update(self.env)
        return importlib.import_module(module)


@pytest.fixture(scope="session", autouse=True)
def _in_project_folder() -> None:
    """Work from any folder, and without a password variable: the URLs carry them from here on."""
    os.chdir(ROOT)
    os.environ["RABBITMQ_URL"], os.environ["REDIS_URL"] = service_url("RABBITMQ"), service_url("REDIS")
    for service in ("RABBITMQ", "REDIS"):
        os.environ.pop(f"{service}_PASSWORD", None)
        os.environ.pop(f"{service}_PASSWORD_FILE", None)


@contextmanager
def _stack(store: str, logs: Path) -> Iterator[Stack]:
    """Make servers of the test's own, and give them back."""
    with ExitStack() as cleanup:
        cleanup.callback(_restore_environment, dict(os.environ))
        try:
            servers = cleanup.enter_context(own_servers(store, "test"))
        except OSError as exc:
            pytest.exit(f"The tests need RabbitMQ's management API (RABBITMQ_API): {exc}", 1)
        yield Stack(**vars(servers), logs=logs)


def _restore_environment(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session", params=["redis", "rabbitmq"])
def shared_stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Each store with one running worker, for the tests that leave it as it was."""
    with (
        _stack(request.param, tmp_path_factory.mktemp(request.param)) as stack,
        Worker(stack.logs / "shared.log", env=stack.env),
    ):
        yield stack


@pytest.fixture(params=["redis", "rabbitmq"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stack]:
    """Each store, without a worker: for the tests that break something."""
    with _stack(request.param, tmp_path) as stack:
        yield stack


@pytest.fixture
def redis_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack of the test's own with the results in Redis, without a worker."""
    with _stack("redis", tmp_path) as stack:
        yield stack


@pytest.fixture
def rabbitmq_stack(tmp_path: Path) -> Iterator[Stack]:
    """A stack of the test's own with the results in RabbitMQ, without a worker."""
    with _stack("rabbitmq", tmp_path) as stack:
        yield stack


def copy_settings(folder: Path, change: str = "") -> None:
    """Copy what the README tells people to copy, and append a change to the settings."""
    (folder / "celeryconfig.py").write_text((ROOT / "celeryconfig.py").read_text() + change)
    shutil.copytree(ROOT / "hardening", folder / "hardening", ignore=shutil.ignore_patterns("__pycache__"))


@pytest.fixture
def tasks(shared_stack: Stack) -> ModuleType:
    """The tasks, with a worker running."""
    return shared_stack.load("tasks")


@pytest.fixture
def producer(shared_stack: Stack) -> ModuleType:
    """The producer, with a worker running."""
    return shared_stack.load("producer")
