"""What README.md and the pages in docs/ show is what happens, and a reader finds the way."""

import json
import re
import sys
from pathlib import Path
from statistics import median

import pytest
from celery.app.defaults import SETTING_KEYS

from lab.benchmark import multiples, page_tables, price
from lab.benchmark_tasks import DEFAULT, OURS
from lab.faults import FAULTS, NOT_PROMISED, table
from lab.servers import ROOT, STORES, Worker, run, wait_until
from tests.conftest import Stack, copy_settings

FILES = [ROOT / "README.md", ROOT / "lab" / "README.md", *ROOT.glob("docs/*.md")]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in FILES}
README = PAGES["README.md"]
WRONG_PAGE = "docs/when-something-is-wrong.md"
WRONG = PAGES[WRONG_PAGE]
PRODUCTION = PAGES["docs/before-production.md"]
COSTS = PAGES["docs/what-it-costs.md"]
LOST = PAGES["docs/what-is-lost.md"]
SIDE_BY_SIDE = PAGES["docs/side-by-side.md"]
MACHINES = PAGES["docs/beyond-one-machine.md"]
FIGURES = json.loads((ROOT / "docs" / "benchmark.json").read_text())

each_page = pytest.mark.parametrize("page", PAGES)


def _without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def _headings(text: str) -> list[str]:
    return re.findall(r"^#+ (.+)$", _without_code(text), re.MULTILINE)


def _anchor(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# --- The way ----------------------------------------------------------------------------------------------


@each_page
def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset)="([^"]+)"', _without_code(PAGES[page]))
    for link in (link or source for link, source in links):
        if not re.match(r"[a-z]+:", link):
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            if anchor:
                name = str(target.resolve().relative_to(ROOT.resolve()))
                assert anchor in map(_anchor, _headings(PAGES[name])), link


@each_page
def test_no_heading_stands_twice(page: str) -> None:
    anchors = list(map(_anchor, _headings(PAGES[page])))
    assert len(anchors) == len(set(anchors))


def test_readme_leads_to_every_page() -> None:
    assert [page for page in PAGES if page != "README.md" and f"]({page}" not in README] == []


@each_page
def test_a_page_begins_with_the_question_that_it_answers(page: str) -> None:
    """Its first heading is a question or a task, and what follows at once says what the page has."""
    first, _, second = PAGES[page].splitlines()[:3]
    assert re.match("# [A-Z]", first)
    assert re.match(r"[A-Z`*]", second)


def _minutes(text: str) -> float:
    """Return how long the prose takes. Tables, code and what is folded away are looked at when wanted."""
    prose = re.sub(r"<details>.*?</details>", "", _without_code(text), flags=re.DOTALL)
    return len(" ".join(line for line in prose.splitlines() if not line.startswith("|")).split()) / 230


@each_page
def test_a_page_is_read_in_minutes(page: str) -> None:
    """Of the page that one searches, what one finds counts: each entry takes seconds."""
    overview, *entries = re.split(r"^### ", PAGES[page], flags=re.MULTILINE)
    assert _minutes(overview if page == WRONG_PAGE else PAGES[page]) <= 4.5
    for entry in entries if page == WRONG_PAGE else ():
        assert _minutes(entry.partition("\n## ")[0]) * 60 <= 20, entry.partition("\n")[0]


@pytest.mark.parametrize(("file", "limit"), [("README.md", 280), ("celeryconfig.py", 180), ("docker-compose.yml", 170)])
def test_what_everybody_reads_is_short(file: str, limit: int) -> None:
    assert len((ROOT / file).read_text().splitlines()) <= limit


