"""The clients of the fault run and of the scale run; the runs need Docker: python3 -m lab.faults, lab.scale."""

import json
import sys

from lab.servers import Worker, run
from tests.conftest import Stack


def test_the_client_fetches_all_that_it_queues(stack: Stack) -> None:
    """Single tasks, a group and, where there are any, a chord; and one that kills its process."""
    with Worker(stack.logs / "w.log", "--include", "lab.more_tasks", env=stack.env):
        done = run(sys.executable, "-m", "lab.fault_client", "poison", "50", env=stack.env)
        said = [json.loads(line) for line in done.stdout.splitlines()]
        report = said[-1]
        assert any("Worker exited prematurely: signal 9" in line.get("poison", "") for line in said), done.stderr
        assert (report["accepted"], report["lost"], report["wrong"]) == (50, 0, [])


def test_the_client_of_the_scale_run_measures(stack: Stack) -> None:
    def measured(what: str, count: int, *more: str) -> list[dict[str, float]]:
        done = run(sys.executable, "-m", "lab.scale_client", what, str(count), *more, env=stack.env)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with Worker(stack.logs / "w.log", "--include", "lab.more_tasks", "-Q", "tasks,imports", env=stack.env):
        begins, spread = measured("spread", 20, "tasks,imports")
        assert begins == {"begins": 20}
        assert spread["spread"] > 0 < spread["cpu"]
        assert measured("trips", 3)[0]["trips"] > 0
    if stack.store == "redis":
        copies = measured("copies", 3)[0]
        assert copies["copies"] > 0 < copies["stored"]
    else:
        assert measured("replies", 3)[0]["replies"] > 0
        assert len(stack.rabbitmq.queues(stack.vhost)) >= 3
