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
    from serving import model_folder, open_service, served
    from test_server_load import Client

    from plainsd.server.jobs.job import CANCELLED, DONE, FAILED
    from plainsd.server.limits import Limits

    service = open_service([model_folder(place)], place / "clients", Limits(queue=4 * clients), batch=8)
    found = {"clients": clients, "jobs": 0, "lost": 0, "doubled": 0, "wrong": 0}
    with served(service) as server:
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            threads = [Client(server.url, number, 2) for number in range(clients)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(600)
            for thread in threads:
                if thread.problem or thread.is_alive():
                    found["wrong"] += 1
                    print(f"  wrong: client {thread.number}: {thread.problem!r}", flush=True)
            while service.queue.jobs:
                time.sleep(0.1)
            jobs = {job.id: job for job in service.store.jobs((DONE, FAILED, CANCELLED))}
            rows = [row.job for row in service.store.pictures(limit=10**6)]
            expected = {id: state for thread in threads for id, state in thread.expected.items()}
            found["jobs"] = len(jobs)
            found["lost"] += sum(id not in jobs or jobs[id].state != state for id, state in expected.items())
            found["lost"] += len({id for id, job in jobs.items() if job.state == DONE} - set(rows))
            found["doubled"] += len(rows) - len(set(rows))
            found["wrong"] += sum(job.state == FAILED for job in jobs.values())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6))
    parser.add_argument("--files", type=int, default=10**9, help="at most so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that read files")
    asked = parser.parse_args()

    from files import torture_files
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
    every = (training, server, clients)
    wrong = files.files["wrong"] + sum(one["wrong"] for one in every)
    lost, doubled = (sum(one.get(name, 0) for one in every) for name in ("lost", "doubled"))
    read, refused = files.files["read"], files.files["refused"]
    print(f"files mutated     {files.files.total()} ({read} read, {refused} refused in one line)")
    print(f"longest load      {files.seconds:.1f} s")
    print(f"most memory       {files.peak / 1e9:.2f} GB, of a process that reads files")
    print(
        f"kills             {training['kills']} of training in {training['runs']} runs, {server['kills']} of the server"
    )
    print(f"clients           {clients['clients']}")
    print(f"jobs              {server['jobs'] + clients['jobs']}")
    print(f"lost              {lost}")
    print(f"doubled           {doubled}")
    print(f"wrong exceptions  {wrong}")
    sys.stdout.flush()
    return int(bool(wrong or lost or doubled))


if __name__ == "__main__":
    code = main()
    assert threading.main_thread() is threading.current_thread()
    sys.exit(code)
