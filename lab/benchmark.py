"""What each store costs: our settings against Celery's own, against no Celery at all, and each safety by itself.

python -m lab.benchmark          measures for at most five minutes, and prints tables
python -m lab.benchmark --json   the same, and prints the raw figures to standard output, the tables to standard error
python -m lab.benchmark --quick  a tenth of the sizes, one round: to see whether it runs
python -m lab.benchmark --show docs/benchmark.json   the tables of such a file, measuring nothing

Everything that is compared runs in turn, round after round, on the same servers: take the ratios, not the figures.
The servers are those of RABBITMQ_URL and REDIS_URL; what it makes there it removes at the end.
"""

import argparse
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pika
import redis

from lab.benchmark_tasks import BULK, DEFAULT, OURS, PRICES
from lab.servers import ROOT, STORES, OwnServers, Worker, as_admin, markdown, own_servers, wait_until

FLOORS = {"redis": ("redis-py",), "rabbitmq": ("pika-quorum", "pika-classic")}
LIMIT = 300  # seconds for everything
RABBITMQ_SAMPLES = 5.0  # seconds between its statistics

Figures = dict[str, dict[str, dict[str, list[float]]]]  # store, settings, quantity: a value for each round


@dataclass(frozen=True)
class Sizes:
    """How often and how much."""

    rounds: int = 3
    trips: int = 200
    tasks: int = 2_000
    group: int = 100
    large: int = 11
    price_rounds: int = 4
    price_trips: int = 30
    price_tasks: int = 300
    unread: tuple[int, ...] = (100, 1_000, 10_000)
    fetched: int = 9_000
    workers: tuple[int, ...] = (1, 2, 4)
    scale_tasks: int = 150  # for each worker


QUICK = Sizes(1, 10, 40, 10, 1, 1, 5, 20, (10, 50), 100, (1, 2), 20)


def say(line: str) -> None:
    """Show progress."""
    print(f"{time.monotonic() - STARTED:5.0f} s  {line}", file=sys.stderr, flush=True)


STARTED = time.monotonic()


class DefaultWorker(Worker):
    """A worker as Celery starts it by default: it looks for its neighbours first."""

    LEAN = ()


