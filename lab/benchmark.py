"""What each store costs: our settings against Celery's own, and each safety by itself.

python -m lab.benchmark          measures for 4 to 5 minutes on two quiet cores, and prints tables
python -m lab.benchmark --json   the same, and prints the raw figures to standard output, the tables to standard error
python -m lab.benchmark --quick  a tenth of the sizes, one round: to see whether it runs
python -m lab.benchmark --show docs/benchmark.json   the tables of such a file, measuring nothing

Everything that is compared runs in turn, round after round, on the same servers: take the ratios, not the figures.
Only what is measured runs: each kind of settings starts its worker and its client anew in each round.
The servers are those of RABBITMQ_URL and REDIS_URL; what it makes there it removes at the end.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import redis

from lab.benchmark_tasks import DEFAULT, OURS, PRICES, kinds
from lab.servers import STORES, Worker, as_admin, markdown, own_servers, run, wait_until

FULL: dict[str, Any] = {  # how often, and how much
    "rounds": 4,
    "trips": 100,
    "tasks": 400,
    "calls": 2_000,
    "group": 100,
    "large": 11,
    "unread": [1_000, 10_000],
}
QUICK = {"rounds": 1, "trips": 10, "tasks": 50, "calls": 200, "group": 10, "large": 1, "unread": [10, 50]}
TIMEOUT = 1_200.0  # seconds for what takes a client half a minute at most
STARTED = time.monotonic()


def measure(sizes: dict[str, Any]) -> dict[str, Any]:
    """Measure everything. Raises OSError, RuntimeError, redis.RedisError or subprocess.TimeoutExpired."""
    with own_servers("redis", "benchmark") as own:
        versions = own.versions()
    # For each store, kind of settings and quantity a value for each round.
    figures: dict[str, Any] = {store: {kind: {} for kind in kinds(store)} for store in STORES}
    turn = [(store, kind) for store in STORES for kind in kinds(store)]
    for number in range(sizes["rounds"]):
        for store, kind in turn[:: -1 if number % 2 else 1]:
            say(f"round {number + 1} of {sizes['rounds']}: {store}, {kind}")
            for quantity, value in measure_once("speed", store, kind, sizes).items():
                figures[store][kind].setdefault(quantity, []).append(value)
    memory = {}
    for store in STORES:
        say(f"memory: {store}")
        memory[store] = measure_once("memory", store, OURS, sizes)
    return {**conditions(versions), "sizes": sizes, "figures": figures, "memory": memory}


def say(line: str) -> None:
    """Show progress."""
    print(f"{time.monotonic() - STARTED:5.0f} s  {line}", file=sys.stderr, flush=True)


def measure_once(what: str, store: str, kind: str, sizes: dict[str, Any]) -> dict[str, float]:
    """Let a new client measure, with a new worker, on a virtual host and a Redis database of their own."""
    with ExitStack() as cleanup:
        own = cleanup.enter_context(own_servers(store, "benchmark"))
        log = Path(cleanup.enter_context(TemporaryDirectory())) / "worker.log"
        # The administrator, because Celery's defaults know no prefix, and other keys are closed to the user.
        env = {**own.env, "REDIS_URL": as_admin(own.redis_url), "REDIS_PASSWORD": "", "RABBITMQ_PASSWORD": ""}
        env["BENCHMARK_SETTINGS"] = kind
        started = time.monotonic()
        worker = Worker(log, env=env, app="lab.benchmark_tasks", lean=kind != DEFAULT)
        cleanup.push(worker)
        wait_until(lambda: worker.says(" ready.") or worker.process.poll() is not None, "worker ready", interval=0.01)
        figures = {"worker_ready_s": time.monotonic() - started}
        worker.wait_ready()  # raises if it has ended
        arguments = (what, str(time.monotonic()), str(worker.process.pid), json.dumps(sizes))
        client = run(sys.executable, "-m", "lab.benchmark_client", *arguments, env=env, timeout=TIMEOUT)
        if client.returncode:
            reason = client.stderr.strip().rpartition("\n")[2] or f"exit code {client.returncode}"
            raise RuntimeError(f"{store}, {kind}: {reason}")
        figures |= json.loads(client.stdout)
        return {quantity: round(value, 4) for quantity, value in figures.items()}


def conditions(versions: dict[str, str]) -> dict[str, Any]:
    """Return when, where and with what this was measured."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
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
            **versions,
            "kombu": version("kombu"),
            "amqp": version("amqp"),
            "redis-py": redis.__version__,
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
    "chunks_per_s": ("{calls:,} calls, ten in a task: queued and fetched", "/s"),
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


