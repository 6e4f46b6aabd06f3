"""The data folder: everything that survives a crash.

    plainsd.sqlite     jobs, and the history of pictures
    pictures/          one folder a day, ordinary PNG files
    inputs/            input images of unfinished jobs, named by content
    thumbnails/        made on first request

A picture is in the history once its row is written, for the last one in the same transaction as the end of its job; its
file is written before. Ids and file names follow from the job, so a job that runs again writes the same files and rows;
what was deleted of it meanwhile is not drawn again.
"""

import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from io import BytesIO
from pathlib import Path

from PIL import Image

from plainsd.disk import DRAFT, written_whole
from plainsd.errors import UserError
from plainsd.pictures.images import PictureFile
from plainsd.server.jobs.job import DONE, QUEUED, RUNNING, Job
from plainsd.server.jobs.migrations import migrate
from plainsd.server.jobs.pictures import Picture, with_lora_tags
from plainsd.server.jobs.rows import job_of, picture_of

INPUT = re.compile(r"[0-9a-f]{32}\.png")  # names of `canvas.InitImages.as_source`
TRASHED = "SELECT 1 FROM images WHERE id = ? AND deleted IS NOT NULL AND owner = coalesce(?, owner)"
DRAWN = (  # the places of a job's pictures that were drawn, and whether they have been deleted since
    "SELECT place, deleted NOT NULL FROM images WHERE job = :job UNION SELECT place, 1 FROM removed WHERE job = :job"
)
REMOVED = "INSERT OR IGNORE INTO removed (job, place) SELECT job, place FROM images WHERE number = ?"
THUMBNAIL = 320  # pixels, the longer side


def thumbnail_bytes(picture: Path) -> bytes:
    """A picture of at most 320 pixels, as WebP."""
    buffer = BytesIO()
    with Image.open(picture) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
        image.save(buffer, format="WEBP", quality=85)
    return buffer.getvalue()