class Subject:
    """One kind of settings with one store: servers of its own, and where its figures go."""

    def __init__(self, settings: str, own: OwnServers, folder: Path, figures: Figures) -> None:
        self.settings, self.own, self.folder = settings, own, folder
        self.figures = figures.setdefault(own.store, {}).setdefault(settings, {})
        # The administrator, because Celery's defaults know no prefix, and other keys are closed to the user.
        self.env = {**own.env, "REDIS_URL": as_admin(own.redis_url), "REDIS_PASSWORD": "", "RABBITMQ_PASSWORD": ""}
        self.env["BENCHMARK_SETTINGS"] = settings
        self.client: subprocess.Popen[str] | None = None
        self.workers: list[Worker] = []

    def record(self, figures: dict[str, float]) -> None:
        """Keep what one round gave."""
        for quantity, value in figures.items():
            self.figures.setdefault(quantity, []).append(round(value, 4))

    def worker(self) -> Worker:
        """Start another worker."""
        kind = DefaultWorker if self.settings == DEFAULT else Worker
        options = PRICES[self.settings].worker_options if self.settings in PRICES else ()
        log = self.folder / (re.sub(r"\W+", "-", f"{self.own.vhost} {self.settings} {len(self.workers)}") + ".log")
        self.workers.append(kind(log, *options, env=self.env, app="lab.benchmark_tasks"))
        return self.workers[-1]

    def start(self, cleanup: ExitStack, kind: str = "celery") -> None:
        """Start the client, and for the floor the other side as well."""
        for role in ("answer", "") if kind != "celery" else ("",):
            self.client = subprocess.Popen(
                [sys.executable, "-m", "lab.benchmark_client", kind, *([role] if role else [])],
                cwd=ROOT,
                env={**os.environ, **self.env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            cleanup.callback(end, self.client)

    def ask(self, what: str, count: int) -> dict[str, float]:
        """Let the client measure. Raises RuntimeError when it fails; the reason is on the screen."""
        assert self.client
        assert self.client.stdin
        assert self.client.stdout
        self.client.stdin.write(f"{what} {count}\n")
        self.client.stdin.flush()
        line = self.client.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.own.store}, {self.settings}: {what} failed")
        answer: dict[str, float] = json.loads(line)
        return answer


def end(process: subprocess.Popen[str]) -> None:
    """End a client."""
    process.kill()
    process.wait(30)


@contextmanager
def running(workers: list[Worker]) -> Iterator[None]:
    """Wait until all workers are ready, and kill them at the end: they hold nothing that anybody wants."""
    try:
        for worker in workers:
            worker.wait_ready()
        yield
    finally:
        for worker in workers:
            worker.kill()


# --- What is measured -------------------------------------------------------------------------------------


def measure_start(subject: Subject) -> None:
    """Worker start to ready, and client start to first result."""
    started = time.perf_counter()
    worker = subject.worker()
    try:
        wait_until(lambda: worker.says(" ready."), "worker ready", interval=0.01)
        ready = time.perf_counter() - started
        command = [sys.executable, "-m", "lab.benchmark_client", "first"]
        started = time.perf_counter()
        subprocess.run(command, cwd=ROOT, env={**os.environ, **subject.env}, check=True, stdout=-3, timeout=60)
        subject.record({"worker_ready_s": ready, "first_result_s": time.perf_counter() - started})
    finally:
        worker.kill()


def measure_trips(subject: Subject, sizes: Sizes) -> None:
    """One at a time, and all at once; for Celery also groups, chords and a large result."""
    subject.record(subject.ask("one_at_a_time", sizes.trips))
    if subject.settings not in (OURS, DEFAULT):
        subject.record(subject.ask("all_at_once", sizes.tasks))
    else:
        before = processor_time(subject)
        subject.record(subject.ask("all_at_once", sizes.tasks))
        after = processor_time(subject)
        subject.record({f"{who}_cpu_ms": (after[who] - before[who]) / sizes.tasks * 1e3 for who in after})
        subject.record(subject.ask("together", sizes.tasks))
        subject.record(subject.ask("chunks", sizes.tasks))
        subject.record(subject.ask("group", sizes.group))
        subject.record(subject.ask("large", sizes.large))
        if subject.own.store == "redis":
            subject.record(subject.ask("chord", sizes.group))


def processor_time(subject: Subject) -> dict[str, float]:
    """Return the seconds of processor time that each has used until now; the rest is RabbitMQ and the system."""
    assert subject.client
    ticks = os.sysconf("SC_CLK_TCK")

    def of(pid: int | str) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / ticks

    main = subject.workers[-1].process.pid
    pool = Path(f"/proc/{main}/task/{main}/children").read_text().split()
    with subject.own.redis_admin() as client:
        cpu = client.info("cpu")
    times = {"client": of(subject.client.pid), "worker": of(main), "pool": sum(map(of, pool))}
    times["redis"] = cpu["used_cpu_user"] + cpu["used_cpu_sys"]
    user, nice, system, _idle, _waiting, *interrupts = map(int, Path("/proc/stat").read_text().split()[1:8])
    return {**times, "rest": (user + nice + system + sum(interrupts)) / ticks - sum(times.values())}


def measure_price(subject: Subject, sizes: Sizes) -> None:
    """The two figures that a single setting changes."""
    figures = subject.ask("one_at_a_time", sizes.price_trips) | subject.ask("all_at_once", sizes.price_tasks)
    subject.record({f"price_{quantity}": value for quantity, value in figures.items()})


def measure_memory(subject: Subject, sizes: Sizes, until: float) -> None:
    """Unread results, in the store and in the client; then whether the client grows."""
    own = subject.own
    for count in sizes.unread:
        results, empty = count_results(own), 0.0 if own.store == "rabbitmq" else memory_of(own, 0)
        queued = subject.ask("queue", count)
        wait_until(partial(holds, own, results + count), f"{count} results", 120)
        full = memory_of(own, results + count) - empty
        figures = {"store_mb": full / 1e6, **queued, **subject.ask("fetch", count)}
        subject.record({f"unread_{count}_{quantity}": value for quantity, value in figures.items()})
    before = subject.ask("memory", 0)
    batch = min(1_000, sizes.fetched)
    fetched = 0
    while fetched < sizes.fetched and time.monotonic() - STARTED < until:
        subject.ask("all_at_once", batch)
        fetched += batch
    after = subject.ask("memory", 0)
    subject.record(
        {
            "client_mb_before": before["memory_mb"],
            "client_mb_after": after["memory_mb"],
            "fetched": fetched,
            "objects_per_result": (after["blocks"] - before["blocks"]) / max(fetched, 1),
        }
    )


def reply_queues(own: OwnServers) -> dict[str, int]:
    """Return the reply queues, which are named by a UUID, and how many results each holds."""
    queues = {queue["name"]: queue["messages"] for queue in own.rabbitmq.queues(own.vhost)}
    return {name: messages for name, messages in queues.items() if re.fullmatch(r"[0-9a-f-]{36}", name)}


def count_results(own: OwnServers) -> int:
    """Return how many results are in the store."""
    if own.store == "rabbitmq":
        return sum(reply_queues(own).values())
    with own.redis_admin() as client:
        return int(client.dbsize())


def holds(own: OwnServers, results: int) -> bool:
    """Tell whether so many results are in the store."""
    return count_results(own) >= results


def memory_of(own: OwnServers, results: int) -> float:
    """Return the bytes that Redis uses, or the reply queues when they hold so many results."""
    if own.store == "redis":
        with own.redis_admin() as client:
            return float(client.info("memory")["used_memory"])

    def sampled() -> list[dict[str, Any]] | None:
        queues = [own.rabbitmq.request("GET", f"queues/{own.vhost}/{name}") for name in reply_queues(own)]
        return queues if sum(queue.get("messages", 0) for queue in queues) == results else None

    wait_until(sampled, "RabbitMQ's statistics", 20, 0.2)
    if results > 1_000:
        time.sleep(RABBITMQ_SAMPLES)  # the first sample still has garbage in it
    return float(sum(queue.get("memory", 0) for queue in sampled() or ()))


def measure_scale(subject: Subject, sizes: Sizes) -> None:
    """Tasks a second with one worker and with several."""
    workers: list[Worker] = []
    with ExitStack() as cleanup:
        subject.start(cleanup)
        for count in sizes.workers:
            more = [subject.worker() for _ in range(count - len(workers))]
            workers += more
            cleanup.enter_context(running(more))
            subject.ask("waiting", 10)
            subject.record({f"waiting_{count}_per_s": subject.ask("waiting", count * sizes.scale_tasks)["per_s"]})
            subject.record({f"computing_{count}_per_s": subject.ask("computing", sizes.scale_tasks)["per_s"]})


class TimeIsUp(Exception):
    """Everything has taken LIMIT seconds."""


def measure(sizes: Sizes) -> dict[str, Any]:
    """Measure as much as the time allows. Raises OSError, RuntimeError or redis.RedisError."""
    figures: Figures = {}
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(TemporaryDirectory()))
        owns = {store: cleanup.enter_context(own_servers(store, "benchmark")) for store in STORES}
        # What is on by default listens to the other workers of its virtual host.
        apart = {store: cleanup.enter_context(own_servers(store, "benchmark")) for store in STORES}

        def subject(settings: str, store: str) -> Subject:
            return Subject(settings, (apart if settings == DEFAULT else owns)[store], folder, figures)

        complete = False
        try:
            measure_all(sizes, subject)
            complete = True
        except TimeIsUp:
            say(f"the {LIMIT} s are over: what is missing in the tables was not measured; try --quick")
        signal.alarm(0)
        return {**conditions(owns["redis"]), "complete": complete, "sizes": vars(sizes), "figures": figures}