def digits(value: float) -> str:
    """Return three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread(values: list[float], unit: str) -> str:
    """Return the median, and the smallest and the largest value."""
    separator = "" if unit == "/s" else " "
    return f"{digits(statistics.median(values))}{separator}{unit} ({digits(min(values))} to {digits(max(values))})"


def multiples(report: dict[str, Any], store: str, kind: str, quantity: str = "trips_per_s") -> list[float]:
    """Return a figure of other settings as a multiple of ours, for each round; nothing if the store has no such."""
    figures = report["figures"][store]
    if quantity not in figures.get(kind, {}):
        return []
    return [other / our for other, our in zip(figures[kind][quantity], figures[OURS][quantity], strict=True)]


def times(multiples: list[float]) -> str:
    """Return the median ratio, and the smallest and the largest."""
    if not multiples:
        return ""
    return f"{statistics.median(multiples):.2f} ({min(multiples):.2f} to {max(multiples):.2f})"


def summary_table(report: dict[str, Any]) -> list[str]:
    """Both stores side by side, ratios first."""
    rows = [["with our settings", *(f"{store}{of}" for store in STORES for of in (": of the defaults", ""))]]
    for quantity, (name, unit) in QUANTITIES.items():
        cells = []
        for store in STORES:
            ours = report["figures"][store][OURS].get(quantity)
            of_defaults = [1 / multiple for multiple in multiples(report, store, DEFAULT, quantity)]
            cells += [times(of_defaults), spread(ours, unit) if ours else ""]
        rows.append([name.format(**report["sizes"]), *cells])
    return markdown(rows)


def price(report: dict[str, Any], kind: str) -> str:
    """Return what celeryconfig.py says above a setting: how many of the tasks a second it takes.

    It is a price, or a gain, if all rounds say so and their median is 5 % or more.
    """
    parts = []
    for store in STORES:
        if found := multiples(report, store, kind):
            percent = round((1 - 1 / statistics.median(found)) * 100)
            if percent >= 5 and min(found) > 1:
                parts.append(f"{store} {percent} %")
            elif percent <= -5 and max(found) < 1:
                parts.append(f"{store} a gain of {-percent} %")
            else:
                parts.append(f"{store} none")
    return f"Price, tasks a second: {', '.join(parts)}."


def price_table(report: dict[str, Any]) -> list[str]:
    """Each safety by itself, and at last all of Celery's defaults."""
    rows = [["our settings, but", *(f"{store}: {what}" for store in STORES for what in ("tasks/s", "one at a time"))]]
    for kind in (*PRICES, DEFAULT):
        cells = [times(multiples(report, store, kind, what)) for store in STORES for what in ("trips_per_s", "p50_ms")]
        rows.append([label(kind), *cells])
    return markdown(rows)


def label(kind: str) -> str:
    """Return a kind with the name of the first setting that it changes, and whether there are more."""
    if kind == DEFAULT:
        return "all of Celery's defaults"
    first, *more = PRICES[kind]
    return f"{kind} (`{first}`{', ...' if more else ''})"


def memory_table(report: dict[str, Any]) -> list[str]:
    """Unread results, and what they take."""
    columns = {"store_mb": ("in the store", "{:.2f} MB"), "client_mb": ("in the client", "{:.0f} MB")}
    columns["fetch_ms"] = ("to fetch each", "{:.2f} ms")
    rows = [["unread results", *(f"{store}: {head}" for store in STORES for head, _ in columns.values())]]
    for count in report["sizes"]["unread"]:
        cells = [
            form.format(report["memory"][store][f"unread_{count}_{quantity}"])
            for store in STORES
            for quantity, (_, form) in columns.items()
        ]
        rows.append([f"{count:,}", *cells])
    return markdown(rows)


def conditions_line(report: dict[str, Any]) -> str:
    """Say when, where and with what."""
    machine = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"Measured on {report['date'][:10]} in {report['seconds']} s: {machine['processors']} processors "
        f"({machine['model']}), {machine['memory_gb']} GB, {machine['system']}; {versions}."
    )


def page_tables(report: dict[str, Any]) -> list[str]:
    """Return what is shown of a report, here and in docs/what-it-costs.md."""
    return [conditions_line(report), "", *price_table(report), "", *summary_table(report), "", *memory_table(report)]


def main() -> int:
    """Measure or show, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print the raw figures to standard output")
    parser.add_argument("--quick", action="store_true", help="see whether it runs")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the tables of such a file")
    options = parser.parse_args()
    if options.show:
        print(*page_tables(json.loads(options.show.read_text())), sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmark: stopped"))  # clean up then, too
    try:
        report = measure(QUICK if options.quick else FULL)
    except (OSError, RuntimeError, redis.RedisError, subprocess.TimeoutExpired) as exc:
        print(f"benchmark: {exc}. Check RABBITMQ_URL, RABBITMQ_API and REDIS_URL.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(*page_tables(report), sep="\n", file=sys.stderr if options.json else sys.stdout)
    if options.json:
        print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
