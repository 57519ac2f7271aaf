"""What README.md shows is what happens."""

import re
import sys
from pathlib import Path

import pytest

from lab.servers import ROOT, Worker, run
from tests.conftest import Stack, copy_settings

README = (ROOT / "README.md").read_text()


def _same_every_time(text: str) -> list[str]:
    """Return the lines of a tour without what differs from run to run: times, ids and this machine's URLs."""
    text = re.sub(r"[\d.]+ m?s\b", "TIME", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    return [line for line in text.splitlines() if not re.match(r"  (broker|result backend) ", line)]


def test_the_tour_in_the_readme_is_the_tour(shared_stack: Stack) -> None:
    shown = re.search(rf"<!-- tour:{shared_stack.store} -->\n```text\n(.*?)```", README, re.DOTALL)
    assert shown
    shown_lines = _same_every_time(shown[1])
    assert len(shown_lines) > 10
    tour = run(sys.executable, "producer.py", env=shared_stack.env)
    printed = _same_every_time(tour.stdout)
    missing = [line for line in shown_lines if line not in printed]
    assert not missing
    if shared_stack.store == "redis":  # shown as a whole
        assert shown_lines == printed[: len(shown_lines)]
        assert "steps ended as announced" in shown_lines[-1]


def _plain_project_works(stack: Stack, folder: Path, change: str = "") -> None:
    code = re.search(r"```python\n# jobs\.py\n(.*?)```", README, re.DOTALL)
    assert code
    (folder / "jobs.py").write_text(code[1])
    copy_settings(folder, change)
    alone = {**stack.env, "PYTHONPATH": ""}
    with Worker(folder / "jobs.log", cwd=folder, app="jobs", env=alone):
        client = "from jobs import double; print(double.delay(21).get(timeout=10))"
        done = run(sys.executable, "-c", client, cwd=folder, env=alone)
        assert (done.stdout, done.returncode) == ("42\n", 0), done.stderr


def test_the_plain_project_in_the_readme_works(stack: Stack, tmp_path: Path) -> None:
    _plain_project_works(stack, tmp_path)


def test_it_works_with_two_broker_urls_of_which_the_first_leads_nowhere(rabbitmq_stack: Stack, tmp_path: Path) -> None:
    _plain_project_works(rabbitmq_stack, tmp_path, 'broker_url = f"amqp://127.0.0.1:1//;{broker_url}"\n')


@pytest.mark.parametrize(
    ("what", "env"),
    [
        ("unknown `RESULT_STORE`", {"RESULT_STORE": "memcached"}),
        ("malformed URL", {"RABBITMQ_URL": "amqp://demo:pass/word@rabbitmq:5672/demo"}),
        ("wrong password", {"RABBITMQ_PASSWORD": "wrong"}),
        ("server down", {"REDIS_URL": "redis://127.0.0.1:1/0"}),
        ("no worker", {}),
        ("Celery's own variables in the way", {"CELERY_RESULT_BACKEND": "redis://elsewhere"}),
    ],
)
def test_the_readme_quotes_the_error_line(what: str, env: dict[str, str], redis_stack: Stack) -> None:
    row = re.search(rf"^\| {re.escape(what)} \| `(.*)` \|$", README, re.MULTILINE)
    assert row
    done = run(sys.executable, "producer.py", env={**redis_stack.env, **env})
    line = re.sub(r"(RabbitMQ|Redis) at \S+", r"\1 at SERVER", done.stderr)
    assert line.startswith(re.sub(r"(RabbitMQ|Redis) at \S+", r"\1 at SERVER", row[1]))


@pytest.mark.parametrize(
    ("call", "variable", "url", "error"),
    [
        ("tasks.add.delay(1, 2)", "RABBITMQ_URL", "amqp://127.0.0.1:1//", "kombu.exceptions.OperationalError"),
        (
            "tasks.add.delay(1, 2).get(timeout=1)",
            "REDIS_URL",
            "redis://127.0.0.1:1/0",
            "celery.exceptions.TimeoutError",
        ),
        (
            "celery.chord([tasks.add.s(1, 2)])(tasks.total.s())",
            "REDIS_URL",
            "redis://127.0.0.1:1/0",
            "redis.exceptions.ConnectionError",
        ),
    ],
)
def test_a_client_raises_when_a_server_is_down(
    call: str, variable: str, url: str, error: str, redis_stack: Stack
) -> None:
    assert error in README
    env = {**redis_stack.env, variable: url}
    done = run(sys.executable, "-c", f"import celery, tasks; {call}", env=env)
    assert done.returncode == 1
    assert error in done.stderr


def test_calls_can_be_sent_in_chunks_which_share_one_fate(shared_stack: Stack) -> None:
    shown = re.search(r"`add\.chunks\(calls, 10\)(\..*?)`", README)
    assert shown

    def say(chunks: str) -> str:
        code = f"from tasks import *; calls = [(number, 1) for number in range(25)]; print({chunks}{shown[1]})"
        done = run(sys.executable, "-c", code, env=shared_stack.env)
        return done.stdout.strip() or done.stderr.splitlines()[-1]

    assert say("add.chunks(calls, 10)") == str([[*range(1, 11)], [*range(11, 21)], [*range(21, 26)]])
    assert say("divide.chunks([(1, 1), (1, 0)], 2)") == "ZeroDivisionError: division by zero"
    assert say("fetch_price.chunks([('tea',)], 1)").startswith("ConnectionError: the shop"), (
        "the task itself retries it"
    )


def test_each_line_of_the_checklist_points_at_a_line_that_is_there() -> None:
    checklist = README[README.index("## Before production") :].split("\n\n")[1]
    rows = re.findall(r"^\| [A-Z].* \| \[`(.+?)`\]\(.+?\): (.*) \|$", checklist, re.MULTILINE)
    assert len(rows) == 11
    for file, rest in rows:
        for part in rest.split(", and "):
            line = re.match(r"`(.+?)`", part)
            elsewhere = re.search(r"in `(.+?)`$", part)
            assert line
            assert line[1] in (ROOT / (elsewhere[1] if elsewhere else file)).read_text(), line[1]


def test_every_link_to_a_file_leads_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
