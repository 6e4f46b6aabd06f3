"""The database's versions: what makes it, and what brings an older one to the next."""

import sqlite3
from pathlib import Path

from plainsd.errors import UserError

MIGRATIONS = (  # from each version of the database to the next; the first makes it
    """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, client TEXT NOT NULL, api TEXT NOT NULL,
    model TEXT NOT NULL, loras TEXT NOT NULL, pictures TEXT NOT NULL, source TEXT, sheet TEXT, place TEXT NOT NULL,
    state TEXT NOT NULL, error TEXT, attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL,
    finished REAL
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
CREATE TABLE IF NOT EXISTS images (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, job TEXT NOT NULL, place INTEGER NOT NULL,
    file TEXT NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, settings TEXT NOT NULL, loras TEXT NOT NULL,
    search TEXT NOT NULL, created REAL NOT NULL, UNIQUE (job, place)
);
""",
    # attempts are now those that ended the server; `alone` is 1 while a job is drawn by itself
    """
UPDATE jobs SET attempts = 0;
ALTER TABLE jobs ADD COLUMN alone INTEGER NOT NULL DEFAULT 0;
""",
    # `deleted`: when a picture was moved to the trash
    """
ALTER TABLE images ADD COLUMN favourite INTEGER NOT NULL DEFAULT 0;
ALTER TABLE images ADD COLUMN deleted REAL;
""",
    # what was drawn and then deleted for good: an unfinished job does not draw it again
    """
CREATE TABLE removed (job TEXT NOT NULL, place INTEGER NOT NULL, PRIMARY KEY (job, place)) WITHOUT ROWID;
""",
    # whose a job and its pictures are, by the name of a token; empty: the admin's
    """
ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE images ADD COLUMN owner TEXT NOT NULL DEFAULT '';
CREATE INDEX images_by_owner ON images (owner, number);
""",
    # notes for the client, beyond the end of the job; the trash is found without a look at the whole history
    """
ALTER TABLE jobs ADD COLUMN notes TEXT NOT NULL DEFAULT '[]';
CREATE INDEX images_in_trash ON images (deleted) WHERE deleted NOT NULL;
""",
)


def migrate(db: sqlite3.Connection, folder: Path) -> None:
    """Brings an older database to this version, a step at a time, each whole or not at all. UserError for a newer
    one."""
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > len(MIGRATIONS):
        what = f"cannot use the data folder '{folder}': its database is of version {version}"
        remedy = "update it, or choose another place with --data"
        raise UserError(f"{what}, this plainsd knows up to {len(MIGRATIONS)}; {remedy}")
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        try:
            db.executescript(f"BEGIN; {script} PRAGMA user_version = {number}; COMMIT;")
        except sqlite3.Error:
            db.rollback()
            raise
