"""The benchmark runs, and its figures are whole. What is shown of them: tests/test_pages.py.

How fast anything is, no test says: that differs between machines. What is sent for each task does not.
"""

import gc
import json
import re
import sys
from collections import Counter
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest

from lab.benchmark import FULL, QUANTITIES, QUICK, page_tables, price
from lab.benchmark_tasks import DEFAULT, OURS, kinds
from lab.servers import ROOT, STORES, Worker, run, wait_until
from tests.conftest import Stack

FIGURES = ROOT / "docs" / "benchmark.json"


def _is_whole(report: dict[str, Any], sizes: dict[str, Any]) -> None:
    assert report["sizes"] == sizes, "a quick run, or an old one"
    for store in STORES:
        figures = report["figures"][store]
        assert list(figures) == kinds(store)
        for kind in (OURS, DEFAULT):
            assert set(QUANTITIES) - set(figures[kind]) == ({"chord_ms"} if store == "rabbitmq" else set())
        for kind, quantities in figures.items():
            assert {"p50_ms", "trips_per_s"} <= set(quantities)
            for quantity, values in quantities.items():
                assert len(values) == sizes["rounds"], f"{store}, {kind}: {quantity}"
    assert report["machine"]["processors"] >= 1
    assert {"Celery", "RabbitMQ", "Redis", "Python"} <= set(report["versions"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_command_measures_everything() -> None:
    done = run(sys.executable, "-m", "lab.benchmark", "--quick", "--json", env={}, timeout=1100)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    _is_whole(report, QUICK)
    assert page_tables(report) == done.stderr.splitlines()[-len(page_tables(report)) :]


def test_the_committed_figures_are_whole() -> None:
    _is_whole(json.loads(FIGURES.read_text()), FULL)


def test_the_prices_in_celeryconfig_are_those_of_the_committed_figures() -> None:
    figures = json.loads(FIGURES.read_text())
    blocks = (ROOT / "celeryconfig.py").read_text().split("\n\n")
    prices = {}
    for block in blocks:
        if said := re.search(r"Price, [^.]*\.", re.sub(r"\n# ", " ", block)):
            prices[re.findall(r"^([a-z]\w*) = ", block, re.MULTILINE)[0]] = said[0]
    priced = {
        "broker_transport_options": "publishing is not confirmed",
        "task_default_queue": "classic queue, not quorum",
    }
    assert prices == {setting: price(figures, name) for setting, name in priced.items()}


@pytest.mark.parametrize(
    ("rounds", "said"),
    [
        ([1.2, 1.25, 1.3], "redis 20 %, rabbitmq none"),
        ([0.8, 0.85, 0.9], "redis a gain of 18 %, rabbitmq none"),
        ([1.3, 1.25, 0.99], "redis none, rabbitmq none"),
    ],
)
def test_a_price_is_one_if_all_rounds_say_so(rounds: list[float], said: str) -> None:
    def figures(rounds: list[float]) -> dict[str, Any]:
        return {"prefetch 4, not 1": {"trips_per_s": rounds}, OURS: {"trips_per_s": [1.0] * 3}}

    run = {"figures": {"redis": figures(rounds), "rabbitmq": figures([1.01, 1.03, 1.02])}}
    assert price(run, "prefetch 4, not 1") == f"Price, tasks a second: {said}."


# --- What is sent for each task ---------------------------------------------------------------------------


def _commands(stack: Stack, call: Any) -> list[str]:
    """Return the Redis commands that arrive in a database while something is called, without those that connect."""
    database = urlsplit(stack.redis_url).path[1:]
    with stack.redis_admin() as client, client.monitor() as monitor:
        call()
        client.echo("enough")
        seen = []
        while (seen_one := monitor.next_command())["command"] != "ECHO enough":
            if str(seen_one["db"]) == database and seen_one["client_type"] != "lua":
                seen.append(seen_one["command"].split()[0])
        return [name for name in seen if name not in ("AUTH", "CLIENT", "HELLO", "SELECT")]


def test_a_result_costs_few_redis_commands(redis_stack: Stack) -> None:
    tasks = redis_stack.load("tasks")
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env) as worker:
        tasks.add.delay(1, 1).get(timeout=30)
        count = 5
        waited_for = _commands(redis_stack, lambda: [tasks.nap.delay(0.2).get(timeout=30) for _ in range(count)])
        results = [tasks.add.delay(number, 1) for number in range(count)]
        wait_until(lambda: worker.log.read_text().count(" succeeded in ") == 1 + 2 * count, "all results are there")
        fetched_later = _commands(redis_stack, lambda: [result.get(timeout=30) for result in results])
    # The worker writes and announces in one script, a nap twice, for it is STARTED first. The client looks, listens,
    # looks once more, and stops listening.
    of_worker, of_client = ["EVALSHA"] * 2, ["MGET", "SUBSCRIBE", "MGET", "UNSUBSCRIBE"]
    assert Counter(waited_for) == Counter((of_worker + of_client) * count)
    assert Counter(fetched_later) == {"MGET": count}


def test_get_of_a_group_does_not_sleep_before_it_listens(redis_stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Celery's own sleeps half a second, whatever has arrived meanwhile."""
    tasks = redis_stack.load("tasks")
    slept: list[float] = []
    monkeypatch.setattr("celery.backends.base.time", SimpleNamespace(sleep=slept.append))
    results = [tasks.nap.delay(0.5) for _ in range(2)]
    group = tasks.app.GroupResult("a-group", results)
    with Worker(redis_stack.logs / "w.log", env=redis_stack.env):
        assert group.get(timeout=30) == [0.5, 0.5]
    assert [seconds for seconds in slept if seconds] == []


@pytest.mark.slow
def test_a_client_does_not_grow_with_the_results_that_it_has_fetched(stack: Stack) -> None:
    """Each batch is read when it is complete."""
    tasks = stack.load("tasks")

    def objects_after(batches: int) -> int:
        for _ in range(batches):
            results = [tasks.add.delay(number, 1) for number in range(100)]
            last = tasks.add.delay(1, 1)
            assert last.get(timeout=60) == 2
            assert [result.get(timeout=60) for result in results] == list(range(1, 101))
            assert tasks.nap.delay(0.1).get(timeout=60) == 0.1
        gc.collect()
        return sys.getallocatedblocks()

    with Worker(stack.logs / "w.log", env=stack.env):
        before = objects_after(3)
        assert objects_after(5) - before < 5 * 100 * 3, "objects more for each result"
    if stack.store == "redis":
        consumer = tasks.app.backend.result_consumer
        assert (consumer._noted, consumer.subscribed_to) == (set(), set())