def measure_all(sizes: Sizes, subject: Callable[[str, str], Subject]) -> None:
    """Measure everything: one round at least, and as many more as fit into so many seconds since the start."""
    ours = {store: subject(OURS, store) for store in STORES}
    main = [kind for store in STORES for kind in (ours[store], subject(DEFAULT, store))]
    floors = [subject(kind, store) for store in STORES for kind in FLOORS[store]]
    each_in_turn(main, sizes.rounds, 22, "worker and client start", measure_start)
    with ExitStack() as clients, running([each.worker() for each in main]):
        for each in main + floors:
            each.start(clients, each.settings if each in floors else "celery")
            each.ask("all_at_once", 20)  # connections, declarations, imports
        each_in_turn(main + floors, sizes.rounds, 103, "round trips", lambda each: measure_trips(each, sizes))
    for store, until in (("redis", 143), ("rabbitmq", 184)):
        several = [ours[store]] + [subject(name, store) for name in PRICES if store in PRICES[name].stores]
        with ExitStack() as clients, running([each.worker() for each in several]):
            for each in several:
                each.start(clients)
                each.ask("all_at_once", 20)
            each_in_turn(several, sizes.price_rounds, until, "settings", lambda each: measure_price(each, sizes))
    for store, until in (("redis", 220), ("rabbitmq", 262)):
        say(f"memory: {store}")
        bulk = subject(BULK, store)
        with ExitStack() as clients, running([bulk.worker()]):
            bulk.start(clients)
            measure_memory(bulk, sizes, until)
    for store in STORES:
        say(f"one worker and more: {store}")
        measure_scale(ours[store], sizes)