@each_page
def test_commands_and_code_are_those_of_the_project(page: str) -> None:
    text = PAGES[page]
    for module in re.findall(r"python3? -m ((?:lab|hardening)[\w.]+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for file in re.findall(r"-f ([\w./-]+\.yml)", text):
        assert (ROOT / file).exists(), file
    services = "".join(path.read_text() for path in ROOT.glob("**/docker-compose*.yml"))
    for service in re.findall(r"docker compose run (?:-\S+ )*([a-z]+)", text):
        assert f"\n  {service}:" in services, service
    for file, code in re.findall(r"```python\n# from (\S+)\n(.*?)```", text, re.DOTALL):
        for part in code.strip().split("\n\n\n"):
            assert f"\n{part}\n" in (ROOT / file).read_text(), part


# --- README: the tour, and the plain project --------------------------------------------------------------


def _same_every_time(text: str) -> list[str]:
    """Return the lines of a tour without what differs from run to run: times, ids and this machine's URLs."""
    text = re.sub(r"[\d.]+ m?s\b", "TIME", text)
    text = re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", text)
    return [line for line in text.splitlines() if not re.match(r"  (broker|result backend) ", line)]


def test_the_tour_that_is_shown_is_the_tour(shared_stack: Stack) -> None:
    if shared_stack.store == "redis":
        pytest.skip("README.md has a picture of it: tests/test_tour.py")
    shown = re.search(rf"<!-- tour:{shared_stack.store} -->\n```text\n(.*?)```", README, re.DOTALL)
    assert shown
    shown_lines = [line for line in _same_every_time(shown[1]) if line.strip() not in ("", "...")]
    assert len(shown_lines) > 10
    tour = run(sys.executable, "producer.py", env=shared_stack.env)
    printed = _same_every_time(tour.stdout)
    assert [line for line in shown_lines if line not in printed] == []


def _plain_project_works(stack: Stack, folder: Path, change: str = "") -> None:
    code = re.search(r"```python\n# jobs\.py\n(.*?)```", README, re.DOTALL)
    assert code
    (folder / "jobs.py").write_text(code[1])
    copy_settings(folder, change)
    alone = {**stack.env, "PYTHONPATH": ""}
    with Worker(folder / "jobs.log", cwd=folder, app="jobs", env=alone):
        client = "from jobs import double; print(double.delay(21).get(timeout=10))"
        assert f'$ python -c "{client}"\n42\n' in README
        done = run(sys.executable, "-c", client, cwd=folder, env=alone)
        assert (done.stdout, done.returncode) == ("42\n", 0), done.stderr


def test_the_plain_project_works(stack: Stack, tmp_path: Path) -> None:
    _plain_project_works(stack, tmp_path)


def test_it_works_with_two_broker_urls_of_which_the_first_leads_nowhere(rabbitmq_stack: Stack, tmp_path: Path) -> None:
    _plain_project_works(rabbitmq_stack, tmp_path, 'broker_url = f"amqp://127.0.0.1:1//;{broker_url}"\n')


# --- docs/side-by-side.md ---------------------------------------------------------------------------------

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
    "Read it from another thread": ("5", "5"),
}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_table_side_by_side_is_what_the_comparison_prints() -> None:
    done = run(sys.executable, "-m", "lab.compare", env={}, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    cells = {
        row[1].strip(): (row[2].strip(), row[3].strip())
        for row in (re.split(r"(?<!\\)\|", line) for line in printed[2:])
    }
    for behaviour, expected in CELLS.items():
        assert cells[behaviour] == expected
    shown = re.search(r"<!-- compare -->\n(.*?)\n\n", SIDE_BY_SIDE, re.DOTALL)
    assert shown
    assert shown[1].splitlines() == printed
    different = [row.replace("\\|", "|") for row, (redis, rabbitmq) in cells.items() if redis != rabbitmq]
    reasons = re.findall(r"^- (.*)", SIDE_BY_SIDE, re.MULTILINE)
    assert len(different) > 5
    assert [row for row in different if not any(row in reason for reason in reasons)] == []
    assert [reason for reason in reasons if not reason.startswith(tuple(different))] == []


# --- docs/before-production.md ----------------------------------------------------------------------------


def test_each_line_of_the_checklist_points_at_a_line_that_is_there() -> None:
    checklist = PRODUCTION.split("| the line that does it |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| [A-Z].* \| \[`(.+?)`\]\(.+?\): (.*) \|$", checklist, re.MULTILINE)
    assert len(rows) == checklist.count("\n| ")
    assert len(rows) > 10
    for file, rest in rows:
        for part in rest.split(", and "):
            line = re.match(r"`(.+?)`", part)
            elsewhere = re.search(r"in `(.+?)`$", part)
            assert line
            assert line[1] in (ROOT / (elsewhere[1] if elsewhere else file)).read_text(), line[1]


def test_the_settings_that_can_surprise_are_there_and_so_is_the_way_back() -> None:
    rows = PRODUCTION.split("| the setting |")[1].split("\n\n")[0].splitlines()[2:]
    assert len(rows) > 3
    settings = (ROOT / "celeryconfig.py").read_text()
    for row in rows:
        for line in re.findall(r"`(\w+ = [^`]+)`", row.split("|")[2]):
            assert f"\n{line}" in settings, line
        for name in re.findall(r"`((?:task|result|worker|broker)_\w+)[ `]", row):
            assert name in SETTING_KEYS, name


LIMITED = """
from tasks import app

@app.task(rate_limit="1/h")
def limited(): ...

@app.task
def quick(): ...
"""


def test_a_rate_limit_stops_its_queue_and_no_other(redis_stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "jobs.py").write_text(LIMITED)
    env = {**redis_stack.env, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    client = "from jobs import *; "
    slow = Worker(tmp_path / "slow.log", "-Q", "slow", "-c", "1", env=env, app="jobs")
    with slow, Worker(tmp_path / "own.log", env=env, app="jobs"):
        run(sys.executable, "-c", client + "[limited.apply_async(queue='slow') for _ in range(2)]", env=env)
        wait_until(lambda: slow.log.read_text().count("limited[") > 2, "the second waits for its turn")
        send = "quick.apply_async(queue='slow'); print(quick.delay().get(timeout=60)); "
        look = "print(app.connection_for_read().default_channel.queue_declare('slow', passive=True).message_count)"
        done = run(sys.executable, "-c", client + send + look, env=env)
    assert done.stdout == "None\n1\n", done.stderr


# --- docs/when-something-is-wrong.md; the texts by which it is searched: tests/test_troubleshooting.py ----


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
def test_the_line_that_tells_what_is_wrong(what: str, env: dict[str, str], redis_stack: Stack) -> None:
    row = re.search(rf"^\| {re.escape(what)} \| `(.*)` \|$", WRONG, re.MULTILINE)
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
            "kombu.exceptions.OperationalError",
        ),
    ],
)
def test_a_client_raises_when_a_server_is_down(
    call: str, variable: str, url: str, error: str, redis_stack: Stack
) -> None:
    assert error in WRONG
    env = {**redis_stack.env, variable: url}
    done = run(sys.executable, "-c", f"import celery, tasks; {call}", env=env)
    assert done.returncode == 1
    assert error in done.stderr


