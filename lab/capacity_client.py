"""Two clients and two workers, and how many tasks a second they get done, while lab/capacity.py limits a server.

python -m lab.capacity_client redis    results in Redis; prints a number for each of three rounds
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from lab.benchmark import Subject, running
from lab.benchmark_client import clocked
from lab.benchmark_tasks import OURS
from lab.servers import own_servers

CLIENTS = WORKERS = 2
TASKS = 500  # for each client and round


def main(store: str) -> None:
    """Queue and fetch from all clients at the same time."""
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(TemporaryDirectory()))
        own = cleanup.enter_context(own_servers(store, "capacity"))
        clients = [Subject(OURS, own, folder, {}) for _ in range(CLIENTS)]
        cleanup.enter_context(running([clients[0].worker() for _ in range(WORKERS)]))
        pool = cleanup.enter_context(ThreadPoolExecutor(CLIENTS))

        def one_round(tasks: int) -> None:
            list(pool.map(lambda client: client.ask("all_at_once", tasks), clients))

        for client in clients:
            client.start(cleanup)
        one_round(20)  # connections, declarations, imports
        for _ in range(3):
            print(CLIENTS * TASKS / clocked(lambda: one_round(TASKS)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