class Store:
    """All writes to the data folder. Its one exclusive connection also locks out a second server."""

    def __init__(self, folder: Path):
        self.folder, self.lock = folder.absolute(), threading.RLock()
        try:
            for name in ("pictures", "inputs", "thumbnails"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(self.folder / "plainsd.sqlite", check_same_thread=False, timeout=1)
            self.db.row_factory = sqlite3.Row
            self.db.text_factory = lambda text: text.decode("utf-8", "replace")
            self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.db.execute("PRAGMA journal_mode = WAL")
            migrate(self.db, self.folder)
            self.db.execute(
                "UPDATE jobs SET attempts = attempts + alone, alone = 0 WHERE alone"
            )  # of one that was killed
            self.db.commit()
            self.remove_drafts()
            self.remove_unused_thumbnails()
            with suppress(OSError):  # a file that the disk refuses to delete: it is tried again
                self.empty_trash()
        except (sqlite3.Error, OSError) as error:
            busy = "is locked" in str(error)
            why = "another server uses it; stop that one, or" if busy else f"{error};"
            raise UserError(f"cannot use the data folder '{folder}': {why} choose another place with --data") from None

    def remove_drafts(self) -> None:
        """Removes partly written files of a killed server; nothing else writes into this folder."""
        for name in ("pictures", "inputs", "thumbnails"):
            for parent, _, files in os.walk(self.folder / name):
                for file in files:
                    if DRAFT.fullmatch(file):
                        Path(parent, file).unlink(missing_ok=True)

    def remove_unused_thumbnails(self) -> None:
        """Removes those of pictures that are not in the history any more."""
        known = {f"{id}.webp" for (id,) in self.db.execute("SELECT id FROM images")}
        for path in (self.folder / "thumbnails").glob("*.webp"):
            if path.name not in known:
                with suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        with self.lock:
            with suppress(sqlite3.Error, OSError):  # the next start tries again
                self.empty_trash()
            self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        with self.lock, self.db:
            yield self.db

    # --- jobs --------------------------------------------------------------------------------------------------------

    def add(self, job: Job) -> None:
        values = {
            "id": job.id, "client": job.client, "api": job.api, "model": job.model, "loras": json.dumps(job.loras),
            "pictures": json.dumps([asdict(one) for one in job.settings]), "place": job.path_prefix, "state": job.state,
            "source": json.dumps(asdict(job.source)) if job.source else None,
            "sheet": json.dumps(asdict(job.sheet)) if job.sheet else None, "created": job.created,
            "owner": job.owner, "notes": json.dumps(job.notes),
        }  # fmt: skip
        names = ", ".join(values)
        with self.transaction() as db:
            for name, content in job.inputs.items():
                with written_whole(self.folder / "inputs" / name) as temporary:
                    temporary.write_bytes(content)
            job.inputs = {}
            placeholders = ", ".join(f":{name}" for name in values)
            job.number = db.execute(f"INSERT INTO jobs ({names}) VALUES ({placeholders})", values).lastrowid or 0

    def mark_started(self, job: Job, when: float) -> None:
        with self.transaction() as db:
            db.execute("UPDATE jobs SET state = ?, started = ? WHERE id = ?", (RUNNING, when, job.id))

    def mark_alone(self, job: Job, is_alone: bool) -> None:
        """Records whether it is processed alone: if the server crashes meanwhile, this job caused it."""
        with self.transaction() as db:
            db.execute("UPDATE jobs SET alone = ? WHERE id = ?", (is_alone, job.id))

    def count_attempt(self, job: Job) -> None:
        """Of a job that ended the worker which processed it alone."""
        with self.transaction() as db:
            db.execute("UPDATE jobs SET attempts = attempts + 1 WHERE id = ?", (job.id,))

    def mark_ended(self, job: Job, state: str, error: str | None, finished: float) -> None:
        """Stores its final state, unless it is DONE, which `add_picture` has stored. Deletes its input images unless
        another job needs them."""
        if state != DONE:
            with self.transaction() as db:
                db.execute(
                    "UPDATE jobs SET state = ?, error = ?, finished = ?, alone = 0 WHERE number = ?",
                    (state, error, finished, job.number),
                )
        if job.source:
            self.remove_unused_inputs(job.source.files())

    def requeue_running(self) -> None:
        """On a regular shutdown: running jobs are queued again, without counting an attempt."""
        with self.transaction() as db:
            db.execute("UPDATE jobs SET state = ?, alone = 0 WHERE state = ?", (QUEUED, RUNNING))

    def job(self, id: str) -> Job | None:
        with self.lock:
            row = self.db.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        return self._job(row) if row else None

    def jobs(self, states: tuple[str, ...], limit: int = -1, owner: str | None = None) -> list[Job]:
        """Oldest first; with a limit, the newest of them. None: everybody's."""
        placeholders = ", ".join("?" * len(states))
        with self.lock:
            rows = self.db.execute(
                f"SELECT * FROM jobs WHERE state IN ({placeholders}) AND owner = coalesce(?, owner) "
                "ORDER BY number DESC LIMIT ?",
                (*states, owner, limit),
            ).fetchall()
        return [self._job(row) for row in reversed(rows)]

    def unfinished(self) -> list[Job]:
        """Jobs left queued or running by a crash or a shutdown. Also deletes unused input images."""
        jobs = self.jobs((QUEUED, RUNNING))
        names = {path.name for path in (self.folder / "inputs").iterdir()}
        self.remove_unused_inputs({name for name in names if INPUT.fullmatch(name)})
        return jobs

    def _job(self, row: sqlite3.Row) -> Job:
        with self.lock:
            return job_of(row, self.db.execute(DRAWN, {"job": row["id"]}).fetchall())

    def counts(self) -> dict[str, int]:
        with self.lock:
            return dict(self.db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())

    # --- input images -------------------------------------------------------------------------------------------

    def input(self, name: str) -> Image.Image:
        with Image.open(self.folder / "inputs" / name) as image:
            image.load()
            return image

    def input_bytes(self, name: str) -> bytes:
        return (self.folder / "inputs" / name).read_bytes()

    def remove_unused_inputs(self, names: set[str]) -> None:
        """Deletes those of these inputs that no unfinished job uses. What the disk refuses to delete is left to the
        next start."""
        with self.lock:
            rows = self.db.execute(
                "SELECT source FROM jobs WHERE source NOT NULL AND state IN (?, ?)", (QUEUED, RUNNING)
            )
            needed = {name for (source,) in rows for name in INPUT.findall(str(source))}
            for name in names - needed:
                with suppress(OSError):
                    (self.folder / "inputs" / name).unlink()

    # --- pictures ----------------------------------------------------------------------------------------------------

    def write(self, job: Job, index: int, picture: Image.Image | PictureFile) -> str:
        """Writes the PNG file of one picture. Returns its path below the data folder."""
        file = f"pictures/{job.path_prefix}-{index}.png"
        if isinstance(picture, Image.Image):
            picture = PictureFile.of(picture, ".png", with_lora_tags(job.settings_of(index), job.loras))
        with written_whole(self.folder / file) as draft:
            draft.write_bytes(picture.content)
        return file

    def add_picture(self, job: Job, index: int, file: str, size: tuple[int, int]) -> None:
        """Stores the row of a picture whose file is written; with the last one the job is done."""
        settings = job.settings_of(index)
        search = f"{settings.prompt}\n{settings.negative}\n{job.model}\nseed {settings.seed}".casefold()
        row = (job.picture_id(index), job.id, index, file, *size, json.dumps(asdict(settings)), json.dumps(job.loras),
               search, time.time(), job.owner)  # fmt: skip
        with self.transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO images "  # of one in the trash that is drawn again after a restart
                "(id, job, place, file, width, height, settings, loras, search, created, owner) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            if job.done | {index} == job.indices:
                ended = (DONE, time.time(), job.id)
                db.execute("UPDATE jobs SET state = ?, finished = ?, alone = 0 WHERE id = ?", ended)

    def picture(self, id: str, *, trash: bool = False, owner: str | None = None) -> Picture | None:
        """Of the history, if it is this owner's (None: anybody's); with `trash`, also one that can be restored."""
        with self.lock:
            row = self.db.execute(
                "SELECT * FROM images WHERE id = ? AND (? OR deleted IS NULL) AND owner = coalesce(?, owner)",
                (id, trash, owner),
            ).fetchone()
        return picture_of(row) if row else None

    def pictures(
        self,
        search: str = "",
        before: int | None = None,
        limit: int = 50,
        job: str | None = None,
        favourites: bool = False,
        owner: str | None = None,
    ) -> list[Picture]:
        """Newest first. Each word of `search` must occur in prompt, negative prompt, model or seed."""
        where = ["number < ?", "deleted IS NULL"]
        values: list[int | str] = [before if before is not None else 2**62]
        for word in search.casefold().split():
            where.append("instr(search, ?)")
            values.append(word)
        if job is not None:
            where.append("job = ?")
            values.append(job)
        if owner is not None:
            where.append("owner = ?")
            values.append(owner)
        if favourites:
            where.append("favourite")
        with self.lock:
            rows = self.db.execute(
                f"SELECT * FROM images WHERE {' AND '.join(where)} ORDER BY number DESC LIMIT ?", (*values, limit)
            ).fetchall()
        return [picture_of(row) for row in rows]

    def path(self, picture: Picture) -> Path:
        """Its file, always below `pictures`, whatever the database says. That folder or a day in it may be a link."""
        path = Path(picture.file)
        if path.is_absolute() or path.parts[:1] != ("pictures",) or ".." in path.parts or "\0" in picture.file:
            raise FileNotFoundError(path)
        return self.folder / path

    def thumbnail(self, picture: Picture) -> Path:
        """A WebP of at most 320 pixels; the picture itself where it is no larger."""
        if max(picture.width, picture.height) <= THUMBNAIL:
            return self.path(picture)
        path = self.folder / "thumbnails" / f"{picture.id}.webp"
        if not path.exists():
            content = thumbnail_bytes(self.path(picture))
            with self.lock:
                if self.picture(picture.id, trash=True) is None:  # deleted for good meanwhile
                    raise FileNotFoundError(path)
                with written_whole(path) as temporary:
                    temporary.write_bytes(content)
        return path

    def mark(self, pictures: list[Picture], favourite: bool) -> None:
        """As favourites, or no longer: all of them or, where that fails, none."""
        with self.transaction() as db:
            rows = [(favourite, picture.id) for picture in pictures]
            db.executemany("UPDATE images SET favourite = ? WHERE id = ?", rows)

    def trash(self, pictures: list[Picture]) -> None:
        """Out of the history, all of them or none; `restore` brings them back until `empty_trash` removes them."""
        with self.transaction() as db:
            rows = [(time.time(), picture.id) for picture in pictures]
            db.executemany("UPDATE images SET deleted = ? WHERE id = ?", rows)

    def restore(self, ids: list[str], owner: str | None = None) -> list[str]:
        """Back into the history; the ids of those that were in the trash of this owner (None: of anybody)."""
        with self.transaction() as db:
            found = [id for id in ids if db.execute(TRASHED, (id, owner)).fetchone()]
            db.executemany("UPDATE images SET deleted = NULL WHERE id = ?", [(id,) for id in found])
        return found

    def empty_trash(self, seconds: float = 0.0) -> None:
        """Deletes what has been in the trash for so long."""
        with self.lock:
            rows = self.db.execute("SELECT * FROM images WHERE deleted <= ?", (time.time() - seconds,)).fetchall()
            if rows:
                self.delete([picture_of(row) for row in rows])

    def delete(self, pictures: list[Picture]) -> None:
        """For good: their files, then the rows of those whose files are gone. OSError, afterwards, where the disk
        refuses one: its row stays."""
        gone, refused = [], None
        for picture in pictures:
            try:
                with suppress(FileNotFoundError):  # of a row that does not name a file of ours
                    self.path(picture).unlink()
                (self.folder / "thumbnails" / f"{picture.id}.webp").unlink(missing_ok=True)
                gone.append((picture.number,))
            except OSError as error:
                refused = error
        with self.transaction() as db:
            db.executemany(REMOVED, gone)
            db.executemany("DELETE FROM images WHERE number = ?", gone)
        if refused is not None:
            raise refused
