"""Every step of the tour, on both stores, and the tour as a whole."""

import html
import re
import sys
from types import ModuleType
from typing import Any

import pytest

from lab.servers import ROOT, run
from tests.conftest import Stack

ENDS = {
    "value": "5",
    "failure": "ZeroDivisionError: division by zero",
    "retry": "(28.5, 'after 2 retries')",
    "progress": "10",
    "group": "[4, 2, 3]",
    "chain": "(15, 5)",
    "revoke": "TaskRevokedError: terminated",
    "time_limit": "SoftTimeLimitExceeded",
    "ignored": "None",
    "where": "42",
}
CHORD_ENDS = {
    "redis": "9",
    "rabbitmq": 'REFUSED, NotImplementedError: The "rpc" result backend does not support chords!',
}


@pytest.mark.parametrize("name", [*ENDS, "chord"])
def test_each_step_ends_as_announced(
    producer: ModuleType, shared_stack: Stack, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    end = CHORD_ENDS[shared_stack.store] if name == "chord" else ENDS[name]
    step = producer.STEPS[name]
    assert producer.run_step(1, step) == ("refused" if end.startswith("REFUSED") else "ended")
    printed = capfd.readouterr().out
    assert f"-> {end}   (" in printed
    assert step.__doc__ in printed
    assert ".get(timeout=30)" in printed or ".get(timeout=30, " in printed


def test_every_step_is_tested(producer: ModuleType) -> None:
    assert {*ENDS, "chord"} == set(producer.STEPS)


def test_a_step_that_ends_otherwise_is_noticed(
    producer: ModuleType, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(producer.ANNOUNCED, producer.value, "6")
    assert producer.run_step(1, producer.value) == "failed"
    assert "NOT AS ANNOUNCED: it should end with 6" in capfd.readouterr().out


def test_the_whole_tour_exits_with_0(shared_stack: Stack) -> None:
    tour = run(sys.executable, "producer.py", env=shared_stack.env)
    assert tour.returncode == 0, tour.stdout + tour.stderr
    ended = (
        "11 of 11 steps ended as announced, in"
        if shared_stack.store == "redis"
        else "10 of 11 steps ended as announced, 1 was"
    )
    assert ended in tour.stdout
    assert "What next?" in tour.stdout
    assert tour.stderr == ""


def test_the_tour_runs_chosen_steps(shared_stack: Stack) -> None:
    tour = run(sys.executable, "producer.py", "value", "ignored", env=shared_stack.env)
    assert tour.returncode == 0, tour.stdout + tour.stderr
    assert "2 of 2 steps ended as announced" in tour.stdout
    unknown = run(sys.executable, "producer.py", "nonsense", env=shared_stack.env)
    assert unknown.returncode == 2
    assert "there is no step nonsense; the steps are value, failure" in unknown.stderr


def test_progress_is_reported_while_the_task_runs(tasks: ModuleType) -> None:
    reports: list[dict[str, Any]] = []
    assert tasks.import_rows.delay(3).get(timeout=30, on_message=reports.append) == 3
    assert [meta["result"]["done"] for meta in reports if meta["status"] == "PROGRESS"] == [1, 2, 3]


def test_a_hard_time_limit_ends_a_task_that_ignores_the_soft_one(tasks: ModuleType) -> None:
    with pytest.raises(Exception, match=r"TimeLimitExceeded\(1") as caught:
        tasks.nap.apply_async((30,), time_limit=1).get(timeout=30)
    assert type(caught.value).__name__ == "TimeLimitExceeded"


def test_the_picture_shows_the_tour(shared_stack: Stack) -> None:
    if shared_stack.store != "redis":
        pytest.skip("the picture is of redis")
    tour = run(sys.executable, "producer.py", env=shared_stack.env).stdout
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", (ROOT / "docs" / "tour.svg").read_text())
    picture = re.sub(r"\s", "", html.unescape("".join(texts)))
    steps = tour[tour.index("\n 1. ") : tour.index("\nWhat next?")]
    for line in steps.splitlines():
        words = re.sub(r"([\d.]+ m?s\b|meta-).*", "", line)  # times and ids differ
        assert re.sub(r"\s", "", words) in picture, line
