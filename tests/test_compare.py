"""The comparison runs, and README.md shows the table that it prints."""

import re
import sys

import pytest

from lab.servers import ROOT, run

CELLS = {
    "Run a `chord`": ("9", '`NotImplementedError: The "rpc" result backend does not support chords!`'),
    "Read it from another process": (
        "5",
        "PENDING for ever, `celery.exceptions.TimeoutError: The operation timed out.`",
    ),
    "Read it through a new `AsyncResult`, twice": (
        "5, then 5",
        "5, then PENDING for ever, `celery.exceptions.TimeoutError: The operation timed out.`",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_table_in_the_readme_is_what_the_comparison_prints() -> None:
    done = run(sys.executable, "-m", "lab.compare", env={}, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    reasons = [line for line in done.stdout.splitlines() if line.startswith("- ")]
    cells = {
        row[1].strip(): (row[2].strip(), row[3].strip()) for row in (re.split(r"(?<!\\)\|", line) for line in table)
    }
    for behaviour, expected in CELLS.items():
        assert cells[behaviour] == expected
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"<!-- compare -->\n(.*?)\n\n", readme, re.DOTALL)
    assert shown
    assert shown[1].splitlines() == table
    assert len(reasons) > 5
    assert [line for line in reasons if line not in readme.splitlines()] == []
