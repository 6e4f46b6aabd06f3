"""One kind of error for everything a user can put right: one line that says what, which value, and what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Wrong input. The message is one complete line for the user; the command line prints it and exits with code 2."""


def unknown(what: str, value: object, choices: Iterable[str]) -> UserError:
    """`unknown sampler 'eular'; did you mean 'euler'? choose from ...`"""
    names = list(choices)
    near = get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return UserError(f"unknown {what} {value!r}{hint} choose from {', '.join(names)}")