# --- docs/what-is-lost.md ---------------------------------------------------------------------------------


def test_the_table_of_faults_has_every_fault_on_both_stores_and_nothing_is_lost() -> None:
    header, _, *rows = LOST.split("<!-- faults -->\n")[1].split("\n\n")[0].splitlines()
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


# --- docs/what-it-costs.md --------------------------------------------------------------------------------


def test_the_tables_of_costs_are_those_of_the_committed_figures() -> None:
    shown = re.findall(r"<!-- benchmark -->\n(.*?)\n<!-- /benchmark -->", COSTS, re.DOTALL)
    assert "\n\n".join(shown).splitlines() == page_tables(FIGURES)


def test_the_words_on_costs_are_those_of_the_committed_figures() -> None:
    ours = [FIGURES["figures"][store][OURS] for store in STORES]

    def of_defaults(quantity: str) -> list[float]:
        return [median(1 / each for each in multiples(FIGURES, store, DEFAULT, quantity)) for store in STORES]

    rates, together = of_defaults("trips_per_s"), of_defaults("together_per_s")
    without = [median(multiples(FIGURES, store, "neither confirmed nor quorum")) for store in STORES]
    chunks = [median(each["chunks_per_s"]) / median(each["trips_per_s"]) for each in ours]
    words = " ".join(COSTS.split())
    for said in (
        f"pass at {rates[0]:.2f} (redis) and {rates[1]:.2f} (rabbitmq) of the rate",
        f"{without[0]:.1f} and {without[1]:.1f} times our rate",
        f"go out {together[0]:.2f} (redis) and {together[1]:.2f} (rabbitmq) times as fast",
        f"{chunks[0]:.0f} times as many calls a second on redis, {chunks[1]:.0f} times on rabbitmq",
    ):
        assert said in words
    alone, queue, both = (
        re.findall(r"\d+ %", price(FIGURES, kind))
        for kind in ("publishing is not confirmed", "classic queue, not quorum", "neither confirmed nor quorum")
    )
    assert all(percent in words.split("Alone,")[1].split(".")[0] for percent in (*alone, *queue, *both))


def test_the_processor_time_of_a_task_is_that_of_the_committed_figures() -> None:
    """docs/beyond-one-machine.md reckons with it; three RabbitMQ nodes take three times what one takes at most."""
    rows = re.findall(
        r"^\| .+? \| (?:(3) x )?([\d.]+) ms \| ([\d.]+).*? \| ([\d.]+)",
        MACHINES.split("| CPU a task |")[1],
        re.MULTILINE,
    )
    ours = FIGURES["figures"]["redis"][OURS]
    measured = [f"{median(ours[f'{who}_cpu_ms']):.2f}" for who in ("client", "worker", "pool", "rest", "redis")]
    assert [row[1] for row in rows] == measured
    assert [row[0] for row in rows] == ["", "", "", "3", ""]
    for nodes, cpu, five, fifty in rows:
        cpus = int(nodes or 1) * float(cpu)
        assert (float(five), float(fifty)) == pytest.approx((5 * cpus, 50 * cpus), abs=0.06)


def test_calls_can_be_sent_in_chunks_which_share_one_fate(shared_stack: Stack) -> None:
    shown = re.search(r"`add\.chunks\(calls, 10\)(\..*?)`", COSTS)
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


# --- All tables -------------------------------------------------------------------------------------------


def test_the_tables_were_made_with_the_servers_of_the_compose_file() -> None:
    compose, lock = (ROOT / "docker-compose.yml").read_text(), (ROOT / "requirements.txt").read_text()
    wanted = [
        version
        for pattern, text in (
            (r"^celery==([\d.]+)", lock),
            (r"image: rabbitmq:([\d.]+)", compose),
            (r"image: redis:([\d.]+)", compose),
        )
        for version in re.findall(pattern, text, re.MULTILINE)[:1]
    ]
    said = {
        (page, versions)
        for page, text in PAGES.items()
        for versions in re.findall(r"Celery ([\d.]+), RabbitMQ ([\d.]+)(?:,| and) Redis ([\d.]+)", text)
    }
    assert {page for page, _ in said} >= {
        f"docs/{name}.md" for name in ("side-by-side", "what-is-lost", "what-it-costs")
    }
    for page, versions in said:
        for version, start in zip(versions, wanted, strict=True):
            assert f"{version}.".startswith(f"{start}."), f"{page}: {version}"