def each_in_turn(
    subjects: list[Subject], rounds: int, until: float, what: str, call: Callable[[Subject], None]
) -> None:
    """Measure each subject once a round, every other round backwards, for so many rounds or seconds since the start."""
    took = 0.0
    for number in range(rounds):
        started = time.monotonic()
        if number and started - STARTED + took > until:
            say(f"{what}: no time for round {number + 1}")
            break
        for subject in subjects[:: -1 if number % 2 else 1]:
            say(f"{what}, round {number + 1} of {rounds}: {subject.own.store}, {subject.settings}")
            call(subject)
        took = time.monotonic() - started


def conditions(own: OwnServers) -> dict[str, Any]:
    """Return when, where and with what this was measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - STARTED),
        "machine": {
            "processors": os.cpu_count(),
            "model": models[0] if models else platform.machine(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
            "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        },
        "versions": {
            **own.versions(),
            "kombu": version("kombu"),
            "amqp": version("amqp"),
            "redis-py": redis.__version__,
            "pika": pika.__version__,
            "Python": platform.python_version(),
        },
    }


# --- The tables -------------------------------------------------------------------------------------------

QUANTITIES = {  # of the main table: what it is called, and its unit
    "p50_ms": ("One at a time, median", "ms"),
    "p99_ms": ("One at a time, 99th percentile", "ms"),
    "queued_per_s": ("{tasks:,} tasks: queued", "/s"),
    "together_per_s": ("{tasks:,} tasks: queued, confirmed together", "/s"),
    "trips_per_s": ("{tasks:,} tasks: queued and fetched", "/s"),
    "chunks_per_s": ("{tasks:,} calls, ten in a task: queued and fetched", "/s"),
    "one_by_one_ms": ("Group of {group}: each `get()`", "ms"),
    "group_get_ms": ("Group of {group}: `get()`", "ms"),
    "group_get_0_ms": ("Group of {group}: `get(interval=0)`", "ms"),
    "chord_ms": ("Chord of {group}", "ms"),
    "large_ms": ("A result of 100 kB", "ms"),
    "first_result_s": ("Client start to first result", "s"),
    "worker_ready_s": ("Worker start to ready", "s"),
    "client_cpu_ms": ("Processor time a task: client", "ms"),
    "worker_cpu_ms": ("Processor time a task: worker, main process", "ms"),
    "pool_cpu_ms": ("Processor time a task: worker, pool", "ms"),
    "redis_cpu_ms": ("Processor time a task: Redis", "ms"),
    "rest_cpu_ms": ("Processor time a task: RabbitMQ, system", "ms"),
}


def number(value: float) -> str:
    """Return three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: list[float] | None, unit: str) -> str:
    """Return the median, and the smallest and the largest value."""
    if not values:
        return ""
    middle = number(statistics.median(values))
    separator = "" if unit == "/s" else " "
    return f"{middle}{separator}{unit} ({number(min(values))} to {number(max(values))})"


