"""What a server's data folder holds in the end, against what was asked of it; and the figures that are printed."""

from collections import Counter
from pathlib import Path

from files import Figures

from plainsd.server.jobs.job import ACTIVE, CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job
from plainsd.server.jobs.queue import ATTEMPTS
from plainsd.server.jobs.store import Store


def is_given_up(job: Job) -> bool:
    """Whether it failed since the server was killed so often while it was drawn alone."""
    return job.state == FAILED and job.attempts >= ATTEMPTS


def drafts_in(folder: Path) -> list[str]:
    """Files that were not written to their end; the next server that opens the folder removes them."""
    return sorted(path.name for path in folder.rglob(".*.part"))


def outcome(store: Store, asked: dict[str, str]) -> dict[str, int]:
    """Counts over a whole folder; what is not as it should be is printed by its name. `asked`: ids of jobs, and the
    state in which each was to end.

    lost      jobs that are not there, have not ended, or ended in another state, unless they were given up; pictures
              of jobs that are done without their row or file; files of other rows
    doubled   rows or files of the same picture beyond the first; files of no picture that anybody asked for
    failed    jobs that failed, but were not given up
    """
    jobs = {job.id: job for job in store.jobs((QUEUED, RUNNING, DONE, FAILED, CANCELLED))}
    rows = store.pictures(limit=10**6)
    places = Counter((row.job, row.index) for row in rows)
    whole = {(row.job, row.index) for row in rows if store.path(row).is_file()}
    files = Counter(picture_of(path) for path in (store.folder / "pictures").glob("*/*.png"))
    ended = {id: job for id, job in jobs.items() if job.state not in ACTIVE}
    given_up = {id for id, job in ended.items() if is_given_up(job)}
    wanted = dict.fromkeys(set(jobs) - set(ended), DONE) | asked
    lost = [
        f"job {id}, {jobs[id].state if id in jobs else 'not there'}, which was to be {state}"
        for id, state in wanted.items()
        if id not in given_up and (id not in ended or ended[id].state != state)
    ]
    due = {(id, index) for id, job in ended.items() if job.state == DONE for index in job.indices}
    lost += [f"picture {index} of job {id}" for id, index in sorted((due | set(places)) - whole)]
    kept = {place for place in files if place in due or place in places or place[0] in given_up}
    doubled = [f"file of picture {index} of job {id}" for id, index in (files - Counter(kept)).elements()]
    doubled += [f"row of picture {index} of job {id}" for id, index in (places - Counter(set(places))).elements()]
    failed = [f"job {id}: {job.error}" for id, job in ended.items() if job.state == FAILED and id not in given_up]
    for what, names in (("lost", lost), ("doubled", doubled), ("failed", failed)):
        for name in names:
            print(f"  {what}: {name}", flush=True)
    return {"jobs": len(jobs), "lost": len(lost), "doubled": len(doubled), "given up": len(given_up),
            "failed": len(failed)}  # fmt: skip


def picture_of(path: Path) -> tuple[str, int]:
    """The job and the index in the name of a picture's file."""
    name, _, index = path.stem.rpartition("-")
    return name.rpartition("-")[2], int(index)


def summary(
    files: Figures, training: dict[str, int], server: dict[str, int], clients: dict[str, int]
) -> tuple[str, bool]:
    """The figures as text, and whether nothing was lost, doubled or wrong."""
    every = (training, server, clients)
    wrong = files.files["wrong"] + sum(one["wrong"] for one in every)
    lost, doubled, given_up = (sum(one.get(name, 0) for one in every) for name in ("lost", "doubled", "given up"))
    read, refused = files.files["read"], files.files["refused"]
    kills = f"{training['kills']} of training in {training['runs']} runs, {server['kills']} of the server"
    jobs = f"{server['jobs'] + clients['jobs']}, of which {given_up} were given up after {ATTEMPTS} kills"
    lines = {
        "files mutated": f"{files.files.total()} ({read} read, {refused} refused in one line)",
        "longest load": f"{files.seconds:.1f} s",
        "most memory": f"{files.peak / 1e9:.2f} GB, of a process that reads files",
        "kills": kills,
        "clients": clients["clients"],
        "jobs": jobs,
        "lost": lost,
        "doubled": doubled,
        "wrong exceptions": wrong,
    }
    return "\n".join(f"{name:<17} {value}" for name, value in lines.items()), not (wrong or lost or doubled)
