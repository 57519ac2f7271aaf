"""The fault run's client, and what README.md says of it; the run itself needs Docker: python3 -m lab.faults."""

import inspect
import json
import re
import sys

from lab import fault_client
from lab.faults import FAULTS, NOT_PROMISED, STORES, table
from lab.servers import ROOT, Worker, run
from tests.conftest import Stack

README = (ROOT / "README.md").read_text()


def test_the_client_fetches_all_that_it_queues(stack: Stack) -> None:
    """Single tasks, a group and, where there are any, a chord; and one that kills its process."""
    with Worker(stack.logs / "w.log", "--include", "lab.fault_tasks", env=stack.env):
        done = run(sys.executable, "-m", "lab.fault_client", "stream", "50", "--poison", env=stack.env)
        said = [json.loads(line) for line in done.stdout.splitlines()]
        report = said[-1]
        assert any("Worker exited prematurely: signal 9" in line.get("poison", "") for line in said), done.stderr
        assert (report["accepted"], report["lost"], report["wrong"]) == (50, 0, [])


def test_the_readme_shows_the_clients_code() -> None:
    shown = re.search(r"```python\n# from lab/fault_client\.py\n(.*?)```", README, re.DOTALL)
    assert shown
    assert shown[1].strip() == "\n\n".join(
        inspect.getsource(function).strip() for function in (fault_client.queue, fault_client.fetch)
    ).replace("\n\ndef fetch", "\n\n\ndef fetch")


def test_the_readmes_table_has_every_fault_on_both_stores_and_nothing_is_lost() -> None:
    header, _, *rows = README.split("<!-- faults -->\n")[1].split("\n\n")[0].splitlines()
    assert header == table([]).splitlines()[0]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(fault, store) for fault, store, *_ in cells] == [
        (fault.text, store) for fault in FAULTS for store in STORES
    ]
    names = {fault.text: fault.name for fault in FAULTS}
    for fault, store, accepted, fetched, lost, *_ in cells:
        if (store, names[fault]) in NOT_PROMISED:
            assert lost.endswith("*")
        else:
            assert (accepted, lost) == (fetched, "0")