def ratios(values: list[float] | None, others: list[float] | None) -> list[float]:
    """Return the ratio within each round."""
    return [value / other for value, other in zip(values or (), others or (), strict=False)]


def times(multiples: list[float]) -> str:
    """Return the median ratio, and the smallest and the largest."""
    if not multiples:
        return ""
    return f"{statistics.median(multiples):.2f} ({min(multiples):.2f} to {max(multiples):.2f})"


def main_table(run: dict[str, Any], store: str) -> list[str]:
    """Our settings against Celery's own and against no Celery."""
    figures = run["figures"][store]
    rows = [
        [store, "ours / defaults", "our settings", "Celery's defaults", *(f"{name} alone" for name in FLOORS[store])]
    ]
    for quantity, (name, unit) in QUANTITIES.items():
        ours, default = (figures.get(settings, {}).get(quantity) for settings in (OURS, DEFAULT))
        if ours:
            floors = [spread(figures.get(floor, {}).get(quantity), unit) for floor in FLOORS[store]]
            cells = [spread(ours, unit), spread(default, unit), *floors]
            rows.append([name.format(**run["sizes"]), times(ratios(ours, default)), *cells])
    return markdown(rows)


def summary_table(run: dict[str, Any]) -> list[str]:
    """Both stores side by side, ratios first."""
    rows = [["with our settings", *(f"{store}{of}" for store in STORES for of in (": of the defaults", ""))]]
    for quantity, (name, unit) in QUANTITIES.items():
        cells = []
        for store in STORES:
            figures = run["figures"][store]
            ours = figures.get(OURS, {}).get(quantity)
            cells += [times(ratios(ours, figures.get(DEFAULT, {}).get(quantity))), spread(ours, unit)]
        if any(cells):
            rows.append([name.format(**run["sizes"]), *cells])
    return markdown(rows)


def multiples(run: dict[str, Any], store: str, settings: str, quantity: str = "trips_per_s") -> list[float]:
    """Return a figure of other settings as a multiple of ours, for each round; nothing if the store has no such."""
    figures = run["figures"][store]
    quantity = f"price_{quantity}" if settings in PRICES else quantity
    return ratios(figures.get(settings, {}).get(quantity), figures.get(OURS, {}).get(quantity))


def price(run: dict[str, Any], settings: str) -> str:
    """Return what celeryconfig.py says above a setting: how many of the tasks a second it takes.

    It is a price, or a gain, if all rounds say so and their median is 5 % or more.
    """
    parts = []
    for store in STORES:
        if found := multiples(run, store, settings):
            percent = round((1 - 1 / statistics.median(found)) * 100)
            if percent >= 5 and min(found) > 1:
                parts.append(f"{store} {percent} %")
            elif percent <= -5 and max(found) < 1:
                parts.append(f"{store} a gain of {-percent} %")
            else:
                parts.append(f"{store} none")
    return f"Price, tasks a second: {', '.join(parts)}."


def price_table(run: dict[str, Any]) -> list[str]:
    """Each safety by itself, and at last all of Celery's defaults."""
    rows = [["our settings, but", *(f"{store}: {what}" for store in STORES for what in ("tasks/s", "one at a time"))]]
    labels = {name: f"{name}{changes(each.settings)}" for name, each in PRICES.items()}
    for settings, label in {**labels, DEFAULT: "all of Celery's defaults"}.items():
        cells = [times(multiples(run, store, settings, what)) for store in STORES for what in ("trips_per_s", "p50_ms")]
        rows.append([label, *cells])
    return markdown(rows)


def changes(settings: dict[str, Any]) -> str:
    """Return the name of the first setting that is changed, and whether there are more."""
    names = [f"`{name}`" for name in settings]
    return f" ({names[0]}{', ...' if names[1:] else ''})" if names else ""


