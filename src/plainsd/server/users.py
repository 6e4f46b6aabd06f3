"""Who may use the server: its admin, and people with tokens of their own, each of whom sees only what is theirs."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from plainsd.errors import UserError
from plainsd.json_reader import BadJSON, parsed_json

log = logging.getLogger("plainsd.server")
MIN_TOKEN_LENGTH = 12
USER_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")  # never an address, by which clients without a name are known
LONGEST_TOKEN_FILE = 1_000_000  # characters
LOOK_SECONDS = 1.0  # between looks at whether the file has changed


class User(NamedTuple):
    """Who sends a request. Without a name: the admin, who sees everything."""

    name: str | None = None

    @property
    def owner(self) -> str:
        """Of the jobs and pictures that this user makes."""
        return self.name or ""

    @property
    def scope(self) -> str | None:
        """The owner whose jobs and pictures this user sees; None for all."""
        return self.name

    def sees(self, owner: str) -> bool:
        return self.scope is None or self.scope == owner


class KnownToken(NamedTuple):
    """A token, as it is compared."""

    digest: bytes
    session: str
    user: User


class Access:
    """The admin's token, and the named ones of a file, which is read again when it changes.

    A file that cannot be read then is named once in the log, and the tokens before it stay. Every comparison takes the
    same time, whatever is given and whichever token it equals.
    """

    def __init__(self, token: str | None, file: Path | None = None, on_names: Callable[[int], None] = lambda _: None):
        self.token, self.file, self.on_names = token, file, on_names
        self.key = secrets.token_bytes(32)
        self.entries: list[KnownToken] = []
        self.stamp: tuple | None = stamp_of(file)
        self.looked = time.monotonic()
        self.take(read_tokens(file) if file else [])

    @property
    def required(self) -> bool:
        return self.token is not None or self.file is not None

    def take(self, named: list[tuple[str, str]]) -> None:
        """The tokens that are accepted from now on: the admin's and these pairs of name and token."""
        admin = [("", self.token)] if self.token is not None else []
        if any(token == self.token for _, token in named):
            raise UserError(f"a token in '{self.file}' is the admin's too; give each one of its own", field="tokens")
        self.entries = [
            KnownToken(self.digest(token), session_of(token), User(name or None)) for name, token in (*admin, *named)
        ]
        self.on_names(len({name for name, _ in named}))

    def refresh(self) -> None:
        """Reads the file again if it has changed."""
        if self.file is None or time.monotonic() - self.looked < LOOK_SECONDS:
            return
        self.looked, stamp = time.monotonic(), stamp_of(self.file)
        if stamp == self.stamp:
            return
        self.stamp = stamp
        try:
            self.take(read_tokens(self.file))
            log.info("the file of tokens was read again")
        except UserError as error:
            log.error("%s; the tokens before are still in use", error)

    def digest(self, token: str) -> bytes:
        return hmac.digest(self.key, token.encode(), "sha256")

    def user_of_token(self, given: str) -> User | None:
        digest = self.digest(given)
        return self.found(hmac.compare_digest(entry.digest, digest) for entry in self.entries)

    def user_of_session(self, given: str) -> User | None:
        session = given.encode()
        return self.found(hmac.compare_digest(entry.session.encode(), session) for entry in self.entries)

    def found(self, equal: Iterator[bool]) -> User | None:
        """The user of the entry that is equal; all of them are compared."""
        users = [entry.user for entry, is_equal in zip(self.entries, list(equal), strict=True) if is_equal]
        return users[0] if users else None


def session_of(token: str) -> str:
    """The cookie's value: proves knowledge of the token without revealing it."""
    return hmac.new(token.encode(), b"plainsd session", hashlib.sha256).hexdigest()


def stamp_of(file: Path | None) -> tuple | None:
    """Differs once the file is another; None if there is none."""
    try:
        found = file.stat() if file else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


# --- the file --------------------------------------------------------------------------------------------------------


def read_tokens(file: Path) -> list[tuple[str, str]]:
    """Pairs of name and token: from lines `name token`, or a JSON object of names and their token, or list of tokens.
    A name may have several tokens. UserError that shows no token."""
    try:
        text = file.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"cannot read the tokens in '{file}' ({why}); choose another file", field="tokens") from None
    if len(text) > LONGEST_TOKEN_FILE:
        raise UserError(f"'{file}' has {len(text)} characters; at most {LONGEST_TOKEN_FILE} are read", field="tokens")
    pairs = list(json_pairs(text, file) if text.lstrip().startswith("{") else line_pairs(text, file))
    seen: set[str] = set()
    for where, name, token in pairs:
        if not USER_NAME.fullmatch(name):
            rule = "start with a letter, and go on with letters, digits, '.', '_' and '-', 64 at most"
            raise UserError(f"{where}: name {name[:80]!r} is not allowed; {rule}", field="tokens")
        if not is_token(token):
            raise UserError(f"{where}: the token of {name!r} {TOKEN_RULE}", field="tokens")
        if token in seen:
            raise UserError(f"{where}: the token of {name!r} is there twice; give each its own", field="tokens")
        seen.add(token)
    return [(name, token) for _, name, token in pairs]


TOKEN_RULE = f"must be {MIN_TOKEN_LENGTH} or more ASCII characters without spaces; choose another"


def is_token(text: str) -> bool:
    return len(text) >= MIN_TOKEN_LENGTH and text.isascii() and text.isprintable() and " " not in text


def line_pairs(text: str, file: Path) -> Iterator[tuple[str, str, str]]:
    """(where, name, token) of each line but empty ones and comments."""
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2:
            what = f"'{file}', line {number} has {len(words)} words"
            raise UserError(f"{what}; write a name and its token, with a space between them", field="tokens")
        name, token = words
        yield f"'{file}', line {number}", name, token


def json_pairs(text: str, file: Path) -> Iterator[tuple[str, str, str]]:
    try:
        content = parsed_json(text)
    except BadJSON as error:
        raise UserError(f"cannot read the tokens in '{file}' ({error}); mend its JSON", field="tokens") from None
    for name, given in content.items():
        tokens = given if isinstance(given, list) else [given]
        if not tokens or not all(isinstance(token, str) for token in tokens):
            rule = "give a token in quotes, or a list of them"
            raise UserError(f"'{file}': what {name[:80]!r} has is no token; {rule}", field="tokens")
        yield from ((f"'{file}'", name, token) for token in tokens)
