"""The fault run's client; the run itself needs Docker: python3 -m lab.faults."""

import json
import sys

from lab.servers import Worker, run
from tests.conftest import Stack


def test_the_client_fetches_all_that_it_queues(stack: Stack) -> None:
    """Single tasks, a group and, where there are any, a chord; and one that kills its process."""
    with Worker(stack.logs / "w.log", "--include", "lab.fault_tasks", env=stack.env):
        done = run(sys.executable, "-m", "lab.fault_client", "stream", "50", "--poison", env=stack.env)
        said = [json.loads(line) for line in done.stdout.splitlines()]
        report = said[-1]
        assert any("Worker exited prematurely: signal 9" in line.get("poison", "") for line in said), done.stderr
        assert (report["accepted"], report["lost"], report["wrong"]) == (50, 0, [])