def once(run: dict[str, Any], store: str, settings: str) -> dict[str, float]:
    """Return what was measured once."""
    return {quantity: values[0] for quantity, values in run["figures"][store].get(settings, {}).items()}


def cell(figures: dict[str, float], quantity: str, form: str) -> str:
    """Return a figure as it stands in a table, or nothing if it was not measured."""
    return form.format(figures[quantity]) if quantity in figures else ""


def memory_table(run: dict[str, Any]) -> list[str]:
    """Unread results, and what they take."""
    columns = {"store_mb": ("in the store", "{:.1f} MB"), "client_mb": ("in the client", "{:.0f} MB")}
    columns["fetch_ms"] = ("to fetch each", "{:.2f} ms")
    rows = [["unread results", *(f"{store}: {head}" for store in STORES for head, _ in columns.values())]]
    for count in run["sizes"]["unread"]:
        cells = [
            cell(once(run, store, BULK), f"unread_{count}_{quantity}", form)
            for store in STORES
            for quantity, (_, form) in columns.items()
        ]
        rows.append([f"{count:,}", *cells])
    return markdown(rows)


def scale_table(run: dict[str, Any]) -> list[str]:
    """Tasks a second with more workers."""
    kinds = {"waiting": "wait 10 ms", "computing": "compute 10 ms"}
    rows = [["workers, each of 2 processes", *(f"{store}: {kind}" for store in STORES for kind in kinds.values())]]
    for count in run["sizes"]["workers"]:
        cells = [
            cell(once(run, store, OURS), f"{kind}_{count}_per_s", "{:.0f}/s") for store in STORES for kind in kinds
        ]
        rows.append([str(count), *cells])
    return markdown(rows)


def growth(run: dict[str, Any]) -> list[str]:
    """Whether the client holds on to what it has fetched."""
    lines = []
    for store in STORES:
        if "fetched" in (one := once(run, store, BULK)):
            before = sum(run["sizes"]["unread"])
            lines.append(
                f"{store}: the client took {one['client_mb_before']:.0f} MB after {before:,} fetched results, and "
                f"{one['client_mb_after']:.0f} MB after {before + one['fetched']:,.0f}: "
                f"{one['objects_per_result']:.2f} objects more for each."
            )
    return lines


def conditions_line(run: dict[str, Any]) -> str:
    """Say when, where and with what."""
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"Measured on {run['date'][:10]} in {run['seconds']} s: {machine['processors']} processors "
        f"({machine['model']}), {machine['memory_gb']} GB, {machine['system']}; {versions}."
    )


def page_tables(run: dict[str, Any]) -> list[str]:
    """Return the part of tables() that docs/what-it-costs.md shows."""
    parts = (summary_table, price_table, memory_table, growth, scale_table)
    return [conditions_line(run), *(line for part in parts for line in ("", *part(run)))]


def tables(run: dict[str, Any]) -> list[str]:
    """Return everything that is shown of a run."""
    return [*(line for store in STORES for line in (*main_table(run, store), "")), *page_tables(run)]


def time_is_up(*_: Any) -> None:
    """Stop measuring."""
    raise TimeIsUp


def main() -> int:
    """Measure or show, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the raw figures to standard output")
    parser.add_argument("--quick", action="store_true", help="see whether it runs")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of such a file")
    options = parser.parse_args()
    if options.show:
        print(*tables(json.loads(options.show.read_text())), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmark: stopped"))  # clean up then, too
    signal.signal(signal.SIGALRM, time_is_up)
    signal.alarm(0 if options.quick else LIMIT - 10)  # they are needed to clean up; --quick ends by itself
    try:
        run = measure(QUICK if options.quick else Sizes())
    except (OSError, RuntimeError, redis.RedisError) as exc:
        print(f"benchmark: {exc}. Check RABBITMQ_URL, RABBITMQ_API and REDIS_URL.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(*tables(run), sep="\n", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(run, indent=1))
    return 0 if run["complete"] else 1


if __name__ == "__main__":
    sys.exit(main())
