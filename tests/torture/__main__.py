"""Mutated files, kills, and many clients, for as long as is asked; prints what was lost, doubled, or went wrong.

    python tests/torture [--minutes 60] [--seed N] [--files N] [--jobs N]

Half of the time goes to files, a quarter to kills of training, a quarter to the server: kills of it, and clients. Exit
code 1 where any of the last three figures is not 0. With the seed that is printed the same files are made again; when
processes are killed depends on the machine.
"""

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("OMP_NUM_THREADS", "1")


def torture_clients(place: Path, seconds: float, clients: int = 64) -> dict[str, int]:
    """Clients who wait, cancel, hang up and stop listening."""
    from kept import drafts_in, outcome
    from serving import model_folder, open_service, served
    from test_server_load import Client

    from plainsd.server.limits import Limits

    service = open_service([model_folder(place)], place / "clients", Limits(queue=4 * clients), batch=8)
    wrong, expected = 0, {}
    with served(service) as server:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            threads = [Client(server.url, number, 2) for number in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(600)
            for thread in threads:
                if thread.problem or thread.is_alive():
                    wrong += 1
                    print(f"  wrong: client {thread.number}: {thread.problem!r}", flush=True)
                expected |= thread.expected
            patience = time.monotonic() + 600
            while service.queue.jobs and time.monotonic() < patience:
                time.sleep(0.1)
        found = outcome(service.store, expected)
        wrong += found["failed"] + len(drafts_in(service.store.folder))
    return found | {"clients": clients, "wrong": wrong}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--files", type=int, default=10**9, help="at most so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that read files")
    asked = parser.parse_args()

    from files import torture_files
    from kept import summary
    from kills import torture_server, torture_training

    share = 60 * asked.minutes / 8
    print(f"seed {asked.seed}", flush=True)
    files = torture_files(asked.seed, 4 * share, asked.files, asked.jobs)
    with tempfile.TemporaryDirectory() as place:
        for name in ("training", "server", "clients"):
            (Path(place) / name).mkdir()
        training = torture_training(Path(place) / "training", asked.seed, 2 * share)
        server = torture_server(Path(place) / "server", asked.seed, share)
        clients = torture_clients(Path(place) / "clients", share)
    text, sound = summary(files, training, server, clients)
    print(text, flush=True)
    return 0 if sound else 1


if __name__ == "__main__":
    code = main()
    assert threading.main_thread() is threading.current_thread()
    sys.exit(code)
